"""Residual blocks added to a trained tiny generator: identities at first, trained like all others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onestepsr.core.config import from_mapping
from onestepsr.core.errors import UserError
from onestepsr.methods.d3sr import D3SRConfig, build
from onestepsr.models.architectures import describe, random_backbone
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.tiny.generator import Depth, TinyGeneratorConfig, deepened, tiny_generator
from onestepsr.models.tiny.networks import ResidualBlock, TinyConfig, TinyUNet
from onestepsr.weights.files import save_model

SIZES = TinyConfig(
    widths=(8, 8),
    down_blocks=(1, 1),
    up_blocks=(1, 2),
    decoder_width=8,
    encoder_width=8,
    refine_width=8,
    prompt_width=16,
    time_width=16,
)
DEPTH = Depth(down_blocks=(1, 3), up_blocks=(2, 2), decoder_blocks=2, refine_blocks=1)
ADDED = 2 + 1 + 2 + 1


@pytest.fixture
def shallow() -> OneStepLatentGenerator:
    """A generator whose every weight is far from where it starts."""
    torch.manual_seed(0)
    generator = tiny_generator(TinyGeneratorConfig(model=SIZES)).eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return generator


def blocks_of(generator: torch.nn.Module) -> int:
    return sum(isinstance(module, ResidualBlock) for module in generator.modules())


def test_a_deeper_generator_makes_the_same_images(shallow: OneStepLatentGenerator) -> None:
    deep = deepened(shallow, DEPTH)
    lr = torch.rand(2, 3, 12, 8)
    with torch.no_grad():
        assert torch.equal(deep(lr), shallow(lr))
    assert blocks_of(deep) == blocks_of(shallow) + ADDED
    _, config = describe(deep)
    assert {
        name: config["model"][name] for name in ("down_blocks", "up_blocks", "decoder_blocks", "refine_blocks")
    } == {
        "down_blocks": [1, 3],
        "up_blocks": [2, 2],
        "decoder_blocks": 2,
        "refine_blocks": 1,
    }


def test_new_blocks_learn(shallow: OneStepLatentGenerator) -> None:
    deep = deepened(shallow, DEPTH)
    known = shallow.state_dict()
    deep(torch.rand(1, 3, 12, 8)).square().mean().backward()
    new = {name: p for name, p in deep.named_parameters() if name not in known and name.endswith("conv2.weight")}
    assert len(new) == ADDED
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in new.values())


def test_parts_left_out_stay_as_they_are(shallow: OneStepLatentGenerator) -> None:
    deep = deepened(shallow, Depth(decoder_blocks=1))
    assert isinstance(deep.unet, TinyUNet)
    assert deep.unet.config.down_blocks == SIZES.down_blocks
    assert blocks_of(deep) == blocks_of(shallow) + 1


@pytest.mark.parametrize(
    "depth",
    [Depth(down_blocks=(1, 0)), Depth(up_blocks=(1, 1)), Depth(up_blocks=(1, 2, 1)), Depth(decoder_blocks=-1)],
)
def test_blocks_are_never_taken_away(shallow: OneStepLatentGenerator, depth: Depth) -> None:
    with pytest.raises(UserError, match="which the model has already"):
        deepened(shallow, depth)


def test_other_backbones_are_refused() -> None:
    with torch.device("meta"):
        foreign = random_backbone("random:sd21-base")
    with pytest.raises(UserError, match="tiny backbone"):
        deepened(foreign, DEPTH)


def test_d3sr_trains_a_deeper_generator_than_its_backbone(shallow: OneStepLatentGenerator, tmp_path: Path) -> None:
    architecture, config = describe(shallow)
    save_model(
        tmp_path / "shallow.safetensors", architecture=architecture, config=config, state_dict=shallow.state_dict()
    )
    values = {
        "backbone": str(tmp_path / "shallow.safetensors"),
        "tuning": "full",
        "adversarial_weight": 0.0,
        "extras": {"deepen": {"down_blocks": [1, 3]}},
    }
    method = build(from_mapping(D3SRConfig, values, "recipe"))
    assert blocks_of(method.networks["generator"]) == blocks_of(shallow) + 2

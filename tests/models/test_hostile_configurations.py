"""Configurations of strangers: a network is not built beyond what its file holds, and every refusal is one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from onestepsr.core.config import merged, to_mapping
from onestepsr.core.errors import UserError
from onestepsr.models.architectures import build_network, describe
from onestepsr.models.loading import load_network
from onestepsr.models.resshift.config import RANDOM_RESIDUAL
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyConfig

SMALL = TinyConfig(encoder_width=8, decoder_width=8, widths=(8,), down_blocks=(1,), up_blocks=(1,), time_width=8)
HUGE = 10**8


def write(path: Path, architecture: str, config: Any, tensors: dict[str, torch.Tensor]) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    save_file(tensors, path, {"format": "onestepsr", "architecture": architecture, "config": text})
    return path


def refused(path: Path, match: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=match) as error:
        load_network(path)
    assert time.monotonic() - begun < 5
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": {"down_blocks": [HUGE]}}, "more than .* weights"),
        ({"model": {"decoder_blocks": HUGE}}, "more than .* weights"),
        ({"model": {"widths": [8] * 100, "down_blocks": [1] * 100, "up_blocks": [1] * 100}}, "more than .* weights"),
        ({"model": {"widths": [HUGE]}}, "a weight of"),
        ({"model": {"time_width": HUGE}}, "a weight of"),
        ({"model": {"prompt_tokens": HUGE, "prompt_width": HUGE}}, "a weight of"),
        ({"model": {"refine_width": HUGE, "refine_blocks": HUGE}}, "a weight of"),
        ({"schedule": {"steps": 10**10}}, "steps must be 1 to"),
        ({"timestep": 1000}, "timestep T_L must be 0..999"),
        ({"timestep": -1}, "timestep T_L must be"),
        ({"scale": 0}, "scale must be 1, 2, 4 or 8"),
        ({"scale": -1}, "scale must be 1, 2, 4 or 8"),
        ({"scale": 3}, "scale must be 1, 2, 4 or 8"),
        ({"scale": 10**400}, "scale must be|expected"),
        ({"model": {"widths": ["x"]}}, "expected int"),
        ({"nothing": 1}, "unknown setting"),
    ],
)
def test_a_tiny_generator_is_built_only_as_far_as_its_file_goes(change: Any, match: str, tmp_path: Path) -> None:
    network = tiny_generator(TinyGeneratorConfig(model=SMALL))
    architecture, config = describe(network)
    path = write(tmp_path / "m.safetensors", architecture, merged(config, change), network.state_dict())
    refused(path, match)


@pytest.mark.parametrize(
    ("architecture", "config", "match"),
    [
        ("realesrgan", {"blocks": HUGE}, "a weight of"),
        ("realesrgan", {"width": HUGE}, "a weight of"),
        ("stable-diffusion", {"unet": {"layers_per_block": HUGE}}, "a weight of|more than"),
        ("stable-diffusion", {"prompt": {"tokens": HUGE}}, "a weight of|more than"),
        ("stable-diffusion", {"unet": {"norm_num_groups": 7}}, "configuration does not fit"),
        ("stable-diffusion", {"unet": {"norm_num_groups": 0}}, "configuration does not fit"),
        ("osediff", {"timestep": 5000}, "timestep"),
        ("residual-shift", {"schedule": {"steps": 10**10}}, "steps must be 2 to"),
        ("residual-shift", {"scale": 0}, "scale must be"),
        ("residual-shift", {"unet": {"lq_halvings": HUGE}}, "configuration does not fit"),
        ("tiny-residual-shift", {"denoiser": {"down_blocks": [HUGE, 1, 1]}}, "a weight of|more than"),
        ("nothing", {}, "unknown architecture"),
        ("realesrgan", "[" * 100_000, "damaged metadata"),
        ("realesrgan", "[1]", "damaged metadata"),
        ("realesrgan", '{"blocks": ' + "9" * 5000 + "}", "damaged metadata"),
    ],
)
def test_any_architecture(architecture: str, config: Any, match: str, tmp_path: Path) -> None:
    if architecture in ("stable-diffusion", "osediff"):
        import diffusers.models.unets.unet_2d_condition  # noqa: F401  (what that takes is not counted)
    refused(write(tmp_path / "m.safetensors", architecture, config, {"weight": torch.zeros(3)}), match)


def test_what_fits_is_built_as_before() -> None:
    config = RANDOM_RESIDUAL["resshift-micro"]
    with torch.device("meta"):
        free = build_network("residual-shift", to_mapping(config), "x")
        shapes = {key: tuple(value.shape) for key, value in free.state_dict().items()}
        bound = build_network("residual-shift", to_mapping(config), "x", shapes)
    assert bound.state_dict().keys() == free.state_dict().keys()

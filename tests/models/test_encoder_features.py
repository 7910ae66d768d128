"""What distillation takes from a teacher: features on the teacher's own weights, one map per level."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_diffusion import UNET
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.models.architectures import random_backbone, random_generator
from onestepsr.models.backbones import unet_encoder_of
from onestepsr.models.discriminators import LatentDiffusionFeatures, PromptedUNet, ResidualShiftFeatures
from onestepsr.models.generators import OneStepConfig, OneStepLatentGenerator
from onestepsr.models.stable_diffusion.networks import StableDiffusionUNet
from onestepsr.models.tiny.networks import TinyAutoencoder

THREE_LEVELS = replace(
    UNET,
    block_out_channels=(32, 32, 64),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    transformer_layers_per_block=(1, 1, 1),
    attention_head_dim=(2, 2, 4),
    layers_per_block=2,
)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def shapes(features: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    return [tuple(map_.shape[1:]) for map_ in features]


@pytest.mark.parametrize("name", ["resshift-micro", "resshift-tiny"])
def test_features_of_residual_shifting(name: str) -> None:
    denoiser = random_generator(f"random:{name}").unet
    network = ResidualShiftFeatures(denoiser)
    z, t, lr = noise(2, denoiser.latent_channels, 16, 16), torch.tensor([0, 3]), noise(2, 3, 16, 16)
    emb, *features = network(z, t, lr)
    assert emb.shape == (2, network.time_channels)
    assert shapes(features) == [(count, 16 >> k, 16 >> k) for k, count in enumerate(network.feature_channels)]
    middle, _, same = denoiser.encode(z, t, lr)
    assert torch.equal(features[-1], middle)
    assert torch.equal(emb, same)


@pytest.fixture(scope="module")
def stable_diffusion() -> StableDiffusionUNet:
    torch.manual_seed(0)
    return StableDiffusionUNet(THREE_LEVELS).eval()


def prompted(unet: nn.Module, width: int) -> PromptedUNet:
    return PromptedUNet(unet, noise(1, 4, width))


def test_features_of_stable_diffusion_are_those_of_its_half(stable_diffusion: StableDiffusionUNet) -> None:
    network = prompted(stable_diffusion, THREE_LEVELS.cross_attention_dim)
    z, t = noise(2, THREE_LEVELS.in_channels, 16, 16), torch.tensor([3, 800])
    seen: list[Tensor] = []
    attending = [block for block in network.unet.unet.down_blocks if hasattr(block, "attentions")]
    hooks = [b.attentions[-1].register_forward_hook(lambda *call: seen.append(call[2][0])) for b in attending]
    with torch.no_grad():
        view = LatentDiffusionFeatures(network)
        emb, *features = view(z, t)
        generator = OneStepLatentGenerator(TinyAutoencoder(), stable_diffusion, network.prompt, OneStepConfig())
        middle = unet_encoder_of(generator)(z, t, network.prompt)[0]
    for hook in hooks:
        hook.remove()
    assert emb.shape == (2, view.time_channels)
    assert shapes(features) == [(count, 16 >> k, 16 >> k) for k, count in enumerate(view.feature_channels)]
    torch.testing.assert_close(features[-1], middle)
    for feature, end in zip(features[:-1], seen, strict=True):
        assert torch.equal(feature, end), "the end of its level, before it is halved"


def test_features_of_the_tiny_unet_and_its_prompt() -> None:
    generator = random_backbone("random:d3sr-tiny")
    network = PromptedUNet(generator.unet, generator.prompt)
    view = LatentDiffusionFeatures(network)
    z, t = noise(1, generator.latent_channels, 8, 8), torch.tensor([10])
    emb, *features = view(z, t)
    assert emb.shape == (1, view.time_channels)
    assert [feature.shape[1] for feature in features] == list(view.feature_channels)
    assert torch.equal(network(z, t), generator.unet(z, t, generator.prompt))
    assert network.prompt is not generator.prompt
    with pytest.raises(UserError, match="too small to offer it"):
        network.enable_gradient_checkpointing()


def test_networks_without_features_are_refused() -> None:
    with pytest.raises(UserError, match="a Conv2d has no features"):
        LatentDiffusionFeatures(PromptedUNet(nn.Conv2d(3, 3, 1), noise(1, 2, 3)))

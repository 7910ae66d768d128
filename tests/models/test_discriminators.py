"""The noise-aware discriminator: regions, noise awareness, where it starts."""

import torch

from onestepsr.models.discriminators import NoiseAwareDiscriminator
from onestepsr.models.tiny.networks import TinyConfig, TinyUNet

SMALL = TinyConfig(widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16, prompt_width=8)


def build() -> NoiseAwareDiscriminator:
    torch.manual_seed(0)
    return NoiseAwareDiscriminator(TinyUNet(SMALL).encoder, torch.randn(1, 8, 8), hidden=(12,))


def test_one_logit_per_region_of_the_middle_block():
    logits = build()(torch.randn(3, SMALL.latent_channels, 8, 12), torch.tensor([0, 10, 999]))
    assert logits.shape == (3, 1, 4, 6)


def test_a_region_sees_its_own_surroundings_only():
    network, z = build(), torch.zeros(1, SMALL.latent_channels, 64, 64)
    changed = z.clone()
    changed[..., 0, 0] = 5.0
    difference = (network(changed, torch.tensor([1])) - network(z, torch.tensor([1])))[0, 0].abs()
    assert difference[0, 0] > 0
    assert difference[16:, 16:].max() < 1e-6


def test_it_is_told_the_step():
    network, z = build(), torch.randn(1, SMALL.latent_channels, 8, 8)
    assert not torch.allclose(network(z, torch.tensor([5])), network(z, torch.tensor([800])))

"""Formulas of the one-step generators, precision, padding, and the view that training uses."""

from __future__ import annotations

import copy

import pytest
import torch
from agreement import decibels
from torch import nn

from onestepsr.diffusion.residual_shift import NoisePlane
from onestepsr.inference.upscaler import Upscaler
from onestepsr.models import cpu_kernels, generators
from onestepsr.models.cpu_kernels import PackedConvolution, PackedLinear
from onestepsr.models.generators import NoisedLatentGenerator, OneStepLatentGenerator, TrainableGenerator, pad_to
from onestepsr.models.tiny.generator import TinyGeneratorConfig
from small import SMALL, small_generator

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def generator() -> OneStepLatentGenerator:
    return small_generator(timestep=250)


@pytest.fixture(scope="module")
def noised() -> NoisedLatentGenerator:
    generator = small_generator(timestep=500, noised=True)
    assert isinstance(generator, NoisedLatentGenerator)
    return generator


def test_step_is_equation_one(generator: OneStepLatentGenerator) -> None:
    z_l = torch.randn(2, SMALL.latent_channels, 8, 8)
    alpha_bar = generator.schedule.alpha_bar[250]
    eps = generator.unet(z_l, torch.tensor([250, 250]), generator.prompt)
    expected = (z_l - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    assert torch.allclose(generator.step(z_l), expected, atol=1e-6)


def test_a_noised_generator_starts_from_the_noised_latent(noised: NoisedLatentGenerator) -> None:
    lr = torch.rand(1, 3, 8, 8)
    z_y = noised.encode(noised.enlarge(lr))
    noise = torch.randn(z_y.shape)
    alpha_bar = noised.schedule.alpha_bar[500]
    z_T = alpha_bar.sqrt() * z_y + (1 - alpha_bar).sqrt() * noise
    eps = noised.unet(z_T, torch.tensor([500]), noised.prompt)
    expected = (z_T - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    z_0 = noised.denoise(z_y, lambda draw, like: noise)
    torch.testing.assert_close(z_0, expected, rtol=1e-4, atol=1e-4)
    plain = noised.decode(noised.denoise(z_y, NoisePlane(0)))
    torch.testing.assert_close(noised(lr), plain, rtol=1e-4, atol=1e-4)


def test_tiles_start_from_the_noise_of_the_whole(noised: NoisedLatentGenerator) -> None:
    pixels = (torch.rand(40, 32, 3, generator=torch.Generator().manual_seed(0)).numpy() * 255).astype("uint8")
    upscaler = Upscaler(copy.deepcopy(noised), device="cpu", dtype="float32")
    whole, tiled = (upscaler(pixels, tile=tile, color_fix="none", seed=3) for tile in ("off", 24))
    difference = [abs(a - b) for a, b in zip(whole.tobytes(), tiled.tobytes(), strict=True)]
    assert sum(difference) / len(difference) < 1, "levels, of which the noise alone would make dozens"


def test_sixteen_bits_are_for_the_networks_alone(generator: OneStepLatentGenerator) -> None:
    torch.manual_seed(1)
    half = copy.deepcopy(generator).bfloat16()
    z_l = torch.randn(1, SMALL.latent_channels, 8, 8).bfloat16()
    eps = half.unet(z_l, torch.tensor([250]), half.prompt)
    exact = half.schedule.x0_from_eps(z_l.double(), eps.double(), 250)
    assert torch.allclose(half.step(z_l).double(), exact, atol=1e-5)
    image = 0.5 + 0.5 * torch.rand(1, 3, 32, 32)
    assert torch.equal(half.encode(image), half.autoencoder.encode((image * 2 - 1).bfloat16()))
    assert half.decode(exact.float()).dtype == torch.float32
    lr = torch.rand(1, 3, 8, 8)
    assert half(lr).dtype == half(lr.bfloat16()).dtype == torch.float32


def test_padding_reflects_and_then_repeats() -> None:
    x = torch.arange(3.0).reshape(1, 1, 1, 3)
    assert pad_to(x, 1, 5)[0, 0, 0].tolist() == [0, 1, 2, 1, 0]
    assert pad_to(x, 1, 8)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert pad_to(x, 2, 3)[0, 0].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert pad_to(torch.ones(1, 1, 1, 1), 4, 4).shape == (1, 1, 4, 4)


def test_training_view_returns_the_same_image_and_its_latent(generator: OneStepLatentGenerator) -> None:
    lr = torch.rand(2, 3, 8, 8)
    image, z_h = TrainableGenerator(generator)(lr)
    assert torch.equal(image, generator(lr))
    assert torch.equal(image, generator.decode(z_h))


def test_a_prompt_of_another_length_is_kept_in_the_configuration() -> None:
    generator = small_generator()
    generator.set_prompt(torch.zeros(1, 5, SMALL.prompt_width))
    assert isinstance(generator.config, TinyGeneratorConfig)
    assert generator.config.model.prompt_tokens == 5


def test_timestep_outside_the_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.999"):
        TinyGeneratorConfig(model=SMALL, timestep=1000)


@pytest.mark.parametrize("native", [False, True])
def test_every_layer_multiplies_in_float32_where_that_is_faster(generator, native, monkeypatch):
    for module in (generators, cpu_kernels):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: native)
    plain = copy.deepcopy(generator).bfloat16()
    made = copy.deepcopy(plain)
    made.speed_up()
    layers = [layer for layer in made.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert all(isinstance(layer, (PackedConvolution, PackedLinear)) != native for layer in layers)
    lr = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact, usual, found = generator(lr), plain(lr), made(lr)
    assert decibels(exact, found) > decibels(exact, usual) - 1.0
    assert made.state_dict().keys() == plain.state_dict().keys()

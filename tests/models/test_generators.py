"""Eq. 1 of D3SR, sizes, and the view that training uses."""

import copy

import pytest
import torch

from onestepsr.models.generators import TrainableGenerator, pad_to
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyConfig

SMALL = TinyConfig(
    encoder_width=8, decoder_width=8, widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16
)


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    generator = tiny_generator(TinyGeneratorConfig(model=SMALL, timestep=250)).eval()
    torch.nn.init.normal_(generator.unet.conv_out.weight, std=0.05)
    return generator.requires_grad_(False)


def test_step_is_equation_one(generator):
    z_l = torch.randn(2, SMALL.latent_channels, 8, 8)
    alpha_bar = generator.schedule.alpha_bar[250]
    eps = generator.unet(z_l, torch.tensor([250, 250]), generator.prompt)
    expected = (z_l - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    assert torch.allclose(generator.step(z_l), expected, atol=1e-6)


def test_sixteen_bits_are_for_the_networks_alone(generator):
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


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 5), (7, 2), (16, 24)])
def test_any_size_gives_exactly_four_times_as_much(generator, size):
    out = generator(torch.rand(1, 3, *size))
    assert out.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert out.isfinite().all()


def test_padding_reflects_and_then_repeats():
    x = torch.arange(3.0).reshape(1, 1, 1, 3)
    assert pad_to(x, 1, 5)[0, 0, 0].tolist() == [0, 1, 2, 1, 0]
    assert pad_to(x, 1, 8)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert pad_to(x, 2, 3)[0, 0].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert pad_to(torch.ones(1, 1, 1, 1), 4, 4).shape == (1, 1, 4, 4)


def test_training_view_returns_the_same_image_and_its_latent(generator):
    lr = torch.rand(2, 3, 8, 8)
    picture, z_h = TrainableGenerator(generator)(lr)
    assert torch.equal(picture, generator(lr))
    assert torch.equal(picture, generator.decode(z_h))


def test_timestep_outside_the_schedule_is_refused():
    with pytest.raises(ValueError, match=r"0\.\.999"):
        tiny_generator(TinyGeneratorConfig(model=SMALL, timestep=1000))

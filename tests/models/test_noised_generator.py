"""The generator that starts from a noised LR latent: its formula, its noise, its weights file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from onestepsr.diffusion.noise_field import NoisePlane
from onestepsr.inference.upscaler import Upscaler
from onestepsr.models import loading
from onestepsr.models.architectures import describe
from onestepsr.models.generators import NoisedLatentGenerator
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyConfig
from onestepsr.weights import native

SMALL = TinyConfig(
    encoder_width=8, decoder_width=8, widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16
)


@pytest.fixture
def generator() -> NoisedLatentGenerator:
    torch.manual_seed(0)
    made = tiny_generator(TinyGeneratorConfig(model=SMALL, timestep=500, noised=True))
    torch.nn.init.normal_(made.unet.conv_out.weight, std=0.1)
    assert isinstance(made, NoisedLatentGenerator)
    return made.eval().requires_grad_(False)


def image(height: int = 8, width: int = 8) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_it_starts_from_the_noised_latent(generator: NoisedLatentGenerator) -> None:
    lr = image()
    z_y = generator.encode(generator.enlarge(lr))
    noise = torch.randn(z_y.shape, generator=torch.Generator().manual_seed(1))
    alpha_bar = generator.schedule.alpha_bar[500]
    z_T = alpha_bar.sqrt() * z_y + (1 - alpha_bar).sqrt() * noise
    eps = generator.unet(z_T, torch.tensor([500]), generator.prompt)
    expected = (z_T - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    sr, z_0 = generator.restore(lr, lambda draw, like: noise)
    torch.testing.assert_close(z_0, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sr, generator.decode(expected), rtol=1e-4, atol=1e-4)


def test_noise_follows_from_seed_and_place(generator: NoisedLatentGenerator) -> None:
    lr = image()
    seeded = [generator(lr, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.allclose(seeded[0], seeded[2], atol=1e-3)
    assert torch.equal(generator(lr), generator.restore(lr, NoisePlane(0))[0])
    assert not torch.allclose(generator(lr), generator(lr, origin=(0, 4)), atol=1e-3)
    assert generator(image(5, 7)).shape == (1, 3, 20, 28)


def test_tiles_start_from_the_noise_of_the_whole(generator: NoisedLatentGenerator) -> None:
    pixels = (image(40, 32)[0].permute(1, 2, 0).numpy() * 255).astype("uint8")
    upscaler = Upscaler(generator, device="cpu", dtype="float32")
    whole, tiled = (upscaler(pixels, tile=tile, color_fix="none", seed=3) for tile in ("off", 24))
    difference = [abs(a - b) for a, b in zip(whole.tobytes(), tiled.tobytes(), strict=True)]
    assert sum(difference) / len(difference) < 1, "levels, of which the noise alone would make dozens"


def test_weights_file_remembers_the_start(generator: NoisedLatentGenerator, tmp_path: Path) -> None:
    architecture, config = describe(generator)
    assert config["noised"] is True
    path = tmp_path / "model.safetensors"
    native.save_model(path, architecture=architecture, config=config, state_dict=generator.state_dict())
    loaded = loading.load_generator(path)
    assert isinstance(loaded, NoisedLatentGenerator)
    assert loaded.timestep == 500
    torch.testing.assert_close(loaded(image()), generator(image()))

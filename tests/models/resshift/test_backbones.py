"""Generators of the residual-shifting family by name, from files of ours and on a trained autoencoder."""

import numpy as np
import pytest
import torch
from torch import Tensor

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UnknownModel, UserError
from onestepsr.diffusion.residual_shift import ResidualShiftConfig
from onestepsr.imaging.read import from_array
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
from onestepsr.models.architectures import build_network, describe
from onestepsr.models.loading import load_generator, load_network, load_residual_generator, residual_generator_on
from onestepsr.models.resshift.config import PUBLISHED, TinyResidualShiftGeneratorConfig
from onestepsr.models.resshift.generator import ResidualShiftGenerator, tiny_residual_shift_generator
from onestepsr.models.tiny.denoiser import TinyDenoiserConfig
from onestepsr.models.tiny.networks import TinyAutoencoder, TinyConfig
from onestepsr.weights.files import save_model
from weights_by_name import fill_by_name

pytestmark = pytest.mark.numeric

SMALL_AUTOENCODER = TinyConfig(luma_channels=10, chroma_channels=2, encoder_width=8, decoder_width=8)
SMALL_DENOISER = TinyDenoiserConfig(
    latent_channels=14, widths=(8, 12), down_blocks=(1, 1), up_blocks=(1, 1), time_width=8
)


def small_tiny(**changes) -> ResidualShiftGenerator:
    config = TinyResidualShiftGeneratorConfig(denoiser=SMALL_DENOISER, autoencoder=SMALL_AUTOENCODER, **changes)
    torch.manual_seed(0)
    generator = tiny_residual_shift_generator(config).eval().requires_grad_(False)
    fill_by_name(generator.unet)
    return generator


def low(*size) -> Tensor:
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))


def written(generator, path):
    architecture, config = describe(generator)
    save_model(path, architecture=architecture, config=config, state_dict=generator.state_dict())
    return path


def same_output(first, second) -> bool:
    """But for the rounding of another memory layout."""
    expected, found = first(low(9, 5)), second(low(9, 5))
    return bool((found - expected).abs().max() < 1e-4 * expected.std())


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"steps": 1, "sampler": "deterministic"},
        {"steps": 4},
        {"steps": 4, "respacing": "published"},
        {"schedule": ResidualShiftConfig(steps=4, min_noise=0.2)},
    ],
)
def test_a_file_keeps_steps_sampler_and_respacing(tmp_path, sampling):
    generator = small_tiny(**sampling)
    path = written(generator, tmp_path / "model.safetensors")
    loaded = load_network(path)
    assert describe(loaded) == describe(generator)
    assert loaded.schedule.kept == generator.schedule.kept
    assert loaded.sampler == generator.sampler
    assert same_output(generator, loaded)
    assert same_output(generator, load_generator(path))


def load(name: str) -> ResidualShiftGenerator:
    return load_residual_generator(f"random:resshift-{name}")


def test_random_weights_are_the_same_every_time_and_trainable():
    for name in ("micro", "tiny"):
        first, second = load(name), load(name)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        assert all(parameter.requires_grad for parameter in first.parameters())
        assert not first.training


@pytest.mark.parametrize(
    ("name", "steps", "size", "multiple"),
    [
        ("random:resshift-realsr", 15, 173_916_365, 64),
        ("random:sinsr", 1, 173_916_365, 64),
        ("random:resshift-face", 4, None, 512),
    ],
)
def test_published_sizes_have_names(name, steps, size, multiple):
    with torch.device("meta"):
        generator = load_residual_generator(name)
    assert generator.schedule.steps == steps
    assert generator.lr_multiple == multiple
    assert size in (None, sum(parameter.numel() for parameter in generator.parameters()))


@pytest.mark.parametrize("build", [small_tiny, lambda: load("micro")], ids=["tiny", "micro"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 0.0), ("bfloat16", 0.05)])
def test_images_of_any_size_in_tiles_and_16_bit_weights(build, dtype, limit):
    image = from_array(np.random.default_rng(0).integers(0, 256, (37, 41, 3), dtype=np.uint8))
    options = UpscaleOptions(tile=32, color_fix="none")
    generator = build()
    generator.choose_sampling(steps=1)
    exact = Upscaler(build_like(generator), "cpu", "float32").upscale_image(image, options).pixels
    found = Upscaler(generator, "cpu", dtype).upscale_image(image, options).pixels
    assert found.shape == (148, 164, 3)
    assert np.abs(found.astype(int) - exact).mean() <= 255 * limit


def build_like(generator: ResidualShiftGenerator) -> ResidualShiftGenerator:
    architecture, config = describe(generator)
    copy = build_network(architecture, config, architecture)
    copy.load_state_dict(generator.state_dict())
    return copy


def test_steps_and_sampler_can_be_chosen_where_there_are_any(tmp_path):
    path = written(small_tiny(), tmp_path / "model.safetensors")
    chosen = load_generator(path, steps=3, sampler="deterministic")
    assert chosen.schedule.kept == [0, 7, 14]
    assert same_output(chosen, small_tiny(steps=3, sampler="deterministic"))
    assert same_output(load_generator(path, steps=15), small_tiny())
    with pytest.raises(UserError, match=r"16 steps: this schedule has 15, accepted: 1 to 15"):
        load_generator(path, steps=16)
    with pytest.raises(UserError, match=r"sampler 'euler': accepted: ancestral, deterministic"):
        load_generator(path, sampler="euler")
    for choice in ({"steps": 4}, {"sampler": "ancestral"}):
        with pytest.raises(UserError, match=r"--(steps 4|sampler ancestral): 'bicubic' takes no steps"):
            load_generator("bicubic", **choice)


def test_a_new_teacher_stands_on_a_trained_autoencoder(tmp_path):
    autoencoder = TinyAutoencoder(SMALL_AUTOENCODER).eval()
    autoencoder.latent_mean.fill_(0.25)
    path = written(autoencoder, tmp_path / "autoencoder.safetensors")
    schedule = ResidualShiftConfig(steps=4, min_noise=0.2)
    generator = residual_generator_on(path, schedule=schedule)
    assert torch.equal(generator.autoencoder.latent_mean, autoencoder.latent_mean)
    assert generator.unet.latent_channels == 14
    assert generator.schedule.config == schedule
    again = residual_generator_on(path, TinyDenoiserConfig(latent_channels=14), schedule=schedule)
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), again.parameters(), strict=True))
    whole = written(generator, tmp_path / "teacher.safetensors")
    assert same_output(load_residual_generator(whole), generator)
    assert residual_generator_on(whole, schedule=schedule).config == generator.config
    with pytest.raises(UserError, match=r"latents of 14 channels, the denoiser is for 20"):
        residual_generator_on(path, TinyDenoiserConfig())
    with pytest.raises(UserError, match=r"ResidualShiftGenerator without a tiny autoencoder"):
        residual_generator_on("random:resshift-micro")


def test_another_kind_of_model_is_refused(tmp_path):
    path = written(TinyAutoencoder(SMALL_AUTOENCODER), tmp_path / "autoencoder.safetensors")
    with pytest.raises(UserError, match=r"holds a TinyAutoencoder, expected a model of the ResShift family"):
        load_residual_generator(path)
    with pytest.raises(UserError, match=r"holds a OneStepLatentGenerator"):
        load_residual_generator("random:d3sr-tiny")
    with pytest.raises(UnknownModel, match="resshift-face"):
        load_residual_generator("random:resshift-fase")


@pytest.mark.parametrize("config", [TinyResidualShiftGeneratorConfig(), *PUBLISHED.values()])
def test_configurations_survive_a_mapping(config):
    assert from_mapping(type(config), to_mapping(config)) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [({"scale": 2}, "scale must be 4"), ({"denoiser": {"latent_channels": 3}}, "UNet have 3 channels, those of the")],
)
def test_tiny_settings_that_do_not_fit_are_one_line(change, said):
    with pytest.raises(UserError, match=said):
        from_mapping(TinyResidualShiftGeneratorConfig, change)

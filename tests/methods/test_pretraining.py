"""Both stages of pretraining: their terms by hand on made-up networks, what previews show, what trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.diffusion.schedule import DiffusionSchedule, DiffusionScheduleConfig
from onestepsr.methods.base import Method, SampleRandom
from onestepsr.methods.pretraining import AutoencoderConfig, DiffusionConfig, build_autoencoder, build_diffusion
from onestepsr.models.tiny.generator import TinyGeneratorConfig
from onestepsr.models.tiny.networks import TinyAutoencoder, TinyConfig
from onestepsr.weights import files
from small import SMALL, added_noise

TWO_CHANNELS = TinyConfig(luma_channels=2, chroma_channels=0, encoder_width=8, decoder_width=8)


def random_of(samples: int) -> SampleRandom:
    return SampleRandom("pretraining", samples=range(samples))


def photos(count: int, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_autoencoders_terms_are_the_mean_error_and_the_divergence_from_a_standard_normal() -> None:
    """Pixels of 0.75 are 0.5 in [-1, 1]. Per channel the divergence is (mean^2 + exp(v) - 1 - v) / 2."""
    method = build_autoencoder(AutoencoderConfig(model=TWO_CHANNELS, kl_weight=0.25))
    (phase,) = method.phases
    seen: list[Tensor] = []
    mean = torch.tensor([1.0, 2.0])[:, None, None].expand(3, 2, 4, 6)
    log_variance = torch.tensor([0.0, math.log(3)])

    def network(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.extend((x, noise))
        return torch.full_like(x, 0.125), mean, log_variance

    hr = torch.full((3, 3, 16, 24), 0.75)
    terms = phase.loss({"autoencoder": network}, {"hr": hr}, random_of(3))
    assert torch.equal(seen[0], torch.full_like(hr, 0.5))
    assert torch.equal(seen[1], random_of(3).normal(mean)), "noise of the latent's shape"
    assert terms["l1"].item() == pytest.approx(0.375)
    divergences = ((1 + 1 - 1 - 0) / 2, (4 + 3 - 1 - math.log(3)) / 2)
    assert terms["kl"].item() == pytest.approx(0.25 * sum(divergences) / 2)
    assert AutoencoderConfig().kl_weight == 1e-4
    with pytest.raises(ValueError, match="kl_weight must not be negative, got -1"):
        AutoencoderConfig(kl_weight=-1.0)


def test_autoencoders_preview_is_the_clamped_reconstruction_without_noise() -> None:
    method = build_autoencoder(AutoencoderConfig(model=TWO_CHANNELS))
    seen: list[Tensor] = []
    values = torch.tensor([-3.0, -0.5, 0.25, 3.0])

    def network(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(x)
        return values.expand(1, 3, 4, 4), torch.zeros(1, 2, 1, 1), torch.zeros(2)

    hr = torch.full((1, 3, 4, 4), 0.75)
    assert method.preview is not None
    columns = method.preview({"autoencoder": network}, {"hr": hr})
    assert list(columns) == ["SR", "HR"]
    assert torch.equal(seen[0], torch.full_like(hr, 0.5))
    assert columns["SR"][0, 0, 0].tolist() == pytest.approx([0.0, 0.25, 0.625, 1.0])
    assert torch.equal(columns["HR"], hr)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    method = build_autoencoder(AutoencoderConfig(model=SMALL))
    assert method.export is not None
    exported = method.export(method.networks)
    path = tmp_path_factory.mktemp("pretraining") / "autoencoder.safetensors"
    files.save_model(path, architecture=exported.architecture, config=exported.config, state_dict=exported.state_dict)
    return path


def diffusion_on(autoencoder: Path, **changes: Any) -> Method:
    torch.manual_seed(0)
    return build_diffusion(
        DiffusionConfig(autoencoder=autoencoder, backbone=TinyGeneratorConfig(model=SMALL, **changes))
    )


def latent_of(method: Method, images: Tensor) -> Tensor:
    network = method.frozen["autoencoder"]
    assert isinstance(network, TinyAutoencoder)
    with torch.no_grad():
        return network.encode(images * 2 - 1)


def knowing(z: Tensor, factor: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A network that knows the undamaged latent, and so the noise, of which it predicts ``factor`` times as much."""
    return lambda z_t, t: factor * added_noise(DiffusionSchedule(), z_t, z, t)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_unet_is_taught_the_noise_that_was_added_to_the_photos_latent(autoencoder: Path, factor: float) -> None:
    method, hr = diffusion_on(autoencoder), photos(3)
    z = latent_of(method, hr)
    random = random_of(3)
    random.integers(0, 1000)
    expected = (factor - 1) ** 2 * random.normal(z).square().mean().item()
    (phase,) = method.phases
    terms = phase.loss({"unet": knowing(z, factor)}, {"hr": hr}, random_of(3))
    assert terms["eps"].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_every_step_of_the_diffusion_is_taught(autoencoder: Path) -> None:
    told: set[int] = set()

    def network(z_t: Tensor, t: Tensor) -> Tensor:
        told.update(t.tolist())
        return torch.zeros_like(z_t)

    method = diffusion_on(autoencoder, schedule=DiffusionScheduleConfig(steps=3), timestep=2)
    (phase,) = method.phases
    phase.loss({"unet": network}, {"hr": photos(40, 8, 8)}, random_of(40))
    assert told == {0, 1, 2}


def test_the_autoencoder_of_a_diffusion_learns_nothing(autoencoder: Path) -> None:
    """Though its parameters ask for gradients here: the loss itself gives them none."""
    method, hr = diffusion_on(autoencoder), photos(2)
    unet, frozen = method.networks["unet"], method.frozen["autoencoder"]
    nn.init.normal_(unet.get_submodule("unet.conv_out").weight, std=0.1)  # it starts at zero
    (phase,) = method.phases
    phase.loss({"unet": unet}, {"hr": hr}, random_of(2))["eps"].backward()
    assert any(p.grad is not None and p.grad.any() for p in unet.parameters())
    assert all(p.requires_grad for p in frozen.parameters())
    assert all(p.grad is None for p in frozen.parameters())


def test_diffusions_preview_noises_the_photo_to_the_generators_step_and_denoises_it_at_once(autoencoder: Path) -> None:
    method, hr = diffusion_on(autoencoder, timestep=900), photos(2)
    network, z = method.frozen["autoencoder"], latent_of(method, hr)
    assert isinstance(network, TinyAutoencoder)
    assert method.preview is not None
    with torch.no_grad():
        columns = method.preview({"unet": knowing(z)}, {"hr": hr})
        alpha_bar = 0.014151  # of step 900
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        noised = network.decode(alpha_bar**0.5 * z + (1 - alpha_bar) ** 0.5 * noise) / 2 + 0.5
        blind = method.preview({"unet": lambda z_t, t: torch.zeros_like(z_t)}, {"hr": hr})["denoised"]
    assert list(columns) == ["noised", "denoised", "HR"]
    assert noised.min() < -0.1, "there is something to clamp"
    assert noised.max() > 1.1
    torch.testing.assert_close(columns["noised"], noised.clamp(0, 1), rtol=0, atol=2e-3)
    torch.testing.assert_close(columns["denoised"], (network.decode(z) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-3)
    assert (blind.min().item(), blind.max().item()) == (0, 1)
    assert torch.equal(columns["HR"], hr)


def test_photos_have_sides_that_all_levels_of_the_unet_can_halve(autoencoder: Path) -> None:
    """A latent position is 4 pixels, and the UNet of two levels halves the latent once."""
    assert diffusion_on(autoencoder).hr_multiple == 8
    assert build_autoencoder(AutoencoderConfig()).hr_multiple == 4


def test_other_weights_than_an_autoencoders_are_refused(autoencoder: Path, tmp_path: Path) -> None:
    method = diffusion_on(autoencoder)
    assert method.export is not None
    whole = method.export(method.networks)
    path = tmp_path / "backbone.safetensors"
    files.save_model(path, architecture=whole.architecture, config=whole.config, state_dict=whole.state_dict)
    with pytest.raises(UserError, match="holds a OneStepLatentGenerator, expected a tiny autoencoder"):
        diffusion_on(path)

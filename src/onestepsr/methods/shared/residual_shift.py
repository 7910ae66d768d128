"""Latents, previews and export of ResShift and the students distilled from it.

A generator of this family is a frozen autoencoder around a denoising network; only the network is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.diffusion.residual_shift import NoisePlane, ResidualShiftSchedule, Respacing
from onestepsr.methods.base import Batch, Exported, Networks, exported
from onestepsr.models.generators import LatentAutoencoder, LatentUNet, OneStepLatentGenerator
from onestepsr.models.resshift.config import Sampler
from onestepsr.models.resshift.generator import ResidualShiftGenerator, conditioned
from onestepsr.models.seesr.generator import SeeSRGenerator

DENOISER, AUTOENCODER = "denoiser", "autoencoder"
"""Names of the trained network and of the frozen one in :class:`onestepsr.methods.base.Method`."""


class FrozenAutoencoder(nn.Module):
    """An autoencoder as one callable, so that the loop's precision applies to it."""

    autoencoder: LatentAutoencoder

    def __init__(self, autoencoder: LatentAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, *, decode: bool = False) -> Tensor:
        """Latent (N, C, H/f, W/f) of an image (N, 3, H, W) in [0, 1]; with ``decode`` the image, not clamped, of a
        latent."""
        autoencoder = self.autoencoder
        return autoencoder.decode(x).float() * 0.5 + 0.5 if decode else autoencoder.encode(x * 2 - 1).float()


@torch.no_grad()
def latents(
    networks: Networks, generator: ResidualShiftGenerator | OneStepLatentGenerator | SeeSRGenerator, batch: Batch
) -> tuple[Tensor, Tensor]:
    """z_0 of the HR image and z_y of the enlarged LR image, (N, C, h, w) each; one evaluation for both."""
    images = torch.cat([batch["hr"], generator.enlarge(batch["lr"])])
    z_0, z_y = networks[AUTOENCODER](images).chunk(2)
    return z_0, z_y


SQRT_ETA_CAP = math.sqrt(0.001)
"""Largest sqrt(eta) of step 0 in the published code of SinSR and TAD-SR; ResShift's code has none."""


def whole_schedule(generator: ResidualShiftGenerator, *, capped: bool = False) -> ResidualShiftSchedule:
    """All steps that the generator's process has, however many of them it runs.

    ``capped`` limits sqrt(eta) of step 0 to :data:`SQRT_ETA_CAP`, which changes the schedule of 4 steps alone.
    """
    process = generator.schedule.config
    if capped:
        process = replace(process, min_noise=min(process.min_noise, max(process.kappa, 1.0) * SQRT_ETA_CAP))
    return ResidualShiftSchedule(process)


def with_sampling(
    generator: ResidualShiftGenerator,
    steps: int | None,
    sampler: Sampler,
    *,
    unet: nn.Module | None = None,
    respacing: Respacing = "spread",
) -> ResidualShiftGenerator:
    """The same networks, or another ``unet`` between the same autoencoder, run in ``steps`` steps by ``sampler``."""
    config = replace(generator.config, steps=steps, sampler=sampler, respacing=respacing)
    return ResidualShiftGenerator(generator.autoencoder, cast(LatentUNet, unet or generator.unet), config)


def check_same_latents(
    teacher: ResidualShiftGenerator, student: ResidualShiftGenerator, names: tuple[str, str]
) -> None:
    """Refuse a student whose latents or LR images have another shape than its teacher's; ``names`` are the
    user's names for the two."""

    def shape(generator: ResidualShiftGenerator) -> tuple[int, int, int]:
        return generator.latent_channels, generator.autoencoder.factor, generator.scale

    if shape(teacher) != shape(student):
        described = [
            f"{name} has {channels} channels, 1/{factor} of the image's side, for x{scale}"
            for name, (channels, factor, scale) in zip(names, (shape(teacher), shape(student)), strict=True)
        ]
        raise UserError(f"teacher and student need latents of one shape, but {described[0]}; {described[1]}")


def preview_of(generator: ResidualShiftGenerator) -> Callable[[Networks, Batch], dict[str, Tensor]]:
    """LR | SR | HR, by the generator's own steps and always the same noise."""

    def preview(networks: Networks, batch: Batch) -> dict[str, Tensor]:
        lr = batch["lr"]
        enlarged = generator.enlarge(lr)
        z_0 = generator.sample(conditioned(networks[DENOISER], lr), networks[AUTOENCODER](enlarged), NoisePlane(0))
        sr = networks[AUTOENCODER](z_0, decode=True)
        return {"LR (bicubic)": enlarged.clamp(0, 1), "SR": sr.clamp(0, 1), "HR": batch["hr"]}

    return preview


def export_of(generator: ResidualShiftGenerator) -> Callable[[Mapping[str, nn.Module]], Exported]:
    """The whole generator, with the trained network in it and its own steps."""

    def export(networks: Mapping[str, nn.Module]) -> Exported:
        trained = cast(LatentUNet, networks[DENOISER])
        return exported(ResidualShiftGenerator(generator.autoencoder, trained, generator.config))

    return export

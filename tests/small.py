"""Small configurations and generators that tests of several folders share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onestepsr.diffusion.schedule import DiffusionSchedule
from onestepsr.models.generators import Generator, OneStepLatentGenerator
from onestepsr.models.resshift.config import MICRO, RANDOM_RESIDUAL, ResidualShiftGeneratorConfig
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyConfig

SMALL = TinyConfig(
    encoder_width=8, decoder_width=8, widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16
)
"""A tiny backbone of a few thousand parameters."""
SMALL_RESIDUAL: ResidualShiftGeneratorConfig = RANDOM_RESIDUAL[MICRO]  # type: ignore[assignment]
"""ResShift's networks with every part of the published ones, in 4 steps."""


def small_generator(**changes: Any) -> OneStepLatentGenerator:
    """The same random one-step generator at every call, whose UNet matters."""
    torch.manual_seed(0)
    generator = tiny_generator(TinyGeneratorConfig(model=SMALL, **changes)).eval()
    torch.nn.init.normal_(generator.unet.conv_out.weight, std=0.1)
    return generator.requires_grad_(False)


def added_noise(schedule: DiffusionSchedule, z_t: Tensor, z_0: Tensor, t: Tensor | int) -> Tensor:
    """The noise that makes ``z_0`` into ``z_t``: Eq. 1 solved for eps."""
    signal, sigma = schedule.coefficients(t, z_t)
    return (z_t - signal * z_0) / sigma


class Nearest(Generator):
    """A generator of someone else's: repeats every pixel four times, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.given: list[Tensor] = []
        self.conditions: list[dict[str, Any]] = []

    def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
        self.given.append(lr)
        self.conditions.append(conditions)
        return self.weight * functional.interpolate(lr, scale_factor=4.0)

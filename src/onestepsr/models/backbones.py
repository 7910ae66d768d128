"""Building networks from their configuration: what the registry's architectures and the training methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from onestepsr.config import from_mapping
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.tiny import TinyAutoencoder, TinyConfig, TinyUNet
from onestepsr.schedules import DiffusionSchedule, DiffusionScheduleConfig


@dataclass(frozen=True, kw_only=True)
class TinyGeneratorConfig:
    """Everything that fixes a generator on the tiny backbone."""

    model: TinyConfig = field(default_factory=TinyConfig)
    """Sizes of autoencoder and UNet."""
    schedule: DiffusionScheduleConfig = field(default_factory=DiffusionScheduleConfig)
    """Noise schedule the UNet was pretrained with."""
    timestep: int = 399
    """T_L, the step at which the UNet is evaluated. The paper says only that it lies between 0 and T; a related
    release of the same group fixes 399."""
    scale: int = 4
    """Upscaling factor."""


def build_tiny_autoencoder(config: Mapping[str, Any]) -> TinyAutoencoder:
    """Autoencoder of a configuration mapping, freshly initialised."""
    return TinyAutoencoder(from_mapping(TinyConfig, config))


def build_tiny_generator(config: Mapping[str, Any]) -> OneStepLatentGenerator:
    """Generator of a configuration mapping, freshly initialised."""
    return tiny_generator(from_mapping(TinyGeneratorConfig, config))


def tiny_generator(config: TinyGeneratorConfig) -> OneStepLatentGenerator:
    """Autoencoder, UNet and prompt embedding, freshly initialised, as one generator."""
    return OneStepLatentGenerator(
        TinyAutoencoder(config.model),
        TinyUNet(config.model),
        torch.randn(
            1, config.model.prompt_tokens, config.model.prompt_width, generator=torch.Generator().manual_seed(0)
        ),
        timestep=config.timestep,
        scale=config.scale,
        schedule=DiffusionSchedule(config.schedule),
    )

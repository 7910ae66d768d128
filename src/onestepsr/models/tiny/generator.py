"""The tiny backbone as a one-step generator: configuration and construction."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from onestepsr.diffusion.schedule import DiffusionSchedule, DiffusionScheduleConfig
from onestepsr.models.generators import NoisedLatentGenerator, OneStepLatentGenerator
from onestepsr.models.tiny.networks import TinyAutoencoder, TinyConfig, TinyUNet


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
    noised: bool = False
    """Start from the LR latent noised to ``timestep``, as a student of a multi-step teacher does, not from the LR
    latent itself."""


def tiny_generator(config: TinyGeneratorConfig) -> OneStepLatentGenerator:
    """Autoencoder, UNet and prompt embedding, freshly initialised, as one generator."""
    shape = (1, config.model.prompt_tokens, config.model.prompt_width)
    prompt = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    kind = NoisedLatentGenerator if config.noised else OneStepLatentGenerator
    return kind(
        TinyAutoencoder(config.model),
        TinyUNet(config.model),
        prompt.to(torch.empty(0).device),  # the default device, which may be "meta"
        timestep=config.timestep,
        scale=config.scale,
        schedule=DiffusionSchedule(config.schedule),
    )


def tiny_config(generator: OneStepLatentGenerator) -> TinyGeneratorConfig:
    """Configuration of a generator on the tiny backbone. Raises TypeError for one on another backbone."""
    if not isinstance(generator.unet, TinyUNet):
        raise TypeError(f"a generator on a {type(generator.unet).__name__} is not on the tiny backbone")
    return TinyGeneratorConfig(
        model=generator.unet.config,
        schedule=generator.schedule.config,
        timestep=generator.timestep,
        scale=generator.scale,
        noised=isinstance(generator, NoisedLatentGenerator),
    )

"""The architectures that a weights file can name: configuration to freshly initialised network, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from onestepsr.config import from_mapping, to_mapping
from onestepsr.errors import UnknownModel, UserError, did_you_mean
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.noised_generator import NoisedLatentGenerator
from onestepsr.models.osediff import OSEDiffGenerator, OSEDiffGeneratorConfig, osediff_generator
from onestepsr.models.residual_architectures import (
    RANDOM_RESIDUAL,
    ResidualShiftGeneratorConfig,
    TinyResidualShiftGeneratorConfig,
    random_residual_generator,
    residual_config,
    residual_shift_generator,
    tiny_residual_shift_generator,
)
from onestepsr.models.residual_generator import ResidualShiftGenerator
from onestepsr.models.stable_diffusion import (
    StableDiffusionAutoencoder,
    StableDiffusionUNet,
    StableDiffusionUNetEncoder,
    stable_diffusion_encoder,
    stable_diffusion_generator,
)
from onestepsr.models.stable_diffusion_config import (
    SD21_BASE,
    SDXL_BASE,
    PromptConfig,
    SDXLConditioning,
    StableDiffusionEncoderConfig,
    StableDiffusionGeneratorConfig,
)
from onestepsr.models.tiny import BUNDLED, TinyAutoencoder, TinyConfig, TinyUNet
from onestepsr.schedules import DiffusionSchedule, DiffusionScheduleConfig

RANDOM = "random:"
"""Prefix of names that mean an architecture with random weights: for tests, benchmarks and dry runs."""
RESIDUAL, TINY_RESIDUAL = "residual-shift", "tiny-residual-shift"
Generator = OneStepLatentGenerator | ResidualShiftGenerator


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


def _builder(config: type[Any], build: Callable[[Any], nn.Module]) -> Callable[[Mapping[str, Any]], nn.Module]:
    return lambda values: build(from_mapping(config, values))


ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "tiny-autoencoder": _builder(TinyConfig, TinyAutoencoder),
    "tiny-latent-diffusion": _builder(TinyGeneratorConfig, tiny_generator),
    "stable-diffusion": _builder(StableDiffusionGeneratorConfig, stable_diffusion_generator),
    "stable-diffusion-encoder": _builder(StableDiffusionEncoderConfig, stable_diffusion_encoder),
    "osediff": _builder(OSEDiffGeneratorConfig, osediff_generator),
    RESIDUAL: _builder(ResidualShiftGeneratorConfig, residual_shift_generator),
    TINY_RESIDUAL: _builder(TinyResidualShiftGeneratorConfig, tiny_residual_shift_generator),
}
"""Builders of freshly initialised networks from their configuration; their weights are loaded right after."""


def describe(network: nn.Module) -> tuple[str, dict[str, Any]]:
    """Name of the architecture and configuration of a network, as its weights file records them."""
    if isinstance(network, StableDiffusionUNetEncoder):
        encoder = StableDiffusionEncoderConfig(unet=network.config, sdxl=network.sdxl)
        return "stable-diffusion-encoder", to_mapping(encoder)
    if isinstance(network, OneStepLatentGenerator):
        return _describe_generator(network)
    if isinstance(network, ResidualShiftGenerator):
        residual = residual_config(network)
        tiny = isinstance(residual, TinyResidualShiftGeneratorConfig)
        return TINY_RESIDUAL if tiny else RESIDUAL, to_mapping(residual)
    if isinstance(network, TinyAutoencoder):
        return "tiny-autoencoder", to_mapping(network.config)
    raise TypeError(f"a {type(network).__name__} has no weights file")


def _describe_generator(generator: OneStepLatentGenerator) -> tuple[str, dict[str, Any]]:
    common: dict[str, Any] = {
        "schedule": generator.schedule.config,
        "timestep": generator.timestep,
        "scale": generator.scale,
        "noised": isinstance(generator, NoisedLatentGenerator),
    }
    if isinstance(generator.unet, TinyUNet):
        return "tiny-latent-diffusion", to_mapping(TinyGeneratorConfig(model=generator.unet.config, **common))
    if isinstance(generator.unet, StableDiffusionUNet) and isinstance(
        generator.autoencoder, StableDiffusionAutoencoder
    ):
        parts: dict[str, Any] = {
            "unet": generator.unet.config,
            "autoencoder": generator.autoencoder.config,
            "prompt": PromptConfig(tokens=generator.prompt.shape[1]),
        }
        if isinstance(generator, OSEDiffGenerator):
            prompted = OSEDiffGeneratorConfig(posterior=generator.posterior, **parts, **common)
            return "osediff", to_mapping(prompted)
        config = StableDiffusionGeneratorConfig(**parts, **common)
        return "stable-diffusion", to_mapping(config)
    raise TypeError(f"a generator on a {type(generator.unet).__name__} has no weights file")


_RANDOM_GENERATORS: dict[str, Callable[[], OneStepLatentGenerator]] = {
    "d3sr-tiny": lambda: tiny_generator(TinyGeneratorConfig(model=BUNDLED)),
    "sd21-base": lambda: stable_diffusion_generator(StableDiffusionGeneratorConfig()),
}
_RANDOM_ENCODERS = {"sd21-base": SD21_BASE, "sdxl-base": SDXL_BASE}


def is_random(name: object) -> bool:
    """Whether ``name`` asks for random weights (``random:ALIAS``)."""
    return str(name).startswith(RANDOM)


def random_generator(name: str) -> Generator:
    """The generator that ``random:ALIAS`` names, with the same random weights at every call."""
    alias, known = name.removeprefix(RANDOM), [*_RANDOM_GENERATORS, *RANDOM_RESIDUAL]
    if alias in _RANDOM_ENCODERS and alias not in known:
        raise UserError(f"'{name}' can be a discriminator's backbone only, accepted: {', '.join(_RANDOM_GENERATORS)}")
    if alias not in known:
        raise UnknownModel(f"unknown name '{name}' of random weights: {did_you_mean(alias, known)}")
    with repeatable():
        return random_residual_generator(alias) if alias in RANDOM_RESIDUAL else _RANDOM_GENERATORS[alias]()


def random_backbone(name: str) -> OneStepLatentGenerator:
    """The generator that ``random:ALIAS`` names, which must predict noise in one step."""
    if name.removeprefix(RANDOM) in RANDOM_RESIDUAL:
        raise UserError(f"'{name}' is no latent-diffusion backbone, accepted: {', '.join(_RANDOM_GENERATORS)}")
    return cast(OneStepLatentGenerator, random_generator(name))


def random_encoder(name: str, sdxl: SDXLConditioning | None = None) -> StableDiffusionUNetEncoder | None:
    """The half UNet of a Stable Diffusion that ``random:ALIAS`` names, built by itself; None for other names."""
    config = _RANDOM_ENCODERS.get(name.removeprefix(RANDOM))
    if config is None:
        return None
    with repeatable():
        return StableDiffusionUNetEncoder(config, sdxl)


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, fresh weights are the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield

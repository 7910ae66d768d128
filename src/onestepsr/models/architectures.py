"""The architectures that a weights file can name: configuration to freshly initialised network, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UnknownModel, UserError, did_you_mean
from onestepsr.models.generators import NoisedLatentGenerator, OneStepLatentGenerator
from onestepsr.models.osediff.generator import OSEDiffGenerator, OSEDiffGeneratorConfig, osediff_generator
from onestepsr.models.resshift.config import (
    RANDOM_RESIDUAL,
    ResidualShiftGeneratorConfig,
    TinyResidualShiftGeneratorConfig,
    random_residual_generator,
    residual_config,
    residual_shift_generator,
    tiny_residual_shift_generator,
)
from onestepsr.models.resshift.generator import ResidualShiftGenerator
from onestepsr.models.stable_diffusion.config import (
    SD21_BASE,
    SDXL_BASE,
    PromptConfig,
    SDXLConditioning,
    StableDiffusionEncoderConfig,
    StableDiffusionGeneratorConfig,
)
from onestepsr.models.stable_diffusion.networks import (
    StableDiffusionAutoencoder,
    StableDiffusionUNet,
    StableDiffusionUNetEncoder,
    stable_diffusion_encoder,
    stable_diffusion_generator,
)
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_config, tiny_generator
from onestepsr.models.tiny.networks import BUNDLED, TinyAutoencoder, TinyConfig, TinyUNet
from onestepsr.weights.native import read_weights

RANDOM = "random:"
"""Prefix of names that mean an architecture with random weights: for tests, benchmarks and dry runs."""
RESIDUAL, TINY_RESIDUAL = "residual-shift", "tiny-residual-shift"
Generator = OneStepLatentGenerator | ResidualShiftGenerator


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


def load_native(path: Path) -> nn.Module:
    """The network that one of our own weight files describes, loaded strictly, in float32 on the CPU, in eval mode.

    Raises :class:`UserError` in one line for a damaged file and for weights that do not fit their configuration.
    """
    architecture, config, tensors = read_weights(path)
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: unknown architecture '{architecture}': {did_you_mean(architecture, ARCHITECTURES)}")
    try:
        with torch.device("meta"):  # nothing is initialised only to be overwritten
            network = ARCHITECTURES[architecture](config)
        copies = {key: _in_float32(tensor) for key, tensor in tensors.items()}
        network.load_state_dict(copies, assign=True)
    except UserError as error:
        raise UserError(f"{path}: configuration does not fit '{architecture}': {error}") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: weights do not match their configuration: {reason}") from error
    return network.eval()


def _in_float32(tensor: Tensor) -> Tensor:
    """A copy, because tensors of a file are windows on it, and the file may be replaced while the network lives."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


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
        return "tiny-latent-diffusion", to_mapping(tiny_config(generator))
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

"""Every architecture that a weights file can name: its configuration, and the network that is built from it."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UnknownModel, UserError, did_you_mean, first_line
from onestepsr.models.generators import LatentGenerator, OneStepLatentGenerator
from onestepsr.models.osediff.generator import OSEDiffGeneratorConfig, osediff_generator
from onestepsr.models.realesrgan.networks import RealESRGANConfig, RealESRGANGenerator
from onestepsr.models.resshift.config import (
    RANDOM_RESIDUAL,
    ResidualShiftGeneratorConfig,
    TinyResidualShiftGeneratorConfig,
)
from onestepsr.models.resshift.generator import residual_shift_generator, tiny_residual_shift_generator
from onestepsr.models.seesr.generator import SeeSRConfig, seesr_generator
from onestepsr.models.stable_diffusion.config import (
    SD21_BASE,
    SDXL_BASE,
    SDXLConditioning,
    StableDiffusionEncoderConfig,
    StableDiffusionGeneratorConfig,
)
from onestepsr.models.stable_diffusion.networks import StableDiffusionUNetEncoder, stable_diffusion_generator
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import BUNDLED, TinyAutoencoder, TinyConfig
from onestepsr.weights.files import Shapes, read_weights


@dataclass(frozen=True)
class Architecture:
    """A kind of network: its name in weights files, the class of its configuration, and how it is built from that."""

    name: str
    config: type[Any]
    build: Callable[[Any], nn.Module]


RESIDUAL, TINY_RESIDUAL = "residual-shift", "tiny-residual-shift"
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("tiny-autoencoder", TinyConfig, TinyAutoencoder),
        Architecture("tiny-latent-diffusion", TinyGeneratorConfig, tiny_generator),
        Architecture("stable-diffusion", StableDiffusionGeneratorConfig, stable_diffusion_generator),
        Architecture("stable-diffusion-encoder", StableDiffusionEncoderConfig, StableDiffusionUNetEncoder),
        Architecture("osediff", OSEDiffGeneratorConfig, osediff_generator),
        Architecture(RESIDUAL, ResidualShiftGeneratorConfig, residual_shift_generator),
        Architecture("seesr", SeeSRConfig, seesr_generator),
        Architecture("realesrgan", RealESRGANConfig, RealESRGANGenerator),
        Architecture(TINY_RESIDUAL, TinyResidualShiftGeneratorConfig, tiny_residual_shift_generator),
    )
}
"""All of them by name. A network keeps its configuration as ``config``, whose class tells its architecture."""


class Configured(Protocol):
    """A network of one of the architectures."""

    config: Any
    """The configuration it was built from."""


def describe(network: nn.Module) -> tuple[str, dict[str, Any]]:
    """Name of the architecture and configuration of a network, as its weights file records them."""
    config = cast(Configured, network).config
    return _architecture_of(config).name, to_mapping(config)


def _architecture_of(config: object) -> Architecture:
    for architecture in ARCHITECTURES.values():
        if type(config) is architecture.config:
            return architecture
    raise TypeError(f"a network with a {type(config).__name__} has no weights file")


def build_network(
    architecture: str, config: Mapping[str, Any], where: str | Path, shapes: Shapes | None = None
) -> nn.Module:
    """A freshly initialised network as the weights file ``where`` describes it; its weights are loaded right after.

    ``shapes`` are those of the file's tensors: building stops as soon as the network has more or larger parameters.
    Raises :class:`UserError` in one line for an unknown architecture and a configuration that does not fit it.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f"{where}: unknown architecture '{architecture}': {did_you_mean(architecture, ARCHITECTURES)}")
    known = ARCHITECTURES[architecture]
    try:
        with contextlib.nullcontext() if shapes is None else no_larger_than(shapes):
            return known.build(from_mapping(known.config, config))
    except Exception as error:  # of a constructor, for sizes that do not go together
        raise UserError(f"{where}: configuration does not fit '{architecture}': {first_line(error)}") from error


SLACK = 4
"""Sizes beyond those of a file that may be built: the half of a UNet is cut from a whole one, and a network of which a
file lacks some weights shall be told which."""


@contextmanager
def no_larger_than(shapes: Shapes) -> Iterator[None]:
    """Inside, this thread cannot build a network with more parameters than ``shapes``, or one with more values.

    A configuration of 10^8 blocks would otherwise take hours, and one of a width of 10^8 any memory, before the first
    missing weight is found.
    """
    largest, thread = max(map(math.prod, shapes.values()), default=0), threading.get_ident()
    most, most_values = SLACK * len(shapes), SLACK * largest
    seen: dict[int, nn.Parameter] = {}  # held, or the next one could have the identity of one that has gone

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or threading.get_ident() != thread:
            return
        seen[id(parameter)] = parameter
        if parameter.numel() > most_values:
            raise UserError(
                f"it describes a weight of {tuple(parameter.shape)}, the largest here has {largest:,} values"
            )
        if len(seen) > most:
            raise UserError(f"it describes more than {most} weights, here are {len(shapes)}")

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def load_native(path: Path) -> nn.Module:
    """The network that one of our own weight files describes, loaded strictly, in float32 on the CPU, in eval mode.

    Raises :class:`UserError` in one line for a damaged file and for weights that do not fit their configuration.
    """
    architecture, config, tensors = read_weights(path)
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        network = build_network(architecture, config, path, {key: value.shape for key, value in tensors.items()})
    try:
        network.load_state_dict({key: _in_float32(tensor) for key, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:
        reason = (str(error).splitlines()[1].strip() if "\n" in str(error) else str(error))[:300]
        raise UserError(f"{path}: weights do not match their configuration: {reason}") from error
    return network.eval()


def _in_float32(tensor: Tensor) -> Tensor:
    """A copy, because tensors of a file are windows on it, and the file may be replaced while the network lives."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


# ---- architectures with random weights: for tests, benchmarks and dry runs ----

RANDOM = "random:"
"""Prefix of the names of architectures with random weights."""
RANDOM_GENERATORS: dict[str, Any] = {
    "d3sr-tiny": TinyGeneratorConfig(model=BUNDLED),
    "sd21-base": StableDiffusionGeneratorConfig(),
    "seesr": SeeSRConfig(),
    **RANDOM_RESIDUAL,
}
"""Configurations of the generators by name."""
_ENCODERS = {"sd21-base": SD21_BASE, "sdxl-base": SDXL_BASE}
_BACKBONES = [name for name in RANDOM_GENERATORS if name not in (*RANDOM_RESIDUAL, "seesr")]


def is_random(name: object) -> bool:
    """True for names that ask for random weights (``random:ALIAS``)."""
    return str(name).startswith(RANDOM)


def random_generator(name: str) -> LatentGenerator:
    """The generator that ``random:ALIAS`` names, with the same random weights at every call."""
    alias = name.removeprefix(RANDOM)
    if alias in _ENCODERS and alias not in RANDOM_GENERATORS:
        raise UserError(f"'{name}' can be a discriminator's backbone only, accepted: {', '.join(_BACKBONES)}")
    if alias not in RANDOM_GENERATORS:
        raise UnknownModel(f"unknown name '{name}' of random weights: {did_you_mean(alias, RANDOM_GENERATORS)}")
    config = RANDOM_GENERATORS[alias]
    with repeatable():
        return cast(LatentGenerator, _architecture_of(config).build(config))


def random_backbone(name: str) -> OneStepLatentGenerator:
    """The generator that ``random:ALIAS`` names, which must predict noise in one step."""
    if (alias := name.removeprefix(RANDOM)) in RANDOM_GENERATORS and alias not in _BACKBONES:
        raise UserError(f"'{name}' is no latent-diffusion backbone, accepted: {', '.join(_BACKBONES)}")
    return cast(OneStepLatentGenerator, random_generator(name))


def random_encoder(name: str, sdxl: SDXLConditioning | None = None) -> StableDiffusionUNetEncoder | None:
    """The half UNet of a Stable Diffusion that ``random:ALIAS`` names, built by itself; None for other names."""
    config = _ENCODERS.get(name.removeprefix(RANDOM))
    if config is None:
        return None
    with repeatable():
        return StableDiffusionUNetEncoder(StableDiffusionEncoderConfig(unet=config, sdxl=sdxl or SDXLConditioning()))


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, fresh weights are the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield

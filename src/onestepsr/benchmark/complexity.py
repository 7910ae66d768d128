"""Complexity of a generator stage by stage, and of a discriminator: parameters and multiply-accumulate operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from onestepsr.benchmark.counting import Cost, count, number_of
from onestepsr.core.errors import UserError
from onestepsr.models.discriminators import DiffusionEncoder, NoiseAwareDiscriminator
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.resshift.generator import ResidualShiftGenerator
from onestepsr.models.stable_diffusion.networks import StableDiffusionUNet

Generator = OneStepLatentGenerator | ResidualShiftGenerator
SD_FACTOR = 8
"""Pixels per cell of Stable Diffusion's latents."""
TOKENS = 77
"""Length of its prompts."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a network's evaluation."""

    name: str
    """``encode``, ``unet``, ``decode``, ``discriminator``, or ``denoiser``."""
    cost: Cost
    """What one evaluation costs."""
    times: int = 1
    """How often it is evaluated for one image."""


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """A network and what its evaluation costs."""

    name: str
    """Name of the network in the tables."""
    summary: str
    """What it is, in one line."""
    side: int
    """Side of the square image that is put out, in pixels."""
    parameters: int
    """All numbers in its parameters, those that the evaluation does not touch included."""
    trainable: int
    """Those of them that training changes."""
    parts: Mapping[str, int]
    """Numbers by part of the network; adapters apart from what they adapt."""
    stages: tuple[Stage, ...]
    """The parts of one evaluation, in order."""

    @property
    def steps(self) -> int:
        """Evaluations of the diffusion network for one image."""
        return max(stage.times for stage in self.stages)

    @property
    def macs(self) -> int:
        """MACs of all stages, by PyTorch's counter."""
        return sum(stage.times * stage.cost.macs for stage in self.stages)

    @property
    def layer_macs(self) -> int:
        """MACs of all stages in convolution and linear layers."""
        return sum(stage.times * stage.cost.layer_macs for stage in self.stages)


def measure_generator(generator: Generator, side: int, *, name: str, summary: str) -> Complexity:
    """Complexity of encoding, every UNet evaluation and decoding for one image of ``side`` x ``side`` pixels.

    ``generator`` must be on the meta device. Bicubic enlargement and the formulas around the UNet count nothing: they
    have no products of matrices. Raises :class:`UserError` for a side that the network would pad.
    """
    multiple = generator.scale * generator.lr_multiple
    if side < 1 or side % multiple:
        near = max(multiple, round(side / multiple) * multiple)
        raise UserError(f"size {side}: '{name}' counts images whose side is a multiple of {multiple}, such as {near}")
    stages, value = [], torch.empty(1, 3, side, side, device="meta")
    parts: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        ("encode", generator.encode),
        ("unet", _step(generator, side // generator.scale)),
        ("decode", generator.decode),
    )
    steps = generator.schedule.steps if isinstance(generator, ResidualShiftGenerator) else 1
    with torch.device("meta"):  # tables of a schedule built on this device stay there
        for part, evaluate in parts:
            value, cost = count(generator, lambda evaluate=evaluate, value=value: evaluate(value))  # type: ignore[misc]
            stages.append(Stage(name=part, cost=cost, times=steps if part == "unet" else 1))
    return _complexity(generator, stages, side, name=name, summary=summary)


def _step(generator: Generator, side: int) -> Callable[[Tensor], Tensor]:
    """One evaluation of the UNet on a latent, for an LR image of ``side`` pixels."""
    if isinstance(generator, OneStepLatentGenerator):
        return generator.step
    t, lr = torch.empty(1, dtype=torch.long, device="meta"), torch.empty(1, 3, side, side, device="meta")
    return lambda z: cast(Tensor, generator.unet(z, t, lr))


def measure_discriminator(
    discriminator: NoiseAwareDiscriminator, side: int, factor: int, *, name: str, summary: str
) -> Complexity:
    """Complexity of judging the latent of one image of ``side`` pixels, ``factor`` pixels per latent cell.

    Training evaluates it three times for every pair: on the generator's latent for each of the two updates, and on the
    photo's. Inference does not use it. ``discriminator`` must be on the meta device.
    """
    if side < 1 or side % factor:
        raise UserError(f"size {side}: '{name}' counts images whose side is a multiple of {factor}")
    channels = cast(DiffusionEncoder, discriminator.encoder).latent_channels
    with torch.device("meta"):
        z_t, t = torch.empty(1, channels, side // factor, side // factor), torch.empty(1, dtype=torch.long)
        _, cost = count(discriminator, lambda: discriminator(z_t, t))
    return _complexity(discriminator, [Stage(name="discriminator", cost=cost)], side, name=name, summary=summary)


def measure_denoiser(unet: StableDiffusionUNet, side: int, *, name: str, summary: str) -> Complexity:
    """Complexity of one evaluation of ``unet`` on the latent of one image of ``side`` pixels, under a prompt of 77
    tokens: of what stands beside a generator while it learns, such as OSEDiff's regulariser and its teacher.

    ``unet`` must be on the meta device.
    """
    if side < 1 or side % SD_FACTOR:
        raise UserError(f"size {side}: '{name}' counts images whose side is a multiple of {SD_FACTOR}")
    cells, config = side // SD_FACTOR, unet.config
    with torch.device("meta"):
        z_t, t = torch.empty(1, config.in_channels, cells, cells), torch.empty(1, dtype=torch.long)
        prompt = torch.empty(1, TOKENS, config.cross_attention_dim)
        _, cost = count(unet, lambda: unet(z_t, t, prompt))
    return _complexity(unet, [Stage(name="denoiser", cost=cost)], side, name=name, summary=summary)


def _complexity(network: nn.Module, stages: Iterable[Stage], side: int, *, name: str, summary: str) -> Complexity:
    return Complexity(
        name=name,
        summary=summary,
        side=side,
        parameters=number_of(network.parameters()),
        trainable=number_of(network.parameters(), trainable=True),
        parts=_parts(network),
        stages=tuple(stages),
    )


def _parts(network: nn.Module) -> Mapping[str, int]:
    parts: Counter[str] = Counter()
    for name, parameter in network.named_parameters():
        parts["adapters" if ".lora_" in name else name.partition(".")[0]] += parameter.numel()
    return parts

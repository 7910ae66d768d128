"""The networks whose complexity can be counted by name, built on the meta device: no weights, no memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from onestepsr.benchmark.complexity import (
    SD_FACTOR,
    Complexity,
    measure_denoiser,
    measure_discriminator,
    measure_generator,
)
from onestepsr.core.errors import UnknownModel, UserError, did_you_mean
from onestepsr.models.architectures import RANDOM, build_network, is_random, random_backbone, random_generator
from onestepsr.models.backbones import load_discriminator_backbone
from onestepsr.models.discriminators import NoiseAwareDiscriminator
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.lora import LoraConfig, add_lora
from onestepsr.models.osediff.generator import ENCODER_LAYERS, FIRST_LAYER, UNET_LAYERS, OSEDiffGenerator
from onestepsr.models.resshift.checkpoints import is_published
from onestepsr.models.resshift.config import PUBLISHED
from onestepsr.models.resshift.generator import ResidualShiftGenerator, residual_shift_generator
from onestepsr.models.stable_diffusion.networks import StableDiffusionUNet
from onestepsr.weights import catalog
from onestepsr.weights.catalog import OSEDIFF_SCALES
from onestepsr.weights.native import read_weights

D3SR_SD21 = "d3sr-sd21"
D3SR_SD21_MERGED = "d3sr-sd21-merged"
TINY_FACTOR = 4


@dataclass(frozen=True, kw_only=True)
class CountedNetwork:
    """A network that has a name here."""

    summary: str
    """What it is, in one line."""
    build: Callable[[], nn.Module]
    """Builds it on the default device, with ``requires_grad`` as training sets it."""
    factor: int = 0
    """Of a discriminator: pixels per cell of the latents that it judges."""


def sd21_generator(targets: str | None = None, *, adapters: bool = True) -> OneStepLatentGenerator:
    """The generator of D3SR on Stable Diffusion 2.1, with adapters on the layers that ``targets`` matches (None: the
    backbone's own choice), or without; only adapters and prompt are trainable."""
    generator = random_backbone(f"{RANDOM}sd21-base").requires_grad_(False)
    if adapters:
        add_lora(generator.unet, LoraConfig(targets=targets))
        generator.prompt.requires_grad_(True)
    return generator


def _tiny_generator() -> nn.Module:
    """UNet, prompt and decoder are trained, as the packaged recipe says."""
    generator = _from_weights("d3sr-tiny").requires_grad_(False)
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(name.startswith(("unet.", "prompt", "autoencoder.decoder")))
    return generator


def _published(alias: str) -> nn.Module:
    return residual_shift_generator(PUBLISHED[alias]).requires_grad_(False)


def _osediff(scale: int = 4, *, adapters: bool = False) -> OSEDiffGenerator:
    """OSEDiff's generator; with ``adapters`` as it trains: on UNet and encoder, and the first convolution whole."""
    generator = OSEDiffGenerator.of(random_backbone(f"{RANDOM}sd21-base"), scale=scale).requires_grad_(False)
    if adapters:
        add_lora(generator.autoencoder, _osediff_lora(ENCODER_LAYERS))
        add_lora(generator.unet, _osediff_lora(UNET_LAYERS))
        first = rf"{FIRST_LAYER}\.base_layer\.\w+"
        for name, parameter in generator.unet.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or re.fullmatch(first, name) is not None)
    return generator


def _osediff_regulariser(*, adapters: bool) -> nn.Module:
    """The UNet of OSEDiff's regulariser, or without adapters that of its teacher."""
    unet = _osediff().unet
    if adapters:
        add_lora(unet, _osediff_lora(UNET_LAYERS))
    return unet


def _osediff_lora(layers: str) -> LoraConfig:
    return LoraConfig(rank=4, alpha=8.0, targets=layers)


def _discriminator(backbone: str, *, adapters: bool) -> NoiseAwareDiscriminator:
    encoder, prompt = load_discriminator_backbone(backbone)
    discriminator = NoiseAwareDiscriminator(encoder, prompt)
    if adapters:
        add_lora(encoder, LoraConfig())
    return discriminator


NETWORKS: dict[str, CountedNetwork] = {
    "d3sr-tiny": CountedNetwork(
        summary="the bundled model, of which all but the encoder is trained", build=_tiny_generator
    ),
    D3SR_SD21: CountedNetwork(
        summary="D3SR on Stable Diffusion 2.1-base as it trains: rank-16 adapters beside their layers",
        build=sd21_generator,
    ),
    D3SR_SD21_MERGED: CountedNetwork(
        summary="the same as it runs: adapters merged into their layers, nothing left to train",
        build=lambda: sd21_generator(adapters=False),
    ),
    "resshift-realsr-v1": CountedNetwork(
        summary="ResShift in 15 steps, nothing trained", build=lambda: _published("resshift-realsr-v1")
    ),
    "resshift-realsr-v3": CountedNetwork(
        summary="ResShift in 4 steps, nothing trained", build=lambda: _published("resshift-realsr-v3")
    ),
    "sinsr": CountedNetwork(
        summary="SinSR, the same networks in one step, as TAD-SR's", build=lambda: _published("sinsr")
    ),
    "osediff-sd21": CountedNetwork(
        summary="OSEDiff on Stable Diffusion 2.1-base as it trains: rank-4 adapters on UNet and encoder, first "
        "convolution",
        build=lambda: _osediff(adapters=True),
    ),
    "osediff": CountedNetwork(
        summary="the same as it runs: adapters merged; without the text encoder and whoever finds the prompt",
        build=_osediff,
    ),
    "osediff-regularizer": CountedNetwork(
        summary="its second UNet, which follows the generator under rank-4 adapters; training only",
        build=lambda: _osediff_regulariser(adapters=True),
    ),
    "osediff-teacher": CountedNetwork(
        summary="its third UNet, frozen; training only", build=lambda: _osediff_regulariser(adapters=False)
    ),
    "tiny-discriminator": CountedNetwork(
        summary="half of the tiny UNet, all of it trained; training only",
        build=lambda: _discriminator("random:d3sr-tiny", adapters=False),
        factor=TINY_FACTOR,
    ),
    "sd21-discriminator": CountedNetwork(
        summary="half of the Stable Diffusion 2.1-base UNet, rank-16 adapters; training only",
        build=lambda: _discriminator("random:sd21-base", adapters=True),
        factor=SD_FACTOR,
    ),
    "sdxl-discriminator": CountedNetwork(
        summary="half of the SDXL-base UNet, rank-16 adapters; training only",
        build=lambda: _discriminator("random:sdxl-base", adapters=True),
        factor=SD_FACTOR,
    ),
}


def default_names() -> list[str]:
    """Every network that has a name here, and every bundled model besides."""
    bundled = (spec.id for spec in catalog.list_models("upscaler") if spec.bundled)
    return [*NETWORKS, *(name for name in bundled if name not in NETWORKS)]


def measure(name_or_path: str, side: int) -> Complexity:
    """Complexity of a network named in :data:`NETWORKS`, of another model or backbone, of ``random:ALIAS``, or of a
    weights file of ours, for one image of ``side`` x ``side`` pixels.

    No weights are read. Raises :class:`UnknownModel` for other names and :class:`UserError` for a network that is no
    generator, a file that cannot be read, or a side that does not suit the network.
    """
    with torch.device("meta"):
        network, summary, factor = _build(name_or_path)
        network.eval()
    if isinstance(network, NoiseAwareDiscriminator):
        return measure_discriminator(network, side, factor, name=name_or_path, summary=summary)
    if isinstance(network, StableDiffusionUNet):
        return measure_denoiser(network, side, name=name_or_path, summary=summary)
    if not isinstance(network, (OneStepLatentGenerator, ResidualShiftGenerator)):
        raise UserError(f"{name_or_path}: a {type(network).__name__} has no stages to count, expected a generator")
    return measure_generator(network, side, name=name_or_path, summary=summary)


def _build(name_or_path: str) -> tuple[nn.Module, str, int]:
    """Network, what it is, and its factor if it is a discriminator."""
    if name_or_path in NETWORKS:
        known = NETWORKS[name_or_path]
        return known.build(), known.summary, known.factor
    kinds = {spec.id: spec.kind for spec in catalog.list_models()}
    if is_random(name_or_path) or kinds.get(name_or_path) == "backbone":
        network = random_generator(name_or_path if is_random(name_or_path) else f"{RANDOM}{name_or_path}")
        return network.requires_grad_(False), "a backbone as it comes, nothing trained", 0
    if is_published(name_or_path):
        return _published(name_or_path), "a published model as it runs, nothing trained", 0
    if name_or_path in OSEDIFF_SCALES:
        return _osediff(OSEDIFF_SCALES[name_or_path]), "a published model as it runs, nothing trained", 0
    if kinds.get(name_or_path) != "upscaler" and not Path(name_or_path).is_file():
        raise UnknownModel(
            f"unknown network '{name_or_path}', and no weights file of ours: {did_you_mean(name_or_path, NETWORKS)}"
        )
    return _from_weights(name_or_path).requires_grad_(False), "a model as it runs, nothing trained", 0


def _from_weights(name_or_path: str) -> nn.Module:
    """The network that a weights file of ours describes, without its weights."""
    path = catalog.resolve(name_or_path)
    architecture, config, _ = read_weights(path, lambda key: False)
    return build_network(architecture, config, path)


# Which adapters reproduce the paper's figures for D3SR: sets of layers, each with its parameters ----------------------

ATTENTION = r"to_q|to_k|to_v|to_out\.0"
TRANSFORMER = rf"{ATTENTION}|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2"
NAMED = {"none, or merged": D3SR_SD21_MERGED, "every layer inside the blocks (default)": D3SR_SD21}
"""Sets of layers that are networks with a name."""
SETS = (
    ("none, or merged", ""),
    ("attention", rf".*\.({ATTENTION})"),
    ("attention, projections, feed-forward", rf".*\.({TRANSFORMER})"),
    ("these and every convolution", rf".*({TRANSFORMER}|conv\w*)"),
    ("every layer inside the blocks (default)", ""),
    ("every layer", r".*"),
)
"""Sets of layers, each with the regular expression of their names where it has no name of its own."""


@dataclass(frozen=True, kw_only=True)
class AdapterSet:
    """D3SR on Stable Diffusion 2.1-base with adapters on one set of layers."""

    layers: str
    """Which layers have adapters."""
    complexity: Complexity
    """The whole generator."""

    @property
    def thop_macs(self) -> int:
        """MACs of the whole generator as the profiler thop reports them."""
        return sum(stage.cost.thop_macs for stage in self.complexity.stages)

    @property
    def thop_parameters(self) -> int:
        """Parameters of the whole generator as the profiler thop reports them."""
        return sum(stage.cost.thop_parameters for stage in self.complexity.stages)


def compare_adapters(side: int, counted: Sequence[Complexity] = ()) -> list[AdapterSet]:
    """D3SR with every set of adapters of :data:`SETS`, for one image of ``side`` x ``side``; networks that have been
    ``counted`` for that size already are not counted again."""
    known = {network.name: network for network in counted}
    return [AdapterSet(layers=layers, complexity=_measure(layers, targets, side, known)) for layers, targets in SETS]


def _measure(layers: str, targets: str, side: int, known: dict[str, Complexity]) -> Complexity:
    if layers in NAMED:
        name = NAMED[layers]
        return known[name] if name in known else measure(name, side)
    with torch.device("meta"):
        generator = sd21_generator(targets).eval()
    return measure_generator(generator, side, name=layers, summary="")

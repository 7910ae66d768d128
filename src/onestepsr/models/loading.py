"""Models by name or path: how to build them, and whether a file is what it says.

Weights are safetensors files whose metadata names the architecture and carries its configuration as JSON. An
architecture is a function from that configuration to a network; the names are in ``catalog``.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.diffusion.residual_shift import ResidualShiftConfig, ResidualShiftSchedule
from onestepsr.models.architectures import is_random, load_native, random_generator, repeatable
from onestepsr.models.backbones import load_backbone
from onestepsr.models.generators import BicubicGenerator, OneStepLatentGenerator
from onestepsr.models.osediff.adapters import Adapters, merge
from onestepsr.models.osediff.checkpoints import ARCHITECTURE, looks_published, read_any
from onestepsr.models.osediff.generator import OSEDiffGenerator, Posterior
from onestepsr.models.resshift.checkpoints import is_published, load_published
from onestepsr.models.resshift.generator import ResidualShiftGenerator, Sampler
from onestepsr.models.stable_diffusion.config import PromptConfig
from onestepsr.models.tiny.decoder import FACTOR
from onestepsr.models.tiny.denoiser import TinyDenoiser, TinyDenoiserConfig
from onestepsr.models.tiny.edit import blend, match_architecture
from onestepsr.models.tiny.networks import TinyAutoencoder
from onestepsr.weights.catalog import (
    BICUBIC,
    OSEDIFF_SCALES,
    get_model,
    list_models,
    require_upscaler,
    resolve,
)
from onestepsr.weights.download import download_all
from onestepsr.weights.native import architecture_of


def load_network(name_or_path: str | Path) -> nn.Module:
    """The network that an alias or a weights file names, in float32 on the CPU, in eval mode.

    Raises :class:`UserError` in one line for an unknown name, a damaged file and weights that do not fit.
    """
    require_upscaler(name_or_path)
    if is_published(name_or_path):
        return load_published(str(name_or_path))
    if str(name_or_path) in OSEDIFF_SCALES and not Path(name_or_path).is_file():
        return load_osediff(name_or_path)
    return load_native(resolve(name_or_path))


def load_generator(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    steps: int | None = None,
    sampler: str | None = None,
    fidelity: float | None = None,
    faster: bool = True,
) -> nn.Module:
    """The generator called ``name_or_path`` (alias, safetensors file or ``random:ALIAS``), ready for inference.

    It maps LR (N, 3, h, w) in [0, 1] of any size to SR (N, 3, s h, s w), where s is its attribute ``scale``. Of a model
    that shifts residuals, ``steps`` and ``sampler`` can be chosen; None is what it was made for. Of a model with a
    faithful counterpart, ``fidelity`` (0 to 1) chooses a place between the two. ``faster``: with layers that take less
    time and memory in inference, where there are such; False leaves those that were trained.
    """
    network = _generator_without_file(str(name_or_path)) or load_network(name_or_path)
    if not isinstance(network, (OneStepLatentGenerator, ResidualShiftGenerator, BicubicGenerator)):
        raise UserError(f"{name_or_path}: a {type(network).__name__} is no generator; it cannot upscale by itself")
    _choose_sampling(network, str(name_or_path), steps, sampler)
    if fidelity is not None:
        if not 0.0 <= fidelity <= 1.0:
            raise UserError(f"fidelity: {fidelity:g}, accepted: 0 (the model as it is) to 1 (its faithful counterpart)")
        network = blend(*match_architecture(network, load_network(_faithful(str(name_or_path)))), fidelity)
    network.requires_grad_(False).to(device=device, dtype=dtype)
    if isinstance(network, OneStepLatentGenerator):
        network.freeze_prompt()
    if faster and isinstance(network, (OneStepLatentGenerator, ResidualShiftGenerator)):
        network.speed_up()
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _choose_sampling(network: nn.Module, name: str, steps: int | None, sampler: str | None) -> None:
    if isinstance(network, ResidualShiftGenerator):
        network.choose(steps, sampler)
    elif steps is not None or sampler is not None:
        wish = f"--steps {steps}" if steps is not None else f"--sampler {sampler}"
        raise UserError(f"{wish}: '{name}' takes no steps; the ResShift family does, see 'onestepsr models list'")


def _faithful(name: str) -> str:
    """The counterpart of a model at the faithful end of the fidelity control."""
    having = [spec.id for spec in list_models() if spec.faithful]
    spec = get_model(name) if name in having else None
    if spec is None:
        raise UserError(f"fidelity: '{name}' has no faithful counterpart; accepted: {', '.join(having)}")
    return spec.faithful


def _generator_without_file(name: str) -> nn.Module | None:
    if is_random(name):
        return random_generator(name).eval()
    return BicubicGenerator().eval() if name == BICUBIC else None


# Generators of the residual-shifting family as training starts from them: teachers, students, ne ----------------------


def load_residual_generator(name_or_path: str | Path) -> ResidualShiftGenerator:
    """The generator called ``name_or_path``, in float32 on the CPU (``random:ALIAS`` also on "meta"), trainable.

    That is an alias, a safetensors file of ours or ``random:`` with one of resshift-realsr, resshift-face, sinsr,
    resshift-tiny and resshift-micro. Raises :class:`UserError` in one line.
    """
    generator = _load(name_or_path)
    if not isinstance(generator, ResidualShiftGenerator):
        raise UserError(f"{name_or_path}: holds a {type(generator).__name__}, expected a model of the ResShift family")
    return generator.eval()


def residual_generator_on(
    autoencoder: str | Path,
    denoiser: TinyDenoiserConfig | None = None,
    *,
    schedule: ResidualShiftConfig | None = None,
    sampler: Sampler = "ancestral",
) -> ResidualShiftGenerator:
    """An untrained denoising network on a trained tiny autoencoder; its weights are the same at every call.

    ``autoencoder`` is the file that ``train autoencoder`` writes, or a model whose autoencoder that is. ``denoiser``
    are the network's sizes, by default those for its latents. Every step of ``schedule`` is run.
    """
    network = _load(autoencoder)
    trained = network if isinstance(network, TinyAutoencoder) else getattr(network, "autoencoder", None)
    if not isinstance(trained, TinyAutoencoder):
        raise UserError(f"{autoencoder}: holds a {type(network).__name__} without a tiny autoencoder")
    sizes = denoiser or TinyDenoiserConfig(latent_channels=trained.latent_channels)
    if sizes.latent_channels != trained.latent_channels:
        raise UserError(
            f"{autoencoder}: latents of {trained.latent_channels} channels, the denoiser is for {sizes.latent_channels}"
        )
    with repeatable():
        unet = TinyDenoiser(sizes)
    return ResidualShiftGenerator(trained, unet, ResidualShiftSchedule(schedule), sampler=sampler, scale=FACTOR).eval()


def _load(name_or_path: str | Path) -> nn.Module:
    return random_generator(str(name_or_path)) if is_random(name_or_path) else load_network(name_or_path)


# Published OSEDiff models as generators: adapters, read and added to the backbone that they were ----------------------

logger = logging.getLogger(__name__)

DEFAULT_BACKBONE = "sd21-base"


def holds_adapters(name_or_path: str | Path) -> bool:
    """Whether it is the alias of a published OSEDiff model, its pickle, or a file of adapters of ours."""
    path = Path(name_or_path)
    if not path.is_file():
        return str(name_or_path) in OSEDIFF_SCALES
    return architecture_of(path) == ARCHITECTURE or looks_published(path)


def load_osediff(
    source: str | Path,
    *,
    backbone: str | Path | None = None,
    prompt_file: Path | None = None,
    published_as: str | None = None,
    posterior: Posterior = "mean",
) -> OSEDiffGenerator:
    """The generator that the weights ``source`` make of ``backbone``, in float32 on the CPU, in eval mode.

    ``source`` is an alias, the published pickle or a file of adapters of ours; ``backbone`` is what
    :func:`load_backbone` takes, by default Stable Diffusion 2.1-base. ``published_as`` is the alias of a file, which
    says whether it enlarges; ``posterior`` is that of :class:`OSEDiffGeneratorConfig`. ``prompt_file`` (see
    :func:`read_prompt`) holds the embedding for images that come without one; zeros stand in for it. Raises
    :class:`UserError` in one line for weights of another backbone.
    """
    scale = _scale(source, published_as)
    path, own_backbone = _files(source, backbone)
    adapters = read_any(path)
    network = load_backbone(own_backbone, prompt=PromptConfig(std=0.0), prompt_file=prompt_file)
    if prompt_file is None:
        logger.info("%s: no prompt embedding is given: zeros stand in for it, which is not that of an empty text", path)
    generator = OSEDiffGenerator.of(network, scale=scale, posterior=posterior)
    merge(generator, adapters, str(path))
    return generator.eval()


def adapters_of(source: str | Path) -> Adapters:
    """The adapters behind an alias or in a file; the backbone is not fetched."""
    return read_any(_files(source, DEFAULT_BACKBONE)[0])


def _scale(source: str | Path, published_as: str | None) -> int:
    alias = published_as or (str(source) if not Path(source).is_file() else "osediff")
    if alias not in OSEDIFF_SCALES:
        raise UserError(f"--as {alias}: no published model of OSEDiff: {did_you_mean(alias, OSEDIFF_SCALES)}")
    return OSEDIFF_SCALES[alias]


def _files(source: str | Path, backbone: str | Path | None) -> tuple[Path, str | Path]:
    """File of adapters and backbone: those that are given, or else the alias's own, fetched if they are missing."""
    if Path(source).is_file():
        return Path(source), backbone or DEFAULT_BACKBONE
    wanted = get_model(str(source)).downloads
    adapters, *rest = download_all(wanted if backbone is None else wanted[:1])
    return adapters, backbone or rest[0]

"""Everything that turns a name or a path into a network: generators for inference, and networks to train from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn

from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.core.files import at_home
from onestepsr.diffusion.residual_shift import ResidualShiftConfig
from onestepsr.models.architectures import is_random, load_native, random_generator, repeatable
from onestepsr.models.backbones import load_backbone
from onestepsr.models.community import is_foreign, load_community
from onestepsr.models.generators import BicubicGenerator, Generator, LatentGenerator
from onestepsr.models.osediff.checkpoints import ARCHITECTURE, Adapters, looks_published, merge, read_any
from onestepsr.models.osediff.generator import OSEDiffGenerator, Posterior
from onestepsr.models.realesrgan.checkpoints import load_realesrgan
from onestepsr.models.realesrgan.checkpoints import looks_published as looks_like_realesrgan
from onestepsr.models.resshift.checkpoints import load_published
from onestepsr.models.resshift.config import PUBLISHED, Sampler, TinyResidualShiftGeneratorConfig
from onestepsr.models.resshift.generator import ResidualShiftGenerator
from onestepsr.models.stable_diffusion.config import PromptConfig
from onestepsr.models.tiny.denoiser import TinyDenoiser, TinyDenoiserConfig
from onestepsr.models.tiny.generator import blend, match_architecture
from onestepsr.models.tiny.networks import TinyAutoencoder
from onestepsr.weights.catalog import BICUBIC, OSEDIFF_SCALES, get_model, list_models, require_upscaler, resolve
from onestepsr.weights.download import download_all
from onestepsr.weights.files import architecture_of

logger = logging.getLogger(__name__)

DEFAULT_BACKBONE = "sd21-base"
"""Backbone of OSEDiff's adapters unless another is named."""


# ---- OSEDiff: adapters added to a backbone ----


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
    alias = published_as or (str(source) if not Path(source).is_file() else "osediff")
    if alias not in OSEDIFF_SCALES:
        raise UserError(f"--as {alias}: no published model of OSEDiff: {did_you_mean(alias, OSEDIFF_SCALES)}")
    path, own_backbone = _osediff_files(source, backbone)
    adapters = read_any(path)
    network = load_backbone(own_backbone, prompt=PromptConfig(std=0.0), prompt_file=prompt_file)
    if prompt_file is None:
        logger.info("%s: no prompt embedding is given: zeros stand in for it, which is not that of an empty text", path)
    generator = OSEDiffGenerator.of(
        network, scale=OSEDIFF_SCALES[alias], posterior=posterior, enlarging=adapters.enlarging
    )
    merge(generator, adapters, str(path))
    return generator.eval()


def holds_adapters(name_or_path: str | Path) -> bool:
    """True for the alias of a published OSEDiff model, its pickle, or a file of adapters of ours."""
    path = Path(name_or_path)
    if not path.is_file():
        return str(name_or_path) in OSEDIFF_SCALES
    return architecture_of(path) == ARCHITECTURE or looks_published(path)


def adapters_of(source: str | Path) -> Adapters:
    """The adapters behind an alias or in a file; the backbone is not fetched."""
    return read_any(_osediff_files(source, DEFAULT_BACKBONE)[0])


def _osediff_files(source: str | Path, backbone: str | Path | None) -> tuple[Path, str | Path]:
    """File of adapters and backbone: those that are given, or else the alias's own, fetched if they are missing."""
    if Path(source).is_file():
        return Path(source), backbone or DEFAULT_BACKBONE
    wanted = get_model(str(source)).downloads
    adapters, *rest = download_all(wanted if backbone is None else wanted[:1])
    return adapters, backbone or rest[0]


# ---- any network by name ----

LOADERS: dict[str, Callable[[str], nn.Module]] = {
    "random": random_generator,
    "native": lambda name: load_native(resolve(name)),
    "bicubic": lambda name: BicubicGenerator(),
    "resshift": load_published,
    "osediff": load_osediff,
    "realesrgan": lambda name: load_realesrgan(resolve(name)),
    "community": lambda name: load_community(resolve(name)),
}
"""Loader of each family of names: random weights, files and aliases of files of ours, published models, and files of
other projects."""
ALIASES: dict[str, Collection[str]] = {
    "bicubic": (BICUBIC,),
    "resshift": PUBLISHED,
    "osediff": OSEDIFF_SCALES,
    **{name: [spec.id for spec in list_models() if spec.family == name] for name in ("realesrgan", "community")},
}
"""Names of the published models by family; every other name is one of ours."""


def load_network(name_or_path: str | Path) -> nn.Module:
    """The network that an alias, a weights file or ``random:ALIAS`` names, in float32 on the CPU, in eval mode.

    Raises :class:`UserError` in one line for an unknown name, a damaged file and weights that do not fit.
    """
    name_or_path = at_home(Path(name_or_path)) if str(name_or_path).startswith("~") else name_or_path
    require_upscaler(name_or_path)
    return LOADERS[family_of(str(name_or_path))](str(name_or_path)).eval()


def family_of(name: str) -> str:
    """Key in :data:`LOADERS` for an alias, a weights file or ``random:ALIAS``; "native" for a name that is unknown."""
    if is_random(name):
        return "random"
    if looks_like_realesrgan(Path(name)):
        return "realesrgan"
    if Path(name).is_file():
        return "community" if is_foreign(Path(name)) else "native"
    return next((family for family, names in ALIASES.items() if name in names), "native")


# ---- a generator for inference ----


def load_generator(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    steps: int | None = None,
    sampler: str | None = None,
    fidelity: float | None = None,
    faster: bool = True,
) -> Generator:
    """The generator called ``name_or_path`` (alias, safetensors file or ``random:ALIAS``), ready for inference.

    Of a model that shifts residuals, ``steps`` and ``sampler`` can be chosen; None is what it was made for. Of a model
    with a faithful counterpart, ``fidelity`` (0 to 1) chooses a point between the two. ``faster``: with layers that
    take less time and memory in inference, where there are such; False leaves those that were trained.
    """
    name = str(name_or_path)
    generator = _as_generator(load_network(name_or_path), name)
    if isinstance(generator, ResidualShiftGenerator):
        generator.choose_sampling(steps, sampler)
    elif steps is not None or sampler is not None:
        wish = f"--steps {steps}" if steps is not None else f"--sampler {sampler}"
        raise UserError(f"{wish}: '{name}' takes no steps; the ResShift family does, see 'onestepsr models list'")
    generator = _with_fidelity(generator, name, fidelity)
    generator.requires_grad_(False).to(device=device, dtype=dtype)
    generator.freeze_prompt()
    if faster:
        generator.speed_up()
    return generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _as_generator(network: nn.Module, name: str) -> Generator:
    if not isinstance(network, Generator):
        raise UserError(f"{name}: a {type(network).__name__} is no generator; it cannot upscale by itself")
    return network


def _with_fidelity(generator: Generator, name: str, fidelity: float | None) -> Generator:
    """The generator blended with the model at the faithful end of the fidelity control."""
    if fidelity is None:
        return generator
    counterparts = {spec.id: spec.faithful for spec in list_models() if spec.faithful}
    if not 0.0 <= fidelity <= 1.0:
        raise UserError(f"fidelity: {fidelity:g}, accepted: 0 (the model as it is) to 1 (its faithful counterpart)")
    if name not in counterparts:
        raise UserError(f"fidelity: '{name}' has no faithful counterpart; accepted: {', '.join(counterparts)}")
    return _as_generator(blend(*match_architecture(generator, load_network(counterparts[name])), fidelity), name)


# ---- generators of the residual-shifting family, to train from ----


def load_residual_generator(name_or_path: str | Path) -> ResidualShiftGenerator:
    """The generator called ``name_or_path``, in float32 on the CPU (``random:ALIAS`` also on "meta"), trainable.

    That is an alias, a safetensors file of ours or ``random:`` with an alias, resshift-tiny or resshift-micro. Raises
    :class:`UserError` in one line.
    """
    generator = load_network(name_or_path)
    if not isinstance(generator, ResidualShiftGenerator):
        raise UserError(f"{name_or_path}: holds a {type(generator).__name__}, expected a model of the ResShift family")
    return generator


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
    network = load_network(autoencoder)
    trained = network.autoencoder if isinstance(network, LatentGenerator) else network
    if not isinstance(trained, TinyAutoencoder):
        raise UserError(f"{autoencoder}: holds a {type(network).__name__} without a tiny autoencoder")
    sizes = denoiser or TinyDenoiserConfig(latent_channels=trained.latent_channels)
    if sizes.latent_channels != trained.latent_channels:
        raise UserError(
            f"{autoencoder}: latents of {trained.latent_channels} channels, the denoiser is for {sizes.latent_channels}"
        )
    config = TinyResidualShiftGeneratorConfig(
        denoiser=sizes, autoencoder=trained.config, schedule=schedule or ResidualShiftConfig(), sampler=sampler
    )
    with repeatable():
        unet = TinyDenoiser(sizes)
    return ResidualShiftGenerator(trained, unet, config).eval()

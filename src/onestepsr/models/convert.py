"""Foreign backbones and published checkpoints into weights files of ours, and OSEDiff's adapters back again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.models.architectures import RESIDUAL, TINY_RESIDUAL, describe
from onestepsr.models.backbones import load_backbone, load_discriminator_backbone
from onestepsr.models.loading import adapters_of, holds_adapters, load_network, load_osediff
from onestepsr.models.osediff.checkpoints import read_published, write_adapters, write_published
from onestepsr.models.osediff.generator import Posterior
from onestepsr.models.resshift.checkpoints import is_published, load_published, looks_published
from onestepsr.models.resshift.config import PUBLISHED
from onestepsr.models.seesr import generator as seesr
from onestepsr.models.tiny.generator import blend, equalize_subpixel_contrast, match_architecture
from onestepsr.weights.files import architecture_of, save_model

ADAPTERS = ".adapters.safetensors"
"""Ending of the file that keeps OSEDiff's adapters beside the model that they made."""
Part = Literal["generator", "discriminator"]
"""The whole backbone, or the half UNet that a discriminator is made of."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A written file."""

    file: Path
    """The weights file."""
    architecture: str
    """Its architecture."""
    parameters: int
    """Number of its parameters."""
    bytes: int
    """Its size."""


def convert(
    source: str | Path,
    target: Path,
    *,
    part: Part = "generator",
    published_as: str | None = None,
    autoencoder: Path | None = None,
    backbone: str | Path | None = None,
    prompt_file: Path | None = None,
    posterior: Posterior | None = None,
    seesr_prompts: tuple[Tensor, Tensor] | None = None,
    towards: Path | None = None,
    share: float = 0.5,
    even_contrast: bool = False,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Converted:
    """Write what ``source`` holds into ``target``, in ``dtype``; the written file is loaded as a proof.

    A backbone (see :func:`load_backbone`) is written whole, or the half that a discriminator is made of. ``towards`` is
    a second backbone of the same shape: the weights written lie the part ``share`` of the way to its own.
    ``even_contrast`` is :func:`onestepsr.models.tiny.generator.equalize_subpixel_contrast`.

    A model of the ResShift family is an alias, a file of ours, or a published UNet. The latter needs ``published_as``,
    the alias whose sizes, schedule and sampler it has; ``autoencoder`` is the file of its autoencoder, by default that
    of the alias.

    OSEDiff's adapters are added to their ``backbone``; the other arguments are those of :func:`load_osediff`. The
    adapters as they are go into a second file, whose name ends in ``.adapters.safetensors``.

    SeeSR is a folder with ``unet`` and ``controlnet``; ``backbone`` is the diffusers folder of Stable Diffusion beside
    it, and ``seesr_prompts`` are the embeddings (1, L, C) of the empty text and of SeeSR's negative prompt.

    Raises :class:`UserError` in one line when the source is of no kind, ``target`` exists already, the numbers do not
    fit ``dtype``, or an option is for sources of another kind; nothing is left behind then.
    """
    _check_absent(target, overwrite)
    if seesr.looks_published(source):
        others = (published_as, autoencoder, prompt_file, posterior, towards, even_contrast or None)
        if part != "generator" or any(other is not None for other in others):
            raise UserError(f"{source}: SeeSR takes --backbone, --dtype and --overwrite alone")
        if backbone is None or not Path(backbone).is_dir():
            raise UserError(
                f"{source}: SeeSR needs --backbone, the diffusers folder of Stable Diffusion 2-base or 2.1-base"
            )
        prompt, negative = seesr_prompts or (None, None)
        return _written(
            seesr.read_published(Path(source), Path(backbone), prompt=prompt, negative=negative), target, dtype
        )
    is_osediff = holds_adapters(source)
    if not is_osediff and (backbone, prompt_file, posterior) != (None, None, None):
        if Path(source).suffix == ".pkl":
            read_published(Path(source))  # says what is wrong with it
        options = "--backbone, --prompt-embedding and --posterior"
        raise UserError(f"{source}: holds no adapters of OSEDiff, which {options} are for")
    if not is_osediff and published_as is None and autoencoder is None and not _is_residual(source):
        network = _load_part(source, part)
        if towards is not None:
            network = blend(*match_architecture(network, _load_part(towards, part)), share)
        return _written(equalize_subpixel_contrast(network) if even_contrast else network, target, dtype)
    if part != "generator":
        kinds = (
            ("a whole backbone", "OSEDiff's adapters") if is_osediff else ("Stable Diffusion", "the ResShift family")
        )
        raise UserError(f"{source}: --part {part} is for {kinds[0]}, not for {kinds[1]}")
    if towards is not None or even_contrast:
        option = "--towards" if towards is not None else "--even-contrast"
        raise UserError(f"{source}: {option} is for one-step generators in files of ours")
    if is_osediff and autoencoder is not None:
        raise UserError(f"{source}: --autoencoder is for the ResShift family, not for OSEDiff's adapters")
    if not is_osediff:
        return _written(_load_residual_shift(source, published_as, autoencoder), target, dtype)
    beside = target.with_name(target.name.removesuffix(".safetensors") + ADAPTERS)
    _check_absent(beside, overwrite)
    generator = load_osediff(
        source, backbone=backbone, prompt_file=prompt_file, published_as=published_as, posterior=posterior or "mean"
    )
    converted = _written(generator, target, dtype)
    write_adapters(beside, adapters_of(source))
    return converted


def _load_part(source: str | Path, part: Part) -> nn.Module:
    return load_backbone(source, for_training=True) if part == "generator" else load_discriminator_backbone(source)[0]


def _load_residual_shift(source: str | Path, published_as: str | None, autoencoder: Path | None) -> nn.Module:
    if architecture_of(source):
        if published_as is not None or autoencoder is not None:
            raise UserError(f"{source}: is a file of ours already; --as and --autoencoder are for published files")
        return load_network(source)
    if is_published(source):
        if published_as not in (None, str(source)):
            raise UserError(f"--as {published_as}: '{source}' is a published model itself")
        return load_published(str(source), autoencoder=autoencoder)
    if published_as is None:
        raise UserError(f"--autoencoder {autoencoder}: needs --as with one of {', '.join(PUBLISHED)}")
    return load_published(published_as, unet=source, autoencoder=autoencoder)


def convert_to_published(source: str | Path, target: Path, *, overwrite: bool = False) -> Converted:
    """Write OSEDiff's adapters in the layout of its published ``osediff.pkl``, from a file of adapters of ours."""
    _check_absent(target, overwrite, ".pkl")
    if not holds_adapters(source):
        raise UserError(
            f"{source}: holds no adapters of OSEDiff; they are in a file '*{ADAPTERS}' beside a converted model"
        )
    adapters = adapters_of(source)
    with _write_errors_named(target):
        write_published(target, adapters)
    parameters = sum(value.numel() for state in (adapters.unet, adapters.vae) for value in state.values())
    return Converted(file=target, architecture="osediff.pkl", parameters=parameters, bytes=target.stat().st_size)


def _is_residual(source: str | Path) -> bool:
    """True for a name or file of a model of the ResShift family; raises for a file that does not say which."""
    if is_published(source) or architecture_of(source) in (RESIDUAL, TINY_RESIDUAL):
        return True
    path = Path(source)
    if path.is_file() and not architecture_of(path) and looks_published(path):
        raise UserError(
            f"{path}: a UNet of the ResShift family; --as says which of the published models it is: "
            f"{', '.join(PUBLISHED)}"
        )
    return False


# ---- writing ----


def _check_absent(target: Path, overwrite: bool, suffix: str = ".safetensors") -> None:
    if target.suffix != suffix:
        raise UserError(f"{target}: the file to write must end in {suffix}")
    if target.is_dir() or (target.exists() and not overwrite):
        raise UserError(f"{target}: is already there; --overwrite replaces a file")


def _written(network: nn.Module, target: Path, dtype: torch.dtype) -> Converted:
    """Write the weights of ``network``, and load the file."""
    architecture, config = describe(network)
    state = {key: _cast(key, value, dtype) for key, value in network.state_dict().items()}
    parameters = sum(parameter.numel() for parameter in network.parameters())
    with _write_errors_named(target):
        save_model(target, architecture=architecture, config=config, state_dict=state)
    load_network(target)
    return Converted(file=target, architecture=architecture, parameters=parameters, bytes=target.stat().st_size)


@contextmanager
def _write_errors_named(target: Path) -> Iterator[None]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    result = value.to(dtype)
    if not result.isfinite().all():
        raise UserError(f"weight '{key}' is too large for {str(dtype).removeprefix('torch.')}: try bfloat16 or float32")
    return result

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


@dataclass(frozen=True, kw_only=True)
class Target:
    """A file to write."""

    file: Path
    """Its path, which must end in ``.safetensors``."""
    dtype: torch.dtype = torch.float32
    """Dtype of the floating-point weights in it."""
    overwrite: bool = False
    """Replace a file that exists."""


# ---- one function per kind of source ----


def convert_backbone(
    source: str | Path,
    target: Target,
    *,
    part: Part = "generator",
    towards: Path | None = None,
    share: float = 0.5,
    even_contrast: bool = False,
) -> Converted:
    """Write a backbone (see :func:`load_backbone`), or the half of it that a discriminator is made of.

    ``towards`` is a second backbone of the same shape: the weights written lie the part ``share`` of the way to its
    own. ``even_contrast`` is :func:`onestepsr.models.tiny.generator.equalize_subpixel_contrast`.
    """

    def load(name: str | Path) -> nn.Module:
        return load_backbone(name) if part == "generator" else load_discriminator_backbone(name)[0]

    network = load(source)
    if towards is not None:
        network = blend(*match_architecture(network, load(towards)), share)
    if even_contrast:
        network = equalize_subpixel_contrast(network)
    return _written(network, target)


def convert_residual_shift(
    source: str | Path, target: Target, *, published_as: str | None = None, autoencoder: Path | None = None
) -> Converted:
    """Write a model of the ResShift family: an alias, a file of ours, or a published UNet.

    A published UNet needs ``published_as``, the alias whose sizes, schedule and sampler it has; ``autoencoder`` is the
    file of its autoencoder, by default that of the alias.
    """
    if architecture_of(source):
        if published_as is not None or autoencoder is not None:
            raise UserError(f"{source}: is a file of ours already; --as and --autoencoder are for published files")
        return _written(load_network(source), target)
    if is_published(source):
        if published_as not in (None, str(source)):
            raise UserError(f"--as {published_as}: '{source}' is a published model itself")
        return _written(load_published(str(source), autoencoder=autoencoder), target)
    if published_as is None:
        raise UserError(f"--autoencoder {autoencoder}: needs --as with one of {', '.join(PUBLISHED)}")
    return _written(load_published(published_as, unet=source, autoencoder=autoencoder), target)


def convert_osediff(
    source: str | Path,
    target: Target,
    *,
    published_as: str | None = None,
    backbone: str | Path | None = None,
    prompt_file: Path | None = None,
    posterior: Posterior = "mean",
) -> Converted:
    """Write OSEDiff's adapters added to their ``backbone``; the other arguments are those of :func:`load_osediff`.

    The adapters as they are go into a second file, whose name ends in ``.adapters.safetensors``.
    """
    beside = target.file.with_name(target.file.name.removesuffix(".safetensors") + ADAPTERS)
    _check_absent(beside, target.overwrite)
    generator = load_osediff(
        source, backbone=backbone, prompt_file=prompt_file, published_as=published_as, posterior=posterior
    )
    converted = _written(generator, target)
    write_adapters(beside, adapters_of(source))
    return converted


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


# ---- the function that a source asks for ----


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
    towards: Path | None = None,
    share: float = 0.5,
    even_contrast: bool = False,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Converted:
    """Convert ``source`` by the function for its kind; the written file is loaded as a proof.

    Raises :class:`UserError` in one line when the source is of no kind, ``target`` exists already, the numbers do not
    fit ``dtype``, or an option is for sources of another kind; nothing is left behind then.
    """
    to = Target(file=target, dtype=dtype, overwrite=overwrite)
    _check_absent(target, overwrite)
    is_osediff = holds_adapters(source)
    if not is_osediff and (backbone, prompt_file, posterior) != (None, None, None):
        if Path(source).suffix == ".pkl":
            read_published(Path(source))  # says what is wrong with it
        options = "--backbone, --prompt-embedding and --posterior"
        raise UserError(f"{source}: holds no adapters of OSEDiff, which {options} are for")
    if not is_osediff and published_as is None and autoencoder is None and not _is_residual(source):
        return convert_backbone(source, to, part=part, towards=towards, share=share, even_contrast=even_contrast)
    if part != "generator":
        kinds = (
            ("a whole backbone", "OSEDiff's adapters") if is_osediff else ("Stable Diffusion", "the ResShift family")
        )
        raise UserError(f"{source}: --part {part} is for {kinds[0]}, not for {kinds[1]}")
    if towards is not None or even_contrast:
        option = "--towards" if towards is not None else "--even-contrast"
        raise UserError(f"{source}: {option} is for one-step generators in files of ours")
    if not is_osediff:
        return convert_residual_shift(source, to, published_as=published_as, autoencoder=autoencoder)
    return convert_osediff(
        source,
        to,
        published_as=published_as,
        backbone=backbone,
        prompt_file=prompt_file,
        posterior=posterior or "mean",
    )


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


def _written(network: nn.Module, target: Target) -> Converted:
    """Write the weights of ``network``, and load the file."""
    architecture, config = describe(network)
    state = {key: _cast(key, value, target.dtype) for key, value in network.state_dict().items()}
    parameters = sum(parameter.numel() for parameter in network.parameters())
    with _write_errors_named(target.file):
        save_model(target.file, architecture=architecture, config=config, state_dict=state)
    load_network(target.file)
    return Converted(
        file=target.file, architecture=architecture, parameters=parameters, bytes=target.file.stat().st_size
    )


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

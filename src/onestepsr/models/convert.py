"""Foreign backbones and published checkpoints into weights files of ours."""

from __future__ import annotations

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
from onestepsr.models.tiny.edit import blend, equalize_subpixel_contrast, match_architecture
from onestepsr.weights.native import architecture_of, save_model

ADAPTERS = ".adapters.safetensors"
"""How the file ends that keeps OSEDiff's adapters beside the model that they made."""
Part = Literal["generator", "discriminator"]
"""The whole backbone, or the half UNet that a discriminator is made of."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion has written."""

    file: Path
    """The weights file."""
    architecture: str
    """Its architecture."""
    parameters: int
    """Numbers in it."""
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
    towards: Path | None = None,
    share: float = 0.5,
    even_contrast: bool = False,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Converted:
    """Write a backbone (see :func:`load_backbone`), a model of the ResShift family or OSEDiff's adapters added to their
    ``backbone`` as a safetensors file of ours, and load that file as a proof.

    A published UNet of that family needs ``published_as``, the alias whose sizes, schedule and sampler it has;
    ``autoencoder`` is the file of its autoencoder, by default that of the alias. Raises :class:`UserError` in one line
    when the source is none, ``target`` exists already or the numbers do not fit ``dtype``; nothing is left behind then.
    Adapters stay as they are in a second file, whose name ends in ``.adapters.safetensors``; the model's prompt for
    images that come without one is read from ``prompt_file``, and ``posterior`` says what its encoder gives, the mean
    by default. ``towards`` is a second backbone of the same shape: the weights written lie the part ``share`` of the
    way to its own. ``even_contrast`` is :func:`onestepsr.models.tiny.edit.equalize_subpixel_contrast`.
    """
    _check_target(target, overwrite)
    adapters = _adapters_file(target, overwrite) if holds_adapters(source) else None
    if adapters is not None:
        network: nn.Module = _osediff(
            source,
            part,
            published_as=published_as,
            backbone=backbone,
            prompt_file=prompt_file,
            posterior=posterior or "mean",
        )
    elif (backbone, prompt_file, posterior) != (None, None, None):
        if Path(source).suffix == ".pkl":
            read_published(Path(source))  # says what is wrong with it
        options = "--backbone, --prompt-embedding and --posterior"
        raise UserError(f"{source}: holds no adapters of OSEDiff, which {options} are for")
    elif published_as is not None or autoencoder is not None or _is_residual(source):
        network = _residual(source, part, published_as, autoencoder)
    else:
        network = load_backbone(source) if part == "generator" else load_discriminator_backbone(source)[0]
    if towards is not None:
        other = load_backbone(towards) if part == "generator" else load_discriminator_backbone(towards)[0]
        network = blend(*match_architecture(network, other), share)
    if even_contrast:
        network = equalize_subpixel_contrast(network)
    architecture, config = describe(network)
    state = {key: _cast(key, value, dtype) for key, value in network.state_dict().items()}
    parameters = sum(parameter.numel() for parameter in network.parameters())
    del network  # two copies of a large backbone would not fit everywhere
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_model(target, architecture=architecture, config=config, state_dict=state)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    del state
    load_network(target)
    if adapters is not None:
        write_adapters(adapters, adapters_of(source))
    return Converted(file=target, architecture=architecture, parameters=parameters, bytes=target.stat().st_size)


def convert_to_published(source: str | Path, target: Path, *, overwrite: bool = False) -> Converted:
    """Write OSEDiff's adapters in the layout of its published ``osediff.pkl``, from a file of adapters of ours."""
    _check_target(target, overwrite, ".pkl")
    if not holds_adapters(source):
        raise UserError(
            f"{source}: holds no adapters of OSEDiff; they are in a file '*{ADAPTERS}' beside a converted model"
        )
    adapters = adapters_of(source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_published(target, adapters)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    parameters = sum(value.numel() for state in (adapters.unet, adapters.vae) for value in state.values())
    return Converted(file=target, architecture="osediff.pkl", parameters=parameters, bytes=target.stat().st_size)


def _osediff(
    source: str | Path,
    part: Part,
    *,
    published_as: str | None,
    backbone: str | Path | None,
    prompt_file: Path | None,
    posterior: Posterior,
) -> nn.Module:
    if part != "generator":
        raise UserError(f"{source}: --part {part} is for a whole backbone, not for OSEDiff's adapters")
    return load_osediff(
        source,
        backbone=backbone,
        prompt_file=prompt_file,
        published_as=published_as,
        posterior=posterior,
    )


def _adapters_file(target: Path, overwrite: bool) -> Path:
    file = target.with_name(target.name.removesuffix(".safetensors") + ADAPTERS)
    _check_target(file, overwrite)
    return file


def _is_residual(source: str | Path) -> bool:
    """Whether a name or file stands for a model of the ResShift family; raises for one that does not say which."""
    if is_published(source) or architecture_of(source) in (RESIDUAL, TINY_RESIDUAL):
        return True
    path = Path(source)
    if path.is_file() and not architecture_of(path) and looks_published(path):
        raise UserError(
            f"{path}: a UNet of the ResShift family; --as says which of the published models it is: "
            f"{', '.join(PUBLISHED)}"
        )
    return False


def _residual(source: str | Path, part: Part, published_as: str | None, autoencoder: Path | None) -> nn.Module:
    if part != "generator":
        raise UserError(f"{source}: --part {part} is for Stable Diffusion, not for the ResShift family")
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


def _check_target(target: Path, overwrite: bool, suffix: str = ".safetensors") -> None:
    if target.suffix != suffix:
        raise UserError(f"{target}: the file to write must end in {suffix}")
    if target.is_dir() or (target.exists() and not overwrite):
        raise UserError(f"{target}: is already there; --overwrite replaces a file")


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    result = value.to(dtype)
    if not result.isfinite().all():
        raise UserError(f"weight '{key}' is too large for {str(dtype).removeprefix('torch.')}: try bfloat16 or float32")
    return result

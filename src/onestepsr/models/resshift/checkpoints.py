"""The published checkpoints of ResShift and SinSR: a UNet and an autoencoder, each in a PyTorch file of its own.

Nothing in such a file says what it is for: sizes, schedule and sampler are those of an alias.
"""

from __future__ import annotations

from pathlib import Path

import torch

from onestepsr.core.errors import UnknownModel, UserError, did_you_mean
from onestepsr.models.resshift.config import PUBLISHED
from onestepsr.models.resshift.generator import ResidualShiftGenerator, residual_shift_generator
from onestepsr.weights.catalog import get_model
from onestepsr.weights.download import download_all
from onestepsr.weights.files import LazyTensors, canonical_keys, fill, open_weights

UNET_MARK = "input_blocks.1.1.patch_embed.proj.weight"
"""A weight that only a UNet of this family has."""
CODEBOOK = "quantize.embedding.weight"
"""The weight of an autoencoder by which its kind is known."""


def is_published(name: object) -> bool:
    """True for the alias of a published model of this family that is no file."""
    return str(name) in PUBLISHED and not Path(str(name)).is_file()


def load_published(
    alias: str, *, unet: str | Path | None = None, autoencoder: str | Path | None = None
) -> ResidualShiftGenerator:
    """The published generator called ``alias``, in float32 on the CPU, in eval mode.

    Files that are not given come from the cache and are fetched first if they are missing. Raises
    :class:`UserError` in one line for other weights than the alias has: every key and shape must be the published one.
    """
    if alias not in PUBLISHED:
        raise UnknownModel(f"no published model '{alias}' of the ResShift family: {did_you_mean(alias, PUBLISHED)}")
    own, coder = _files(alias, unet, autoencoder)
    config = PUBLISHED[alias]
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        generator = residual_shift_generator(config)
    weights = _open(own)
    if UNET_MARK not in weights:
        kind = "an autoencoder" if CODEBOOK in weights else "another network"
        raise UserError(f"{own}: UNet of '{alias}': holds {kind} (no weight '{UNET_MARK}')")
    fill(generator.unet, weights, f"{own}: UNet of '{alias}'")
    weights = _open(coder)
    where = f"{coder}: autoencoder of '{alias}'"
    if CODEBOOK not in weights:
        raise UserError(f"{where}: holds another network (no weight '{CODEBOOK}')")
    found, expected = tuple(weights[CODEBOOK]().shape), (config.autoencoder.codes, config.autoencoder.latent_channels)
    if found != expected:
        said, wanted = (" of ".join(map(str, shape)) for shape in (found, expected))
        raise UserError(f"{where}: a codebook of {said} numbers, expected {wanted}: another model's autoencoder")
    fill(generator.autoencoder, weights, where)
    return generator.eval()


def _files(alias: str, *given: str | Path | None) -> list[Path]:
    """UNet and autoencoder: the file that is given, or the alias's own."""
    missing = [file for file, path in zip(get_model(alias).downloads, given, strict=True) if path is None]
    fetched = iter(download_all(missing))
    return [next(fetched) if path is None else Path(path) for path in given]


def looks_published(path: Path) -> bool:
    """True for a file of weights that holds a UNet of this family; False for one that cannot be read."""
    try:
        return UNET_MARK in _open(path)
    except UserError:
        return False


def _open(path: Path) -> LazyTensors:
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    return canonical_keys(open_weights(path))

"""Foreign backbones into weights files of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from onestepsr.errors import UserError
from onestepsr.models.architectures import describe
from onestepsr.models.backbones import load_backbone, load_discriminator_backbone
from onestepsr.models.registry import load_network, save_model

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
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Converted:
    """Write a backbone (see :func:`load_backbone`) as a safetensors file of ours, and load that file as a proof.

    Raises :class:`UserError` in one line when the source is none, ``target`` exists already or the numbers do not fit
    ``dtype``; nothing is left behind then.
    """
    _check_target(target, overwrite)
    network: nn.Module = load_backbone(source) if part == "generator" else load_discriminator_backbone(source)[0]
    architecture, config = describe(network)
    state = {key: _cast(key, value, dtype) for key, value in network.state_dict().items()}
    del network  # two copies of a large backbone would not fit everywhere
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_model(target, architecture=architecture, config=config, state_dict=state)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    parameters = sum(value.numel() for value in state.values())
    del state
    load_network(target)
    return Converted(file=target, architecture=architecture, parameters=parameters, bytes=target.stat().st_size)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: the file to write must end in .safetensors")
    if target.is_dir() or (target.exists() and not overwrite):
        raise UserError(f"{target}: is already there; --overwrite replaces a file")


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    result = value.to(dtype)
    if not result.isfinite().all():
        raise UserError(f"weight '{key}' is too large for {str(dtype).removeprefix('torch.')}: try bfloat16 or float32")
    return result

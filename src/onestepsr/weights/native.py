"""Our own weight files: safetensors with the architecture and its configuration in the metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.core.files import replacing

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the header."""
ALIGNMENT = 8
"""Tensors start at a multiple of this many bytes."""
FORMAT = "onestepsr"
MAX_WEIGHT_BYTES = 20 * 2**30
PICKLES = (".pth", ".pt", ".ckpt")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` and ``metadata``, the same bytes for the same content every time.

    The library's own writer orders the metadata at random, and needs all tensors and their serialised copy in memory,
    which is too much for a model of several gigabytes; here a tensor is copied to the CPU only while it is written.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # so that all of them are aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for key in order:
        tensor = tensors[key]
        end = position + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            flat = tensors[key].detach().cpu().contiguous().reshape(-1)
            handle.write(flat.view(torch.uint8).numpy().data)


def read_weights(
    path: Path, wanted: Callable[[str], bool] = lambda key: True
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Architecture, configuration and state dict of one of our weight files; everything about the file is checked.

    Tensors that are not ``wanted`` are not read.
    """
    try:
        if path.stat().st_size > MAX_WEIGHT_BYTES:
            raise UserError(f"{path}: larger than {MAX_WEIGHT_BYTES >> 30} GiB")
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {key: handle.get_tensor(key) for key in handle.keys() if wanted(key)}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        hint = "; 'onestepsr models convert' makes one of it" if path.suffix in PICKLES else ""
        raise UserError(f"{path}: not a safetensors file ({error}){hint}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not onestepsr weights (no 'format: {FORMAT}' in the file's metadata)")
    try:
        config = json.loads(metadata["config"])
        architecture = metadata["architecture"]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged metadata ({error})") from error
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path}: weight '{broken[0]}' holds values that are not finite; the file is damaged")
    return architecture, config, tensors


def architecture_of(path: str | Path) -> str:
    """The architecture that a weights file of ours names; empty for any other file, and for one that cannot be read."""
    if Path(path).suffix != ".safetensors":
        return ""
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
    except (OSError, SafetensorError):
        return ""
    return str(metadata.get("architecture", "unnamed")) if metadata.get("format") == FORMAT else ""


def save_model(
    path: Path,
    *,
    architecture: str,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write weights with their configuration; equal weights give equal files, complete or not there at all."""
    metadata = {
        "format": FORMAT,
        "architecture": architecture,
        "config": json.dumps(config, sort_keys=True),
        **(extra or {}),
    }
    with replacing(path) as temporary:
        write_safetensors(temporary, state_dict, metadata)

"""Writing safetensors files one tensor at a time, and the same bytes for the same tensors every time.

The library's own writer needs all tensors and their serialised copy in memory, which for a model of several gigabytes
is too much, and orders the metadata at random.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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
"""Names of number formats in the header."""
ALIGNMENT = 8
"""Tensors start at a multiple of this many bytes."""


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` and ``metadata``; a tensor is copied to the CPU only while it is written."""
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

"""Devices and dtypes by name, copies between host and GPU, and memory that runs out."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from onestepsr.core.errors import UserError, first_line
from onestepsr.core.machine import instructions, multiplies_bfloat16, recall_speeds

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BFLOAT16_GAIN = 1.2
"""Speed of bfloat16 over float32 on a CPU from which on it is worth its fewer digits."""


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is the first CUDA GPU if it works, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and _computes("cuda") else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" is a device too, of tensors that have no values to copy
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}': not available here; accepted: auto, cpu, cuda, cuda:N, mps") from error
    return device


def _computes(device: str) -> bool:
    """True if a present device can be used: it may be busy or full, or too old or too new for this PyTorch."""
    try:
        torch.ones(1, device=device)
    except RuntimeError as error:
        logger.warning("%s cannot be used, so the CPU computes (%s)", device, first_line(error))
        return False
    return True


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called ``name``.

    "auto" is float16 on a CUDA GPU (its 11 bits matter more to an image than bfloat16's range; should it overflow, the
    image is repeated in float32), bfloat16 on a CPU where it is faster, else float32.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and _bfloat16_pays() else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype '{name}': accepted: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _bfloat16_pays() -> bool:
    """True if bfloat16 is faster on this processor, as ``doctor`` measured it; else, if it has instructions for it."""
    from onestepsr.weights.download import cache_folder

    try:
        speeds = recall_speeds(cache_folder())
    except UserError:  # there is no folder for a cache, so nothing was kept
        speeds = {}
    if {"bfloat16", "float32"} <= speeds.keys():
        return speeds["bfloat16"] > BFLOAT16_GAIN * speeds["float32"]
    return multiplies_bfloat16() and "bf16" not in instructions()  # ARM's, of which we have no measurement


# ---- copies that neither host nor GPU waits for: through page-locked memory ----


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; on a CUDA GPU once the work that it was given before is done."""
    if device.type != "cuda":
        return values.to(device)
    return values.contiguous().pin_memory().to(device, non_blocking=True)


class Arrival:
    """A tensor that is on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._event: Any = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))

    def get(self) -> Tensor:
        """The tensor on the host, once it is there."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._values.cpu()


# ---- memory that runs out ----

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|alloc_failed|bad_alloc"
    r"|could not create a (primitive(?! desc)|memory)",  # all that oneDNN says when an allocation of its own fails
    re.IGNORECASE,
)


@contextmanager
def oom_as_user_error(message: str) -> Iterator[None]:
    """Inside, memory that runs out is a :class:`UserError` with ``message``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from error


def is_out_of_memory(error: BaseException) -> bool:
    """True for an error by which memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None

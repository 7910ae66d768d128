"""Devices and dtypes by name, copies between host and GPU, memory, and ``torch.compile``."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onestepsr.core.errors import OneStepSRError, UserError, first_line
from onestepsr.core.machine import prefers_bfloat16
from onestepsr.models.generators import Generator, LatentGenerator

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    image is repeated in float32), bfloat16 on a CPU that is faster in it, else float32.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and prefers_bfloat16() else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype '{name}': accepted: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


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


# ---- Freed memory ----------------------------------------------------------------------------------------------------
# By default glibc hands freed blocks beyond 32 MB back to the system at once. The next tensor of that size is made of
# new pages, each with a page fault and filled with zeros first: in the autoencoder of Stable Diffusion at 512 x 512
# pixels that takes several times as long as an activation function itself. Before a process has freed a block that
# large, the same happens to smaller ones, from 128 kB on.

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of mallopt, from malloc.h."""
HELD = 256 << 20
"""Bytes of freed memory that stay with the process from one image to the next: about twice what the bundled model takes
for one of 128 x 128 pixels. New pages each time took a tenth to a sixth of the time."""
USUAL = {MMAP_MAX: 65_536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: HELD}
"""Values that glibc arrives at by itself in a process that has used large blocks, but for the last, 64 MB there."""
SEPARATE = {MMAP_MAX: 65_536, MMAP_THRESHOLD: 128 << 10}
"""Values that it begins with, but for good: by itself it raises the threshold when the first large block is freed."""
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
"""Values with which freed memory stays with the process."""


@contextmanager
def no_malloc_trim(wanted: bool = True) -> Iterator[None]:
    """Inside, freed memory stays with the process for later allocations; at the end all beyond :data:`HELD` goes back.

    Unless ``wanted``, the process only gets the :data:`USUAL` settings, for good: small images never free a block from
    which glibc would learn them. Blocks of other threads than the main one may be treated as ever. They are settings of
    the process: of two threads inside, the first one to leave ends it for both, which costs time and nothing else.
    """
    _tune_malloc(KEPT if wanted else USUAL, trim=wanted)
    try:
        yield
    finally:
        if wanted:
            _tune_malloc(USUAL, trim=True)


@contextmanager
def separate_mmaps() -> Iterator[None]:
    """Inside, every block from 128 kB on has pages of its own: whenever it is freed, they go back to the system.

    Made for weights. Those that are converted or packed later would leave gaps between the others, in which nothing of
    the size of a feature map fits.
    """
    _tune_malloc(SEPARATE)
    try:
        yield
    finally:
        _tune_malloc(USUAL)


def _tune_malloc(settings: dict[int, int], *, trim: bool = False) -> None:
    """Apply ``settings`` where the C library is glibc; with ``trim``, hand freed memory beyond :data:`HELD` back."""
    library = _glibc()
    if library is None:
        return
    for parameter, value in settings.items():
        library.mallopt(parameter, value)
    if trim:
        library.malloc_trim(HELD)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


# ---- torch.compile ---------------------------------------------------------------------------------------------------

COMPILERS = ("g++", "clang++", "c++", "cl")
"""Names of C++ compilers to look for if ``CXX`` names none."""
PARTS = ("encode", "decode")
"""Methods of an autoencoder that are compiled."""


def require_compiler(device: torch.device) -> None:
    """Raise :class:`UserError` where ``torch.compile`` lacks what it needs: a C++ compiler, for CUDA Triton too."""
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        looked = named or ", ".join(COMPILERS)
        raise UserError(f"compile: needs a C++ compiler, found none ({looked}); install g++, or leave --compile out")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("compile: needs Triton for a CUDA GPU; pip install triton, or leave --compile out")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"compile: device '{device}'; accepted: cpu, cuda")


def compile_networks(generator: Generator) -> None:
    """Let the networks of ``generator`` be compiled when they are first called, and again for another shape.

    The code around them stays as it is: noise that depends on a tile's origin would have every tile compiled anew.
    Weights keep their names. A generator that does not consist of ``autoencoder`` and ``unet`` is compiled as a whole.
    """
    if not isinstance(generator, LatentGenerator):
        generator.compile()
        return
    generator.unet.compile()
    for name in PARTS:
        setattr(generator.autoencoder, name, torch.compile(getattr(generator.autoencoder, name)))


def without_compiling(copied: nn.Module) -> nn.Module:
    """``copied``, the copy of a generator, without the changes of :func:`compile_networks` to the original: compiled
    methods would reach back to it."""
    for name in PARTS if isinstance(copied, LatentGenerator) else ():
        vars(copied.autoencoder).pop(name, None)
    return copied


@contextmanager
def compiler_errors_named(name: str) -> Iterator[None]:
    """Inside, a compiler's failure becomes one :class:`OneStepSRError`; ``name`` is the model's."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        raise OneStepSRError(f"{name}: cannot be compiled here ({lines[0]}); leave --compile out") from error

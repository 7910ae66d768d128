"""Settings of glibc's allocator for large tensors on a CPU. Other C libraries are left alone.

By default glibc hands freed blocks beyond 32 MB back to the system at once. The next tensor of that size is made of new
pages, each with a page fault and filled with zeros first: in the autoencoder of Stable Diffusion at 512 x 512 pixels
that takes several times as long as an activation function itself. Before a process has freed a block that large, the
same happens to smaller ones, from 128 kB on.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of mallopt, from malloc.h."""
USUAL = {MMAP_MAX: 65_536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}
"""Values that glibc arrives at by itself in a process that has used large blocks."""
SEPARATE = {MMAP_MAX: 65_536, MMAP_THRESHOLD: 128 << 10}
"""Values that it begins with, but for good: by itself it raises the threshold when the first large block is freed."""
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
"""Values with which freed memory stays with the process."""

_lock = threading.Lock()
_users = 0


@contextmanager
def no_malloc_trim(wanted: bool = True) -> Iterator[None]:
    """Inside, freed memory stays with the process for later allocations; when the last user leaves, all is handed back.

    Unless ``wanted``, the process only gets the :data:`USUAL` settings, for good: small images never free a block from
    which glibc would learn them. Blocks of other threads than the main one may be treated as ever.
    """
    global _users  # noqa: PLW0603  (as global as what it counts the users of)
    library = _glibc()
    if library is None or not wanted:
        _set(USUAL)
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            library.malloc_trim(0)
            _apply(library, KEPT)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _apply(library, USUAL)
                library.malloc_trim(0)


@contextmanager
def separate_mmaps() -> Iterator[None]:
    """Inside, every block from 128 kB on has pages of its own: whenever it is freed, they go back to the system.

    Made for weights. Those that are converted or packed later would leave gaps between the others, in which nothing of
    the size of a feature map fits.
    """
    _set(SEPARATE)
    try:
        yield
    finally:
        _set(USUAL)


def _set(settings: dict[int, int]) -> None:
    """Apply ``settings`` unless freed memory is being kept."""
    library = _glibc()
    with _lock:
        if library is not None and _users == 0:
            _apply(library, settings)


def _apply(library: ctypes.CDLL, settings: dict[int, int]) -> None:
    for parameter, value in settings.items():
        library.mallopt(parameter, value)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None

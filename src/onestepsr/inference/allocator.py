"""The C library's allocator, and how it treats large blocks that are freed.

By default it hands blocks beyond 32 MB back to the system at once. The next tensor of that size is made of new pages,
each with a page fault and filled with zeros first: in the autoencoder of Stable Diffusion at 512 x 512 pixels that
takes several times as long as an activation function itself. Before a process has freed a block that large, the same
happens to smaller ones, from 128 kB on.
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
"""What glibc has arrived at by itself in a process that has used large blocks."""
APART = {MMAP_MAX: 65_536, MMAP_THRESHOLD: 128 << 10}
"""What it begins with, but for good: by itself it raises the threshold with the first large block that is freed."""

_lock = threading.Lock()
_users = 0


@contextmanager
def no_malloc_trim(wanted: bool = True) -> Iterator[None]:
    """Inside, memory that is freed stays with the process for what is allocated next; afterwards, and of what had been
    freed before, all is handed back.

    Unless ``wanted``, the process only gets :data:`USUAL` settings, for good: small images never free a block from
    which glibc would learn them. Does nothing where the C library is not glibc. Blocks of other threads than the main
    one may be treated as ever.
    """
    library = _glibc()
    if library is None or not wanted:
        _settle()
        yield
        return
    _enter(library)
    try:
        yield
    finally:
        _leave(library)


@contextmanager
def separate_mmaps() -> Iterator[None]:
    """Inside, every block from 128 kB on has pages of its own: whenever it is freed, they go back to the system.

    Made for weights. Those that are converted or packed later would leave gaps between the others, in which nothing of
    the size of a feature map fits. Does nothing where the C library is not glibc, or freed memory is being kept.
    """
    _arrange(APART)
    try:
        yield
    finally:
        _arrange(USUAL)


def _enter(library: ctypes.CDLL) -> None:
    global _users  # noqa: PLW0603  (as global as what it counts the users of)
    with _lock:
        _users += 1
        if _users == 1:
            library.malloc_trim(0)
        library.mallopt(MMAP_MAX, 0)
        library.mallopt(TRIM_THRESHOLD, -1)


def _leave(library: ctypes.CDLL) -> None:
    global _users  # noqa: PLW0603
    with _lock:
        _users -= 1
        if _users == 0:
            _apply(library, USUAL)
            library.malloc_trim(0)


@functools.cache
def _settle() -> None:
    _arrange(USUAL)


def _arrange(settings: dict[int, int]) -> None:
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

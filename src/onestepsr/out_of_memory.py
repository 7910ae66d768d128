"""What memory that runs out looks like, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from onestepsr.errors import UserError

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|alloc_failed|bad_alloc"
    r"|could not create a (primitive(?! desc)|memory)",  # all that oneDNN says when an allocation of its own fails
    re.IGNORECASE,
)


@contextmanager
def lack_of_memory_named(message: str) -> Iterator[None]:
    """Inside, memory that runs out is a :class:`UserError` with ``message``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, whatever the device says that with."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None

"""Locks between processes: what several of them share is made by one, and a run has one writer.

A lock ends with the process that holds it, however that ends, and the processes that prepare batches do not inherit it.
Where the system or the disk knows no locks, everybody gets one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the file ``path``, made if absent, in a folder that exists, against other processes.

    With ``wait`` until it is free; without, yields False if another process holds it. A file that cannot be opened or
    locked for any other reason is no obstacle.
    """
    if os.name != "posix":
        yield True
        return
    try:
        file = path.open("a")
    except OSError:
        yield True
        return
    with file:
        yield _take(file, wait)


def _take(file: IO[str], wait: bool) -> bool:
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in HELD_BY_ANOTHER
    return True

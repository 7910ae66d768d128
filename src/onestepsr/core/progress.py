"""Progress bars on stderr: on a terminal only, and only in the first process of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

T = TypeVar("T")
PATIENCE_S = 1.0
"""Seconds after which the bar of :func:`progress` appears."""


def progress(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items``; a bar appears once that takes over a second. ``total``: their number, if they have no length."""
    bar = _bar(MofNCompleteColumn())
    task = bar.add_task(title, total=len(items) if total is None and isinstance(items, Sized) else total)
    begin = time.monotonic()
    try:
        for item in items:
            if not bar.disable and not bar.live.is_started and time.monotonic() - begin > PATIENCE_S:
                bar.start()
            yield item
            bar.advance(task)
    finally:
        bar.stop()


@contextmanager
def byte_progress(title: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes that begins at ``done``; yields a function that is called with the size of each block."""
    with _bar(DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _bar(*columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *columns, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not shown)

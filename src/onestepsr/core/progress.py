"""Progress on stderr, in the first process of a run: a bar on a terminal, lines elsewhere."""

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


def progress(
    items: Iterable[T], title: str, total: int | None = None, *, line: Callable[[T], str] | None = None
) -> Iterator[T]:
    """Yield ``items``; a bar appears once that takes over a second. ``total``: their number, if they have no length.

    Where stderr is no terminal, ``line`` gives what is written there of each item once it is done, at once, with its
    number.
    """
    bar = _bar(MofNCompleteColumn())
    total = len(items) if total is None and isinstance(items, Sized) else total
    task = bar.add_task(title, total=total)
    log = bar.console if line is not None and _is_first() and not bar.console.is_terminal else None
    begin = time.monotonic()
    try:
        for number, item in enumerate(items, 1):
            if not bar.disable and not bar.live.is_started and time.monotonic() - begin > PATIENCE_S:
                bar.start()
            yield item
            bar.advance(task)
            if log is not None and line is not None:
                log.out(f"{title} {number}{'' if total is None else f'/{total}'}: {line(item)}", highlight=False)
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
    shown = console.is_terminal and _is_first()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *columns, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not shown)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"

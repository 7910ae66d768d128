"""A progress bar for what may take a moment or an hour."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
PATIENCE_S = 1.0


def tracked(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield ``items``; on a terminal, in the first process of a run, a bar appears once that takes over a second."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    wanted = console.is_terminal and os.environ.get("RANK", "0") == "0"
    progress = Progress(*columns, console=console, transient=True, disable=not wanted)
    task = progress.add_task(what, total=len(items))
    begin = time.monotonic()
    try:
        for item in items:
            if wanted and not progress.live.is_started and time.monotonic() - begin > PATIENCE_S:
                progress.start()
            yield item
            progress.advance(task)
    finally:
        progress.stop()


ProgressCallback = Callable[[int, int | None], None]
"""Called with the bytes that are here and, where it is known, their final number."""


@contextmanager
def progress_bar(title: str) -> Iterator[ProgressCallback]:
    """A bar of bytes on stderr; nothing when stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# The progress bar of the commands -------------------------------------------------------------------------------------


def progress(items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]:
    """``items`` under a bar on stderr, where that is a terminal; ``total`` is their number if they do not know it."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, title, total=total, console=console, transient=True, disable=not console.is_terminal)

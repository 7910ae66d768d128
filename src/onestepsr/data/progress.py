"""A progress bar for what may take a moment or an hour."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
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

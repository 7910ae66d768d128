"""Whether a machine had other things to do while something was measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""Columns of /proc/stat in which a core works: user, nice, system, interrupts (two), and what the hypervisor took."""


class OtherWork:
    """Counts from its creation on how many cores were busy with anything but this process and its children."""

    def __init__(self) -> None:
        self._begun, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Mean number of busy cores, of those that this process may use; None where the system does not tell."""
        busy = _busy_seconds()
        elapsed = time.perf_counter() - self._begun
        if busy is None or self._busy is None or elapsed <= 0:
            return None
        return max(0.0, (busy - self._busy) - (_own_seconds() - self._own)) / elapsed


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _busy_seconds() -> float | None:
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii", errors="replace").splitlines()
        usable = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        rows = [words[1:] for words in (line.split() for line in lines) if words and words[0] in usable]
        return sum(int(row[field]) for row in rows for field in BUSY_FIELDS) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux, or another layout of the file
        return None

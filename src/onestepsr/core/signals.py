"""Interruption by Ctrl-C or a cluster, handled between two iterations instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

REPEATED = 1.0
"""Seconds in which a second signal is the same request: sent to a whole group of processes, it arrives by itself and
once more from a parent that passes it on."""


_terminated = threading.Event()


def interrupt_on_sigterm() -> None:
    """Let SIGTERM do what Ctrl-C does: raise KeyboardInterrupt; for the main thread of a program."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        _terminated.set()
        raise KeyboardInterrupt

    _terminated.clear()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


def was_terminated() -> bool:
    """True if SIGTERM has come since :func:`interrupt_on_sigterm`."""
    return _terminated.is_set()


class Interruption:
    """While open, the first SIGINT or SIGTERM only sets ``requested``; a later one acts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            _terminated.set()
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > REPEATED:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

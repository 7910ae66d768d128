"""Bounded pipeline over many images: the next ones are read and the last ones written while the network runs.

Reading and writing have threads of their own; the network stays on the caller's thread. Results come in the order of
the items, and what is done to each is the same as one item after the other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Made = TypeVar("Made")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Number of images in memory, their bytes, and the threads that read and write them."""

    images: int = 8
    """Images in memory at most: read ahead, in the network, or waiting to be written."""
    nbytes: int = 256_000_000
    """No further image is read while those in memory take this much: small ones overlap, very large ones follow each
    other and need hardly more memory than one alone."""
    readers: int = 1
    """Threads that read."""
    writers: int = 4
    """Threads that write. Encoding a PNG takes longer than a small network on a GPU does."""


def bounded_map(
    items: Iterable[Item],
    read: Callable[[Item], Loaded],
    run: Callable[[Loaded], Made],
    write: Callable[[Made], Result],
    *,
    nbytes: Callable[[Loaded], int] = lambda loaded: 0,
    limits: Limits | None = None,
) -> Generator[Result, None, None]:
    """Yield ``write(run(read(item)))`` for every item, in order; close the generator to stop early.

    ``run`` is called on this thread, in order; ``read`` and ``write`` are called on others, several items at a time.
    ``nbytes`` is what an item takes from the end of ``read`` to the end of ``write``. What goes wrong with one image
    is for the functions to return; an exception that leaves one of them ends the whole run. Stopping early drops what
    is not being written yet.
    """
    return grouped_map(items, read, lambda group: [run(group.pop())], write, nbytes=nbytes, limits=limits)


def grouped_map(
    items: Iterable[Item],
    read: Callable[[Item], Loaded],
    run: Callable[[list[Loaded]], list[Made]],
    write: Callable[[Made], Result],
    *,
    kind: Callable[[Loaded], Hashable] = lambda loaded: None,
    most: int = 1,
    nbytes: Callable[[Loaded], int] = lambda loaded: 0,
    limits: Limits | None = None,
) -> Generator[Result, None, None]:
    """As :func:`bounded_map`, but ``run`` is given up to ``most`` items of one ``kind``, and returns as many.

    These are the next item and those behind it that have been read by then: nothing waits for a group to be full, so
    that groups depend on time, and results come in the order of running.
    """
    limits = limits or Limits()
    budget = _Budget(limits)

    def read_one(number: int, item: Item) -> tuple[Loaded, int]:
        budget.enter(number)
        loaded = read(item)
        size = nbytes(loaded)
        budget.hold(size)
        return loaded, size

    def write_one(made: Made, size: int) -> Result:
        try:
            return write(made)
        finally:
            budget.leave(size)

    readers = ThreadPoolExecutor(limits.readers, thread_name_prefix="reading")
    writers = ThreadPoolExecutor(limits.writers, thread_name_prefix="writing")
    numbered = enumerate(items)
    reading: deque[Future[tuple[Loaded, int]]] = deque()
    results: deque[Future[Result]] = deque()
    try:
        while True:
            for number, item in islice(numbered, limits.images - len(reading)):
                reading.append(readers.submit(read_one, number, item))
            if not reading:
                break
            first, size = reading.popleft().result()
            group, sizes, wanted = [first], [size], kind(first)
            del first
            for later in list(reading) if most > 1 else ():
                if len(group) < most and later.done() and kind(later.result()[0]) == wanted:
                    reading.remove(later)
                    group.append(later.result()[0])
                    sizes.append(later.result()[1])
                del later
            made = run(group)
            results.extend(writers.submit(write_one, *one) for one in zip(made, sizes, strict=True))
            del group, made  # or this frame would keep both images until the next ones are there
            while results and results[0].done():
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        budget.close()
        readers.shutdown(cancel_futures=True)
        writers.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """The run is over; raised in threads that wait to read."""


class _Budget:
    """Images and bytes in memory. An image enters before it is read, in turn, and leaves once it is written."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._images = self._nbytes = self._entered = 0
        self._closed = False
        self._changed = threading.Condition()

    def enter(self, number: int) -> None:
        """Wait until image ``number`` is the next one and there is room for it."""
        with self._changed:
            # In turn: were a later image to take the last room, the earlier one that is awaited could never be read.
            self._changed.wait_for(lambda: self._closed or (number == self._entered and self._has_room()))
            if self._closed:
                raise _Stopped
            self._images += 1
            self._entered += 1
            self._changed.notify_all()

    def hold(self, size: int) -> None:
        """Count the bytes of an image that has entered, once they are known."""
        with self._changed:
            self._nbytes += size

    def leave(self, size: int) -> None:
        """Take an image and its bytes off the count."""
        with self._changed:
            self._images -= 1
            self._nbytes -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Refuse all further images."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._images < self._limits.images and self._nbytes < self._limits.nbytes

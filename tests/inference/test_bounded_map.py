"""Reading ahead and writing behind: in order, within limits, and stoppable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from onestepsr.inference.pipeline import Limits, bounded_map, grouped_map

LIMITS = Limits()


class Counted:
    """Numbers for images: how many were read and written, and hooks into either."""

    def __init__(
        self, before_run: Callable[[int], None] = lambda number: None, before_read: Callable[[int], None] | None = None
    ) -> None:
        self.read = self.written = 0
        self.before_run, self.before_read = before_run, before_read or (lambda number: None)
        self._lock = threading.Lock()

    def map(self, count: int, limits: Limits = LIMITS, nbytes: int = 0) -> list[int]:
        mapped = bounded_map(range(count), self._read, self._run, self._write, nbytes=lambda _: nbytes, limits=limits)
        with closing(mapped) as results:
            return list(results)

    @property
    def held(self) -> int:
        with self._lock:
            return self.read - self.written

    def _read(self, number: int) -> int:
        self.before_read(number)
        with self._lock:
            self.read += 1
        return number

    def _run(self, number: int) -> int:
        self.before_run(number)
        return number * number

    def _write(self, number: int) -> int:
        with self._lock:
            self.written += 1
        return number


def reach(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_reading_and_writing_overlap_the_network() -> None:
    """While the first image is in the network, others are read; while the last is, all others are written."""
    images = Counted()

    def wait_for(number: int) -> None:
        if number == 0:
            reach(lambda: images.read == LIMITS.images)
        if number == 19:
            reach(lambda: images.written == 19)

    images.before_run = wait_for
    assert images.map(20) == [number**2 for number in range(20)]


@pytest.mark.parametrize("readers", [1, 3])
def test_ten_thousand_images_keep_to_the_limits(readers: int) -> None:
    most = []
    images = Counted(lambda number: most.append(images.held))
    assert images.map(10_000, Limits(readers=readers)) == [number**2 for number in range(10_000)]
    assert 1 <= max(most) <= LIMITS.images


def test_the_network_stays_on_the_callers_thread_and_in_order() -> None:
    seen: list[tuple[int, int]] = []
    Counted(lambda number: seen.append((number, threading.get_ident()))).map(30, Limits(readers=3))
    assert seen == [(number, threading.get_ident()) for number in range(30)]


def test_large_images_follow_each_other() -> None:
    held: list[int] = []
    images = Counted(lambda number: held.append(images.held))
    images.map(9, Limits(nbytes=1000), nbytes=1000)
    assert held == [1] * 9


def test_a_late_image_cannot_take_the_room_of_an_early_one() -> None:
    """Several readers, room for one image: were the second let in first, nothing could ever be written."""
    images = Counted(before_read=lambda number: time.sleep(0.002 if number % 2 == 0 else 0))
    assert images.map(12, Limits(images=4, nbytes=1, readers=4), nbytes=1) == [number**2 for number in range(12)]


def test_inputs_are_not_kept_while_the_next_are_awaited() -> None:
    import weakref

    class Image:
        pass

    alive: list[weakref.ref[Image]] = []

    def read(number: int) -> Image:
        image = Image()
        alive.append(weakref.ref(image))
        return image

    def run(image: Image) -> int:
        return sum(each() is not None for each in alive)

    limits = Limits(images=1)
    assert max(bounded_map(range(20), read, run, lambda number: number, limits=limits)) == 1


def test_an_interrupt_stops_reading_and_leaves_no_thread() -> None:
    def interrupt(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    before, images = set(threading.enumerate()), Counted(interrupt)
    with pytest.raises(KeyboardInterrupt):
        images.map(1000)
    assert set(threading.enumerate()) <= before
    assert images.read <= 3 + LIMITS.images
    assert images.written <= 3


def test_a_consumer_that_stops_leaves_no_thread() -> None:
    before, images = set(threading.enumerate()), Counted()
    with closing(bounded_map(range(1000), images._read, images._run, images._write)) as results:
        assert next(results) == 0
    assert set(threading.enumerate()) <= before
    assert images.read <= 3 * LIMITS.images


@pytest.mark.parametrize("stage", ["_read", "_run", "_write"])
def test_a_defect_ends_the_run_wherever_it_happens(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def broken(*_: object) -> int:
        raise ZeroDivisionError

    before, images = set(threading.enumerate()), Counted()
    monkeypatch.setattr(images, stage, broken)
    with pytest.raises(ZeroDivisionError):
        images.map(50)
    assert set(threading.enumerate()) <= before


def test_items_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []
    items = (taken.append(number) or number for number in range(100))
    images = Counted()
    with closing(bounded_map(items, images._read, images._run, images._write)) as results:
        next(results)
        assert len(taken) <= 3 * LIMITS.images


def test_groups_are_of_one_kind_and_lose_nothing() -> None:
    images, groups = Counted(), list[list[int]]()

    def run(group: list[int]) -> list[int]:
        groups.append(list(group))
        reach(lambda: images.read == 12 or images.held >= LIMITS.images)  # all that may be read ahead is there
        return [number * number for number in group]

    def kind(number: int) -> bool:
        return number % 3 == 0

    mapped = grouped_map(range(12), images._read, run, images._write, kind=kind, most=3, limits=LIMITS)
    with closing(mapped) as results:
        assert sorted(results) == [number * number for number in range(12)]
    assert sorted(number for group in groups for number in group) == list(range(12))
    assert all(len({kind(number) for number in group}) == 1 for group in groups)
    assert max(map(len, groups)) == 3

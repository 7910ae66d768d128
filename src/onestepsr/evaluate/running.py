"""Whole folders: pictures are read, enlarged and measured at the same time, and come out in the order they went in."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from onestepsr.errors import OneStepSRError
from onestepsr.evaluate.folder import Case, Pair
from onestepsr.evaluate.measuring import Measurer, Score
from onestepsr.image import Picture, Samples, read_picture
from onestepsr.machine import cores
from onestepsr.out_of_memory import lack_of_memory_named

T = TypeVar("T")
MAX_WORKERS = 8
"""Beyond, pictures in memory cost more than threads bring."""
READ_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One case with its pictures read."""

    lr: Picture
    hr: Samples | None
    label: str
    """The files, for messages."""


class Clock:
    """Seconds by part of the work, added up over threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """What it takes to measure a model on cases."""

    load: Callable[[Case], Loaded]
    """Reads a case; called by several threads."""
    enlarge: Callable[[Picture, Path], Picture]
    """The model, on a picture and its file; called by one thread only, in the order of the cases."""
    measurer: Measurer
    keep: Callable[[Case, Loaded, Picture], None] = lambda case, loaded, sr: None
    """Gets every SR picture, for example to save it; called by several threads."""
    clock: Clock = field(default_factory=Clock)

    def scores(self, cases: Iterable[Case], workers: int | None = None) -> Iterator[Score]:
        """Score the cases in order, the network in this thread, reading and measuring in ``workers`` others."""
        count = workers or worker_count()
        with _pool(count) as pool:
            waiting = iter(cases)
            loading: deque[tuple[Case, Future[Loaded]]] = deque()
            scoring: deque[Future[Score]] = deque()
            while True:
                while len(loading) < READ_AHEAD and (case := next(waiting, None)) is not None:
                    loading.append((case, pool.submit(self._load, case)))
                if not loading:
                    break
                scoring.append(pool.submit(self._finish, *self._enlarged(*loading.popleft())))
                while scoring and (scoring[0].done() or len(scoring) > count):
                    yield scoring.popleft().result()
            yield from (future.result() for future in scoring)

    def _load(self, case: Case) -> Loaded:
        with self.clock.part("reading"):
            return self.load(case)

    def _enlarged(self, case: Case, loading: Future[Loaded]) -> tuple[Case, Loaded | None, Picture | str]:
        """The case with its SR picture, or with one line of what went wrong."""
        try:
            with lack_of_memory_named("not enough memory; try --tile 64"):
                loaded = loading.result()
                with self.clock.part("model"):
                    return case, loaded, self.enlarge(loaded.lr, case.path)
        except OneStepSRError as error:
            return case, None, _named(case, str(error))

    def _finish(self, case: Case, loaded: Loaded | None, sr: Picture | str) -> Score:
        if loaded is None or isinstance(sr, str):
            return Score(name=case.name, problems=[str(sr)])
        with self.clock.part("metrics"):
            score = self.measurer.score(case.name, sr.pixels, loaded.hr, loaded.label)
        try:
            self.keep(case, loaded, sr)
        except OneStepSRError as error:
            score.problems.append(str(error))
        return score


def score_pairs(
    pairs: Sequence[Pair], measurer: Measurer, *, workers: int | None = None, clock: Clock | None = None
) -> Iterator[Score]:
    """Score pairs in order; several are read and measured at a time, each by one thread."""
    count, clock = workers or worker_count(), clock or Clock()

    def score(pair: Pair) -> Score:
        label = str(pair.sr) if pair.hr is None else f"{pair.sr} against {pair.hr}"
        try:
            with lack_of_memory_named(f"{label}: not enough memory"):
                with clock.part("reading"):
                    sr, hr = read_picture(pair.sr).pixels, None if pair.hr is None else read_picture(pair.hr).pixels
                with clock.part("metrics"):
                    return measurer.score(pair.name, sr, hr, label)
        except OneStepSRError as error:
            return Score(name=pair.name, problems=[str(error)])

    with _one_core_each(count), _pool(count) as pool:
        yield from in_order(pool, (lambda pair=pair: score(pair) for pair in pairs), 2 * count)  # type: ignore[misc]


def in_order(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """Results of ``tasks`` in their order, with at most ``ahead`` of them begun or waiting."""
    running: deque[Future[T]] = deque()
    for task in tasks:
        running.append(pool.submit(task))
        if len(running) >= ahead:
            yield running.popleft().result()
    yield from (future.result() for future in running)


def worker_count() -> int:
    """Threads to measure with: the cores that this process may use, at most 8."""
    return max(1, min(MAX_WORKERS, cores()))


def _named(case: Case, problem: str) -> str:
    return problem if str(case.path) in problem else f"{case.path}: {problem}"


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that, if the block is left early, start nothing that has not begun."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="evaluate")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_core_each(workers: int) -> Iterator[None]:
    """Keep several threads from each starting as many of PyTorch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)

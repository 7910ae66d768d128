"""Whole folders: images are read, enlarged and measured at the same time, and come out in the order they went in."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from onestepsr.core.errors import OneStepSRError
from onestepsr.core.machine import cores
from onestepsr.evaluate.inputs import Degrader, Loaded, Loader, OutputWriter, relative
from onestepsr.evaluate.pairing import Case, EvaluationData, Pair, Pairing
from onestepsr.evaluate.result import EvaluationResult, Files, ModelRecord, Setting, machine_entries, now
from onestepsr.evaluate.scoring import Score, Scorer
from onestepsr.imaging.read import LoadedImage, read_image
from onestepsr.inference.devices import oom_as_user_error

T = TypeVar("T")
MAX_WORKERS = 8
"""Beyond, images in memory cost more than threads bring."""
READ_AHEAD = 2


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
    enlarge: Callable[[LoadedImage, Path], LoadedImage]
    """The model, on an image and its file; called by one thread only, in the order of the cases."""
    measurer: Scorer
    keep: Callable[[Case, Loaded, LoadedImage], None] = lambda case, loaded, sr: None
    """Gets every SR image, for example to save it; called by several threads."""
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

    def _enlarged(self, case: Case, loading: Future[Loaded]) -> tuple[Case, Loaded | None, LoadedImage | str]:
        """The case with its SR image, or with one line of what went wrong."""
        try:
            with oom_as_user_error("not enough memory; try --tile 64"):
                loaded = loading.result()
                with self.clock.part("model"):
                    return case, loaded, self.enlarge(loaded.lr, case.path)
        except OneStepSRError as error:
            return case, None, _named(case, str(error))

    def _finish(self, case: Case, loaded: Loaded | None, sr: LoadedImage | str) -> Score:
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
    pairs: Sequence[Pair], measurer: Scorer, *, workers: int | None = None, clock: Clock | None = None
) -> Iterator[Score]:
    """Score pairs in order; several are read and measured at a time, each by one thread."""
    count, clock = workers or worker_count(), clock or Clock()

    def score(pair: Pair) -> Score:
        label = str(pair.sr) if pair.hr is None else f"{pair.sr} against {pair.hr}"
        try:
            with oom_as_user_error(f"{label}: not enough memory"):
                with clock.part("reading"):
                    sr, hr = read_image(pair.sr).pixels, None if pair.hr is None else read_image(pair.hr).pixels
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


# One evaluation from beginning to end: of images in folders, or of a model on a dataset ----------------------------

Track = Callable[[Iterable[Score], int], Iterable[Score]]
"""A progress bar around scores, whose number is given."""


def untracked(scores: Iterable[Score], total: int) -> Iterable[Score]:
    """No progress bar."""
    return scores


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model as an evaluation sees it."""

    enlarge: Callable[[LoadedImage, Path], LoadedImage]
    """Enlarges one image by ``scale``. Its file, or that of the photo it was made of, comes along for what belongs to
    it by name, such as a prompt."""
    scale: int
    """Output side / input side."""
    record: ModelRecord
    """What is saved about it."""


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """How LR images are made of HR photos."""

    name: str
    """Name of the recipe."""
    make: Degrader

    @property
    def settings(self) -> dict[str, Setting]:
        """What is saved of it beside the protocol."""
        return {"degradation": self.name, "degradation_seed": self.make.seed}


@dataclass(kw_only=True)
class _Collected:
    """Scores as they come, in the form that a result has."""

    measurer: Scorer
    scores: dict[str, Score] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    started: float = field(default_factory=time.perf_counter)

    def add(self, scores: Iterable[Score]) -> None:
        """Take ``scores`` in."""
        for score in scores:
            self.scores[score.name] = score

    def result(
        self,
        *,
        label: str,
        folders: Files,
        files: Mapping[str, Files],
        settings: Mapping[str, Setting],
        model: ModelRecord | None = None,
    ) -> EvaluationResult:
        """The result of all scores."""
        whole, problems = self.measurer.whole()
        unavailable = {**self.measurer.unavailable, **dict(problem.split(": ", 1) for problem in problems)}
        seconds = {**self.clock.seconds, "total": time.perf_counter() - self.started}
        return EvaluationResult(
            label=label,
            protocol=self.measurer.protocol.record(self.measurer.metrics, **settings),
            images={name: score.values for name, score in self.scores.items() if score.values},
            whole=whole,
            model=model,
            folders=folders,
            files=files,
            failed={name: "; ".join(score.problems) for name, score in self.scores.items() if score.problems},
            unavailable=unavailable,
            seconds={name: round(value, 3) for name, value in seconds.items()},
            machine={**machine_entries(), "torch": str(torch.__version__), "metrics_on": str(self.measurer.device)},
            date=now(),
        )


def evaluate_images(
    pairing: Pairing, folders: Files, measurer: Scorer, *, label: str, track: Track = untracked
) -> EvaluationResult:
    """Measure super-resolved images that are in files; ``folders`` is where the pairs were found."""
    collected = _Collected(measurer=measurer)
    scores = score_pairs(pairing.pairs, measurer, clock=collected.clock)
    collected.add(track(scores, len(pairing.pairs)))
    roots = [None if folder is None else Path(folder) for folder in (folders.sr, folders.hr)]
    files = {p.name: Files(sr=relative(p.sr, roots[0]), hr=relative(p.hr, roots[1])) for p in pairing.pairs}
    return collected.result(label=label, folders=folders, files=files, settings={})


def evaluate_model(
    model: EvaluatedModel,
    data: EvaluationData,
    measurer: Scorer,
    *,
    label: str,
    degradation: Degradation | None = None,
    keep: Path | None = None,
    track: Track = untracked,
) -> EvaluationResult:
    """Enlarge the images of ``data`` with ``model`` and measure what comes out, as 8-bit or 16-bit files hold it.

    ``degradation`` makes the LR images where ``data`` has HR photos only. ``keep`` is a folder that receives the
    images as PNG files. The numbers are those of ``onestepsr upscale`` to PNG and an evaluation of its folder.
    """
    collected = _Collected(measurer=measurer)
    crop = measurer.protocol.crop
    keeper = None if keep is None else OutputWriter(folder=keep, made=degradation is not None or crop > 0)
    if keeper is not None:
        keeper.sweep(data.cases)
    run = ModelRun(
        load=Loader(scale=model.scale, crop=crop, degrade=None if degradation is None else degradation.make),
        enlarge=model.enlarge,
        measurer=measurer,
        clock=collected.clock,
        **({} if keeper is None else {"keep": keeper}),
    )
    collected.add(track(run.scores(data.cases), len(data.cases)))
    folders = Files(lr=_text(data.lr), hr=_text(data.hr))
    files = {case.name: _files(case, data) for case in data.cases}
    if keeper is not None:
        files = {case.name: keeper.files(case, files[case.name]) for case in data.cases}
        folders = keeper.folders(folders)
    settings = {"scale": model.scale, **({} if degradation is None else degradation.settings)}
    return collected.result(label=label, folders=folders, files=files, settings=settings, model=model.record)


def without_images(result: EvaluationResult) -> EvaluationResult:
    """``result`` without the places of SR images, for those that are not kept."""
    files = {name: replace(own, sr=None) for name, own in result.files.items()}
    return replace(result, folders=replace(result.folders, sr=None), files=files)


def _files(case: Case, data: EvaluationData) -> Files:
    return Files(lr=relative(case.lr, data.lr), hr=relative(case.hr, data.hr))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)

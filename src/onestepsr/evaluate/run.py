"""One evaluation from beginning to end: of images in folders, or of a model on a dataset."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from onestepsr.core.errors import OneStepSRError, UserError
from onestepsr.core.files import remove_leftovers
from onestepsr.core.machine import cores
from onestepsr.core.progress import progress
from onestepsr.data.degradation.pipeline import Recipe, draw_for, make_pair
from onestepsr.data.photos import find_images
from onestepsr.evaluate.metrics.catalog import MetricSpec, Reference
from onestepsr.evaluate.metrics.fid import SetDistance
from onestepsr.evaluate.pairing import Case, CaseSet
from onestepsr.evaluate.protocols import Protocol
from onestepsr.evaluate.result import EvaluationResult, Files, ModelRecord, Setting, WholeValue, machine_entries, now
from onestepsr.imaging.read import LoadedImage, Samples, from_array, read_image, samples_to_tensor, to_eight_bits
from onestepsr.imaging.write import write_image
from onestepsr.inference.devices import oom_as_user_error
from onestepsr.inference.pipeline import Limits, bounded_map

# ---- Scoring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Failure of one image, or of one metric on it."""

    reason: str
    files: str = ""
    """The files concerned; empty if the reason names them."""
    metric: str = ""
    """The metric that failed; empty if it was the image."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.files, self.metric, self.reason) if part)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The values of one image, and the metrics or steps that failed."""

    name: str
    values: dict[str, float] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    features: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By metric of sets, the features of SR and of HR, or SR twice where that is compared with other photos."""


class Scorer:
    """Metrics, loaded once, under a protocol; :meth:`score` may be called by several threads.

    ``unavailable`` has the metrics that cannot be loaded, with the reason; UserError if these are all.
    """

    def __init__(
        self,
        metrics: Sequence[MetricSpec],
        protocol: Protocol,
        device: str | torch.device = "cpu",
        *,
        unpaired: Path | None = None,
    ) -> None:
        """``device`` is that of metrics which are networks; ``unpaired`` is the folder of photos that metrics of sets
        compare with instead of HR images, where they are made for that."""
        self.metrics, self.protocol, self.device = list(metrics), protocol, torch.device(device)
        self.unavailable: dict[str, str] = {}
        self._measures: dict[str, Reference] = {}
        self._sets: dict[str, SetDistance] = {}
        self._unpaired = None if unpaired is None else find_images(unpaired)
        self._device_lock = threading.Lock()
        for metric in self.metrics:
            self._load(metric)
        if not self._measures and not self._sets:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.unavailable.items())
            raise UserError(f"nothing can be measured here ({reasons})")

    def score(self, name: str, sr: Samples, hr: Samples | None = None, label: str | None = None) -> Score:
        """Measure samples (H, W, 1 or 3) of one image; ``label`` names its files in messages.

        A metric that fails is one of the score's problems; nothing is raised for anything that images can cause.
        """
        files = name if label is None else label
        try:
            _check_kinds(sr, hr)
            pair = self.protocol.fitted(_as_rgb(sr), None if hr is None else _as_rgb(hr))
        except UserError as error:
            return Score(name=name, problems=[Problem(files=files, reason=str(error))])
        score = Score(name=name)
        for metric in self.metrics:
            if metric.name in self.unavailable:
                continue
            try:
                with oom_as_user_error("not enough memory for an image of this size"):
                    self._measure(metric, pair, score)
            except UserError as error:
                score.problems.append(Problem(files=files, metric=metric.name, reason=str(error)))
        return score

    def whole(self, scores: Iterable[Score]) -> tuple[dict[str, WholeValue], dict[str, str]]:
        """Metrics of all images of ``scores`` together, and the reason for each that cannot be computed."""
        ordered = sorted(scores, key=lambda score: score.name)
        values: dict[str, WholeValue] = {}
        unavailable: dict[str, str] = {}
        for metric, measure in self._sets.items():
            known = [score.features[metric] for score in ordered if metric in score.features]
            spec = next(spec for spec in self.metrics if spec.name == metric)
            try:
                if not known:
                    raise UserError("no image could be measured")
                sr, hr = (torch.cat(side) for side in zip(*known, strict=True))
                if spec.unpaired:
                    hr = self._other_photos(spec, measure)
                values[metric] = WholeValue(value=measure.distance(sr, hr), count=len(known))
            except UserError as error:
                unavailable[metric] = str(error)
        return values, unavailable

    def _other_photos(self, metric: MetricSpec, measure: SetDistance) -> Tensor:
        """Features (photos, D) of the photos to compare with, as they are: no crop and no border of the protocol."""
        photos = progress(self._unpaired or (), "Looking at other photos")
        images = (_as_rgb(to_eight_bits(read_image(path)).pixels) for path in photos)
        return torch.cat([self._on_device(metric, measure.features, image) for image in images])

    def _load(self, metric: MetricSpec) -> None:
        try:
            if metric.unpaired and self._unpaired is None:
                raise UserError("compares with other photos than the references: name their folder by --unpaired")
            if metric.of_sets is not None:
                self._sets[metric.name] = metric.of_sets()
            else:
                self._measures[metric.name] = metric.load()
        except UserError as error:
            self.unavailable[metric.name] = str(error)

    def _measure(self, metric: MetricSpec, pair: tuple[Tensor, Tensor | None], score: Score) -> None:
        sr, hr = pair[0], pair[0] if pair[1] is None else pair[1]
        if metric.name in self._sets:
            features = self._sets[metric.name].features
            found = self._on_device(metric, features, sr)
            other = found if metric.unpaired else self._on_device(metric, features, hr)
            score.features[metric.name] = found, other
            return
        value = float(self._on_device(metric, self._measures[metric.name], sr, hr))
        if not math.isfinite(value):
            raise UserError(f"gives {value}, which is no number to average")
        score.values[metric.name] = value

    def _on_device(self, metric: MetricSpec, measure: Callable[..., Tensor], *images: Tensor) -> Tensor:
        """Run one metric at a time on a GPU, so that the memory is that of one."""
        if not metric.network or self.device.type == "cpu":
            return measure(*images)
        with self._device_lock:
            return measure(*(image.to(self.device) for image in images))


def _check_kinds(sr: Samples, hr: Samples | None) -> None:
    """Refuse gray against colour; a file with three equal channels is gray."""
    if hr is None or sr.shape[2] == hr.shape[2]:
        return
    colour = sr if sr.shape[2] == 3 else hr
    if not (np.array_equal(colour[..., 0], colour[..., 1]) and np.array_equal(colour[..., 0], colour[..., 2])):
        kinds = "SR is gray but HR has colour" if hr.shape[2] == 3 else "SR has colour but HR is gray"
        raise UserError(f"{kinds}: convert one of them, so that both are of one kind")


def _as_rgb(samples: Samples) -> Tensor:
    """(H, W, 1 or 3) samples as (1, 3, H, W) in [0, 1]."""
    return samples_to_tensor(samples).expand(-1, 3, -1, -1)


MAX_WORKERS = 8
"""More threads would cost more in memory than they gain in time."""
READ_AHEAD = 2


# ---- inputs of a model: read as they are, cut to a protocol's crops, or made from HR photos ----


@dataclass(frozen=True, kw_only=True)
class Degrader:
    """Makes LR images from HR photos: with the same recipe, seed and names, those that ``onestepsr degrade`` writes.

    The degradation of a photo depends on the seed and on its path in ``folder`` alone.
    """

    name: str
    """Name of the recipe, for the result."""
    recipe: Recipe
    seed: int
    folder: Path
    scale: int = 4

    @property
    def settings(self) -> dict[str, Setting]:
        """Settings that are saved beside those of the protocol."""
        return {"degradation": self.name, "degradation_seed": self.seed}

    def __call__(self, path: Path) -> tuple[Samples, Samples]:
        """LR samples (h, w, 3) and HR samples (h * scale, w * scale, 3), cropped at the bottom and right."""
        name = path.relative_to(self.folder).as_posix() if path != self.folder else path.name
        drawn = draw_for(self.recipe, self.seed, name)
        return make_pair(path, drawn, seed=self.seed, name=name, scale=self.scale, multiple=self.scale)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One case with its images read."""

    lr: LoadedImage
    hr: Samples | None
    label: str
    """The files, for messages."""


def load_case(case: Case, *, scale: int, crop: int = 0, degrader: Degrader | None = None) -> Loaded:
    """Read one case for a model of factor ``scale``; UserError that names the file.

    ``crop`` is the side of the central square of HR that is measured, or 0 for whole images; ``degrader`` makes the LR
    image of a case that has none.
    """
    if degrader is not None and case.hr is not None:
        samples, hr = degrader(case.hr)
        lr, label = from_array(samples), str(case.hr)
    else:
        lr, hr, label = read_image(case.path), None, str(case.path)
        if case.hr is not None:
            hr, label = read_image(case.hr).pixels, f"{case.path} enlarged, against {case.hr}"
    if not crop:
        return Loaded(lr=lr, hr=hr, label=label)
    side = crop // scale
    if min(lr.height, lr.width) < side:
        raise UserError(f"{label}: the LR image is {lr.width} x {lr.height}, the protocol needs {side} x {side}")
    top, left = (lr.height - side) // 2, (lr.width - side) // 2
    if hr is not None:
        hr = _window(hr, top * scale, left * scale, crop)
    alpha = None if lr.alpha is None else _window(lr.alpha, top, left, side)
    return Loaded(lr=replace(lr, pixels=_window(lr.pixels, top, left, side), alpha=alpha), hr=hr, label=label)


def _window(samples: Samples, top: int, left: int, side: int) -> Samples:
    return samples[top : top + side, left : left + side].copy()


# ---- outputs of a model ----


@dataclass(frozen=True, kw_only=True)
class OutputWriter:
    """Saves the images of an evaluation as PNG."""

    folder: Path
    sides: tuple[str, ...]
    """Subfolders to write: ``SR``; also ``LR`` and ``HR`` if these were degraded or cropped, and are in no file yet."""

    def path(self, side: str, case: Case) -> Path:
        """File of one image."""
        return self.folder / side / f"{case.name}.png"

    def save(self, case: Case, loaded: Loaded, sr: LoadedImage) -> None:
        """Write the images of one case; UserError if that fails."""
        images = {"SR": sr, "LR": loaded.lr}
        if loaded.hr is not None:
            images["HR"] = from_array(loaded.hr)
        for side in self.sides:
            write_image(images[side], self.path(side, case), sweep=False)

    def recorded(self, folders: Files, files: Mapping[str, Files]) -> tuple[Files, dict[str, Files]]:
        """Folders, and the files of each case relative to them, with the saved images filled in."""
        keys = [side.lower() for side in self.sides]
        saved = {key: str(self.folder / side) for key, side in zip(keys, self.sides, strict=True)}
        named = {name: replace(own, **dict.fromkeys(keys, f"{name}.png")) for name, own in files.items()}
        return replace(folders, **saved), named


# ---- evaluations ----

Track = Callable[[Iterable[Score], int], Iterable[Score]]
"""A progress bar around scores, whose number is given."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model to run and measure."""

    enlarge: Callable[[LoadedImage, Path], LoadedImage]
    """Enlarges one image by ``scale``; its path, or that of the photo it was made from, leads to its prompt."""
    scale: int
    """Output side / input side."""
    record: ModelRecord
    """Description that is saved with the values."""
    draws_noise: bool = False
    """True if its images depend on a seed."""


class Clock:
    """Seconds by part of the work, added up over threads."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Seconds by part, and the total since the clock was made."""
        parts = {**self._seconds, "total": time.perf_counter() - self._started}
        return {name: round(value, 3) for name, value in parts.items()}


Scores = Generator[Score, None, None]


def score_files(cases: Sequence[Case], scorer: Scorer, workers: int, clock: Clock | None = None) -> Scores:
    """Measure super-resolved images that are in files, in their order: ``workers`` at a time, each by one thread.

    One each, because sums that threads share have other last digits for every number of them.
    """
    clock = clock or Clock()

    def score(case: Case) -> Score:
        files = str(case.path) if case.hr is None else f"{case.path} against {case.hr}"
        try:
            with oom_as_user_error(f"{files}: not enough memory"):
                with clock.part("reading"):
                    sr, hr = read_image(case.path).pixels, None if case.hr is None else read_image(case.hr).pixels
                with clock.part("metrics"):
                    return scorer.score(case.name, sr, hr, files)
        except OneStepSRError as error:
            return Score(name=case.name, problems=[Problem(reason=str(error))])

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        limits = Limits(images=2 * workers, readers=workers, writers=1)
        with closing(bounded_map(cases, score, lambda one: one, lambda one: one, limits=limits)) as scores:
            yield from scores
    finally:
        torch.set_num_threads(before)


def evaluate_images(
    data: CaseSet,
    scorer: Scorer,
    *,
    label: str,
    track: Track = lambda scores, _: scores,
    spread: Callable[[Sequence[Case]], Scores] | None = None,
) -> EvaluationResult:
    """Measure super-resolved images that are in files; ``spread`` does it elsewhere, and gives scores in any order."""
    clock = Clock()
    own = score_files(data.cases, scorer, worker_count(), clock) if spread is None else spread(data.cases)
    with closing(own) as scores:
        measured = list(track(scores, len(data.cases)))
    places = {case.name: place for place, case in enumerate(data.cases)}
    measured.sort(key=lambda score: places[score.name])
    folders, files = _recorded(data, "sr")
    return _result(measured, scorer, clock, label=label, folders=folders, files=files)


@dataclass(kw_only=True)
class _Step:
    """One case on its way through the pipeline."""

    case: Case
    loaded: Loaded | None = None
    sr: LoadedImage | None = None
    problem: Problem | None = None


def evaluate_model(
    model: EvaluatedModel,
    data: CaseSet,
    scorer: Scorer,
    *,
    label: str,
    degrader: Degrader | None = None,
    keep: Path | None = None,
    track: Track = lambda scores, _: scores,
) -> EvaluationResult:
    """Enlarge the images of ``data`` with ``model`` and measure the result as 8-bit or 16-bit files would hold it.

    ``degrader`` makes the LR images where ``data`` has HR photos only. ``keep`` is a folder that receives the images
    as PNG files. The numbers are those of ``onestepsr upscale`` to PNG and an evaluation of its folder. The network
    runs in this thread, in the order of the cases, while others read and measure.
    """
    clock, crop = Clock(), scorer.protocol.crop
    if crop % model.scale:
        raise UserError(f"crop {crop}: expected a multiple of the model's factor, {model.scale}")
    writer: OutputWriter | None = None
    if keep is not None:
        changed = ("LR", *(("HR",) if data.hr is not None else ())) if degrader is not None or crop else ()
        writer = OutputWriter(folder=keep, sides=("SR", *changed))
        # All at once, for it lists whole folders.
        remove_leftovers(*(writer.path(side, case) for case in data.cases for side in writer.sides))

    def read(case: Case) -> _Step:
        try:
            with clock.part("reading"), oom_as_user_error(f"{case.path}: not enough memory"):
                return _Step(case=case, loaded=load_case(case, scale=model.scale, crop=crop, degrader=degrader))
        except OneStepSRError as error:
            return _Step(case=case, problem=Problem(reason=str(error)))

    def enlarge(step: _Step) -> _Step:
        if step.loaded is not None:
            try:
                with clock.part("model"), oom_as_user_error("not enough memory; try --tile 64"):
                    step.sr = model.enlarge(step.loaded.lr, step.case.path)
            except OneStepSRError as error:
                step.problem = Problem(files=str(step.case.path), reason=str(error))
        return step

    def measure(step: _Step) -> Score:
        if step.loaded is None or step.sr is None:
            return Score(name=step.case.name, problems=[] if step.problem is None else [step.problem])
        with clock.part("metrics"):
            score = scorer.score(step.case.name, step.sr.pixels, step.loaded.hr, step.loaded.label)
        if writer is not None:
            try:
                writer.save(step.case, step.loaded, step.sr)
            except OneStepSRError as error:
                score.problems.append(Problem(reason=str(error)))
        return score

    def nbytes(step: _Step) -> int:
        if step.loaded is None:
            return 0
        hr = 0 if step.loaded.hr is None else int(step.loaded.hr.nbytes)
        return hr + int(step.loaded.lr.pixels.nbytes) * (1 + model.scale**2)

    count = worker_count()
    limits = Limits(images=1 + READ_AHEAD + count, readers=READ_AHEAD, writers=count)
    with closing(bounded_map(data.cases, read, enlarge, measure, nbytes=nbytes, limits=limits)) as scores:
        measured = list(track(scores, len(data.cases)))
    folders, files = _recorded(data, "lr")
    if writer is not None:
        folders, files = writer.recorded(folders, files)
    settings: dict[str, Setting] = {"scale": model.scale, **({} if degrader is None else degrader.settings)}
    return _result(
        measured, scorer, clock, label=label, folders=folders, files=files, settings=settings, model=model.record
    )


def without_images(result: EvaluationResult) -> EvaluationResult:
    """``result`` without the paths of SR images, for those that are not kept."""
    files = {name: replace(own, sr=None) for name, own in result.files.items()}
    return replace(result, folders=replace(result.folders, sr=None), files=files)


def worker_count() -> int:
    """Threads to measure with: the cores that this process may use, at most 8."""
    return max(1, min(MAX_WORKERS, cores()))


def _result(
    scores: Sequence[Score],
    scorer: Scorer,
    clock: Clock,
    *,
    label: str,
    folders: Files,
    files: Mapping[str, Files],
    settings: Mapping[str, Setting] | None = None,
    model: ModelRecord | None = None,
) -> EvaluationResult:
    by_name = {score.name: score for score in scores}
    whole, unavailable = scorer.whole(scores)
    return EvaluationResult(
        label=label,
        protocol=scorer.protocol.record(scorer.metrics, **(settings or {})),
        images={name: score.values for name, score in by_name.items() if score.values},
        whole=whole,
        model=model,
        folders=folders,
        files=files,
        failed={name: "; ".join(map(str, score.problems)) for name, score in by_name.items() if score.problems},
        unavailable={**scorer.unavailable, **unavailable},
        seconds=clock.seconds(),
        machine={**machine_entries(), "torch": str(torch.__version__), "metrics_on": str(scorer.device)},
        date=now(),
    )


def _recorded(data: CaseSet, role: Literal["lr", "sr"]) -> tuple[Files, dict[str, Files]]:
    """Folders of a set, and the files of each case relative to them, with forward slashes."""

    def relative(path: Path | None, folder: Path | None) -> str | None:
        if path is None or folder is None:
            return None
        return path.name if path == folder else path.relative_to(folder).as_posix()

    folders = {role: data.folder, "hr": data.hr}
    paths = {case.name: {role: case.image, "hr": case.hr} for case in data.cases}
    files = {name: Files(**{key: relative(own[key], folders[key]) for key in own}) for name, own in paths.items()}
    return Files(**{key: None if folder is None else str(folder) for key, folder in folders.items()}), files

"""One evaluation from beginning to end: of pictures in folders, or of a model on a data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from onestepsr.evaluate.folder import Case, DataSet, Pairing
from onestepsr.evaluate.inputs import Degrader, Keeper, Loader, relative
from onestepsr.evaluate.measuring import Measurer, Score
from onestepsr.evaluate.result import (
    EvaluationResult,
    Files,
    ModelRecord,
    Setting,
    machine_entries,
    now,
)
from onestepsr.evaluate.running import Clock, ModelRun, score_pairs
from onestepsr.image import Picture

Track = Callable[[Iterable[Score], int], Iterable[Score]]
"""A progress bar around scores, whose number is given."""


def untracked(scores: Iterable[Score], total: int) -> Iterable[Score]:
    """No progress bar."""
    return scores


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model as an evaluation sees it."""

    enlarge: Callable[[Picture, Path], Picture]
    """Enlarges one picture by ``scale``. Its file, or that of the photo it was made of, comes along for what belongs to
    it by name, such as a prompt."""
    scale: int
    """Output side / input side."""
    record: ModelRecord
    """What is saved about it."""


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """How LR pictures are made of HR photos."""

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

    measurer: Measurer
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


def evaluate_pictures(
    pairing: Pairing, folders: Files, measurer: Measurer, *, label: str, track: Track = untracked
) -> EvaluationResult:
    """Measure super-resolved pictures that are in files; ``folders`` is where the pairs were found."""
    collected = _Collected(measurer=measurer)
    scores = score_pairs(pairing.pairs, measurer, clock=collected.clock)
    collected.add(track(scores, len(pairing.pairs)))
    roots = [None if folder is None else Path(folder) for folder in (folders.sr, folders.hr)]
    files = {p.name: Files(sr=relative(p.sr, roots[0]), hr=relative(p.hr, roots[1])) for p in pairing.pairs}
    return collected.result(label=label, folders=folders, files=files, settings={})


def evaluate_model(
    model: EvaluatedModel,
    data: DataSet,
    measurer: Measurer,
    *,
    label: str,
    degradation: Degradation | None = None,
    keep: Path | None = None,
    track: Track = untracked,
) -> EvaluationResult:
    """Enlarge the pictures of ``data`` with ``model`` and measure what comes out, as 8-bit or 16-bit files hold it.

    ``degradation`` makes the LR pictures where ``data`` has HR photos only. ``keep`` is a folder that receives the
    pictures as PNG files. The numbers are those of ``onestepsr upscale`` to PNG and an evaluation of its folder.
    """
    collected = _Collected(measurer=measurer)
    crop = measurer.protocol.crop
    keeper = None if keep is None else Keeper(folder=keep, made=degradation is not None or crop > 0)
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


def without_pictures(result: EvaluationResult) -> EvaluationResult:
    """``result`` without the places of SR pictures, for those that are not kept."""
    files = {name: replace(own, sr=None) for name, own in result.files.items()}
    return replace(result, folders=replace(result.folders, sr=None), files=files)


def _files(case: Case, data: DataSet) -> Files:
    return Files(lr=relative(case.lr, data.lr), hr=relative(case.hr, data.hr))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)

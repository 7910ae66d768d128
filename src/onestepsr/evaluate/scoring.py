"""Scores of images by many metrics, some of which may fail on some images or on this machine."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.evaluate.metrics.catalog import MetricSpec, Reference
from onestepsr.evaluate.metrics.fid import SetDistance
from onestepsr.evaluate.protocols import Protocol
from onestepsr.evaluate.result import WholeValue
from onestepsr.imaging.read import Samples, samples_to_tensor
from onestepsr.inference.devices import oom_as_user_error


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


class Scorer:
    """Metrics, loaded once, under a protocol; :meth:`score` may be called by several threads.

    ``unavailable`` has the metrics that cannot be loaded, with the reason; UserError if these are all.
    """

    def __init__(self, metrics: Sequence[MetricSpec], protocol: Protocol, device: str | torch.device = "cpu") -> None:
        """``device`` is that of metrics which are networks."""
        self.metrics, self.protocol, self.device = list(metrics), protocol, torch.device(device)
        self.unavailable: dict[str, str] = {}
        self._measures: dict[str, Reference] = {}
        self._sets: dict[str, SetDistance] = {}
        self._features: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
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

    def whole(self) -> tuple[dict[str, WholeValue], dict[str, str]]:
        """Metrics of all images scored so far together, and the reason for each that cannot be computed."""
        values: dict[str, WholeValue] = {}
        unavailable: dict[str, str] = {}
        for metric, measure in self._sets.items():
            known = [features for _, features in sorted(self._features[metric].items())]
            try:
                if not known:
                    raise UserError("no image could be measured")
                sr, hr = (torch.cat(side) for side in zip(*known, strict=True))
                values[metric] = WholeValue(value=measure.distance(sr, hr), count=len(known))
            except UserError as error:
                unavailable[metric] = str(error)
        return values, unavailable

    def _load(self, metric: MetricSpec) -> None:
        try:
            if metric.of_sets is not None:
                self._sets[metric.name], self._features[metric.name] = metric.of_sets(), {}
            else:
                self._measures[metric.name] = metric.load()
        except UserError as error:
            self.unavailable[metric.name] = str(error)

    def _measure(self, metric: MetricSpec, pair: tuple[Tensor, Tensor | None], score: Score) -> None:
        sr, hr = pair[0], pair[0] if pair[1] is None else pair[1]
        if metric.name in self._sets:
            features = self._sets[metric.name].features
            self._features[metric.name][score.name] = (
                self._on_device(metric, features, sr),
                self._on_device(metric, features, hr),
            )
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

"""Measuring trained generators on the same held-out pairs, and the values of many runs as one table of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.core.rng import derived_seed
from onestepsr.data.config import DataConfig
from onestepsr.data.datasets import build_dataset
from onestepsr.evaluate.metrics.catalog import METRICS, MetricSpec, Reference
from onestepsr.evaluate.metrics.fidelity import as_eight_bit
from onestepsr.evaluate.statistics import mean, summarize
from onestepsr.inference.upscaler import resolve_device
from onestepsr.methods.shared.image_loss import PerceptualConfig, build_perceptual
from onestepsr.models.loading import load_generator
from onestepsr.train.ablation.suite import EvaluationConfig
from onestepsr.weights.catalog import BICUBIC

PERCEPTUAL = ("dists", "lpips")
"""Metrics whose features are part of a suite's settings."""
OPTIONAL = "niqe"
"""Left out, with a note, where the statistics it needs are not at hand."""

Values = dict[str, list[float | None]]
"""By metric, one value for each held-out pair; none where an image cannot be measured (NIQE of a flat one)."""


@dataclass(frozen=True)
class Candidate:
    """A generator to measure."""

    model: str | Path
    """Its name or weights file."""
    steps: int | None = None
    """Network evaluations, for a model that takes several; none is what it was made for."""
    sampler: str | None = None
    """How it takes them, likewise."""

    def load(self, device: torch.device | str = "cpu") -> nn.Module:
        """The generator, ready for inference."""
        return load_generator(self.model, device=device, steps=self.steps, sampler=self.sampler)


class Track(Protocol):
    """A progress bar around a loop."""

    def __call__(self, items: Sequence[int], title: str) -> Iterable[int]:
        """The same items."""
        ...


def untracked(items: Sequence[int], title: str) -> Iterable[int]:
    """No progress bar."""
    return items


class HeldOut:
    """The held-out pairs and the metrics; everything that can be missing is reported on construction."""

    def __init__(self, config: EvaluationConfig, device: str = "auto") -> None:
        self.config, self.device = config, resolve_device(device)
        # A stream of its own: sample i of a training set with the same seed would get the same degradation.
        self.pairs = build_dataset(config.data, derived_seed(config.seed, "held-out pairs"), with_lr=True)
        self.notes: list[str] = []
        self.metrics: list[MetricSpec] = []
        self._measures: dict[str, Reference] = {}
        for name in config.metrics:
            self._add_metric(name)

    @property
    def indices(self) -> range:
        """Numbers of the pairs; whole images are each used once."""
        whole = self.config.data.crop == 0
        return range(min(self.config.images, len(self.pairs)) if whole else self.config.images)

    def measure(self, candidate: Candidate, track: Track = untracked) -> Values:
        """Values of a generator, computed in float32 and rounded to 8 bits."""
        generator = candidate.load(self.device)
        title = str(candidate.model)
        return self._collect(lambda pair: self.restore(generator, pair["lr"]), self.metrics, track, title)

    def measure_references(self, track: Track = untracked) -> Values:
        """Values of the HR images themselves, for the metrics that compare with nothing."""
        alone = [metric for metric in self.metrics if not metric.needs_reference]
        return self._collect(lambda pair: pair["hr"][None], alone, track, "HR")

    def restore(self, generator: nn.Module, lr: Tensor) -> Tensor:
        """SR image (1, 3, s h, s w) of one LR image (3, h, w), in [0, 1] on the levels of 8 bits, on the CPU."""
        with torch.no_grad():
            return as_eight_bit(generator(lr[None].to(self.device)).float().cpu())

    def images(self, candidates: Mapping[str, Candidate]) -> list[dict[str, Tensor]]:
        """Rows of the image sheet: centre parts (3, side, side) by title, bicubic first and HR last."""
        count = min(self.config.shown, len(self.indices))
        rows: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for title, candidate in {"bicubic": Candidate(BICUBIC), **candidates}.items():
            generator = candidate.load(self.device)
            for index, row in enumerate(rows):
                row[title] = self._centre(self.restore(generator, self.pairs[index]["lr"])[0])
        for index, row in enumerate(rows):
            row["HR"] = self._centre(self.pairs[index]["hr"])
        return rows

    def _centre(self, image: Tensor) -> Tensor:
        side = self.config.shown_side
        height, width = image.shape[-2:]
        top, left = max(0, height - side) // 2, max(0, width - side) // 2
        return image[:, top : top + side, left : left + side]

    def _collect(
        self, picture: Callable[[dict[str, Tensor]], Tensor], metrics: Sequence[MetricSpec], track: Track, title: str
    ) -> Values:
        values: Values = {metric.name: [] for metric in metrics}
        for index in track(self.indices, title):
            pair = self.pairs[index]
            sr, hr = picture(pair), pair["hr"][None]
            for name, column in values.items():
                column.append(self._value(name, sr, hr))
        return values

    def _value(self, name: str, sr: Tensor, hr: Tensor) -> float | None:
        try:
            with torch.no_grad():
                return float(self._measures[name](sr, hr))
        except UserError:
            if name != OPTIONAL:
                raise
            return None  # a flat image has no natural-scene statistics

    def _add_metric(self, name: str) -> None:
        try:
            metric = find_metric(name, self.config.perceptual)
            self._measures[metric.name] = metric.load()
            self.metrics.append(metric)
        except UserError as error:
            if name != OPTIONAL:
                raise
            self.notes.append(f"NIQE was not measured: {error}")


def find_metric(name: str, perceptual: PerceptualConfig) -> MetricSpec:
    """The metric called ``name``; perceptual ones are named after their features, so that none pass for others."""
    plain = {key: spec for key, spec in METRICS.items() if key not in PERCEPTUAL and spec.of_sets is None}
    if name in plain:
        return plain[name]
    if name not in PERCEPTUAL:
        raise UserError(f"evaluation.metrics: unknown metric '{name}': {did_you_mean(name, [*plain, *PERCEPTUAL])}")
    config = replace(perceptual, distance="dists" if name == "dists" else "lpips")

    def load() -> Reference:
        features, distance = build_perceptual(config)
        return lambda sr, hr: cast(Tensor, distance(features, sr, hr))

    title = name.upper().replace("_", "-")
    if config.features != "vgg16":
        title = f"{title} ({config.features})"
    return MetricSpec(name=f"{name}_{config.features}", title=title, higher_is_better=False, against=load)


def refuse_training_photos(held_out: DataConfig, training: DataConfig) -> None:
    """Refuse to compare models on photos from a folder that they were trained on."""
    for folder in held_out.paths:
        for other in training.paths:
            own, theirs = folder.resolve(), other.resolve()
            if own == theirs or theirs in own.parents or own in theirs.parents:
                raise UserError(f"the held-out photos in {folder} are among the training photos in {other}")


def over_seeds(runs: Sequence[Values]) -> dict[str, dict[str, float | None]]:
    """By metric, ``mean`` and ``std`` (of the sample; none for one run) over runs of each run's mean over images."""
    found: dict[str, dict[str, float | None]] = {}
    for name in runs[0] if runs else ():
        means = [value for value in (mean(run[name]) for run in runs) if value is not None]
        summary = summarize(means) if means else None
        found[name] = {"mean": summary.mean, "std": summary.std} if summary else {"mean": None, "std": None}
    return found


def describe_metrics(metrics: Sequence[MetricSpec]) -> list[dict[str, Any]]:
    """What a reader of the results has to know of the columns."""
    titles = {metric.name: f"{metric.title} {metric.unit}".strip() for metric in metrics}
    return [{"name": m.name, "title": titles[m.name], "higher_is_better": m.higher_is_better} for m in metrics]

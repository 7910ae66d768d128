"""The result of one evaluation: every value, and the settings needed to compare it with another.

``evaluate --json`` writes it, ``evaluate compare`` and the report read it. Means, spreads and intervals are computed
from the values of the images, also on reading, so that a file cannot say two things.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from onestepsr import __version__
from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UserError, error_context
from onestepsr.core.files import read_limited, write_text
from onestepsr.core.machine import processor_name

# ---- Statistics ------------------------------------------------------------------------------------------------------
# Images are the sample: an interval says how far the mean would move on other images of the same kind. Two methods
# are compared by their differences image by image, because how hard an image is moves both alike and by more than
# the methods differ.

CONFIDENCE = 0.95
EXACT_PAIRS = 200
"""Largest number of pairs for which the signed-rank test is exact; beyond, the normal approximation holds."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One metric over all images that have it."""

    mean: float
    std: float | None
    """Standard deviation of the sample (divisor n - 1); None for fewer than two values."""
    interval95: float | None
    """Half width of the 95 % confidence interval of the mean, from Student's t; None if ``std`` is None."""
    count: int


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Difference of the second of two methods from the first, on the images that both have."""

    difference: Summary
    """Second minus first, image by image."""
    p_student: float | None
    """Two-sided p value of the paired t-test that the mean difference is 0; None for fewer than two images."""
    p_wilcoxon: float | None
    """Two-sided p value of Wilcoxon's signed-rank test; None if no image differs."""
    higher: int
    """Images on which the second has the higher value."""
    lower: int
    """Images on which the second has the lower value."""


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None if there is none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def summarize(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and 95 % interval of at least one finite value."""
    count = len(values)
    if count < 2:
        return Summary(mean=float(values[0]), std=None, interval95=None, count=count)
    spread = statistics.stdev(values)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * spread / math.sqrt(count)
    return Summary(mean=statistics.fmean(values), std=spread, interval95=half, count=count)


def compare_paired(first: Sequence[float], second: Sequence[float]) -> PairedComparison:
    """Compare two methods by their values on the same images, in the same order; at least one."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return PairedComparison(
        difference=summarize(differences),
        p_student=student_test(differences),
        p_wilcoxon=wilcoxon_test(differences),
        higher=sum(value > 0 for value in differences),
        lower=sum(value < 0 for value in differences),
    )


def student_test(differences: Sequence[float]) -> float | None:
    """Two-sided p value of the paired t-test; None for fewer than two values, 0 or 1 if all are the same."""
    if len(differences) < 2:
        return None
    # If all values are equal but for rounding, t would be a ratio of two rounding errors.
    if statistics.stdev(differences) <= 1e-12 * max(abs(value) for value in differences):
        return 1.0 if statistics.fmean(differences) == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0).pvalue)


def wilcoxon_test(differences: Sequence[float]) -> float | None:
    """Two-sided p value of Wilcoxon's signed-rank test; zeros are left out, None if all are zero."""
    kept = np.asarray([value for value in differences if value != 0])
    if not kept.size:
        return None
    if kept.size <= EXACT_PAIRS and np.unique(np.abs(kept)).size < kept.size:
        return _exact_with_ties(kept)
    method = "exact" if kept.size <= EXACT_PAIRS else "asymptotic"
    return float(stats.wilcoxon(kept, method=method, correction=True).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted for their number after Holm (1979), in the order given.

    Of many comparisons some are small by chance: an adjusted value below 0.05 keeps the chance of even one false
    finding among all of them below 5 %.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = largest
    return adjusted


def _exact_with_ties(differences: NDArray[np.float64]) -> float:
    """Exact signed-rank test with ties; SciPy's is exact for distinct absolute values only.

    Counts the sums of ranks over all 2^n signs; doubled ranks are whole numbers.
    """
    doubled = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)
    chances = np.zeros(int(doubled.sum()) + 1)
    chances[0] = 1.0
    for rank in doubled:
        chances /= 2
        chances[rank:] += chances[: len(chances) - rank].copy()
    positive = int(doubled[differences > 0].sum())
    return min(1.0, 2 * float(chances[: min(positive, int(doubled.sum()) - positive) + 1].sum()))


# ---- Saved results ---------------------------------------------------------------------------------------------------

SCHEMA = 2
MAX_RESULT_BYTES = 64 * 2**20
DERIVED = ("mean", "std", "interval95", "count")
"""Keys of the file that are computed from the others."""
REQUIRED = ("label", "protocol", "images", "mean")
"""Keys that every file has."""

Setting = str | bool | int | float | None
LARGEST_VALUE = 1e100
"""Sums and squares of values up to here are still finite; no metric comes near."""


@dataclass(frozen=True, kw_only=True)
class MetricRecord:
    """Description of a metric, saved with its values."""

    title: str
    """Column heading, such as ``PSNR``."""
    higher_is_better: bool
    variant: str = ""
    """Setting that tells it from others of the same title: ``Y of BT.601, not rounded``, ``maniqa-pipal``."""
    unit: str = ""
    """Unit of the values, such as ``dB``; empty for none."""


@dataclass(frozen=True, kw_only=True)
class ProtocolRecord:
    """Rules under which the values were measured."""

    name: str
    """Name of the protocol."""
    metrics: Mapping[str, MetricRecord]
    """The metrics, by their key in ``images``, in the order in which they are shown."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Everything else that changes numbers: ``resize``, ``crop_border``, ``colour``, ..., as the JSON file has them."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The model that made the images, where the evaluation ran it."""

    name: str
    """Name or path given."""
    sha256: str | None = None
    """Checksum of its weights."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that change its images, such as ``tile`` and ``color_fix``."""
    parameters: int | None = None
    """Number of its parameters, all of them."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """The folders of an evaluation, or the files of one image relative to them; None if there is no such file."""

    lr: str | None = None
    """Low-resolution input."""
    sr: str | None = None
    """Super-resolved image, which was measured."""
    hr: str | None = None
    """Reference."""


@dataclass(frozen=True, kw_only=True)
class WholeValue:
    """A metric that has one value for a whole set of images, such as FID."""

    value: float
    """The value."""
    count: int
    """Number of images that it was computed over."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Values of one method on one set of images; ValueError for unknown metrics and values that are not finite."""

    label: str
    """Name of the method in tables."""
    protocol: ProtocolRecord
    """Rules under which it was measured."""
    images: Mapping[str, Mapping[str, float]]
    """By image (path in its folder without the ending, forward slashes) and metric; what failed is missing."""
    whole: Mapping[str, WholeValue] = field(default_factory=dict)
    """Metrics of the set as a whole; they appear in ``mean``, and have neither spread nor interval."""
    model: ModelRecord | None = None
    """The model, if the evaluation ran one."""
    folders: Files = field(default_factory=Files)
    """Folders of the images, in which a report looks for them."""
    files: Mapping[str, Files] = field(default_factory=dict)
    """By image, its files relative to ``folders`` (or the file itself where that is one)."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """By image, the reason that it or one of its metrics could not be measured."""
    unavailable: Mapping[str, str] = field(default_factory=dict)
    """By metric, the reason that it could not be measured on this machine."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time taken, in seconds, by part of the work."""
    machine: Mapping[str, Setting] = field(default_factory=dict)
    """Machine and libraries."""
    date: str = ""
    """Time of the measurement, in ISO 8601."""
    onestepsr: str = __version__
    """Version that measured it."""

    def __post_init__(self) -> None:
        for metric, whole in self.whole.items():
            self._check(metric, whole.value, "the whole set")
        for name, values in self.images.items():
            for metric, value in values.items():
                self._check(metric, value, f"image '{name}'")
        if not self.label:
            raise ValueError("label is empty, expected the name of the method")

    @property
    def metrics(self) -> dict[str, MetricRecord]:
        """The metrics that have a value, in the protocol's order."""
        measured = {metric for values in self.images.values() for metric in values} | set(self.whole)
        return {name: record for name, record in self.protocol.metrics.items() if name in measured}

    def values(self, metric: str) -> dict[str, float]:
        """By image, its value of ``metric``; empty for a metric of the whole set."""
        return {name: values[metric] for name, values in self.images.items() if metric in values}

    def summaries(self) -> dict[str, Summary]:
        """Mean, spread, interval and count of every metric that has a value."""
        found: dict[str, Summary] = {}
        for metric in self.metrics:
            if metric in self.whole:
                whole = self.whole[metric]
                found[metric] = Summary(mean=whole.value, std=None, interval95=None, count=whole.count)
            else:
                found[metric] = summarize(list(self.values(metric).values()))
        return found

    def to_mapping(self) -> dict[str, Any]:
        """Content of the JSON file."""
        summaries = self.summaries()
        derived = {key: {name: getattr(summary, key) for name, summary in summaries.items()} for key in DERIVED}
        known = {key: {name: value for name, value in row.items() if value is not None} for key, row in derived.items()}
        own = to_mapping(self)
        settings = own["protocol"].pop("settings")
        protocol = {"name": own["protocol"].pop("name"), **settings, **own["protocol"]}
        first = {key: own.pop(key) for key in ("onestepsr", "date", "label", "model")}
        return {"schema": SCHEMA, **first, **own, "protocol": protocol, **known}

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> EvaluationResult:
        """Inverse of :meth:`to_mapping`; UserError for anything else."""
        if content.get("schema") != SCHEMA:
            raise UserError(f"schema {content.get('schema')!r} is not that of an evaluation; readable: {SCHEMA}")
        if missing := [key for key in REQUIRED if key not in content]:
            raise UserError(f"'{missing[0]}' is missing, so this is no result of an evaluation")
        own = {key: value for key, value in content.items() if key not in ("schema", *DERIVED)}
        protocol = own["protocol"]
        if isinstance(protocol, Mapping):  # in a file, the settings stand beside its name
            settings = {key: value for key, value in protocol.items() if key not in ("name", "metrics")}
            known = {key: protocol[key] for key in ("name", "metrics") if key in protocol}
            own["protocol"] = {**known, "settings": settings}
        result = from_mapping(cls, own)
        _check_means(content["mean"], result)
        return result

    def _check(self, metric: str, value: float, where: str) -> None:
        if metric not in self.protocol.metrics:
            raise ValueError(f"{where} has a value of '{metric}', which the protocol does not describe")
        if not abs(value) <= LARGEST_VALUE:  # also refuses NaN
            raise ValueError(
                f"{where} has the {metric} {value}, expected a finite number of at most {LARGEST_VALUE:g} in size"
            )


def write_result(path: Path, result: EvaluationResult) -> None:
    """Write ``result`` as JSON under ``path`` in one step; UserError if that fails."""
    text = json.dumps(result.to_mapping(), indent=1, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def read_result(path: Path) -> EvaluationResult:
    """Read a file of ``evaluate --json``; UserError in one line."""
    data = read_limited(path, MAX_RESULT_BYTES, "result of an evaluation")
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object as written by 'onestepsr evaluate --json'")
    with error_context(str(path)):
        return EvaluationResult.from_mapping(content)


def now() -> str:
    """Current time, for :attr:`EvaluationResult.date`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine_entries() -> dict[str, Setting]:
    """Entries of :attr:`EvaluationResult.machine` that need no PyTorch."""
    return {"system": platform.system(), "processor": processor_name(), "python": platform.python_version()}


def _check_means(written: object, result: EvaluationResult) -> None:
    """UserError if the means in a file are not those of its images."""
    if not isinstance(written, Mapping):
        raise UserError("mean: expected a mapping from metric to value")
    means = {name: summary.mean for name, summary in result.summaries().items()}
    for name in {**written, **means}:
        own, theirs = means.get(name), written.get(name, math.nan)
        # JSON's whole numbers may be larger than any float.
        number = isinstance(theirs, int | float) and abs(theirs) <= LARGEST_VALUE
        if own is None or not number or not math.isclose(own, theirs, rel_tol=1e-6, abs_tol=1e-9):
            raise UserError(f"mean.{name} is {theirs!r:.40} but the images give {own!r}: the file was changed by hand")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON knows")

"""The result of one evaluation: every value, and what has to be known to compare it with another.

``evaluate --json`` writes it, ``evaluate compare`` and the report read it. Means, spreads and intervals are computed
from the values of the images, also on reading, so that a file cannot say two things.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

from onestepsr import __version__
from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UserError, error_context
from onestepsr.core.files import read_limited, write_text
from onestepsr.core.machine import processor_name
from onestepsr.evaluate.statistics import Summary, summarize

SCHEMA = 2
READABLE = (1, 2)
MAX_RESULT_BYTES = 64 * 2**20
UNKNOWN_PROTOCOL = "unknown"
"""Protocol of results of schema 1, which did not say."""
DERIVED = ("mean", "std", "interval95", "count")
"""Keys of the file that follow from the others."""
REQUIRED = ("label", "protocol", "images", "mean")
"""Keys without which a file is none of ours."""

Setting = str | bool | int | float | None
NAME_LENGTH = 1000
LARGEST_VALUE = 1e100
"""No metric comes near; sums and squares of values up to here are numbers still."""
SHOWN_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True)
class MetricRecord:
    """What a reader has to know of one metric."""

    title: str
    """Column heading, such as ``PSNR``."""
    higher_is_better: bool
    variant: str = ""
    """What makes its numbers this one's and not its namesake's: ``Y of BT.601, not rounded``, ``maniqa-pipal``."""
    unit: str = ""
    """Unit of the values, such as ``dB``; empty for none."""


@dataclass(frozen=True, kw_only=True)
class ProtocolRecord:
    """Under which rules the values were measured."""

    name: str
    """Name of the protocol."""
    metrics: Mapping[str, MetricRecord]
    """The metrics, by their key in ``images``, in the order in which they are shown."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Everything else that changes numbers: ``resize``, ``crop_border``, ``colour``, ..., as the JSON file has them."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What made the images, where the evaluation ran it."""

    name: str
    """Name or path given."""
    sha256: str | None = None
    """Checksum of its weights."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that change its images, such as ``tile`` and ``color_fix``."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """The folders of an evaluation, or the files of one image relative to them; none where there is none."""

    lr: str | None = None
    """Low-resolution input."""
    sr: str | None = None
    """What was measured."""
    hr: str | None = None
    """Reference."""


@dataclass(frozen=True, kw_only=True)
class WholeValue:
    """A metric that has one value for a whole set of images, such as FID."""

    value: float
    """The value."""
    count: int
    """Over how many images it was taken."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Values of one method on one set of images. ValueError for values beyond all measure and unknown metrics."""

    label: str
    """Name of the method in tables, at most 1000 characters."""
    protocol: ProtocolRecord
    """How it was measured."""
    images: Mapping[str, Mapping[str, float]]
    """By image (path in its folder without the ending, forward slashes) and metric; what failed is missing."""
    whole: Mapping[str, WholeValue] = field(default_factory=dict)
    """Metrics of the set as a whole; they appear in ``mean``, and have neither spread nor interval."""
    model: ModelRecord | None = None
    """The model, if the evaluation ran one."""
    folders: Files = field(default_factory=Files)
    """Where the images were; a report looks for them there."""
    files: Mapping[str, Files] = field(default_factory=dict)
    """By image, its files relative to ``folders`` (or the file itself where that is one)."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """By image, why it or one of its metrics could not be measured."""
    unavailable: Mapping[str, str] = field(default_factory=dict)
    """By metric, why it could not be measured on this machine."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time taken, in seconds, by part of the work."""
    machine: Mapping[str, Setting] = field(default_factory=dict)
    """What it ran on."""
    date: str = ""
    """When it was measured, in ISO 8601."""
    onestepsr: str = __version__
    """Version that measured it."""

    def __post_init__(self) -> None:
        for metric, whole in self.whole.items():
            self._check(metric, whole.value, "the whole set")
        for name, values in self.images.items():
            if len(name) > NAME_LENGTH:
                raise ValueError(f"the name of an image has {len(name)} characters, at most {NAME_LENGTH} are accepted")
            for metric, value in values.items():
                self._check(metric, value, f"image '{name}'")
        if not self.label or len(self.label) > NAME_LENGTH:
            raise ValueError(f"label has {len(self.label)} characters, expected 1 to {NAME_LENGTH}")

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
        """What the JSON file holds."""
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
        """Inverse of :meth:`to_mapping`, also for files of schema 1; UserError for anything else."""
        schema = content.get("schema")
        if schema not in READABLE or isinstance(schema, bool):
            raise UserError(
                f"schema {schema!r} is not that of an evaluation; readable: {', '.join(map(str, READABLE))}"
            )
        if schema == 1:
            return _from_first_schema(content)
        if missing := [key for key in REQUIRED if key not in content]:
            raise UserError(f"'{missing[0]}' is missing, so this is no result of an evaluation")
        own = {key: value for key, value in content.items() if key not in ("schema", *DERIVED)}
        own["protocol"] = _nested_settings(own.get("protocol"))
        result = from_mapping(cls, own)
        _check_means(content.get("mean"), result)
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
    """Read a file of ``evaluate --json``; the label of a file that has none is its name. UserError, one line."""
    data = read_limited(path, MAX_RESULT_BYTES, "result of an evaluation")
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object as written by 'onestepsr evaluate --json'")
    if content.get("schema") == 1:
        content.setdefault("label", path.stem)
    with error_context(str(path)):
        return EvaluationResult.from_mapping(content)


def now() -> str:
    """The present, for :attr:`EvaluationResult.date`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine_entries() -> dict[str, Setting]:
    """Entries of :attr:`EvaluationResult.machine` that need no PyTorch."""
    return {
        "system": platform.system(),
        "processor": processor_name(),
        "python": platform.python_version(),
    }


def safe_text(text: str) -> str:
    """``text`` without control characters and lone surrogates, which a file name may hold and a terminal may obey."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def _nested_settings(protocol: object) -> Any:
    """The protocol of a file, whose settings stand beside its name, as :class:`ProtocolRecord` has it."""
    if not isinstance(protocol, Mapping):
        return protocol
    own = {key: protocol[key] for key in ("name", "metrics") if key in protocol}
    return {**own, "settings": {key: value for key, value in protocol.items() if key not in ("name", "metrics")}}


def _check_means(written: object, result: EvaluationResult) -> None:
    if not isinstance(written, Mapping):
        raise UserError("mean: expected a mapping from metric to value")
    means = {name: summary.mean for name, summary in result.summaries().items()}
    for name in {**written, **means}:
        own, theirs = means.get(name), written.get(name)
        if own is None or not _is_number(theirs) or not math.isclose(own, theirs, rel_tol=1e-6, abs_tol=1e-9):
            shown = repr(theirs)
            shown = shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}…"
            raise UserError(f"mean.{name} is {shown} but the images give {own!r}: the file was changed by hand")


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of a file can be one of a metric: JSON's whole numbers may be larger than any float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_VALUE


def _from_first_schema(content: Mapping[str, Any]) -> EvaluationResult:
    images = content.get("images")
    if not isinstance(images, Mapping) or not all(isinstance(values, Mapping) for values in images.values()):
        raise UserError("images: expected a mapping from image to values")
    measured = {metric for values in images.values() for metric in values}
    if unknown := sorted(measured - set(_FIRST_METRICS)):
        raise UserError(f"unknown metric '{unknown[0]}' in a file of schema 1; known: {', '.join(_FIRST_METRICS)}")
    metrics = {name: record for name, record in _FIRST_METRICS.items() if name in measured}
    own = {
        "label": content.get("label", UNKNOWN_PROTOCOL),
        "protocol": {"name": UNKNOWN_PROTOCOL, "metrics": metrics},
        "images": images,
        "onestepsr": "0.1.0",
    }
    result = from_mapping(EvaluationResult, own)
    _check_means(content.get("mean"), result)
    return result


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON knows")


_LUMA = "Y of BT.601 studio range"
_FIRST_METRICS = {
    "psnr": MetricRecord(title="PSNR-Y", variant=f"{_LUMA}, not rounded", unit="dB", higher_is_better=True),
    "psnr_rgb": MetricRecord(title="PSNR-RGB", variant="RGB", unit="dB", higher_is_better=True),
    "ssim": MetricRecord(title="SSIM-Y", variant=f"{_LUMA}, rounded", higher_is_better=True),
    "overshoot": MetricRecord(title="overshoot", higher_is_better=False),
    "niqe": MetricRecord(title="NIQE", variant="Y of YIQ, rounded", higher_is_better=False),
    "grid": MetricRecord(title="grid", higher_is_better=False),
}
"""All that schema 1 knew."""

"""Several results side by side: the images they share, differences in how they were measured, and paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from onestepsr.core.errors import UserError, join_names
from onestepsr.evaluate.result import (
    EvaluationResult,
    MetricRecord,
    PairedComparison,
    Summary,
    compare_paired,
    holm,
    summarize,
)

SCHEMA = 1
SIGNIFICANCE = 0.05
MAX_METHODS = 20
LISTED = 3
"""Number of names that a warning about images gives as examples."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of one method against the first method."""

    metric: str
    method: int
    """Number of the method, counted from 0; it is compared with the first."""
    paired: PairedComparison
    adjusted: float | None
    """Wilcoxon's p value after Holm, over every metric and method of the comparison; None if no image differs."""
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``undecided`` than the first method, by the adjusted p value and the 5 % level."""
        if self.adjusted is None or self.adjusted >= SIGNIFICANCE or self.paired.difference.mean == 0:
            return "undecided"
        return "better" if (self.paired.difference.mean > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class Comparison:
    """Results of one or more methods, compared over the images that all of them have."""

    results: tuple[EvaluationResult, ...]

    @property
    def labels(self) -> list[str]:
        """Name of each method, all different."""
        return [result.label for result in self.results]

    @cached_property
    def metrics(self) -> dict[str, MetricRecord]:
        """Every metric that at least one result has, in the order of the first that has it."""
        found: dict[str, MetricRecord] = {}
        for result in self.results:
            for name, record in result.metrics.items():
                found.setdefault(name, record)
        return found

    @cached_property
    def images(self) -> list[str]:
        """Names of the images of all results, in the order of the first result that has them."""
        return list(dict.fromkeys(name for result in self.results for name in result.images))

    def common(self, metric: str) -> list[str]:
        """Images with a value of ``metric`` in every result that has the metric."""
        having = [values for result in self.results if (values := result.values(metric))]
        return [name for name in having[0] if all(name in values for values in having)] if having else []

    @cached_property
    def summaries(self) -> list[dict[str, Summary]]:
        """By method and metric, the mean over the common images, or the value of a metric of whole sets."""
        common = {metric: self.common(metric) for metric in self.metrics}
        found: list[dict[str, Summary]] = []
        for result in self.results:
            row, own = {}, result.summaries()
            for metric in [metric for metric in self.metrics if metric in own]:
                values = result.values(metric)
                if metric in result.whole:
                    row[metric] = own[metric]
                elif common[metric]:
                    row[metric] = summarize([values[name] for name in common[metric]])
            found.append(row)
        return found

    def best(self, metric: str) -> frozenset[int]:
        """Numbers of the methods with the best mean; empty if fewer than two have the metric."""
        means = {number: row[metric].mean for number, row in enumerate(self.summaries) if metric in row}
        if len(means) < 2:
            return frozenset()
        record = self.metrics[metric]
        top = max(means.values()) if record.higher_is_better else min(means.values())
        return frozenset(number for number, mean in means.items() if mean == top)

    @cached_property
    def differences(self) -> list[Difference]:
        """Every method against the first one, by metric, where both have images in common."""
        found: list[Difference] = []
        for metric, record in self.metrics.items():
            for method in range(1, len(self.results)):
                first, second = self.results[0].values(metric), self.results[method].values(metric)
                common = [name for name in self.common(metric) if name in first and name in second]
                if not common:
                    continue
                paired = compare_paired([first[name] for name in common], [second[name] for name in common])
                better = record.higher_is_better
                found.append(
                    Difference(metric=metric, method=method, paired=paired, adjusted=None, higher_is_better=better)
                )
        p_values = {index: p for index, item in enumerate(found) if (p := item.paired.p_wilcoxon) is not None}
        for index, adjusted in zip(p_values, holm(list(p_values.values())), strict=True):
            found[index] = replace(found[index], adjusted=adjusted)
        return found

    @cached_property
    def warnings(self) -> list[str]:
        """Reasons for which the numbers are not comparable, one line each."""
        first = self.results[0]
        lines: list[str] = []
        for result in self.results[1:]:
            pair = f"{first.label} and {result.label}"
            lines += [f"{pair}: {line}" for line in protocol_mismatches(first, result)]
            lines += [f"{pair}: {line}" for line in _image_mismatches(first, result)]
        return lines

    def to_mapping(self) -> dict[str, Any]:
        """Content of the JSON file of ``evaluate compare --json``."""
        methods = [
            {
                "label": result.label,
                "protocol": result.protocol.name,
                "mean": {metric: summary.mean for metric, summary in row.items()},
                "interval95": {m: s.interval95 for m, s in row.items() if s.interval95 is not None},
                "count": {metric: summary.count for metric, summary in row.items()},
            }
            for result, row in zip(self.results, self.summaries, strict=True)
        ]
        differences = [
            {
                "metric": item.metric,
                "first": self.labels[0],
                "second": self.labels[item.method],
                "difference": item.paired.difference.mean,
                "interval95": item.paired.difference.interval95,
                "count": item.paired.difference.count,
                "p_student": item.paired.p_student,
                "p_wilcoxon": item.paired.p_wilcoxon,
                "p_holm": item.adjusted,
                "higher": item.paired.higher,
                "lower": item.paired.lower,
                "verdict": item.verdict,
            }
            for item in self.differences
        ]
        return {"schema": SCHEMA, "methods": methods, "differences": differences, "warnings": self.warnings}


def compare(results: Sequence[EvaluationResult]) -> Comparison:
    """Put results side by side, with numbers added to equal labels; UserError if they have nothing in common."""
    if not 1 <= len(results) <= MAX_METHODS:
        raise UserError(f"{len(results)} results to compare, expected 1 to {MAX_METHODS}")
    if empty := [result.label for result in results if not (result.images or result.whole)]:
        raise UserError(f"'{empty[0]}' has no values to compare")
    comparison = Comparison(tuple(_distinct(results)))
    if len(results) > 1 and comparison.metrics and not any(comparison.common(name) for name in comparison.metrics):
        names = [next(iter(result.images), "none") for result in results[:2]]
        if not all(result.whole for result in results):
            raise UserError(f"no image is in all results (the first two begin with '{names[0]}' and '{names[1]}')")
    return comparison


def protocol_mismatches(first: EvaluationResult, second: EvaluationResult) -> list[str]:
    """Differences between the protocols of two results, one line each."""
    own, other = first.protocol, second.protocol
    lines = []
    if own.name != other.name:
        lines.append(f"protocol '{own.name}' against '{other.name}'")
    for key in [key for key in own.settings if key in other.settings]:
        if own.settings[key] != other.settings[key]:
            lines.append(f"{key} {own.settings[key]} against {other.settings[key]}")
    for name in [name for name in first.metrics if name in second.metrics]:
        mine, theirs = own.metrics[name], other.metrics[name]
        if mine.variant != theirs.variant:
            lines.append(f"{mine.title} is '{mine.variant}' against '{theirs.variant}'")
        if mine.higher_is_better != theirs.higher_is_better:
            lines.append(f"{mine.title} is better when higher in one and lower in the other")
    sides = ((first.metrics, second.metrics), (second.metrics, first.metrics))
    only = [record.title for ours, theirs in sides for name, record in ours.items() if name not in theirs]
    return [*lines, f"only one has {', '.join(only)}"] if only else lines


def _image_mismatches(first: EvaluationResult, second: EvaluationResult) -> list[str]:
    lines = []
    for own, other, label in ((first, second, first.label), (second, first, second.label)):
        missing = [name for name in own.images if name not in other.images]
        if missing:
            lines.append(f"only {label} has the images {join_names(missing, LISTED)}; they are left out")
    for metric in [name for name in first.whole if name in second.whole]:
        counts = first.whole[metric].count, second.whole[metric].count
        if counts[0] != counts[1] or first.images.keys() != second.images.keys():
            title = first.protocol.metrics[metric].title
            lines.append(f"{title} is of different sets ({counts[0]} and {counts[1]} images), not of the common ones")
    return lines


def _distinct(results: Sequence[EvaluationResult]) -> list[EvaluationResult]:
    seen: set[str] = set()
    found = []
    for result in results:
        label, number = result.label, 1
        while label in seen:
            number += 1
            label = f"{result.label} ({number})"
        seen.add(label)
        found.append(result if label == result.label else replace(result, label=label))
    return found

"""Tables of results: on the terminal, as Markdown, LaTeX and CSV, and beside published numbers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from onestepsr.core.config import from_mapping, read_mapping
from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.core.tables import DOWN, NOTHING, UP, Grid, safe_text
from onestepsr.evaluate.comparison import Comparison
from onestepsr.evaluate.result import EvaluationResult, MetricRecord, Setting, Summary

# ---- tables of results ----

DIFFERENCE_NOTE = (
    "Difference: mean over the common images with its 95 % interval. p (t): paired t-test; p (W): Wilcoxon's "
    "signed-rank test; Holm: adjusted for the number of comparisons, the verdict uses it at 5 %. w/d/l: "
    "images on which the method is better, equal, worse."
)


def heading(record: MetricRecord) -> str:
    """Title of a metric with its unit and an arrow: up if higher is better."""
    unit = f" ({record.unit})" if record.unit else ""
    return f"{record.title}{unit} {UP if record.higher_is_better else DOWN}"


def decimals_of(comparison: Comparison, metric: str) -> int:
    """Decimals as usual in papers: two for decibels and for means of 20 and more, four for others."""
    means = [abs(row[metric].mean) for row in comparison.summaries if metric in row]
    return 2 if comparison.metrics[metric].unit == "dB" or max(means, default=0) >= 20 else 4


def cell(summary: Summary | None, decimals: int, sign: str = "") -> str:
    """``mean ± half width``, or the mean alone where there is no interval."""
    if summary is None:
        return NOTHING
    half = "" if summary.interval95 is None else f" ± {summary.interval95:.{decimals}f}"
    return f"{summary.mean:{sign}.{decimals}f}{half}"


def result_grid(result: EvaluationResult) -> Grid:
    """One method: a row for each metric with mean, standard deviation, 95 % interval and count."""
    rows = []
    summaries = result.summaries()
    for name, record in result.protocol.metrics.items():
        better = "higher" if record.higher_is_better else "lower"
        title = f"{record.title} {record.unit}".strip()
        summary = summaries.get(name)
        if summary is None:
            rows.append((title, better, NOTHING, NOTHING, NOTHING, "0"))
            continue
        mean, std, half = summary.mean, summary.std, summary.interval95
        interval = NOTHING if half is None else f"{mean - half:.4f} to {mean + half:.4f}"
        rows.append(
            (title, better, f"{mean:.4f}", NOTHING if std is None else f"{std:.4f}", interval, str(summary.count))
        )
    columns = ("metric", "better", "mean", "std", "95 % interval", "images")
    notes = tuple(f"{name}: {reason}" for name, reason in result.unavailable.items())
    title = f"{result.label}, protocol {result.protocol.name}"
    return Grid(title=title, columns=columns, rows=tuple(rows), words=2, notes=notes)


def method_grid(comparison: Comparison) -> Grid:
    """A row for each method, a column for each metric: mean and 95 % interval over the common images."""
    rows, best = [], set()
    decimals = {name: decimals_of(comparison, name) for name in comparison.metrics}
    for number, (label, summaries) in enumerate(zip(comparison.labels, comparison.summaries, strict=True)):
        cells = [cell(summaries.get(name), decimals[name]) for name in comparison.metrics]
        counts = sorted({summary.count for summary in summaries.values()}) or [0]
        rows.append((label, *cells, "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))))
        best |= {(number, 1 + i) for i, name in enumerate(comparison.metrics) if number in comparison.best(name)}
    columns = ("method", *(heading(record) for record in comparison.metrics.values()), "images")
    return Grid(title="", columns=columns, rows=tuple(rows), best=frozenset(best))


def difference_grid(comparison: Comparison) -> Grid:
    """Every method against the first: mean difference with its interval, p values, and on how many images it wins."""
    rows = []
    for item in comparison.differences:
        record, paired = comparison.metrics[item.metric], item.paired
        difference = cell(paired.difference, decimals_of(comparison, item.metric), "+")
        wins, losses = (paired.higher, paired.lower) if item.higher_is_better else (paired.lower, paired.higher)
        p_values = [p_value(value) for value in (paired.p_student, paired.p_wilcoxon, item.adjusted)]
        score = f"{wins}/{paired.difference.count - wins - losses}/{losses}"
        rows.append((comparison.labels[item.method], heading(record), item.verdict, difference, *p_values, score))
    tests = ("p (t)", "p (W)", "p (W, Holm)")
    columns = ("method", "metric", f"against {comparison.labels[0]}", "difference", *tests, "w/d/l")
    return Grid(title="", columns=columns, rows=tuple(rows), words=3, notes=(DIFFERENCE_NOTE,) if rows else ())


def p_value(value: float | None) -> str:
    """Two significant digits; values below 0.0001 as ``<0.0001``."""
    if value is None:
        return NOTHING
    return "<0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def values_csv(results: Sequence[EvaluationResult]) -> str:
    """Every value: method, image, and a column for each metric; empty where there is none.

    A name that a spreadsheet would take for a formula (``=``, ``+``, ``-``, ``@`` first) gets an apostrophe before it.
    """
    metrics = list(dict.fromkeys(name for result in results for name in result.metrics if name not in result.whole))
    lines = []
    for result in results:
        for image, values in result.images.items():
            numbers = [repr(values[name]) if name in values else "" for name in metrics]
            lines.append([_plain(result.label), _plain(image), *numbers])
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([["method", "image", *metrics], *lines])
    return buffer.getvalue()


def _plain(name: str) -> str:
    name = safe_text(name)
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name


# ---- published tables: results beside the numbers of papers ----

PAPERS = Path(__file__).parent / "papers"
"""Folder of the tables as printed, one file each, with source and protocol as far as the paper states it."""
MARK = "†"
"""Mark of columns whose numbers are not directly comparable."""


@dataclass(frozen=True, kw_only=True)
class PublishedProtocol:
    """Protocol of published numbers, as far as the paper states it."""

    name: str
    """Name of the protocol; results of the same protocol are comparable."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Settings that are known, under the keys that results have."""
    note: str
    """The same in words."""


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """The rows of a table that belong to one dataset."""

    title: str
    """The dataset as the paper writes it."""
    columns: tuple[str, ...]
    """Metrics of the columns, by their key."""
    rows: Mapping[str, tuple[float | None, ...]]
    """By method, its numbers as printed; null where there is none."""
    images: int | None = None
    """Number of images of the set, if known."""

    def __post_init__(self) -> None:
        for name, row in self.rows.items():
            if len(row) != len(self.columns):
                raise ValueError(f"row '{name}' has {len(row)} numbers for {len(self.columns)} columns")


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """One table of a paper."""

    source: str
    """Paper and table."""
    protocol: PublishedProtocol
    metrics: Mapping[str, MetricRecord]
    """Its metrics; an empty variant means that the paper does not name it."""
    sets: Mapping[str, PublishedSet]
    """Its rows, by dataset."""


@cache
def published_tables() -> dict[str, PublishedTable]:
    """Every table, by the name of its file."""
    paths = sorted(PAPERS.glob("*.yaml"))
    return {path.stem: from_mapping(PublishedTable, read_mapping(path), path.name) for path in paths}


def find_published(name: str) -> list[tuple[PublishedTable, PublishedSet]]:
    """Tables of the dataset ``name``, or of one table and dataset as ``osediff/realsr``; UserError if unknown."""
    chosen, _, data = name.rpartition("/")
    tables = published_tables()
    if chosen and chosen not in tables:
        raise UserError(f"no published table '{chosen}': {did_you_mean(chosen, tables)}")
    pool = [tables[chosen]] if chosen else list(tables.values())
    found = [(table, table.sets[data]) for table in pool if data in table.sets]
    if not found:
        known = {key for table in pool for key in table.sets}
        raise UserError(f"no published numbers on '{data}': {did_you_mean(data, known)}")
    return found


def beside(results: Sequence[EvaluationResult], name: str) -> list[Grid]:
    """Results in one table with each published one of the dataset ``name``; notes list the differences.

    Tables that share no metric with any result are left out; UserError if there is no other.
    """
    found = find_published(name)
    grids = [grid for table, data in found if (grid := _joined(results, table, data)) is not None]
    if not grids:
        known = ", ".join(sorted({metric for _, data in found for metric in data.columns}))
        raise UserError(f"no metric of these results is among those published on '{name}': {known}")
    return grids


def _joined(results: Sequence[EvaluationResult], table: PublishedTable, data: PublishedSet) -> Grid | None:
    """Results and published rows under the published columns; None if they share no metric."""
    records = [table.metrics[metric] for metric in data.columns]
    # Digits as printed; YAML drops trailing zeros, so the longest number of a column decides.
    columns_as_printed = zip(*data.rows.values(), strict=True)
    decimals = [max(len(repr(v or 0.0).partition(".")[2]) for v in column) for column in columns_as_printed]
    rows, labels, marked, measured = [], dict[str, list[str]](), set[str](), False
    for result in results:
        keys = [counterpart(result, metric, table.metrics[metric].variant) for metric in data.columns]
        means = [
            costs_of(result).get(metric) if key is None else result.summaries()[key].mean
            for metric, key in zip(data.columns, keys, strict=True)
        ]
        rows.append(_cells(result.label, means, decimals))
        measured |= any(key is not None for key in keys)
        for metric, line in mismatches(result, table, data):
            labels.setdefault(line, []).append(result.label)
            marked.add(metric)
    if not measured:
        return None
    rows += [_cells(name, row, decimals) for name, row in data.rows.items()]
    marks = [MARK if {metric, ""} & marked else "" for metric in data.columns]
    columns = ("method", *(heading(record) + mark for record, mark in zip(records, marks, strict=True)))
    notes = tuple(f"{MARK} {', '.join(names)}: {line}" for line, names in labels.items())
    return Grid(title=f"{data.title}, beside {table.source}", columns=columns, rows=tuple(rows), notes=notes)


def _cells(label: str, values: Sequence[float | None], decimals: Sequence[int]) -> tuple[str, ...]:
    return (label, *(NOTHING if v is None else f"{v:.{d}f}" for v, d in zip(values, decimals, strict=True)))


def costs_of(result: EvaluationResult) -> dict[str, float]:
    """Columns of published tables that are no metrics, where the evaluation ran a model: seconds per image as measured
    there, and parameters in millions."""
    count = max((summary.count for summary in result.summaries().values()), default=0)
    found: dict[str, float] = {}
    if result.model is not None and count and "model" in result.seconds:
        found["seconds"] = result.seconds["model"] / count
    if result.model is not None and result.model.parameters is not None:
        found["parameters"] = result.model.parameters / 1e6
    return found


def mismatches(result: EvaluationResult, table: PublishedTable, data: PublishedSet) -> list[tuple[str, str]]:
    """Differences that keep ``result`` from being compared with a published table: metric ("" for all) and line."""
    own, theirs = result.protocol, table.protocol
    lines = [("", f"protocol '{own.name}'; theirs: {theirs.note}")] if own.name != theirs.name else []
    for key, value in theirs.settings.items():
        if key in own.settings and own.settings[key] != value:
            lines.append(("", f"{key} {own.settings[key]} against {value}"))
    counts = {summary.count for summary in result.summaries().values()}
    if data.images is not None and counts - {data.images}:
        lines.append(("", f"{'-'.join(map(str, sorted(counts)))} images; {data.title} has {data.images}"))
    for metric in data.columns:
        record = table.metrics[metric]
        if metric in costs_of(result):
            notes = {
                "seconds": f"on {own_device(result)}, files and metrics left out",
                "parameters": "all of the model",
            }
            lines.append((metric, f"{record.title}: {notes[metric]}"))
            continue
        matching = counterpart(result, metric, record.variant)
        if matching is None:
            continue
        variant = own.metrics[matching].variant or matching
        if not record.variant:
            lines.append((metric, f"{record.title}: the paper does not say which variant, here it is '{variant}'"))
        elif variant != record.variant:
            lines.append((metric, f"{record.title}: '{variant}' against '{record.variant}'"))
    return lines


def own_device(result: EvaluationResult) -> str:
    """Device that the model ran on, for a note."""
    device = str(result.model.options.get("device", "?")) if result.model is not None else "?"
    return f"{device} of {result.machine.get('processor', 'this machine')}" if device == "cpu" else device


def counterpart(result: EvaluationResult, metric: str, variant: str) -> str | None:
    """The metric of ``result`` closest to a published one: the same variant, else name, else family."""
    known = {name: record for name, record in result.metrics.items() if _family(name) == _family(metric)}
    same = [name for name, record in known.items() if variant and record.variant == variant]
    named = [metric] if metric in known else []
    return next(iter([*same, *named, *known]), None)


def _family(metric: str) -> str:
    """``maniqa`` for ``maniqa-pipal``, ``psnr`` for ``psnr_rgb``."""
    return re.split(r"[-_]", metric)[0]

"""Tables of papers as data, and results printed beside them with everything that keeps the two from being comparable.

Each file of ``papers/`` is one table as printed, with its source and what the paper says of how it was measured. A
metric without a variant is one of which the paper does not say which it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from onestepsr.core.config import from_mapping, read_mapping
from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.evaluate.result import UNKNOWN_PROTOCOL, EvaluationResult, MetricRecord, Setting
from onestepsr.evaluate.tables import NOTHING, Grid, heading

PAPERS = Path(__file__).parent / "papers"
MARK = "†"
"""Beside a column whose numbers may not be compared as they stand."""


@dataclass(frozen=True, kw_only=True)
class PublishedProtocol:
    """What a paper says of how its numbers were measured."""

    name: str
    """Name of the protocol; results measured under one of this name may stand beside the table."""
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
    rows: Mapping[str, tuple[float, ...]]
    """By method, its numbers as printed."""
    images: int | None = None
    """How many images the set has, where that is known."""

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
    """How it was measured."""
    metrics: Mapping[str, MetricRecord]
    """Its metrics; an empty variant means that the paper does not say."""
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
    """Results in one table with each published one of the dataset ``name``; notes say what differs.

    Tables that share no metric with any result are left out; UserError if there is no other.
    """
    found = find_published(name)
    shared = [(table, rows) for table, rows in found if any(_shares(result, table, rows) for result in results)]
    if not shared:
        known = ", ".join(sorted({metric for _, rows in found for metric in rows.columns}))
        raise UserError(f"no metric of these results is among those published on '{name}': {known}")
    return [_beside(results, table, rows) for table, rows in shared]


def mismatches(result: EvaluationResult, table: PublishedTable, rows: PublishedSet) -> dict[str, list[str]]:
    """What keeps ``result`` from being compared with a published table: lines by metric of the table, '' for all."""
    found: dict[str, list[str]] = {"": _protocol_lines(result, table, rows)}
    for metric in rows.columns:
        title, theirs = table.metrics[metric].title, table.metrics[metric].variant
        key = counterpart(result, metric, theirs)
        if key is None:
            continue
        own = result.protocol.metrics[key].variant or key
        if not theirs:
            found[metric] = [f"{title}: the paper does not say which variant, here it is '{own}'"]
        elif own != theirs:
            found[metric] = [f"{title}: '{own}' against '{theirs}'"]
    return {metric: lines for metric, lines in found.items() if lines}


def counterpart(result: EvaluationResult, metric: str, variant: str) -> str | None:
    """The metric of ``result`` nearest to a published one: its variant, its name, or another of its family."""
    known = {name: record for name, record in result.metrics.items() if _family(name) == _family(metric)}
    same = [name for name, record in known.items() if variant and record.variant == variant]
    named = [metric] if metric in known else []
    return next(iter([*same, *named, *known]), None)


def _family(metric: str) -> str:
    """``maniqa`` for ``maniqa-pipal``, ``psnr`` for ``psnr_rgb``."""
    return re.split(r"[-_]", metric)[0]


def _protocol_lines(result: EvaluationResult, table: PublishedTable, rows: PublishedSet) -> list[str]:
    own, theirs = result.protocol, table.protocol
    lines = []
    if own.name == UNKNOWN_PROTOCOL:
        lines.append(f"protocol not recorded; theirs: {theirs.note}")
    elif own.name != theirs.name:
        lines.append(f"protocol '{own.name}'; theirs: {theirs.note}")
    for key in [key for key in theirs.settings if key in own.settings]:
        if own.settings[key] != theirs.settings[key]:
            lines.append(f"{key} {own.settings[key]} against {theirs.settings[key]}")
    counts = {summary.count for summary in result.summaries().values()}
    if rows.images is not None and counts - {rows.images}:
        lines.append(f"{'-'.join(map(str, sorted(counts)))} images; {rows.title} has {rows.images}")
    return lines


def _beside(results: Sequence[EvaluationResult], table: PublishedTable, rows: PublishedSet) -> Grid:
    flags = {result.label: mismatches(result, table, rows) for result in results}
    marked = {metric for lines in flags.values() for metric in lines}
    columns = [heading(table.metrics[m]) + (MARK if {m, ""} & marked else "") for m in rows.columns]
    places = [max(map(_decimals, column)) for column in zip(*rows.rows.values(), strict=True)]
    own = [(result.label, *_own_cells(result, _counterparts(result, table, rows), places)) for result in results]
    printed = [(name, *(f"{v:.{p}f}" for v, p in zip(row, places, strict=True))) for name, row in rows.rows.items()]
    title = f"{rows.title}, beside {table.source}"
    return Grid(title=title, columns=("method", *columns), rows=(*own, *printed), notes=tuple(_notes(flags)))


def _notes(flags: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    """One line for each mismatch, with the labels of the results that have it."""
    labels: dict[str, list[str]] = {}
    for label, found in flags.items():
        for line in (line for lines in found.values() for line in lines):
            labels.setdefault(line, []).append(label)
    return [f"{MARK} {', '.join(names)}: {line}" for line, names in labels.items()]


def _shares(result: EvaluationResult, table: PublishedTable, rows: PublishedSet) -> bool:
    return any(key is not None for key in _counterparts(result, table, rows))


def _counterparts(result: EvaluationResult, table: PublishedTable, rows: PublishedSet) -> list[str | None]:
    return [counterpart(result, metric, table.metrics[metric].variant) for metric in rows.columns]


def _decimals(value: float) -> int:
    """Digits after the point as the paper printed them; trailing zeros are brought back by the others of the column."""
    return len(repr(value).partition(".")[2])


def _own_cells(result: EvaluationResult, keys: Sequence[str | None], places: Sequence[int]) -> list[str]:
    summaries = result.summaries()
    return [NOTHING if key is None else f"{summaries[key].mean:.{p}f}" for key, p in zip(keys, places, strict=True)]

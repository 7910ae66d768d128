"""Tables of results: on the terminal, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onestepsr.core.files import write_text
from onestepsr.evaluate.comparison import Comparison
from onestepsr.evaluate.result import EvaluationResult, MetricRecord, safe_text
from onestepsr.evaluate.statistics import Summary

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "-"
UP, DOWN = "↑", "↓"
FOLDED = 12
"""Characters that a column of words keeps in a narrow terminal."""
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    UP: r"$\uparrow$",
    DOWN: r"$\downarrow$",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
}
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|])")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells of text under headings; what is best in its column is known by its place."""

    title: str
    """Caption."""
    columns: tuple[str, ...]
    """Headings."""
    rows: tuple[tuple[str, ...], ...]
    """Cells, as many in each row as there are columns."""
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of cells to print bold."""
    words: int = 1
    """How many columns from the left are words; the others are numbers, aligned right."""
    notes: tuple[str, ...] = ()
    """Lines below the table."""

    def rich(self) -> Table:
        """For the terminal; names are shown as they are, whatever markup they hold."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(safe_text(self.title)) if self.title else None, title_justify="left")
        for index, heading in enumerate(self.columns):
            word = index < self.words
            table.add_column(
                Text(safe_text(heading)), justify="left" if word else "right", overflow="fold", no_wrap=not word
            )
        for number, row in enumerate(self.rows):
            styles = ["bold" if (number, column) in self.best else "" for column in range(len(row))]
            table.add_row(*(Text(safe_text(cell), style) for cell, style in zip(row, styles, strict=True)))
        return table

    def show(self) -> None:
        """Print the table and its notes on stdout; it is rather too wide for the terminal than that digits are lost."""
        from rich.console import Console
        from rich.text import Text

        width = max(Console().width, self._narrowest())
        console = Console(width=width)
        console.print(self.rich())
        for note in self.notes:
            console.print(Text(safe_text(note)))

    def _narrowest(self) -> int:
        """Columns of text that the table takes when words are folded and numbers are not."""
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        words = [min(width, FOLDED) for width in widths[: self.words]]
        return sum(words) + sum(widths[self.words :]) + 3 * len(widths) + 1

    def markdown(self) -> str:
        """Rows of Markdown, the heading first; no final line break."""
        rule = ["---" if index < self.words else "---:" for index in range(len(self.columns))]
        lines = [[_markdown(cell) for cell in self.columns], rule]
        for number, row in enumerate(self.rows):
            cells = [_markdown(cell) for cell in row]
            lines.append([f"**{c}**" if (number, index) in self.best else c for index, c in enumerate(cells)])
        notes = [f"\n{_markdown(note)}" for note in self.notes]
        return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *notes])

    def latex(self) -> str:
        """A ``tabular`` with rules of the package booktabs; its rows can be copied alone. No final line break."""
        lines = [" & ".join(map(_latex, self.columns)) + r" \\", r"\midrule"]
        for number, row in enumerate(self.rows):
            cells = [_latex(cell) for cell in row]
            bold = [rf"\textbf{{{c}}}" if (number, index) in self.best else c for index, c in enumerate(cells)]
            lines.append(" & ".join(bold) + r" \\")
        shape = "l" * self.words + "r" * (len(self.columns) - self.words)
        notes = [f"% {safe_text(note)}" for note in self.notes]
        return "\n".join(
            [*notes, rf"\begin{{tabular}}{{{shape}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"]
        )


def heading(record: MetricRecord) -> str:
    """Title of a metric with its unit and the arrow of what is better."""
    unit = f" ({record.unit})" if record.unit else ""
    return f"{record.title}{unit} {UP if record.higher_is_better else DOWN}"


def digits(record: MetricRecord, means: Sequence[float]) -> int:
    """Decimals that the field prints: two for decibels and for values of 20 and more, four for the others."""
    return 2 if record.unit == "dB" or max((abs(value) for value in means), default=0) >= 20 else 4


def cell(summary: Summary | None, decimals: int, *, interval: bool = True) -> str:
    """``mean ± half width``, or the mean alone where there is no interval or none is wanted."""
    if summary is None:
        return NOTHING
    text = f"{summary.mean:.{decimals}f}"
    wanted = interval and summary.interval95 is not None
    return f"{text} ± {summary.interval95:.{decimals}f}" if wanted else text


def result_grid(result: EvaluationResult) -> Grid:
    """One method: a row for each metric with mean, standard deviation, 95 % interval and count."""
    rows = []
    summaries = result.summaries()
    for name, record in result.protocol.metrics.items():
        better = "higher" if record.higher_is_better else "lower"
        title = f"{record.title} {record.unit}".strip()
        summary = summaries.get(name)
        numbers = _numbers(summary) if summary else (NOTHING, NOTHING, NOTHING, "0")
        rows.append((title, better, *numbers))
    columns = ("metric", "better", "mean", "std", "95 % interval", "images")
    notes = tuple(f"{name}: {reason}" for name, reason in result.unavailable.items())
    title = f"{result.label}, protocol {result.protocol.name}"
    return Grid(title=title, columns=columns, rows=tuple(rows), words=2, notes=notes)


def method_grid(comparison: Comparison, *, interval: bool = True) -> Grid:
    """A row for each method, a column for each metric: mean and 95 % interval over the common images."""
    rows, best = [], set()
    places = {name: decimals_of(comparison, name) for name in comparison.metrics}
    for number, (label, summaries) in enumerate(zip(comparison.labels, comparison.summaries, strict=True)):
        cells = [cell(summaries.get(name), places[name], interval=interval) for name in comparison.metrics]
        counts = sorted({summary.count for summary in summaries.values()}) or [0]
        rows.append((label, *cells, "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))))
        best |= {
            (number, 1 + place) for place, name in enumerate(comparison.metrics) if number in comparison.best(name)
        }
    columns = ("method", *(heading(record) for record in comparison.metrics.values()), "images")
    return Grid(title="", columns=columns, rows=tuple(rows), best=frozenset(best))


def difference_grid(comparison: Comparison) -> Grid:
    """Every method against the first: mean difference with its interval, p values, and on how many images it wins."""
    rows = []
    for item in comparison.differences:
        record, paired = comparison.metrics[item.metric], item.paired
        places = decimals_of(comparison, item.metric)
        half = paired.difference.interval95
        difference = f"{paired.difference.mean:+.{places}f}" + (f" ± {half:.{places}f}" if half is not None else "")
        wins, losses = (paired.higher, paired.lower) if item.higher_is_better else (paired.lower, paired.higher)
        tests = (p_value(paired.p_student), p_value(paired.p_wilcoxon), p_value(item.adjusted))
        score = f"{wins}/{paired.difference.count - wins - losses}/{losses}"
        rows.append((comparison.labels[item.method], heading(record), item.verdict, difference, *tests, score))
    columns = (
        "method",
        "metric",
        f"against {comparison.labels[0]}",
        "difference",
        "p (t)",
        "p (W)",
        "p (W, Holm)",
        "w/d/l",
    )
    return Grid(title="", columns=columns, rows=tuple(rows), words=3, notes=(DIFFERENCE_NOTE,) if rows else ())


DIFFERENCE_NOTE = (
    "Difference: mean over the common images with its 95 % interval. p (t): paired t-test; p (W): Wilcoxon's "
    "signed-rank test; Holm: adjusted for the number of comparisons, and what the verdict goes by (5 %). w/d/l: "
    "images on which the method is better, equal, worse."
)


def decimals_of(comparison: Comparison, metric: str) -> int:
    """Decimals of ``metric``, the same for all methods."""
    means = [row[metric].mean for row in comparison.summaries if metric in row]
    return digits(comparison.metrics[metric], means)


def p_value(value: float | None) -> str:
    """Two significant digits; what is below 0.0001 only as that."""
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
    return csv_text([["method", "picture", *metrics], *lines])


def csv_text(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as RFC 4180 has them, but with plain line feeds."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write each text under its path in one step, making folders; UserError if that fails."""
    for path, text in texts.items():
        write_text(path, text)


def _numbers(summary: Summary) -> tuple[str, str, str, str]:
    spread = NOTHING if summary.std is None else f"{summary.std:.4f}"
    if summary.interval95 is None:
        return f"{summary.mean:.4f}", spread, NOTHING, str(summary.count)
    ends = summary.mean - summary.interval95, summary.mean + summary.interval95
    return f"{summary.mean:.4f}", spread, f"{ends[0]:.4f} to {ends[1]:.4f}", str(summary.count)


def _plain(name: str) -> str:
    name = safe_text(name)
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name


def _markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", safe_text(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in safe_text(text))

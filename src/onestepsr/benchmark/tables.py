"""Tables as data, and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a title; the first column names, numbers follow."""

    title: str
    """What the table shows."""
    columns: tuple[str, ...]
    """Headings."""
    rows: tuple[tuple[str, ...], ...]
    """Cells, as many in each row as there are columns."""
    note: str = ""
    """What to know before reading it: paragraphs of Markdown."""
    words: int = 1
    """How many columns from the left are words, aligned left; the others are numbers."""

    def markdown(self) -> str:
        """Title, note and table, in Markdown."""
        rule = ["---" if index < self.words else "---:" for index in range(len(self.columns))]
        lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows))
        return "\n\n".join(block for block in (f"## {self.title}", self.note, lines) if block)


def millions(count: float) -> str:
    """A count of parameters in millions, three decimals."""
    return f"{count / 1e6:,.3f}"


def billions(count: float) -> str:
    """A count of operations in billions: one decimal, three below ten."""
    value = count / 1e9
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"

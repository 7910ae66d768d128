"""Table of text as data, and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a title; the first column names, numbers follow."""

    title: str
    columns: tuple[str, ...]
    """Headings."""
    rows: tuple[tuple[str, ...], ...]
    """Cells, as many in each row as there are columns."""
    note: str = ""
    """Paragraphs of Markdown to read before the table."""
    words: int = 1
    """Number of columns from the left that are words, aligned left; the others are numbers."""

    def markdown(self) -> str:
        """Title, note and table, in Markdown."""
        rule = ["---" if index < self.words else "---:" for index in range(len(self.columns))]
        lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows))
        return "\n\n".join(block for block in (f"## {self.title}", self.note, lines) if block)

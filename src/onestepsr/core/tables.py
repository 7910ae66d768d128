"""Tables of text: on the terminal, as Markdown and as LaTeX."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

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
    """A table of text cells under headings."""

    title: str
    """Caption."""
    columns: tuple[str, ...]
    """Headings."""
    rows: tuple[tuple[str, ...], ...]
    """Cells, as many in each row as there are columns."""
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of cells to print bold."""
    words: int = 1
    """Number of columns of words, from the left; the others are numbers, aligned right."""
    lead: str = ""
    """Paragraphs of Markdown to read before the table, on a page of several."""
    notes: tuple[str, ...] = ()
    """Lines below the table."""

    def show(self) -> None:
        """Print the table and its notes on stdout; where it is too wide for the terminal, no digits are cut off.

        Names are shown as they are, whatever markup they hold.
        """
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(safe_text(self.title)) if self.title else None, title_justify="left")
        for index, text in enumerate(self.columns):
            word = index < self.words
            justify: Literal["left", "right"] = "left" if word else "right"
            table.add_column(Text(safe_text(text)), justify=justify, overflow="fold", no_wrap=not word)
        for number, row in enumerate(self.rows):
            styles = ["bold" if (number, column) in self.best else "" for column in range(len(row))]
            table.add_row(*(Text(safe_text(text), style) for text, style in zip(row, styles, strict=True)))
        # Width of the table when words are folded and numbers are not.
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        words = [min(width, FOLDED) for width in widths[: self.words]]
        narrowest = sum(words) + sum(widths[self.words :]) + 3 * len(widths) + 1
        console = Console(width=max(Console().width, narrowest))
        console.print(table)
        for note in self.notes:
            console.print(Text(safe_text(note)))

    def markdown(self) -> str:
        """Rows of Markdown, the heading first; no final line break."""
        rule = ["---" if index < self.words else "---:" for index in range(len(self.columns))]
        lines = [[_markdown(cell) for cell in self.columns], rule]
        for number, row in enumerate(self.rows):
            cells = [_markdown(cell) for cell in row]
            lines.append([f"**{c}**" if (number, index) in self.best else c for index, c in enumerate(cells)])
        notes = [f"\n{_markdown(note)}" for note in self.notes]
        return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *notes])

    def section(self) -> str:
        """Title, paragraphs and table as a section of a page of Markdown."""
        return "\n\n".join(block for block in (f"## {self.title}", self.lead, self.markdown()) if block)

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


def _markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", safe_text(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in safe_text(text))


def safe_text(text: str) -> str:
    """``text`` without control characters and lone surrogates, which file names may hold and terminals interpret."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)

"""Where results go besides the terminal: CSV, Markdown and LaTeX files, published numbers, the report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestepsr.core.errors import UserError
from onestepsr.core.progress import progress

if TYPE_CHECKING:
    from onestepsr.evaluate.comparison import Comparison
    from onestepsr.evaluate.tables import Grid

CsvOption = Annotated[
    Path | None, typer.Option("--csv", help="Write every value to this file: method, image, metrics.")
]
MarkdownOption = Annotated[Path | None, typer.Option("--markdown", help="Write the tables to this file as Markdown.")]
LatexOption = Annotated[Path | None, typer.Option("--latex", help="Write the tables to this file as LaTeX (booktabs).")]
ReportOption = Annotated[
    Path | None,
    typer.Option("--report", help="Write a page with images to this folder; it opens offline in any browser."),
]
BesideOption = Annotated[
    str | None,
    typer.Option(
        "--beside",
        help="Print published numbers on this dataset beside the results, such as realsr, or of one table: "
        "osediff/realsr. What keeps them from being comparable is listed.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What was asked for; none where it was not."""

    csv: Path | None = None
    """Every value."""
    markdown: Path | None = None
    """The tables, as Markdown."""
    latex: Path | None = None
    """The tables, as LaTeX."""
    report: Path | None = None
    """Folder of the report."""
    beside: str | None = None
    """Data set of the published numbers."""

    def check(self) -> None:
        """UserError for what can be known to fail before anything is measured."""
        from onestepsr.evaluate.published import find_published
        from onestepsr.evaluate.report.page import PAGE, refuse_foreign

        for option in ("csv", "markdown", "latex"):
            check_file(f"--{option}", getattr(self, option))
        if self.report is not None:
            if self.report.exists() and not self.report.is_dir():
                raise UserError(f"--report {self.report}: is a file, expected a folder")
            refuse_foreign(self.report / PAGE)
        if self.beside is not None:
            find_published(self.beside)

    def write(self, comparison: Comparison, grids: Sequence[Grid]) -> None:
        """Print the published numbers and write the files; ``grids`` are the tables that were printed.

        UserError, once everything else is written, if no published table has a metric of the results.
        """
        from onestepsr.evaluate.published import beside
        from onestepsr.evaluate.tables import values_csv, write_texts

        published: list[Grid] = []
        problem: UserError | None = None
        try:
            published = beside(comparison.results, self.beside) if self.beside else []
        except UserError as error:  # measuring may have taken hours: the files come first
            problem = error
        for grid in published:
            grid.show()
        tables = [*grids, *published]
        texts = {
            self.csv: values_csv(comparison.results) if self.csv else "",
            self.markdown: "\n\n".join(titled(grid) for grid in tables) + "\n",
            self.latex: "\n\n".join(grid.latex() for grid in tables) + "\n",
        }
        write_texts({path: text for path, text in texts.items() if path is not None})
        if self.report is not None:
            write_report_folder(self.report, comparison, published)
        if problem is not None:
            raise problem


def check_file(option: str, path: Path | None) -> None:
    """UserError where an output file cannot be: no such folder, one that is read-only, or a folder of that name."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {path}: the folder {path.parent} cannot be written to")
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder, expected a file")


def titled(grid: Grid) -> str:
    """A table as Markdown under its title."""
    return f"**{grid.title}**\n\n{grid.markdown()}" if grid.title else grid.markdown()


def write_report_folder(folder: Path, comparison: Comparison, published: Sequence[Grid]) -> None:
    """Write the report with a progress bar; say what could not be shown, and where the page is."""
    from onestepsr.evaluate.report.page import PAGE, write_report

    def tracked(names: Sequence[str]) -> Iterable[str]:
        return progress(names, "Writing images")

    for problem in write_report(folder, comparison, published=published, track=tracked):
        typer.echo(f"not in the report: {problem}", err=True)
    typer.echo(f"report: {folder / PAGE}", err=True)

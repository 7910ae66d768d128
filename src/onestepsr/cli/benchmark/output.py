"""What the ``benchmark`` commands share: ``--json`` with or without a file, tables on the screen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from onestepsr.core.errors import UserError
from onestepsr.core.files import write_text

if TYPE_CHECKING:
    from onestepsr.benchmark.tables import Table

STDOUT = "-"
PIPE_WIDTH = 160
MEASURED_WITH = ("torch", "diffusers", "peft")
"""Packages whose versions decide what is counted or measured."""


class OptionalJsonFile(TyperCommand):
    """Lets ``--json`` stand alone, for standard output, or be followed by a file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the dash for standard output where ``--json`` has no file behind it."""
        filled: list[str] = []
        for argument, following in zip(args, [*args[1:], "--"], strict=False):
            filled.append(argument)
            if argument == "--json" and following.startswith("-") and following != STDOUT:
                filled.append(STDOUT)
        return super().parse_args(ctx, filled)


def check_outputs(json_file: str | None, markdown: bool) -> None:
    """Raise :class:`UserError` before any work when the results could not be put out."""
    if json_file == STDOUT and markdown:
        raise UserError("--json and --markdown would both print: give --json a file, or leave one out")
    if json_file not in (None, STDOUT) and not Path(str(json_file)).parent.is_dir():
        raise UserError(f"--json {json_file}: the folder {Path(str(json_file)).parent} does not exist")


def write_json(path: str, document: Mapping[str, Any]) -> None:
    """Print the document as JSON, or write it under ``path`` in one step."""
    text = json.dumps(document, indent=1, allow_nan=False)
    if path == STDOUT:
        typer.echo(text)
        return
    write_text(Path(path), text + "\n")


def show_tables(tables: Sequence[Table], width: int = PIPE_WIDTH) -> None:
    """Print every table; into a pipe, ``width`` columns wide."""
    from rich.console import Console
    from rich.table import Table as Drawing

    console = Console()
    if not console.is_terminal:  # a pipe has no width: nothing needs to be cut
        console = Console(width=width)
    for content in tables:
        drawing = Drawing(*content.columns, title=content.title, title_justify="left")
        for column in drawing.columns[content.words :]:
            column.justify = "right"
        for row in content.rows:
            drawing.add_row(*row)
        console.print(drawing)

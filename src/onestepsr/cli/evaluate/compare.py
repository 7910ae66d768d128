"""``onestepsr evaluate compare``: files of ``evaluate --json`` side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from onestepsr.cli.evaluate.output import (
    BesideOption,
    CsvOption,
    LatexOption,
    MarkdownOption,
    Outputs,
    ReportOption,
    check_file,
)
from onestepsr.core.errors import UserError

WORD = "compare"


class WithCompare(TyperCommand):
    """The command ``evaluate``, of which ``evaluate compare`` is a command of its own.

    A group would not do: its first argument is the name of a command, and that of ``evaluate`` is a folder.
    """

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of this command, or of the other if its name is the first argument."""
        if args[:1] != [WORD]:
            return super().make_context(info_name, args, parent, **extra)
        return compare_app().make_context(f"{info_name} {WORD}", args[1:], parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the context is of."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


def compare_app() -> Any:
    """The command ``compare`` on its own."""
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    app.command(WORD, no_args_is_help=True)(compare_command)
    return typer.main.get_command(app)


def compare_command(
    files: Annotated[
        list[Path], typer.Argument(help="Files of 'onestepsr evaluate --json'; all are compared with the first.")
    ],
    *,
    beside: BesideOption = None,
    report: ReportOption = None,
    csv: CsvOption = None,
    markdown: MarkdownOption = None,
    latex: LatexOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write means, differences and warnings to this file.")
    ] = None,
) -> None:
    """Compare results on the images that all have: means, paired differences from the first, significance.

    What keeps results from being comparable, such as another protocol, is listed before the tables.
    """
    from onestepsr.evaluate.comparison import compare
    from onestepsr.evaluate.result import read_result
    from onestepsr.evaluate.tables import difference_grid, method_grid, write_texts

    outputs = Outputs(csv=csv, markdown=markdown, latex=latex, report=report, beside=beside)
    outputs.check()
    check_file("--json", json_file)
    _refuse_repeats(files)
    comparison = compare([read_result(path) for path in files])
    for line in comparison.warnings:
        typer.echo(f"warning: {line}", err=True)
    grids = [method_grid(comparison)] + ([difference_grid(comparison)] if comparison.differences else [])
    for grid in grids:
        grid.show()
    if json_file is not None:
        write_texts({json_file: json.dumps(comparison.to_mapping(), indent=1, allow_nan=False) + "\n"})
    outputs.write(comparison, grids)


def _refuse_repeats(files: list[Path]) -> None:
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise UserError(f"{path}: given twice")
        seen.add(path.resolve())

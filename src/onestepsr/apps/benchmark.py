"""``onestepsr benchmark``: what the models cost."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from onestepsr.errors import UserError
from onestepsr.files import replacing

if TYPE_CHECKING:
    from onestepsr.benchmark.complexity_report import Report

STDOUT = "-"
LARGEST_SIDE = 65_536
PIPE_WIDTH = 160
COUNTED_WITH = ("torch", "diffusers", "peft")

benchmark = typer.Typer(help="Count and measure what the models cost.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    app.add_typer(benchmark, name="benchmark")


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


@benchmark.command(cls=OptionalJsonFile)
def complexity(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Network to count; may be repeated. All by default.", show_default=False),
    ] = None,
    size: Annotated[int, typer.Option(min=1, max=LARGEST_SIDE, help="Side of the picture put out, in pixels.")] = 512,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="[FILE]", help="Write one JSON document to FILE, or print it.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page of Markdown.")] = False,
) -> None:
    """Count parameters and multiply-accumulate operations, stage by stage, without weights or computation."""
    if json_file == STDOUT and markdown:
        raise UserError("--json and --markdown would both print: give --json a file, or leave one out")
    if json_file not in (None, STDOUT) and not Path(json_file).parent.is_dir():
        raise UserError(f"--json {json_file}: the folder {Path(json_file).parent} does not exist")
    report = make_report(model, size)
    if json_file is not None:
        write_json(json_file, report)
    if markdown:
        from onestepsr.benchmark.complexity_report import as_markdown

        typer.echo(as_markdown(report, command=_command(model, size), machine=describe_machine()), nl=False)
    elif json_file != STDOUT:
        show(report)


def make_report(names: Sequence[str] | None, side: int) -> Report:
    """Count the networks called ``names``, or all of them, for one picture of ``side`` x ``side`` pixels."""
    from rich.console import Console
    from rich.progress import track

    from onestepsr.benchmark.adapters import compare_adapters
    from onestepsr.benchmark.complexity_report import Report
    from onestepsr.benchmark.networks import D3SR_SD21, default_names, measure
    from onestepsr.benchmark.published import COMPLEXITY_SIDE

    chosen = list(dict.fromkeys(names or default_names()))
    console = Console(stderr=True)
    steps = track(chosen, "Counting", console=console, transient=True, disable=not console.is_terminal)
    networks = [measure(name, side) for name in steps]
    published = D3SR_SD21 in chosen and side == COMPLEXITY_SIDE
    return Report(side=side, networks=networks, adapters=compare_adapters(side, networks) if published else ())


def write_json(path: str, report: Report) -> None:
    """Print the report as JSON, or write it under ``path`` in one step."""
    from onestepsr.benchmark.complexity_report import as_document

    text = json.dumps(as_document(report), indent=1, allow_nan=False)
    if path == STDOUT:
        typer.echo(text)
        return
    try:
        with replacing(Path(path)) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from error


def show(report: Report) -> None:
    """Print every table."""
    from rich.console import Console
    from rich.table import Table

    from onestepsr.benchmark.complexity_report import tables

    console = Console()
    if not console.is_terminal:  # a pipe has no width: nothing needs to be cut
        console = Console(width=PIPE_WIDTH)
    for content in tables(report):
        table = Table(*content.columns, title=content.title, title_justify="left")
        for column in table.columns[content.words :]:
            column.justify = "right"
        for row in content.rows:
            table.add_row(*row)
        console.print(table)


def describe_machine() -> str:
    """Processor and versions, in one phrase."""
    from onestepsr.apps.doctor import examine_cpu

    cpu = examine_cpu()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in COUNTED_WITH)
    return f"{cpu['model']} ({cpu['cores']} cores) with Python {platform.python_version()}, {versions}"


def _command(names: Sequence[str] | None, side: int) -> str:
    models = [part for name in dict.fromkeys(names or ()) for part in ("--model", name)]
    sizes = [] if side == 512 else ["--size", str(side)]
    return shlex.join(["onestepsr", "benchmark", "complexity", *models, *sizes, "--markdown"])

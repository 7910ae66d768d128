"""``onestepsr benchmark``: what the models cost."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from onestepsr.cli.benchmark import speed
from onestepsr.cli.benchmark.output import (
    MEASURED_WITH,
    STDOUT,
    OptionalJsonFile,
    check_outputs,
    show_tables,
    write_json,
)
from onestepsr.core.machine import describe_machine
from onestepsr.core.progress import progress

if TYPE_CHECKING:
    from onestepsr.benchmark.complexity_report import Report

LARGEST_SIDE = 65_536

benchmark = typer.Typer(help="Count and measure what the models cost.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    app.add_typer(benchmark, name="benchmark")


speed.register(benchmark)


@benchmark.command(cls=OptionalJsonFile)
def complexity(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Network to count; may be repeated. All by default.", show_default=False),
    ] = None,
    size: Annotated[int, typer.Option(min=1, max=LARGEST_SIDE, help="Side of the image put out, in pixels.")] = 512,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="[FILE]", help="Write one JSON document to FILE, or print it.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page of Markdown.")] = False,
) -> None:
    """Count parameters and multiply-accumulate operations, stage by stage, without weights or computation."""
    check_outputs(json_file, markdown)
    report = make_report(model, size)

    from onestepsr.benchmark.complexity_report import as_document, as_markdown, tables

    if json_file is not None:
        write_json(json_file, as_document(report))
    if markdown:
        machine = describe_machine(MEASURED_WITH)
        typer.echo(as_markdown(report, command=_command(model, size), machine=machine), nl=False)
    elif json_file != STDOUT:
        show_tables(tables(report))


def make_report(names: Sequence[str] | None, side: int) -> Report:
    """Count the networks called ``names``, or all of them, for one image of ``side`` x ``side`` pixels."""
    from onestepsr.benchmark.complexity_report import COMPLEXITY_SIDE, Report
    from onestepsr.benchmark.networks import D3SR_SD21, compare_adapters, default_names, measure

    chosen = list(dict.fromkeys(names or default_names()))
    networks = [measure(name, side) for name in progress(chosen, "Counting")]
    published = D3SR_SD21 in chosen and side == COMPLEXITY_SIDE
    return Report(side=side, networks=networks, adapters=compare_adapters(side, networks) if published else ())


def _command(names: Sequence[str] | None, side: int) -> str:
    models = [part for name in dict.fromkeys(names or ()) for part in ("--model", name)]
    sizes = [] if side == 512 else ["--size", str(side)]
    return shlex.join(["onestepsr", "benchmark", "complexity", *models, *sizes, "--markdown"])

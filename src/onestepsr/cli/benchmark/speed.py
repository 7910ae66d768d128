"""``onestepsr benchmark speed``: how fast the models are here, stage by stage."""

from __future__ import annotations

import datetime
import re
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from onestepsr.cli.benchmark.output import (
    MEASURED_WITH,
    STDOUT,
    OptionalJsonFile,
    check_outputs,
    show_tables,
    write_json,
)
from onestepsr.core.errors import UserError
from onestepsr.core.machine import cores, describe_machine

if TYPE_CHECKING:
    from onestepsr.benchmark.speed import SpeedConfig
    from onestepsr.benchmark.speed_report import SpeedReport

DEFAULT_MODEL = "d3sr-tiny"
LARGEST_SIDE = 16_384
TABLE_WIDTH = 200
CEILING_SECONDS = 0.5
"""Time for every shape that the ceiling is looked for with."""
COMMAND = ("onestepsr", "benchmark", "speed")


def register(app: typer.Typer) -> None:
    """Add the command to the group."""
    app.command("speed", cls=OptionalJsonFile)(speed)


def speed(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"Model, file or random:NAME; may be repeated. {DEFAULT_MODEL} by default."),
    ] = None,
    size: Annotated[str, typer.Option(help="Image that is enlarged: its side, or WIDTHxHEIGHT, in pixels.")] = "128",
    steps: Annotated[
        str, typer.Option(help="Evaluations of residual-shifting models, such as 1,15; their own number by default.")
    ] = "",
    batch: Annotated[int, typer.Option(help="Images that the network is given at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; the baseline has float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    tile: Annotated[str, typer.Option(help="Tile side in input pixels, auto or off.")] = "auto",
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile the network first, as upscale does; the baseline stays as it is."),
    ] = False,
    file_format: Annotated[str, typer.Option("--format", help="Files read and written: jpg, png, webp, tiff.")] = "jpg",
    repeats: Annotated[int, typer.Option(help="Runs that are timed.")] = 5,
    warmup: Annotated[int, typer.Option(help="Runs before them.")] = 1,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Measure the plain float32 network too.")
    ] = True,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure the memory of one image too.")] = True,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="[FILE]", help="Write one JSON document to FILE, or print it.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page of Markdown.")] = False,
) -> None:
    """Time every stage from file to file, beside the ceiling of the device and a plain baseline.

    Times mean something on an idle machine only; how busy it was with other things is reported.
    """
    check_outputs(json_file, markdown)
    numbers = _steps(steps)
    width, height = _size(size)

    from onestepsr.benchmark.speed import SpeedConfig
    from onestepsr.inference.options import tile_of

    config = SpeedConfig(
        width=width,
        height=height,
        batch=batch,
        device=device,
        dtype=dtype,
        tile=tile_of(tile),
        compiled=compiled,
        file_format=file_format,
        repeats=repeats,
        warmup=warmup,
        baseline=baseline,
        memory=memory,
        ceiling_seconds=CEILING_SECONDS,
    )
    report = measure(list(dict.fromkeys(model or [DEFAULT_MODEL])), numbers, config)
    _put_out(report, json_file, markdown)


def measure(models: Sequence[str], steps: Sequence[int | None], config: SpeedConfig) -> SpeedReport:
    """Measure every model with every number of steps."""
    import torch

    from onestepsr.benchmark.ceiling import OtherWork
    from onestepsr.benchmark.speed import measure_speed
    from onestepsr.benchmark.speed_report import SpeedReport
    from onestepsr.inference.upscaler import resolve_device

    other, chosen = OtherWork(), resolve_device(config.device)
    found = [measure_speed(model, config, number, _say) for model in models for number in steps]
    return SpeedReport(
        models=found,
        config=config,
        command=shlex.join([*COMMAND, *_own_arguments()]),
        machine=describe_machine(MEASURED_WITH),
        device=str(chosen),
        threads=torch.get_num_threads(),
        other_work=other.cores(),
        cores=cores(),
        date=datetime.date.today().isoformat(),
    )


def _put_out(report: SpeedReport, json_file: str | None, markdown: bool) -> None:
    from onestepsr.benchmark.speed_report import as_document, as_markdown, circumstances, tables

    if json_file is not None:
        write_json(json_file, as_document(report))
    if markdown:
        typer.echo(as_markdown(report), nl=False)
    elif json_file != STDOUT:
        show_tables(tables(report), TABLE_WIDTH)
        typer.echo(circumstances(report))


def _own_arguments() -> list[str]:
    """What stood behind the command on the line; nothing where it was called from Python."""
    return sys.argv[3:] if sys.argv[1:3] == list(COMMAND[1:]) else []


def _size(text: str) -> tuple[int, int]:
    sides = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    width, height = (int(sides[1]), int(sides[2] or sides[1])) if sides else (0, 0)
    if not 1 <= min(width, height) <= max(width, height) <= LARGEST_SIDE:
        raise UserError(f"--size {text}: accepted: a side or WIDTHxHEIGHT, 1 to {LARGEST_SIDE} pixels")
    return width, height


def _steps(text: str) -> list[int | None]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--steps {text}: accepted: numbers of evaluations separated by commas, such as 1,15")
    return list(dict.fromkeys(int(word) for word in words)) or [None]


def _say(line: str) -> None:
    typer.echo(line, err=True)

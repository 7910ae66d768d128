"""``onestepsr benchmark``: count and measure the cost of the models."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from onestepsr.core.errors import UserError
from onestepsr.core.files import write_text
from onestepsr.core.machine import describe_machine
from onestepsr.core.progress import progress

if TYPE_CHECKING:
    from onestepsr.benchmark.speed import SpeedConfig

STDOUT = "-"
MEASURED_WITH = ("torch", "diffusers", "peft")
"""Packages whose versions decide what is counted or measured."""
CEILING_SECONDS = 0.5
"""Time for every shape that is tried for the ceiling."""

benchmark = typer.Typer(help="Count and measure what the models cost.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    app.add_typer(benchmark, name="benchmark")


class OptionalJsonFile(TyperCommand):
    """Command whose ``--json`` stands alone, for standard output, or is followed by a file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the dash for standard output where ``--json`` has no file behind it."""
        filled: list[str] = []
        for argument, following in zip(args, [*args[1:], "--"], strict=False):
            filled.append(argument)
            if argument == "--json" and following.startswith("-") and following != STDOUT:
                filled.append(STDOUT)
        return super().parse_args(ctx, filled)


JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="[FILE]", help="Write one JSON document to FILE, or print it.")
]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print a page of Markdown.")]

# ---- speed ----

DEFAULT_MODEL = "d3sr-tiny"
LARGEST_INPUT = 16_384


@benchmark.command(cls=OptionalJsonFile)
def speed(
    *,
    model: Annotated[
        list[str] | None, typer.Option(help=f"Model, file or random:NAME; may be repeated. {DEFAULT_MODEL} by default.")
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
        bool, typer.Option("--compile", help="Compile the network first, as upscale does; the baseline stays as it is.")
    ] = False,
    file_format: Annotated[str, typer.Option("--format", help="Files read and written: jpg, png, webp, tiff.")] = "jpg",
    repeats: Annotated[int, typer.Option(help="Runs that are timed.")] = 5,
    warmup: Annotated[int, typer.Option(help="Runs before them.")] = 1,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Measure the plain float32 network too.")
    ] = True,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure the memory of one image too.")] = True,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Time every stage from file to file, beside the ceiling of the device and a plain baseline.

    Times mean something on an idle machine only; how busy it was with other things is reported.
    """
    _check_outputs(json_file, markdown)
    numbers = _steps(steps)
    width, height = _size(size)

    from onestepsr.benchmark.speed import SpeedConfig
    from onestepsr.benchmark.speed_report import as_markdown, circumstances, tables
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
    report = _measure(list(dict.fromkeys(model or [DEFAULT_MODEL])), numbers, config)
    if json_file is not None:
        _write_json(json_file, report)
    if markdown:
        typer.echo(as_markdown(report), nl=False)
    elif json_file != STDOUT:
        for table in tables(report):
            table.show()
        typer.echo(circumstances(report))


def _measure(models: Sequence[str], steps: Sequence[int | None], config: SpeedConfig) -> dict[str, Any]:
    """The document on every model with every number of steps."""
    import torch

    from onestepsr.benchmark.probes import other_work
    from onestepsr.benchmark.speed import measure_speed
    from onestepsr.benchmark.speed_report import document
    from onestepsr.inference.upscaler import resolve_device

    own = sys.argv[3:] if sys.argv[1:3] == ["benchmark", "speed"] else []  # none where it was called from Python
    device, begun, before = resolve_device(config.device), time.perf_counter(), other_work()
    found = [measure_speed(model, config, number, _say) for model in models for number in steps]
    after, elapsed = other_work(), time.perf_counter() - begun
    return document(
        found,
        config,
        busy=None if before is None or after is None else max(0.0, after - before) / elapsed,
        command=shlex.join(["onestepsr", "benchmark", "speed", *own]),
        machine=describe_machine(MEASURED_WITH),
        device=str(device),
        threads=torch.get_num_threads(),
        date=datetime.date.today().isoformat(),
    )


def _size(text: str) -> tuple[int, int]:
    sides = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    width, height = (int(sides[1]), int(sides[2] or sides[1])) if sides else (0, 0)
    if not 1 <= min(width, height) <= max(width, height) <= LARGEST_INPUT:
        raise UserError(f"--size {text}: accepted: a side or WIDTHxHEIGHT, 1 to {LARGEST_INPUT} pixels")
    return width, height


def _steps(text: str) -> list[int | None]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--steps {text}: accepted: numbers of evaluations separated by commas, such as 1,15")
    return list(dict.fromkeys(int(word) for word in words)) or [None]


def _say(line: str) -> None:
    typer.echo(line, err=True)


# ---- complexity ----

LARGEST_OUTPUT = 65_536


@benchmark.command(cls=OptionalJsonFile)
def complexity(
    model: Annotated[
        list[str] | None, typer.Option(help="Network to count; may be repeated. All by default.", show_default=False)
    ] = None,
    size: Annotated[int, typer.Option(min=1, max=LARGEST_OUTPUT, help="Side of the output image, in pixels.")] = 512,
    json_file: JsonFile = None,
    markdown: Markdown = False,
) -> None:
    """Count parameters and multiply-accumulate operations, stage by stage, without weights or computation."""
    _check_outputs(json_file, markdown)

    from onestepsr.benchmark.complexity import Report, as_document, as_markdown, default_names, measure, tables

    names = list(dict.fromkeys(model or default_names()))
    report = Report(side=size, networks=[measure(name, size) for name in progress(names, "Counting")])
    if json_file is not None:
        _write_json(json_file, as_document(report))
    if markdown:
        options = [part for name in dict.fromkeys(model or ()) for part in ("--model", name)]
        options += [] if size == 512 else ["--size", str(size)]
        command = shlex.join(["onestepsr", "benchmark", "complexity", *options, "--markdown"])
        typer.echo(as_markdown(report, command=command, machine=describe_machine(MEASURED_WITH)), nl=False)
    elif json_file != STDOUT:
        for table in tables(report):
            table.show()


# ---- output of both ----


def _check_outputs(json_file: str | None, markdown: bool) -> None:
    """Raise :class:`UserError` before any work when the results could not be put out."""
    if json_file == STDOUT and markdown:
        raise UserError("--json and --markdown would both print: give --json a file, or leave one out")
    if json_file not in (None, STDOUT) and not Path(str(json_file)).parent.is_dir():
        raise UserError(f"--json {json_file}: the folder {Path(str(json_file)).parent} does not exist")


def _write_json(path: str, document: Mapping[str, Any]) -> None:
    """Print the document as JSON, or write it under ``path`` in one step."""
    text = json.dumps(document, indent=1, allow_nan=False)
    if path == STDOUT:
        typer.echo(text)
    else:
        write_text(Path(path), text + "\n")

"""``onestepsr ablate``: train every variant of a suite with every seed, compare them, write table and images."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestepsr.cli.options import refuse
from onestepsr.core.errors import UserError

if TYPE_CHECKING:
    from onestepsr.train.ablation import Ablation
    from onestepsr.train.ablation_report import HeldOut

DEFAULT_SEEDS = "0,1,2"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="ablate", no_args_is_help=True)(ablate)


def ablate(
    context: typer.Context,
    suite: Annotated[
        str | None, typer.Argument(help="Name of a packaged suite, or a YAML file.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="validation=FOLDER names the held-out photos; evaluation.KEY=VALUE changes the comparison; "
            "all others change every run, such as 'data.paths=[PHOTOS]' or train.steps=500.",
        ),
    ] = None,
    *,
    seeds: Annotated[str, typer.Option(help="Seeds of the runs, separated by commas.")] = DEFAULT_SEEDS,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; runs/suites/SUITE by default.")] = None,
    only: Annotated[str, typer.Option(help="Train and compare these variants alone, separated by commas.")] = "",
    report: Annotated[
        Path | None, typer.Option(help="Folder of SUITE.md, .json and .png; the one of the runs.")
    ] = None,
    reuse: Annotated[
        list[Path] | None, typer.Option(help="Take equal finished runs from this folder, such as another suite's.")
    ] = None,
    launcher: Annotated[
        str, typer.Option(help="What starts a run instead of Python, such as 'accelerate launch --num_processes 4'.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show everything, start nothing.")] = False,
    list_suites: Annotated[bool, typer.Option("--list-suites", help="Name the packaged suites and exit.")] = False,
) -> None:
    """Train every variant of SUITE with every seed and compare them on the same held-out pairs.

    The same command continues after an interruption: finished runs are left alone, the interrupted one is resumed. Ends
    with exit code 1 if a run failed; the others are trained and compared all the same.
    """
    from onestepsr.train.ablation import load_suite, plan_ablation, suite_names, train_all
    from onestepsr.train.ablation_report import HeldOut, compare, results_grid
    from onestepsr.weights.download import without_downloads

    if list_suites:
        others = [parameter.name for parameter in context.command.params if parameter.name != "list_suites"]
        refuse(context, map(str, others), "does nothing beside --list-suites")
        typer.echo("\n".join(suite_names()))
        return
    if suite is None:
        raise UserError(f"which SUITE? Packaged ones: {', '.join(suite_names())}")
    loaded = load_suite(suite, settings or [])
    folder = out or Path("runs") / "suites" / loaded.name  # recipes of the same name have runs/NAME
    with without_downloads("a dry run fetches nothing") if dry_run else nullcontext():
        ablation = plan_ablation(loaded, only=_names(only), seeds=_seeds(seeds), out=folder, reuse=reuse or [])
        held_out = HeldOut(loaded.config.evaluation)
    try:
        prefix = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"--launcher {launcher}: {error}") from error
    if report is not None and report.exists() and not report.is_dir():
        raise UserError(f"--report {report}: is a file, expected a folder")
    if dry_run:
        show(ablation, held_out)
        return
    failures = train_all(ablation, launcher=prefix, announce=_say)
    chosen: list[tuple[str, str | Path | None]] = [("--seeds", seeds), ("--only", only), ("--out", out)]
    chosen += [("--report", report), *(("--reuse", path) for path in reuse or []), ("--launcher", launcher)]
    given = [word for name, value in chosen if value for word in (name, str(value))]
    command = shlex.join(["onestepsr", "ablate", suite, *(settings or []), *given])
    results, paths = compare(ablation, held_out, failures, report or folder, command=command)
    results_grid(results).show()
    _say(f"report: {', '.join(map(str, paths))}")
    if failures:
        raise typer.Exit(1)


def show(ablation: Ablation, held_out: HeldOut) -> None:
    """Print what would be trained and compared."""
    from onestepsr.core.tables import Grid
    from onestepsr.train.ablation import override_lines

    config = ablation.suite.config
    variants = tuple((name, ", ".join(config.variants[name].differences) or "-") for name in ablation.variants)
    title = f"{config.title} ({config.source})"
    Grid(title=title, columns=("variant", "settings of its own"), rows=variants, words=2).show()
    runs = []
    for run in ablation.runs:
        state = f"{run.state} at {run.step}" if run.state == "interrupted" else run.state
        runs.append((run.name, state, str(run.folder), f"{run.config.train.steps:,}", str(run.config.train.batch_size)))
    Grid(title="", columns=("run", "state", "folder", "steps", "batch"), rows=tuple(runs), words=3).show()
    common = [*override_lines(config.overrides), *ablation.suite.changes]
    typer.echo(f"recipe: {config.recipe} with {' '.join(common) or 'no changes'}")
    typer.echo(f"held out: {len(held_out.indices)} pairs from {len(held_out.pairs)} photos, on {held_out.device}")
    typer.echo(f"metrics: {', '.join(metric.title for metric in held_out.metrics)}")
    for note in held_out.notes:
        typer.echo(note)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    words = _names(text)
    if not words or not all(word.isdecimal() for word in words) or len({int(word) for word in words}) != len(words):
        raise UserError(
            f"--seeds '{text}': expected different whole numbers separated by commas, such as {DEFAULT_SEEDS}"
        )
    return [int(word) for word in words]


def _say(line: str) -> None:
    typer.echo(line, err=True)

"""``onestepsr train``: train a method from a recipe, resume a run, or show what a run would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestepsr.cli.options import refuse
from onestepsr.core.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from onestepsr.train.memory_estimate import Estimate
    from onestepsr.train.run import Plan


WIDTH = 96
"""Columns of the tables of a dry run, at least."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="train", no_args_is_help=True)(train)


def train(
    context: typer.Context,
    method: Annotated[
        str | None,
        typer.Argument(help="autoencoder, diffusion, d3sr, osediff, resshift, sinsr or tadsr.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as train.steps=500.")
    ] = None,
    *,
    recipe: Annotated[str | None, typer.Option(help="YAML file, or the name of a packaged recipe.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; the recipe's own, or runs/RECIPE.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint, if there is one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show everything, start nothing.")] = False,
    list_recipes: Annotated[bool, typer.Option("--list-recipes", help="Name the packaged recipes and exit.")] = False,
    fields: Annotated[
        bool,
        typer.Option(
            "--fields",
            help="Explain every setting, with its default or RECIPE's value, and exit; without "
            "METHOD those of all methods, as Markdown.",
        ),
    ] = False,
) -> None:
    """Train METHOD by RECIPE. The same command with --resume continues an interrupted run."""
    from onestepsr.train.checkpoint import Checkpoints
    from onestepsr.train.recipes import load_run, recipe_names
    from onestepsr.train.run import execute, prepare
    from onestepsr.weights.download import without_downloads

    if list_recipes:
        others = ("method", "overrides", "recipe", "out", "resume", "dry_run", "fields")
        refuse(context, others, "does nothing beside --list-recipes")
        typer.echo("\n".join(recipe_names()))
        return
    changes = [*(overrides or []), *([f"out={json.dumps(str(out))}"] if out is not None else [])]
    if fields:
        refuse(context, ["resume", "dry_run"], "does nothing beside --fields")
        typer.echo(_fields(method, recipe, changes), nl=False)
        return
    if method is None or recipe is None:
        raise UserError("a METHOD and --recipe FILE|NAME are needed; --list-recipes names the packaged ones")
    run = load_run(method, recipe, changes)
    if dry_run:
        with without_downloads("a dry run fetches nothing"):
            show(prepare(run, resume=resume, dry=True))
        return
    plan = prepare(run, resume=resume)
    try:
        typer.echo(f"finished: {execute(plan)}", err=True)
    except KeyboardInterrupt:
        done = Checkpoints(run.out / "checkpoints").latest()
        state = "no checkpoint yet" if done is None else f"step {done.step} of {run.train.steps:,} is saved"
        typer.echo(f"{run.out}: {state}; the same command with --resume goes on", err=True)
        raise


def _fields(method: str | None, recipe: str | None, changes: list[str]) -> str:
    from onestepsr.train.recipe_help import as_markdown, as_text, recipe_fields
    from onestepsr.train.recipes import load_run

    if recipe is None and changes:
        raise UserError(f"--fields: '{changes[0]}' changes a recipe; add --recipe FILE|NAME to see its values")
    if method is None:
        if recipe is not None:
            raise UserError("--fields: --recipe needs a METHOD before it")
        return as_markdown()
    return as_text(recipe_fields(method, load_run(method, recipe, changes) if recipe is not None else None))


def show(plan: Plan) -> None:
    """Print networks, memory, data and the resolved configuration."""
    from rich.console import Console

    from onestepsr.train.run import config_text

    estimate = plan.estimate()
    console = Console()
    console.width = max(console.width, WIDTH)  # a number cut short is worse than a wrapped line
    console.print(_networks_table(plan, estimate))
    console.print(_phases_table(estimate))
    for line in (*_memory_lines(plan, estimate), *_data_lines(plan)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    begins = f"step {plan.checkpoint.step}" if plan.checkpoint else "step 0"
    console.print(f"starts at {begins} of {plan.run.train.steps:,}", highlight=False)
    typer.echo(config_text(plan.run), nl=False)


def _networks_table(plan: Plan, estimate: Estimate) -> Table:
    title = f"{plan.run.method} -> {plan.run.out}: parameters, and memory in MB"
    table = _table(title, "network", "trainable", "frozen", "weights", "optimiser", "average", "gradients")
    for network in estimate.networks:
        memory = (network.weights, network.optimizer, network.average, network.gradients + network.buckets)
        counts = (f"{network.trainable:,}", f"{network.frozen:,}")
        table.add_row(network.name, *counts, *map(megabytes, memory))
    return table


def _phases_table(estimate: Estimate) -> Table:
    table = _table("", "phase", "loss terms", "activations and gradients at their peak, MB")
    table.columns[1].justify = "left"
    for phase in estimate.phases:
        table.add_row(phase.network, ", ".join(phase.terms), megabytes(phase.peak))
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    return table


def _memory_lines(plan: Plan, estimate: Estimate) -> list[str]:
    from onestepsr.train.run import process_count

    train = plan.run.train
    share = f"{process_count()} processes x {train.accumulation} micro-batches x {estimate.micro_batch}"
    peak, held = estimate.peak / 1e9, estimate.held / 1e9
    whole = f"{peak:,.2f} GB ({held:,.2f} GB held all the time, the rest in the phase that needs most)"
    return [
        f"batch: {train.batch_size} = {share}",
        f"memory per device: {whole}; estimated; on a GPU, its context and workspaces come on top, about 1 GB",
    ]


def _data_lines(plan: Plan) -> list[str]:
    data = plan.run.data
    names = ", ".join(str(path) for path in data.paths)
    crops = "whole images" if data.crop == 0 else f"crops of {data.crop} x {data.crop}"
    return [f"photos: {plan.photos:,} in {names}", f"samples: {crops}, {_low_resolution(plan)}"]


def _low_resolution(plan: Plan) -> str:
    from onestepsr.methods.base import get_method

    data, degradation = plan.run.data, plan.run.data.degradation
    if not get_method(plan.run.method).needs_lr:
        return "without low-resolution versions"
    if data.kind == "pairs":
        return f"with their own 1/{data.scale} versions"
    if isinstance(degradation, dict):
        return f"1/{data.scale} by {', '.join(f'{name} ({weight:g})' for name, weight in degradation.items())}"
    return f"1/{data.scale} by {degradation if isinstance(degradation, str) else 'the degradation below'}"


def megabytes(count: int) -> str:
    """Bytes in MB with one decimal; empty for 0."""
    return f"{count / 1e6:,.1f}" if count else ""

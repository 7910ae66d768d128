"""``onestepsr train``: train a method from a recipe, resume a run, or show what a run would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestepsr.cli.options import refuse
from onestepsr.core.errors import UserError

if TYPE_CHECKING:
    from onestepsr.train.run import Plan


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
    from onestepsr.core.tables import Grid
    from onestepsr.train.run import config_text, process_count

    estimate, train, data = plan.estimate(), plan.run.train, plan.run.data
    rows: list[tuple[str, ...]] = []
    for network in estimate.networks:
        memory = (network.weights, network.optimizer, network.average, network.gradients + network.buckets)
        rows.append((network.name, f"{network.trainable:,}", f"{network.frozen:,}", *map(megabytes, memory)))
    columns = ("network", "trainable", "frozen", "weights", "optimiser", "average", "gradients")
    title = f"{plan.run.method} -> {plan.run.out}: parameters, and memory in MB"
    Grid(title=title, columns=columns, rows=tuple(rows)).show()
    rows = [(phase.network, ", ".join(phase.terms), megabytes(phase.peak)) for phase in estimate.phases]
    phase_columns = ("phase", "loss terms", "activations and gradients at their peak, MB")
    Grid(title="", columns=phase_columns, rows=tuple(rows), words=2).show()
    share = f"{process_count()} processes x {train.accumulation} micro-batches x {estimate.micro_batch}"
    peak, held = estimate.peak / 1e9, estimate.held / 1e9
    whole = f"{peak:,.2f} GB ({held:,.2f} GB held all the time, the rest in the phase that needs most)"
    typer.echo(f"batch: {train.batch_size} = {share}")
    typer.echo(f"memory per device: {whole}; estimated; on a GPU, its context and workspaces come on top, about 1 GB")
    crops = "whole images" if data.crop == 0 else f"crops of {data.crop} x {data.crop}"
    typer.echo(f"photos: {plan.photos:,} in {', '.join(map(str, data.paths))}")
    typer.echo(f"samples: {crops}, {_low_resolution(plan)}")
    begins = f"step {plan.checkpoint.step}" if plan.checkpoint else "step 0"
    typer.echo(f"starts at {begins} of {train.steps:,}")
    typer.echo(config_text(plan.run), nl=False)


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

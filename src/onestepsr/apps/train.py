"""``onestepsr train``: train a method from a recipe, resume a run, or show what a run would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestepsr.errors import UserError

if TYPE_CHECKING:
    from onestepsr.train.session import Plan


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="train", no_args_is_help=True)(train)


def train(
    method: Annotated[str | None, typer.Argument(help="Training method, such as d3sr.", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as train.steps=500.")
    ] = None,
    *,
    recipe: Annotated[str | None, typer.Option(help="YAML file, or the name of a packaged recipe.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; the recipe's own, or runs/RECIPE.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show everything, start nothing.")] = False,
    list_recipes: Annotated[bool, typer.Option("--list-recipes", help="Name the packaged recipes and exit.")] = False,
) -> None:
    """Train METHOD as RECIPE says. The same command with --resume goes on with a run that was interrupted."""
    from onestepsr.train.recipes import load_run, recipe_names
    from onestepsr.train.session import execute, prepare

    if list_recipes:
        typer.echo("\n".join(recipe_names()))
        return
    if method is None or recipe is None:
        raise UserError("a METHOD and --recipe FILE|NAME are needed; --list-recipes names the packaged ones")
    changes = [*(overrides or []), *([f"out={json.dumps(str(out))}"] if out is not None else [])]
    plan = prepare(load_run(method, recipe, changes), resume=resume)
    if dry_run:
        show(plan)
        return
    typer.echo(f"finished: {execute(plan)}", err=True)


def show(plan: Plan) -> None:
    """Print networks, memory, photos and the resolved configuration."""
    from rich.console import Console
    from rich.table import Table

    from onestepsr.train.session import config_text

    table = Table("network", "trainable", "frozen", title=f"{plan.run.method} -> {plan.run.out}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (trainable, frozen) in plan.parameters.items():
        table.add_row(name, f"{trainable:,}", f"{frozen:,}")
    console = Console()
    console.print(table)
    begins = f"step {plan.checkpoint.step}" if plan.checkpoint else "step 0"
    console.print(f"photos: {plan.photos:,}", highlight=False)
    console.print(f"memory of the training state: {plan.state_bytes / 1e6:,.1f} MB, plus activations", highlight=False)
    console.print(f"starts at {begins} of {plan.run.train.steps:,}", highlight=False)
    typer.echo(config_text(plan.run), nl=False)

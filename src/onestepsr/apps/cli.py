"""The ``onestepsr`` command: one module per group of commands, one place where errors become lines and exit codes."""

from __future__ import annotations

import logging
import os
import sys

import click
import typer

from onestepsr import __version__
from onestepsr.errors import OneStepSRError

USAGE_ERROR = 2

app = typer.Typer(
    name="onestepsr",
    help="One-step diffusion super-resolution of real-world images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", is_eager=True, help="Print the version and exit."),
    verbose: bool = typer.Option(False, "--verbose", help="Log what is decided and why."),
    debug: bool = typer.Option(False, "--debug", help="Show a traceback when something fails."),
) -> None:
    if version:
        typer.echo(f"onestepsr {__version__}")
        raise typer.Exit
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")


def _register_commands() -> None:
    from onestepsr.apps import degrade, doctor, evaluate, models, train, upscale

    for module in (upscale, train, evaluate, degrade, models, doctor):
        module.register(app)


_register_commands()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; ``--debug`` is accepted anywhere on the line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or bool(os.environ.get("ONESTEPSR_DEBUG"))
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(args=arguments, prog_name="onestepsr", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except OneStepSRError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(USAGE_ERROR)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        typer.echo(f"error: {type(error).__name__}: {error} (add --debug for the traceback)", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)

"""The ``onestepsr`` command: registration of all commands, and errors as one line with an exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
from typing import Any, NoReturn

import typer

from onestepsr import __version__
from onestepsr.core.errors import OneStepSRError
from onestepsr.core.signals import interrupt_on_sigterm, was_terminated

USAGE_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143

app = typer.Typer(
    name="onestepsr",
    help="One-step diffusion super-resolution of real-world images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onestepsr {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
    ),
    verbose: bool = typer.Option(False, "--verbose", help="Log decisions and their reasons."),
    debug: bool = typer.Option(False, "--debug", help="Show a traceback when something fails."),
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")


def _register_commands() -> None:
    from onestepsr.cli import ablate, batch, benchmark, degrade, doctor, export, models, prompts, serve, train, video
    from onestepsr.cli.evaluate import command as evaluate
    from onestepsr.cli.upscale import command as upscale

    for module in (
        upscale,
        batch,
        video,
        train,
        ablate,
        evaluate,
        benchmark,
        degrade,
        prompts,
        serve,
        export,
        models,
        doctor,
    ):
        module.register(app)


_register_commands()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; ``--debug`` is accepted anywhere on the line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _print_all_characters()
    debug = "--debug" in arguments or bool(os.environ.get("ONESTEPSR_DEBUG"))
    arguments = [_at_home(argument) for argument in arguments if argument != "--debug"]
    interrupt_on_sigterm()
    try:
        code = app(args=arguments, prog_name="onestepsr", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OneStepSRError as error:
        _fail(error, str(error), USAGE_ERROR, debug)
    except Exception as error:  # noqa: BLE001  (last resort: any error ends in one line)
        if hasattr(error, "format_message"):  # wrong usage, found by the command-line library
            _explain_usage(error)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            _fail(
                error,
                f"{str(error.filename)[:40]}…: {error.strerror} ({len(str(error.filename)):,})",
                USAGE_ERROR,
                debug,
            )
        _fail(error, f"{type(error).__name__}: {error} (add --debug for the traceback)", 1, debug)
    if code == INTERRUPTED:  # the command-line library's code for an interrupt
        typer.echo("terminated" if was_terminated() else "interrupted", err=True)
        sys.exit(TERMINATED if was_terminated() else INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _at_home(argument: str) -> str:
    """``argument`` with ``~/`` at the start of its value replaced, which shells leave alone in ``--option=~/x``."""
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    if option == "--prompt" or not re.match(r"~(/|$)", value) or os.path.lexists(value):
        return argument
    return f"{option}{equals}{os.path.expanduser(value)}"


def _print_all_characters() -> None:
    """Write characters that the encoding of a pipe or terminal lacks as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _fail(error: Exception, line: str, code: int, debug: bool) -> NoReturn:
    if debug:
        raise error
    typer.echo(f"error: {line}", err=True)
    sys.exit(code)


def _explain_usage(error: Any) -> NoReturn:
    """Print one line, or the whole help if a command was called without arguments."""
    message = error.format_message()
    if "\n" in message.strip() or not message:
        error.show()
    else:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "onestepsr"
        typer.echo(f"error: {message} (see {command} --help)", err=True)
    sys.exit(USAGE_ERROR)

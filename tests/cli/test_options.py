"""Groups of options: fields of a dataclass are options of the command, and its checks are the command's."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from onestepsr.cli.options import grouped
from onestepsr.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Size:
    width: Annotated[int | None, typer.Option("-w", "--width", help="Columns.")] = None
    fast: Annotated[bool, typer.Option("--fast", help="Be quick.")] = False

    def __post_init__(self) -> None:
        if self.width == 0:
            raise UserError("width 0: accepted: 1 and more")


def command(name: Annotated[str, typer.Argument()], *, size: Size, loud: bool = False) -> None:
    """Show what was given."""
    typer.echo(f"{name} {size} {loud}")


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(grouped(command))
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_fields_are_options_beside_plain_parameters() -> None:
    assert run("a") == "a Size(width=None, fast=False) False\n"
    assert run("a", "-w", "3", "--fast", "--loud") == "a Size(width=3, fast=True) True\n"


def test_help_is_that_of_command_and_fields() -> None:
    text = run("--help")
    assert "Show what was given." in text
    assert "Columns." in text


def test_a_group_refuses_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="width 0"):
        run("a", "--width", "0")

"""Groups of options: fields of a dataclass are options of the command, and its checks are the command's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from onestepsr.cli import main
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("upscale {photos}/0.png -o {out}/a.png --seed 4", "--seed: 'd3sr-tiny' draws no noise"),
        ("upscale {photos}/0.png -o {out}/a.png --scale 4 --width 200", "--scale: --width and --height exclude it"),
        ("degrade {photos} {out} --recipe bicubic --seed 4", "--seed: recipe 'bicubic' draws nothing at random"),
        ("evaluate {photos} --metrics grid --seed 3", "--seed: needs --model"),
        (
            "evaluate --model bicubic --lr {photos} --metrics grid --seed 0",
            "--seed: neither the model nor the degradation draws anything at random",
        ),
        ("ablate --list-suites --dry-run", "--dry-run: does nothing beside --list-suites"),
        ("models convert d3sr-tiny {out}/a.safetensors --share 0.3", "--share: needs --towards"),
        ("models convert x.pkl {out}/a.pkl --to osediff-pkl --dtype float32", "--dtype: does nothing with --to"),
        ("benchmark speed --model bicubic --steps 3 --size 16 --no-memory --repeats 1", "'bicubic' takes no steps"),
    ],
)
def test_options_that_would_do_nothing_are_refused(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "photos" / "0.png")
    words = [word.format(photos=tmp_path / "photos", out=tmp_path / "out") for word in line.split()]
    result = CliRunner().invoke(main.app, words)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_seeds_that_do_something_are_taken(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "photos" / "0.png")
    words = ["degrade", str(tmp_path / "photos"), str(tmp_path / "out"), "--recipe", "camera", "--seed", "4"]
    assert CliRunner().invoke(main.app, words).exit_code == 0

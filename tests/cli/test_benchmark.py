"""``onestepsr benchmark complexity``: what it prints and writes, and how it fails."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onestepsr.cli.main import app, main
from onestepsr.core.errors import UnknownModel, UserError

run = CliRunner().invoke
TINY = ["benchmark", "complexity", "--model", "d3sr-tiny"]


@pytest.mark.parametrize("ending", [["--json"], ["--json", "-"], ["--json", "--size", "64"]])
def test_json_alone_prints_one_document(ending: list[str]) -> None:
    result = run(app, [*TINY, *ending])
    document = json.loads(result.stdout)
    assert document["schema"] == 1
    assert document["size"] == (64 if "--size" in ending else 512)
    assert [stage["name"] for stage in document["networks"][0]["stages"]] == ["encode", "unet", "decode"]


def test_json_with_a_file_leaves_the_tables_on_the_screen(tmp_path: Path) -> None:
    path = tmp_path / "complexity.json"
    result = run(app, [*TINY, "--json", str(path), "--size", "64"])
    assert result.exit_code == 0
    assert "MACs, G (all products)" in result.stdout
    assert json.loads(path.read_text())["networks"][0]["name"] == "d3sr-tiny"
    assert [entry.name for entry in tmp_path.iterdir()] == ["complexity.json"]


def test_markdown_names_its_command_and_repeated_models_once() -> None:
    page = run(app, [*TINY, "--model", "d3sr-tiny", "--size", "64", "--markdown"]).stdout
    assert page.startswith("# Complexity")
    assert "onestepsr benchmark complexity --model d3sr-tiny --size 64 --markdown" in page
    assert page.count("| d3sr-tiny | encode |") == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([*TINY, "--json", "--markdown"], UserError),
        ([*TINY, "--json", "no/such/folder/x.json"], UserError),
        ([*TINY, "--size", "100"], UserError),
        (["benchmark", "complexity", "--model", "d3sr-tny"], UnknownModel),
    ],
)
def test_mistakes_are_user_errors(arguments: list[str], error: type[UserError]) -> None:
    assert isinstance(run(app, arguments).exception, error)


@pytest.mark.parametrize("ending", [["--size", "0"], ["--size", "big"], ["--jsn"], ["--size", "9999999"]])
def test_wrong_usage_is_exit_code_2(ending: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*TINY, *ending])
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err.lower()

"""``onestepsr benchmark``: its tables, documents and errors."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onestepsr.benchmark import probes
from onestepsr.benchmark.speed import SpeedConfig
from onestepsr.benchmark.speed_report import circumstances, document
from onestepsr.cli import benchmark
from onestepsr.cli.main import app, main
from onestepsr.core import machine
from onestepsr.core.errors import UnknownModel, UserError
from onestepsr.inference import devices

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


# ---- speed ----

SPEED = ["benchmark", "speed", "--size", "16x12", "--repeats", "1", "--warmup", "0", "--no-memory", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probes.CONVOLUTIONS, "cpu", ((1, 8, 8),))
    monkeypatch.setitem(probes.MATRICES, "cpu", (32,))
    monkeypatch.setattr(benchmark, "CEILING_SECONDS", 0.0)


def test_one_step_against_several_in_one_document(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    models = ["--model", "random:resshift-micro", "--steps", "1,2", "--no-baseline"]
    result = run(app, [*SPEED, *models, "--json", str(path)])
    assert result.exit_code == 0, result.exception
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    assert (document["settings"]["width"], document["settings"]["height"]) == (16, 12)
    assert [(model["steps"], model["output"]) for model in document["models"]] == [(1, [64, 48]), (2, [64, 48])]
    assert document["models"][0]["speedup_over_baseline"] is None
    (ratio,) = document["speedup_over_steps"]
    assert (ratio["model"], ratio["over_steps"]) == ("random:resshift-micro", 2)
    one, two = (model["product"]["network"]["median"] for model in document["models"])
    assert ratio["network"] == pytest.approx(two / one)
    assert "One step against several" in result.stdout
    assert "random:resshift-micro: loading" in result.stderr


def test_a_page_and_a_document_of_one_measurement(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    result = run(app, [*SPEED, "--dtype", "bfloat16", "--markdown", "--json", str(path)])
    assert result.exit_code == 0, result.exception
    (found,) = json.loads(path.read_text())["models"]
    assert found["model"] == "d3sr-tiny"
    plain, product = found["baseline"], found["product"]
    assert found["speedup_over_baseline"] == pytest.approx(plain["network"]["median"] / product["network"]["median"])
    assert found["fraction_of_ceiling"] == pytest.approx(product["tflops"] / found["ceiling_tflops"]["convolution"])
    assert found["agreement_db"] >= 40.0
    assert [stage["name"] for stage in product["stages"]][2:5] == ["encode", "unet", "decode"]
    assert result.stdout.startswith("# Speed")
    assert result.stdout.count("| d3sr-tiny, 1 step | product |") == 9
    assert " on cpu, " in result.stdout


def test_compiling_is_part_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **others: plain(function, backend=backend))
    torch._dynamo.reset()
    path = tmp_path / "speed.json"
    words = ["--model", "bicubic", "--compile", "--warmup", "1", "--markdown", "--json", str(path)]
    result = run(app, [*SPEED, *words])
    assert result.exit_code == 0, result.exception
    assert graphs
    document = json.loads(path.read_text())
    assert document["settings"]["compiled"] is True
    assert "16 x 12 pixels, compiled" in result.stdout


def test_without_a_compiler_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = run(app, [*SPEED, "--model", "bicubic", "--compile", "--warmup", "1"])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith("compile: needs a C++ compiler, found none (no-such-compiler)")


def test_a_busy_machine_is_named() -> None:
    def said(busy: float | None) -> str:
        own = {"command": "c", "machine": "m", "device": "cpu", "threads": 2, "date": "d"}
        return circumstances(document([], SpeedConfig(), busy=busy, **own))

    assert "not idle" not in said(0.1 * machine.cores())
    assert "not idle" in said(0.1 * machine.cores() + 0.01)
    assert "not idle" not in said(None)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--size", "0"], UserError),
        (["--size", "12x"], UserError),
        (["--size", "99999"], UserError),
        (["--steps", "1,x"], UserError),
        (["--steps", "0"], UserError),
        (["--steps", "4"], UserError),
        (["--batch", "0"], UserError),
        (["--batch", "2", "--tile", "32"], UserError),
        (["--tile", "small"], UserError),
        (["--format", "gif"], UserError),
        (["--dtype", "float8"], UserError),
        (["--device", "tpu"], UserError),
        (["--model", "random:no-such"], UnknownModel),
        (["--compile"], UserError),  # the first run is when that happens, and here it would be timed
        (["--json", "--markdown"], UserError),
        (["--json", "no/such/folder/x.json"], UserError),
    ],
)
def test_mistakes_in_speed_are_user_errors(arguments: list[str], error: type[UserError]) -> None:
    result = run(app, [*SPEED, *arguments])
    assert isinstance(result.exception, error)
    assert "\n" not in str(result.exception)

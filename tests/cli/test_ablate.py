"""The command: what it shows, what it refuses, and one suite from start to report with processes of its own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from onestepsr.cli import ablate as command
from onestepsr.core.errors import UserError


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    command.register(app)
    result = CliRunner().invoke(app, ["ablate", *arguments], catch_exceptions=False, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return int(result.return_value or 0), result.output


def held_out(suite: Path) -> str:
    return f"validation={suite.parent / 'held-out'}"


def test_dry_run_shows_everything_and_writes_nothing(micro_suite: Path, tmp_path: Path) -> None:
    _, shown = invoke(str(micro_suite), held_out(micro_suite), "--out", str(tmp_path / "out"), "--dry-run")
    for part in (
        "mse/seed-2",
        "config.perceptual_weight=0",
        "3 pairs from 3 photos",
        "DISTS (oriented)",
        "train.steps=2",
    ):
        assert part in shown
    assert shown.count("new") == 6
    assert not (tmp_path / "out").exists()


def test_suite_has_another_folder_than_the_recipe_of_its_name(
    micro_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / micro_suite.stem / "model.safetensors"
    run.parent.mkdir(parents=True)
    run.touch()  # what `train --recipe` of the same name has left
    code, shown = invoke(str(micro_suite), held_out(micro_suite), "--dry-run")
    assert code == 0
    assert f"runs/suites/{micro_suite.stem}" in shown.replace("\n", "")


def test_dry_run_fetches_nothing(micro_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONESTEPSR_OFFLINE", raising=False)
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path / "cache"))
    published = "evaluation.perceptual.features=vgg16"
    with pytest.raises(UserError, match="could not be fetched \\(a dry run fetches nothing\\)"):
        invoke(str(micro_suite), held_out(micro_suite), published, "--out", str(tmp_path / "out"), "--dry-run")


def test_a_suite_from_start_to_report(micro_suite: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report"
    words = [str(micro_suite), held_out(micro_suite), "--out", str(out), "--report", str(report), "--seeds", "3"]
    code, said = invoke(*words, "--only", "dists")
    assert code == 0
    assert "[1/1] dists/seed-3" in said
    results = json.loads((report / "micro-suite.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["bicubic", "dists", "hr"]
    run = results["rows"][1]["runs"][0]
    assert (run["seed"], run["folder"], len(run["values"]["psnr"])) == (3, str(out / "dists" / "seed-3"), 3)
    assert results["rows"][1]["scores"]["psnr"]["mean"] == pytest.approx(sum(run["values"]["psnr"]) / 3)
    said_again = ["--seeds", "3", "--only", "dists", "--out", str(out), "--report", str(report)]
    assert shlex.split(results["command"]) == ["onestepsr", "ablate", *words[:2], *said_again]
    assert "| MSE + DISTS |" in (report / "micro-suite.md").read_text()
    with Image.open(report / "micro-suite.png") as sheet:
        assert sheet.size[0] == 3 * (24 + 4) + 4, "bicubic, the variant and HR"
    trained = (out / "dists" / "seed-3" / "model.safetensors").stat().st_mtime_ns
    code, said = invoke(*words, "--only", "dists")
    assert (code, "dists/seed-3\n" in said) == (0, False), "nothing is left to train"
    assert (out / "dists" / "seed-3" / "model.safetensors").stat().st_mtime_ns == trained


def test_a_failed_run_ends_in_exit_code_1_and_a_report_without_it(micro_suite: Path, tmp_path: Path) -> None:
    words = [str(micro_suite), held_out(micro_suite), "--out", str(tmp_path / "out"), "--seeds", "0"]
    with pytest.raises(UserError, match="none of the 2 runs was finished"):
        invoke(*words, "--launcher", "false")
    invoke(*words, "--only", "mse")
    command = json.loads((tmp_path / "out" / "micro-suite.json").read_text())["command"]
    assert shlex.split(command)[4:] == ["--seeds", "0", "--only", "mse", "--out", str(tmp_path / "out")]
    others = [tmp_path / "other suite", tmp_path / "another"]
    for folder in others:
        folder.mkdir()
    reused = [word for folder in others for word in ("--reuse", str(folder))]
    code, said = invoke(*words, *reused, "--launcher", "env false")
    assert code == 1
    command = json.loads((tmp_path / "out" / "micro-suite.json").read_text())["command"]
    assert shlex.split(command)[4:] == ["--seeds", "0", "--out", words[3], *reused, "--launcher", "env false"]
    assert "dists/seed-0: training ended with exit code 1" in said
    text = (tmp_path / "out" / "micro-suite.md").read_text()
    assert "- dists/seed-0 is missing: training ended with exit code 1" in text
    assert "| MSE + DISTS | - |" in text


def test_names_of_suites_are_listed() -> None:
    _, shown = invoke("--list-suites")
    assert {"d3sr-tiny-losses", "d3sr-tiny-discriminators"} <= set(shown.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0,x"], "--seeds '0,x': expected different whole numbers"),
        (["--seeds", "1,1"], "--seeds '1,1': expected different whole numbers"),
        (["--seeds", ""], "--seeds '': expected"),
        (["--only", "mes"], "has no variant 'mes': did you mean 'mse'"),
        (["--reuse", "nowhere"], "--reuse nowhere: no such folder"),
        (["validation=nowhere"], "nowhere: no such folder"),
        (["validation="], "validation=: expected a folder"),
        (["validation=[a"], r"\[a: no such folder"),
        (["--launcher", "'torchrun"], "--launcher 'torchrun: No closing quotation"),
        (["--report", __file__], "--report .*: is a file, expected a folder"),
        (["evaluation.metrics=[psrn]"], "unknown metric 'psrn': did you mean 'psnr'"),
        (["train.stpes=3"], "did you mean 'steps'"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(
    micro_suite: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        invoke(str(micro_suite), held_out(micro_suite), *words, "--out", str(tmp_path / "out"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_suite_is_named() -> None:
    with pytest.raises(UserError, match=r"suite 'd3sr-tiny-los' .* did you mean 'd3sr-tiny-losses'"):
        invoke("d3sr-tiny-los")

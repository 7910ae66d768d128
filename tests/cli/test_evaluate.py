"""The evaluate command: folders and models, table, files, messages and exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from onestepsr.cli.evaluate import command as evaluate
from onestepsr.cli.upscale import command as upscale
from onestepsr.core.errors import UserError
from onestepsr.evaluate.result import read_result

app = typer.Typer()
app.callback()(lambda: None)
evaluate.register(app)
upscale.register(app)


@pytest.fixture(autouse=True)
def no_niqe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither NIQE's statistics nor weights are on this machine."""
    monkeypatch.setenv("ONESTEPSR_NIQE_PARAMETERS", "")
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path / "cache"))


def write(path: Path, seed: int, size: tuple[int, int] = (16, 18), offset: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 250, (*size, 3), dtype=np.uint8)
    Image.fromarray(values + np.uint8(offset)).convert(mode).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a", "b")):
        write(tmp_path / "hr" / f"{name}.png", seed)
        write(tmp_path / "sr" / f"{name}_x4.png", seed, offset=5)
    return tmp_path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three LR images with references: colour, gray, and of 16 bits."""
    for seed, mode in enumerate(("RGB", "L", "RGB")):
        write(tmp_path / "set" / f"p{seed}_HR.png", seed, (48, 56), mode=mode)
        write(tmp_path / "set" / f"p{seed}_LR.png", seed, (12, 14), mode=mode)
    Image.fromarray(np.arange(0, 168 * 300, 300, dtype=np.uint16).reshape(12, 14)).save(tmp_path / "set/p1_LR.png")
    return tmp_path / "set"


def run(*arguments: str | Path, command: str = "evaluate") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    lines = result.stderr.splitlines(keepends=True)
    return result.exit_code, result.stdout, "".join(line for line in lines if not line.startswith("Measuring "))


def test_a_line_tells_of_each_image_where_there_is_no_terminal(folders: Path) -> None:
    words = ["evaluate", str(folders / "sr"), "--hr", str(folders / "hr"), "--metrics", "psnr"]
    assert CliRunner().invoke(app, words).stderr == "Measuring 1/2: a\nMeasuring 2/2: b\n"


def test_table_and_json(folders: Path) -> None:
    target = folders / "scores.json"
    code, out, err = run(folders / "sr", "--hr", folders / "hr", "--json", target, "--label", "mine")
    assert code == 0
    assert re.fullmatch(r"not measured: niqe: NIQE needs .*\n", err)
    result = read_result(target)
    assert set(result.images) == {"a", "b"}
    summaries = result.summaries()
    assert set(summaries) == {"psnr", "ssim", "grid"}
    expected = 20 * np.log10(255 / 5) - 20 * np.log10(219 / 255)
    assert summaries["psnr"].mean == pytest.approx(expected, abs=1e-2)
    assert f"{summaries['psnr'].mean:.4f}" in out
    assert "mine, protocol basic" in out
    assert result.protocol.settings["crop_border"] == 0
    assert "niqe" in result.unavailable
    assert result.files["a"].sr == "a_x4.png"
    assert list(folders.glob(".*")) == []


def test_failures_are_named_and_end_in_exit_code_one(folders: Path) -> None:
    write(folders / "sr" / "b_x4.png", 0, (16, 16))
    write(folders / "sr" / "unmatched.png", 0)
    write(folders / "hr" / "waiting.png", 0)
    target = folders / "scores.json"
    code, out, err = run(folders / "sr", "--hr", folders / "hr", "--metrics", "psnr", "--json", target)
    assert code == 1
    assert "SR without HR (1): unmatched.png" in err
    assert "HR without SR (1): waiting.png" in err
    assert re.search(r"failed: .*b_x4.png against .*b.png: SR is 16 x 16 but HR is 18 x 16", err)
    assert "PSNR" in out
    assert read_result(target).summaries()["psnr"].count == 1
    assert set(read_result(target).failed) == {"b"}


def test_sizes_can_be_made_equal_on_request(folders: Path) -> None:
    write(folders / "sr" / "b_x4.png", 0, (16, 16))
    for options in (("--resize", "crop", "--crop-border", "2"), ("--resize", "sr-to-hr")):
        code, _, err = run(folders / "sr", "--hr", folders / "hr", "--metrics", "psnr", *options)
        assert (code, err) == (0, "")


def test_references_without_counterpart_are_no_failure(folders: Path) -> None:
    (folders / "sr" / "b_x4.png").unlink()
    code, _, err = run(folders / "sr", "--hr", folders / "hr", "--metrics", "psnr")
    assert code == 0
    assert "HR without SR (1): b.png" in err


def test_without_reference(folders: Path) -> None:
    code, out, _ = run(folders / "sr")
    assert code == 0
    assert "grid" in out
    assert "PSNR" not in out


def test_what_was_asked_for_by_name_and_cannot_be_had_is_a_failure(folders: Path) -> None:
    code, out, err = run(folders / "sr", "--hr", folders / "hr", "--metrics", "psnr,lpips,fid,musiq")
    assert code == 1
    lines = err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["lpips", "fid", "musiq"]
    assert "onestepsr models download alexnet" in lines[0]
    assert "onestepsr[iqa]" in lines[2] or "pyiqa" in lines[2]
    assert "PSNR" in out
    with pytest.raises(UserError, match="nothing can be measured here"):
        run(folders / "sr", "--metrics", "niqe")


def test_the_same_numbers_as_upscaling_first(data: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.json", tmp_path / "apart.json"
    code, _, err = run("--model", "d3sr-tiny", "--data", data, "--metrics", "psnr,ssim,grid", "--json", both[0])
    assert (code, err) == (0, "3 images (images ending in _LR and _HR)\n")
    code, _, err = run(str(data / "*_LR.png"), "-o", tmp_path / "sr", "--model", "d3sr-tiny", command="upscale")
    assert code == 0, err
    code, _, err = run(tmp_path / "sr", "--hr", data, "--metrics", "psnr,ssim,grid", "--json", both[1])
    assert (code, err) == (0, "")
    together, apart = (read_result(path) for path in both)
    assert set(together.images) == {"p0", "p1", "p2"}
    assert together.images == apart.images
    assert together.model is not None
    assert together.model.name == "d3sr-tiny"
    assert len(together.model.sha256 or "") == 64


def test_made_inputs_kept_images_and_report(data: Path, tmp_path: Path) -> None:
    target = tmp_path / "made.json"
    code, _, err = run(
        *("--model", "bicubic", "--data", data, "--degradation", "bicubic", "--out", tmp_path / "out"),
        *("--json", target, "--report", tmp_path / "report", "--metrics", "psnr"),
    )
    assert code == 0, err
    for side in ("LR", "SR", "HR"):
        assert len(list((tmp_path / "out" / side).iterdir())) == 3
    settings = json.loads(target.read_text())["protocol"]
    assert (settings["degradation"], settings["degradation_seed"], settings["scale"]) == ("bicubic", 0, 4)
    assert len(list((tmp_path / "report").rglob("*.png"))) == 9
    with pytest.raises(UserError, match="name a new or empty folder"):
        run("--model", "bicubic", "--data", data, "--out", tmp_path / "out")


def test_a_report_has_images_that_are_not_kept(data: Path, tmp_path: Path) -> None:
    target = tmp_path / "scores.json"
    code, _, err = run(
        *("--model", "bicubic", "--lr", data, "--report", tmp_path / "report", "--json", target, "--metrics", "grid")
    )
    assert code == 0, err
    assert len(list((tmp_path / "report").rglob("*sr0.png"))) == 3
    assert read_result(target).folders.sr is None


def test_mistakes_of_usage(folders: Path, data: Path) -> None:
    for arguments, message in (
        ((folders / "sr", "--metrics", "psnr"), "give --hr"),
        ((folders / "sr", "--metrics", "pnsr", "--hr", folders / "hr"), "did you mean 'psnr'"),
        ((folders / "sr", "--protocol", "d3rs"), "did you mean 'd3sr'"),
        ((folders / "sr", "--resize", "no"), "accepted: never, crop"),
        ((folders / "sr", "--crop-border", "-1"), "0 pixels and more"),
        ((folders / "sr", "--json", folders / "absent" / "scores.json"), "does not exist"),
        ((folders / "sr", "--data", data), "--data: needs --model"),
        ((folders / "sr", "--hr", folders / "hr", "--tile", "auto"), "--tile: needs --model"),
        ((folders / "sr", "--suffix", "_x4"), "--suffix: needs --hr"),
        (("--model", "bicubic", "--data", data, "--text-encoder", "sd21-base"), "--text-encoder: there is no prompt"),
        ((folders / "sr", "--label", ""), "--label is empty"),
        ((folders / "absent",), "no such folder"),
        (("--hr", folders / "hr"), "nothing to measure"),
        ((folders / "sr", "--model", "bicubic"), "exclude each other"),
        (("--model", "bicubic"), "needs either --data"),
        (("--model", "bicubic", "--data", data, "--lr", data), "needs either --data"),
        (("--model", "bicubic", "--data", data, "--hr", data), "--hr goes with --lr"),
        (("--model", "bicubic", "--lr", data, "--degradation", "mixed"), "--degradation makes"),
        (("--model", "bicubic", "--data", data, "--degradation", "mixd"), "did you mean 'mixed'"),
        (("--model", "d3sr-tny", "--data", data), "did you mean 'd3sr-tiny'"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments)
    assert run(folders / "sr", "--unknown")[0] == 2
    (folders / "empty").mkdir()
    with pytest.raises(UserError, match="no images in it"):
        run(folders / "empty")


def test_metrics_can_be_listed() -> None:
    code, out, _ = run("--metrics", "help")
    assert code == 0
    assert "maniqa-pipal" in out


def test_the_command_starts_without_torch() -> None:
    code = "import onestepsr.cli.evaluate.command, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The evaluate command: table, JSON file, messages and exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from onestepsr.apps import evaluate
from onestepsr.errors import UserError

app = typer.Typer()
app.callback()(lambda: None)
evaluate.register(app)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        samples = rng.integers(0, 250, (16, 18, 3), dtype=np.uint8)
        for folder, offset, suffix in (("hr", 0, ""), ("sr", 5, "_x4")):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(samples + np.uint8(offset)).save(tmp_path / folder / f"{name}{suffix}.png")
    return tmp_path


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_table_and_json(folders: Path) -> None:
    target = folders / "scores.json"
    code, out, err = run(folders / "sr", "--hr", folders / "hr", "--suffix", "_x4", "--json", target)
    assert (code, err) == (0, "")
    content = json.loads(target.read_text())
    assert content["schema"] == 1
    assert set(content["images"]) == {"a", "b"}
    assert set(content["mean"]) == {"psnr", "ssim", "grid"}
    expected = 20 * np.log10(255 / 5) - 20 * np.log10(219 / 255)
    assert content["mean"]["psnr"] == pytest.approx(expected, abs=1e-2)
    assert f"{content['mean']['psnr']:.4f}" in out
    assert list(folders.glob(".*")) == []


def test_failures_are_named_and_end_in_exit_code_one(folders: Path) -> None:
    Image.new("RGB", (16, 16)).save(folders / "sr" / "b_x4.png")
    Image.new("RGB", (16, 16)).save(folders / "sr" / "lonely.png")
    Image.new("RGB", (16, 16)).save(folders / "hr" / "waiting.png")
    code, out, err = run(folders / "sr", "--hr", folders / "hr", "--suffix", "_x4", "--metrics", "psnr")
    assert code == 1
    assert "SR without HR (1): lonely.png" in err
    assert "HR without SR (1): waiting.png" in err
    assert "is 16 x 16 but" in err
    assert "PSNR" in out


def test_references_without_counterpart_are_no_failure(folders: Path) -> None:
    (folders / "sr" / "b_x4.png").unlink()
    code, _, err = run(folders / "sr", "--hr", folders / "hr", "--suffix", "_x4")
    assert code == 0
    assert "HR without SR (1): b.png" in err


def test_without_reference(folders: Path) -> None:
    code, out, _ = run(folders / "sr")
    assert code == 0
    assert "grid" in out
    assert "PSNR" not in out


def test_mistakes_of_usage(folders: Path) -> None:
    with pytest.raises(UserError, match="give --hr"):
        run(folders / "sr", "--metrics", "psnr")
    with pytest.raises(UserError, match="does not exist"):
        run(folders / "sr", "--json", folders / "absent" / "scores.json")
    assert run(folders / "sr", "--unknown")[0] == 2

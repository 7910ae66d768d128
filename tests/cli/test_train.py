"""The command: checks, dry run, a whole small run, and its resumption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from onestepsr.cli import train as command
from onestepsr.core.errors import UserError
from onestepsr.train.checkpoint import Checkpoints


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8))
        coarse.resize((96, 96), Image.Resampling.BICUBIC).save(photos / f"{number}.png")
    values = {
        "method": "autoencoder",
        "out": str(tmp_path / "run"),
        "data": {"paths": [str(photos)], "crop": 32, "hr_scale": [1.0, 1.0]},
        "validation": {"every": 2, "images": 1, "rows": 1},
        "train": {
            "steps": 3,
            "batch_size": 2,
            "device": "cpu",
            "log_every": 1,
            "threads": 1,
            "optimizer": {"lr": 1e-3},
        },
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def invoke(*arguments: str) -> str:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    command.register(app)
    result = CliRunner().invoke(app, ["train", *arguments], catch_exceptions=False, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_dry_run_shows_everything_and_writes_nothing(recipe: str, tmp_path: Path) -> None:
    shown = invoke("autoencoder", "train.steps=7", "--recipe", recipe, "--dry-run")
    assert "autoencoder" in shown
    assert "photos: 2 in " in shown
    assert "crops of 32 x 32, without low-resolution versions" in shown
    assert "batch: 2 = 1 processes x 1 micro-batches x 2" in shown
    assert "memory per device: 0.0" in shown
    resolved = yaml.safe_load(shown[shown.index("method:") :])
    assert resolved["train"]["steps"] == 7
    assert resolved["train"]["optimizer"]["betas"] == [0.9, 0.999], "defaults are spelt out"
    assert not (tmp_path / "run").exists()


def test_a_run_from_start_to_model_and_on(recipe: str, tmp_path: Path) -> None:
    invoke("autoencoder", "--recipe", recipe)
    out = tmp_path / "run"
    with safe_open(out / "model.safetensors", "pt") as model:
        assert model.metadata()["architecture"] == "tiny-autoencoder"
        assert model.metadata()["step"] == "3"
    assert (out / "best.safetensors").is_file()
    assert sorted(path.name for path in (out / "previews").iterdir()) == ["step_000002.png", "step_000003.png"]
    assert yaml.safe_load((out / "config.yaml").read_text())["train"]["steps"] == 3

    with pytest.raises(UserError, match=r"exists already; add --resume"):
        invoke("autoencoder", "--recipe", recipe)
    with pytest.raises(UserError, match=r"train\.seed"):
        invoke("autoencoder", "train.seed=5", "--recipe", recipe, "--resume")

    invoke("autoencoder", "train.steps=5", "--recipe", recipe, "--resume")
    latest = Checkpoints(out / "checkpoints").latest()
    assert latest is not None
    assert latest.step == 5
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert not list(out.rglob("*writing*")), "nothing half-written stays behind"


@pytest.mark.parametrize(("best", "kept"), [("ssim_y", True), ("null", False)])
def test_the_best_model_is_chosen_by_the_score_that_is_named(
    recipe: str, tmp_path: Path, best: str, kept: bool
) -> None:
    invoke("autoencoder", "data.crop=64", f"validation.best={best}", "train.steps=1", "--recipe", recipe)
    assert (tmp_path / "run" / "best.safetensors").is_file() == kept
    latest = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert latest is not None
    assert set(latest.record["memory"]) == ({f"best_{best}"} if kept else set())


def test_resume_without_a_run_starts_one(recipe: str, tmp_path: Path) -> None:
    invoke("autoencoder", "train.steps=1", "--recipe", recipe, "--resume", "--out", str(tmp_path / "2024"))
    assert (tmp_path / "2024" / "model.safetensors").is_file()


def test_resuming_with_other_photos_is_said(recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    invoke("autoencoder", "train.steps=1", "--recipe", recipe)
    invoke("autoencoder", "train.steps=2", "--recipe", recipe, "--resume")
    assert "training photos were added" not in caplog.text
    shutil.copy(tmp_path / "photos/0.png", tmp_path / "photos/another.png")
    invoke("autoencoder", "train.steps=3", "--recipe", recipe, "--resume")
    assert caplog.text.count("training photos were added, removed or changed since ") == 1


def test_whole_images_of_any_size_are_shown(recipe: str, tmp_path: Path) -> None:
    # 90 is no multiple of the autoencoder's factor.
    for name, side in (("hr", 90), ("lr", 45)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (side, side), (90, 120, 60)).save(tmp_path / name / "a.png")
    pairs = {
        "kind": "pairs",
        "paths": [str(tmp_path / "hr")],
        "lr_paths": [str(tmp_path / "lr")],
        "crop": 0,
        "scale": 2,
    }
    invoke("autoencoder", f"validation.data={json.dumps(pairs)}", "train.steps=1", "--recipe", recipe)
    assert (tmp_path / "run" / "previews" / "step_000001.png").is_file()


def test_processes_that_do_not_find_each_other_train_nothing(
    recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # and nothing that a launcher says besides
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but 1 would train together"):
        invoke("autoencoder", "--recipe", recipe)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_what_is_missing_is_said() -> None:
    with pytest.raises(UserError, match="METHOD and --recipe"):
        invoke("autoencoder")

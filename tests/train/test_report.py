from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from toy_training import ToyImages, toy_config, toy_method

from onestepsr.core.errors import UserError
from onestepsr.train.recipes import PreviewConfig
from onestepsr.train.report import (
    PAPER,
    TITLE_HEIGHT,
    JsonLines,
    Reporter,
    Validator,
    cut,
    draw_grid,
    is_better,
    perceptual_distance,
)
from onestepsr.train.trainer import Hooks, StepRecord, Trainer


def record(step: int, loss: float) -> StepRecord:
    return StepRecord(
        step=step,
        seconds=float(step),
        losses={"generator.mse": loss},
        gradient_norms={"generator": 2.0},
        learning_rates={"generator": 1e-3},
        images=4,
        peak_memory={"peak_memory_mb": 12.5},
    )


def test_log_lines_after_the_resumed_step_are_forgotten(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "log.jsonl")
    lines.forget_after(0)
    for step in (10, 20, 30):
        lines.append({"step": step})
    with lines.path.open("a") as file:
        file.write('{"step": 1')  # cut off in the middle of a line
    lines.forget_after(20)
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [10, 20]


def test_losses_are_averaged_between_log_lines(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=False)
    with Reporter(tmp_path, toy_config(steps=5, log_every=2), 0, console) as reporter:
        for step in range(1, 6):
            time.sleep(0.01)
            reporter.on_step(record(step, loss=float(step)))
        reporter.on_validation(5, {"psnr_y": 30.0}, None)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [2, 4, 5, 5]
    assert [line["losses"]["generator.mse"] for line in logged[:3]] == [1.5, 3.5, 5.0]
    assert 0 < logged[0]["images_per_second"] <= 400
    assert logged[0]["peak_memory_mb"] == 12.5
    assert logged[3] == {"kind": "validation", "step": 5, "scores": {"psnr_y": 30.0}}
    assert text.getvalue().count("\n") == 4, "one line per log record, no bar, when nobody watches"


def test_grid_has_a_row_per_image_and_a_column_per_kind() -> None:
    rows = [{"LR": torch.zeros(3, 16, 16), "HR": torch.ones(3, 64, 96)} for _ in range(2)]
    pixels = np.asarray(draw_grid(rows))
    assert pixels.shape == (TITLE_HEIGHT + 2 * 68, 4 + 2 * 100, 3)
    assert pixels[TITLE_HEIGHT, 104:200].min() == 255
    assert pixels[TITLE_HEIGHT, 4:100].max() == 0
    assert (pixels[:TITLE_HEIGHT] != PAPER[0]).any(), "titles are drawn"


@pytest.mark.parametrize("images", [1, 3])
def test_validation_uses_averages_and_changes_nothing(tmp_path: Path, images: int) -> None:
    method = toy_method(dropout=0.5)
    trainer = Trainer(method, ToyImages(), toy_config(steps=3), tmp_path, hooks=Hooks())
    trainer.run()
    before = {name: value.clone() for name, value in method.networks["generator"].state_dict().items()}
    assert method.preview is not None
    validator = Validator(method.preview, ToyImages(1), PreviewConfig(images=images, rows=2), tmp_path)
    found = [validator.run(3, trainer.networks, torch.device("cpu")) for _ in range(2)]
    assert found[0].scores == found[1].scores, "dropout is off"
    assert 0 < found[0].scores["psnr_y"] < 60
    after = method.networks["generator"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert method.networks["generator"].training
    average = trainer.networks.states["generator"].average
    assert average is not None
    average.values["head.bias"] += 1.0
    assert validator.run(3, trainer.networks, torch.device("cpu")).scores != found[0].scores
    with Image.open(tmp_path / "previews" / "step_000003.png") as image:
        assert image.height == TITLE_HEIGHT + min(images, 2) * 12


def test_whole_images_are_cut_to_what_networks_take() -> None:
    sample = {"hr": torch.rand(3, 50, 37), "lr": torch.rand(3, 25, 18), "prompt": torch.rand(7, 2)}
    kept = cut(sample, 16)
    assert torch.equal(kept["hr"], sample["hr"][:, :48, :32])
    assert torch.equal(kept["lr"], sample["lr"][:, :24, :16])
    assert kept["prompt"] is sample["prompt"]
    assert cut({"hr": sample["hr"]}, 1)["hr"].shape == (3, 50, 37)
    with pytest.raises(UserError, match="37 x 50, expected at least 64 a side"):
        cut(sample, 64)


def test_better_means_more_for_similarities_and_less_for_distances() -> None:
    assert is_better("psnr_y", 20.0, None)
    assert is_better("psnr_y", 21.0, 20.0)
    assert not is_better("ssim_y", 0.5, 0.5)
    assert is_better("dists", 0.1, 0.2)
    assert not is_better("lpips", 0.3, 0.2)


def test_a_perceptual_score_needs_its_published_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONESTEPSR_OFFLINE", "1")
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="vgg16"):
        perceptual_distance(PreviewConfig(best="dists"))
    assert perceptual_distance(PreviewConfig(best="ssim_y")) is None

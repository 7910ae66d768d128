"""What ``train --dry-run`` prints of every recipe: batch, rate and weights, for those of a paper the published ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from onestepsr.cli.main import app
from onestepsr.train.recipes import load_run, read_recipe, recipe_names
from onestepsr.train.run import config_text

D3SR = (16, 5e-5, {"mse_weight": 1.0, "perceptual_weight": 1.0, "adversarial_weight": 0.5})
OSEDIFF = (16, 5e-5, {"mse_weight": 1.0, "perceptual_weight": 2.0})
PUBLISHED = {
    # batch, learning rate, weights; for D3SR those that the paper leaves open are ours (docs/methods.md)
    **{name: D3SR for name in recipe_names() if name.startswith("d3sr-sd21-")},
    "d3sr-sd21-table5-mse": (16, 5e-5, {"perceptual_weight": 0.0, "adversarial_weight": 0.5}),
    "d3sr-sd21-table6-none": (16, 5e-5, {"perceptual_weight": 1.0, "adversarial_weight": 0.0}),
    "d3sr-sd21-table6-cnn": (16, 5e-5, {"perceptual_weight": 1.0, "adversarial_weight": 0.0}),
    "osediff-sd21": OSEDIFF,
    "osediff-sd21-24gb": OSEDIFF,
    "osediff-face": OSEDIFF,
    "resshift-realsr-v1": (64, 5e-5, {"mse_weight": 1.0, "perceptual_weight": 0.0}),
    "resshift-realsr-v2": (64, 5e-5, {"mse_weight": 1.0, "perceptual_weight": 0.0}),
    "resshift-realsr-v3": (96, 5e-5, {"mse_weight": 1.0, "perceptual_weight": 1.0}),
    "resshift-bicubic": (96, 5e-5, {"mse_weight": 1.0, "perceptual_weight": 1.0}),
    "resshift-face": (56, 5e-5, {"mse_weight": 1.0, "perceptual_weight": 10.0}),
    "sinsr-realsr": (64, 5e-5, {"distillation_weight": 1.0, "inverse_weight": 1.0, "ground_truth_weight": 1.0}),
    "tadsr-realsr": (8, 5e-5, {"distillation_weight": 1.0, "score_weight": 1.0, "adversarial_weight": 0.02}),
    "tadsr-face": (7, 5e-5, {"distillation_weight": 1.0, "score_weight": 0.1, "adversarial_weight": 0.2}),
    "tadsr-sd2": (8, 2e-5, {"distillation_weight": 0.2, "score_weight": 1.0, "adversarial_weight": 0.2}),
}
OWN = {"tadsr-sd21", "sinsr-face"}
"""Recipes at the published sizes that repeat no run of a paper."""


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_shows_batch_rate_and_weights(recipe: str) -> None:
    shown = yaml.safe_load(config_text(load_run(read_recipe(recipe)["method"], recipe)))
    assert shown["train"]["batch_size"] > 0
    assert shown["train"]["optimizer"]["lr"] > 0
    if recipe not in PUBLISHED:
        assert "-tiny" in recipe or recipe in OWN, "a recipe of a paper belongs into the table"
        return
    batch, rate, weights = PUBLISHED[recipe]
    assert shown["train"]["batch_size"] == batch
    assert shown["train"]["optimizer"]["lr"] == rate
    assert {optimizer["lr"] for optimizer in shown["train"]["optimizers"].values()} <= {rate}
    assert {name: shown["config"][name] for name in weights} == weights


@pytest.mark.slow
def test_a_dry_run_of_seesr_needs_no_weights(tmp_path: Path) -> None:
    folders = []
    for name, side in (("hr", 512), ("lr", 128), ("taught", 512)):
        (tmp_path / name).mkdir()
        Image.effect_noise((side, side), 60).convert("RGB").save(tmp_path / name / "a.png")
        folders.append(f"data.{'' if name == 'hr' else name + '_'}paths=[{tmp_path / name}]")
    settings = [*folders, "config.teacher=random:seesr", "config.seesr.tagger=random"]
    arguments = ["train", "tadsr", "--recipe", "tadsr-sd2", *settings, "--dry-run", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert re.search(r"student\W+386,739,280\W+1,229,052,484", result.output), "the image branch, and the rest"
    assert re.search(r"75,406,400", result.output), "the published discriminator"
    assert "batch: 8 = 1 processes x 1 micro-batches x 8" in result.output
    assert not (tmp_path / "run").exists()

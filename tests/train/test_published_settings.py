"""What ``train --dry-run`` prints of a paper's recipe: batch, rates and weights of the table in docs/methods.md."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from onestepsr.cli.main import app
from onestepsr.train.recipes import load_run, read_recipe, recipe_names
from onestepsr.train.run import config_text

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
OWN = {"tadsr-sd21", "sinsr-face"}
"""Recipes at the published sizes that repeat no run of a paper."""
STAND_INS = {
    "d3sr": {"config.backbone": "random:sd21-base", "config.perceptual.features": "oriented"},
    "osediff": {"config.backbone": "random:sd21-base", "config.perceptual.features": "oriented"},
    "resshift": {"config.model": "random:resshift-realsr", "config.perceptual.features": "oriented"},
    "sinsr": {"config.teacher": "random:resshift-realsr"},
    "tadsr": {"config.teacher": "random:resshift-realsr"},
    "resshift-face": {"config.model": "random:resshift-face"},
    "tadsr-face": {"config.teacher": "random:resshift-face"},
    "tadsr-sd2": {"config.teacher": "random:seesr", "config.seesr.tagger": "random"},
}
"""By method and recipe, random weights in the place of those that someone has to fetch."""


class Row(NamedTuple):
    """The published settings of a recipe."""

    steps: int
    batch: int
    rate: float
    weights: dict[str, float]


def rows() -> dict[str, Row]:
    """By recipe; of the rows that fit one, the last."""
    section = DOCS.read_text(encoding="utf-8").partition("\n## Settings of the recipes\n")[2].partition("\n## ")[0]
    found: dict[str, Row] = {}
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        names, steps, batch, rate, weights = (cell.strip() for cell in line.strip("|").split("|"))
        values = {name: float(value) for name, value in re.findall(r"`([\w.]+)` ([\d.]+)", weights)}
        row = Row(int(steps.replace(",", "")), int(batch), float(rate), values)
        assert row.weights
        for pattern in re.findall(r"`([^`]+)`", names):
            fitting = [name for name in recipe_names() if fnmatch(name, pattern)]
            assert fitting, pattern
            found |= dict.fromkeys(fitting, row)
    return found


ROWS = rows()


def check(shown: dict[str, Any], row: Row) -> None:
    """Compare the configuration, as it is printed, with the table."""
    train = shown["train"]
    assert (train["steps"], train["batch_size"], train["optimizer"]["lr"]) == (row.steps, row.batch, row.rate)
    assert {optimizer["lr"] for optimizer in train["optimizers"].values()} <= {row.rate}
    for name, value in row.weights.items():
        found: Any = shown["config"]
        for part in name.split("."):
            found = found[part]
        assert found == value, name


def test_every_recipe_of_a_paper_has_its_row() -> None:
    assert set(ROWS) == {name for name in recipe_names() if "-tiny" not in name} - OWN


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_has_batch_rate_and_weights(recipe: str) -> None:
    shown = yaml.safe_load(config_text(load_run(read_recipe(recipe)["method"], recipe)))
    assert shown["train"]["batch_size"] > 0
    assert shown["train"]["optimizer"]["lr"] > 0
    if recipe in ROWS:
        check(shown, ROWS[recipe])


def dry_run(recipe: str, folder: Path, *data: str) -> str:
    """All that the command prints, on one photo."""
    method = read_recipe(recipe)["method"]
    values = STAND_INS[method] | STAND_INS.get(recipe, {})
    if "backbone: sdxl-base" in config_text(load_run(method, recipe)):
        values |= {"config.discriminator.backbone": "random:sdxl-base"}
    Image.effect_noise((512, 512), 60).convert("RGB").save(folder / "a.png")
    settings = [*(f"{key}={value}" for key, value in values.items()), *(data or [f"data.paths=[{folder}]"])]
    command = ["train", method, "--recipe", recipe, *settings, "--dry-run", "--out", str(folder / "run")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert not (folder / "run").exists()
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in ROWS if name != "tadsr-sd2"])
def test_a_dry_run_prints_the_published_settings(recipe: str, tmp_path: Path) -> None:
    printed = dry_run(recipe, tmp_path)
    assert f"batch: {ROWS[recipe].batch} = 1 processes x " in printed
    assert f"starts at step 0 of {ROWS[recipe].steps:,}" in printed
    check(yaml.safe_load(printed[printed.index("\nmethod: ") :]), ROWS[recipe])


@pytest.mark.slow
def test_a_dry_run_of_seesr_needs_no_weights(tmp_path: Path) -> None:
    folders = []
    for name, side in (("hr", 512), ("lr", 128), ("taught", 512)):
        (tmp_path / name).mkdir()
        Image.effect_noise((side, side), 60).convert("RGB").save(tmp_path / name / "a.png")
        folders.append(f"data.{'' if name == 'hr' else name + '_'}paths=[{tmp_path / name}]")
    printed = dry_run("tadsr-sd2", tmp_path, *folders)
    assert re.search(r"student\W+386,739,280\W+1,229,052,484", printed), "the image branch, and the rest"
    assert re.search(r"75,406,400", printed), "the published discriminator"
    assert "batch: 8 = 1 processes x 1 micro-batches x 8" in printed
    check(yaml.safe_load(printed[printed.index("\nmethod: ") :]), ROWS["tadsr-sd2"])

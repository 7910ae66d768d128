from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from onestepsr.config import to_mapping
from onestepsr.errors import UserError
from onestepsr.train.recipes import check_resumable, load_run, read_recipe
from onestepsr.train.session import config_text

RECIPE = {
    "method": "autoencoder",
    "data": {"paths": ["photos"], "crop": 64},
    "train": {
        "steps": 10,
        "optimizer": {"lr": 5e-4, "betas": [0.5, 0.9]},
        "optimizers": {"autoencoder": {"weight_decay": 0}},
    },
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


def test_a_recipe_becomes_a_run(recipe: str) -> None:
    run = load_run("autoencoder", recipe, ["train.steps=20", "config.kl_weight=1e-3"])
    assert run.out == Path("runs/small")
    assert run.train.steps == 20
    assert run.config.kl_weight == 1e-3
    own = run.train.optimizer_of("autoencoder")
    assert (own.lr, own.betas, own.weight_decay) == (5e-4, (0.5, 0.9), 0.0), "unset fields come from the common one"
    assert run.train.optimizer_of("another").weight_decay == 0.01


def test_the_saved_configuration_is_a_recipe_for_the_same_run(recipe: str, tmp_path: Path) -> None:
    run = load_run("autoencoder", recipe)
    saved = tmp_path / "config.yaml"
    saved.write_text(config_text(run))
    assert load_run("autoencoder", str(saved)) == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=3", r"unknown setting 'train\.stpes': did you mean 'steps'"),
        ("config.kl_wieght=3", r"unknown setting 'config\.kl_wieght': did you mean 'kl_weight'"),
        ("trian.steps=3", r"unknown setting 'trian': did you mean 'train'"),
        ("train.steps=many", r"train\.steps: expected int, got 'many'"),
        ("train.accumulation=3", "batch_size 16 is no multiple of accumulation 3"),
        ("train.mixed_precision=fp8", "'fp8' is not one of"),
        ("validation.every=0", "every must be at least 1"),
        ("train.optimizers.autoencoder.rate=1", r"unknown setting 'train\.optimizers\.autoencoder\.rate'"),
    ],
)
def test_mistakes_are_named(recipe: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_run("autoencoder", recipe, [override])


def test_method_and_recipe_must_agree(recipe: str) -> None:
    with pytest.raises(UserError, match="is for method 'autoencoder', not 'd3sr'"):
        load_run("d3sr", recipe)


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(UserError, match="recipe 'no-such-recipe' is neither a file nor a packaged recipe"):
        read_recipe("no-such-recipe")


def test_resuming_allows_length_and_logging_but_nothing_else(recipe: str) -> None:
    saved = to_mapping(load_run("autoencoder", recipe))
    free = ["train.steps=99", "train.log_every=1", "out=elsewhere", "validation.every=7", "train.num_workers=2"]
    check_resumable(saved, load_run("autoencoder", recipe, free))
    for override, name in [
        ("train.seed=1", r"train\.seed: .* 0, now it is 1"),
        ("config.kl_weight=0.5", r"config\.kl_weight"),
        ("train.optimizer.lr=1", r"train\.optimizer\.lr"),
        ("data.crop=128", r"data\.crop: .* 64, now it is 128"),
    ]:
        with pytest.raises(UserError, match=name):
            check_resumable(saved, load_run("autoencoder", recipe, [override]))

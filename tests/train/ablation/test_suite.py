"""What becomes of a suite file: settings in their order, mistakes in one line, packaged suites that hold together."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError
from onestepsr.train.ablation import Run, Suite, load_suite, plan_runs, suite_names
from onestepsr.train.recipes import check_resumable, load_run


def held_out(suite: Path) -> str:
    return f"validation={suite.parent / 'held-out'}"


def plan(suite: Path, *settings: str, seeds: tuple[int, ...] = (0,)) -> dict[str, Run]:
    loaded = load_suite(str(suite), [held_out(suite), *settings])
    return {run.name: run for run in plan_runs(loaded, loaded.chosen(), seeds, suite.parent / "out")}


def edit(suite: Path, **changes: object) -> None:
    suite.write_text(yaml.safe_dump({**yaml.safe_load(suite.read_text()), **changes}, sort_keys=False))


def test_settings_apply_in_their_order(micro_suite: Path) -> None:
    runs = plan(micro_suite, "config.perceptual_weight=3", "train.batch_size=2", seeds=(4, 5))
    assert list(runs) == ["mse/seed-4", "dists/seed-4", "mse/seed-5", "dists/seed-5"], "whole seeds first"
    mse, dists = runs["mse/seed-5"].config, runs["dists/seed-5"].config
    assert mse.train.steps == 2, "the suite's, not the recipe's 9"
    assert (mse.train.batch_size, mse.train.seed) == (2, 5)
    assert (mse.config.perceptual_weight, dists.config.perceptual_weight) == (0, 3), "the variant has the last word"
    assert dists.config.perceptual.distance == "dists"
    assert mse.config.adversarial_weight == dists.config.adversarial_weight == 0.1
    assert mse.out == micro_suite.parent / "out" / "mse" / "seed-5"
    assert mse.validation.data is not None
    assert mse.validation.data.paths == (micro_suite.parent / "held-out",)


def test_another_recipe_takes_the_budget_and_not_the_configuration(micro_suite: Path) -> None:
    other = {"method": "autoencoder", "data": {"paths": ["x"], "crop": 32}, "train": {"steps": 5, "batch_size": 1}}
    (micro_suite.parent / "other.yaml").write_text(yaml.safe_dump(other))
    variants = {
        "own": {"title": "a"},
        "like": {"title": "a", "recipe": str(micro_suite.parent / "micro.yaml")},
        "recipe": {"title": "b", "recipe": str(micro_suite.parent / "other.yaml")},
        "method": {"title": "c", "method": "autoencoder", "overrides": {"config.kl_weight": 0.5}},
    }
    edit(micro_suite, variants=variants)
    runs = plan(micro_suite, "config.mse_weight=2")
    assert runs["own/seed-0"].config.config.mse_weight == runs["like/seed-0"].config.config.mse_weight == 2
    assert load_suite(str(micro_suite), [held_out(micro_suite)]).config.variants["method"].differences == [
        "method=autoencoder",
        "config.kl_weight=0.5",
    ]
    recipe, method = runs["recipe/seed-0"].config, runs["method/seed-0"].config
    assert (recipe.method, recipe.train.steps, recipe.data.paths) == ("autoencoder", 2, (Path("x"),))
    assert (method.method, method.train.steps, method.config.kl_weight) == ("autoencoder", 2, 0.5)
    assert method.data == runs["own/seed-0"].config.data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.stpes=3"], r"variant 'mse': unknown setting 'train\.stpes': did you mean 'steps'"),
        (["config.kind=3"], r"variant 'mse': unknown setting 'config\.kind'"),
        (["evaluation.imags=3"], r"unknown setting 'evaluation\.imags': did you mean 'images'"),
        (["evaluation.images=0"], "evaluation: images must be at least 1"),
        (["evaluation.data.crop=33"], "crop is 33: expected a multiple of 4"),
        (["train.seed=3"], r"train\.seed: set by --seeds"),
        (["out=x"], "out: set by --out"),
        (["train.steps"], "expected key=value"),
    ],
)
def test_mistakes_on_the_command_line_are_named(micro_suite: Path, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(micro_suite, *settings)


def test_a_mistake_in_the_last_variant_is_found_before_anything_starts(micro_suite: Path) -> None:
    edit(micro_suite, variants={"a": {"title": "a"}, "b": {"title": "b", "overrides": ["config.mse_wieght=1"]}})
    with pytest.raises(
        UserError, match=r"variant 'b': unknown setting 'config\.mse_wieght': did you mean 'mse_weight'"
    ):
        plan(micro_suite)


def test_a_setting_that_every_variant_overwrites_is_refused(micro_suite: Path) -> None:
    edit(micro_suite, variants={name: {"title": name, "overrides": {"config": {"timestep": 5}}} for name in "ab"})
    with pytest.raises(UserError, match=r"config\.timestep: every variant of the suite sets it"):
        plan(micro_suite, "config.timestep=7")


def test_budgets_have_to_be_equal(micro_suite: Path) -> None:
    edit(micro_suite, variants={"a": {"title": "a"}, "b": {"title": "b", "overrides": ["train.steps=3"]}})
    with pytest.raises(UserError, match=r"train\.steps: 3 in variant 'b' but 2 in 'a'"):
        plan(micro_suite)


def test_at_equal_time_the_numbers_of_steps_may_differ_and_batches_may_not(micro_suite: Path) -> None:
    variants = {"a": {"title": "a"}, "b": {"title": "b", "overrides": ["train.steps=3"]}}
    edit(micro_suite, budget="time", variants=variants)
    assert {run.config.train.steps for run in plan(micro_suite).values()} == {2, 3}
    variants["b"]["overrides"] = ["train.batch_size=7"]
    edit(micro_suite, variants=variants)
    with pytest.raises(UserError, match=r"train\.batch_size: 7 in variant 'b'"):
        plan(micro_suite)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "variants is empty"),
        ({"variants": {"hr": {"title": "x"}}}, r"variants\.hr: expected a name"),
        ({"variants": {"a/b": {"title": "x"}}}, r"variants\.a/b: expected a name"),
        ({"variants": {"a": {"title": "x", "model": "bicubic"}}}, "expected at least one that is trained"),
        ({"variants": {"a": {"title": "x", "model": "y", "method": "z"}}}, "'x' has an existing model"),
        ({"variants": {"a": {"title": "x", "steps": 3}}}, "'x' has steps or sampler and no model"),
        ({"variants": {"a": {"titel": "x"}}}, r"unknown setting 'variants\.a\.titel': did you mean 'title'"),
        ({"published": {"columns": ["a"], "rows": {"x": [1, 2]}}}, "row 'x' has 2 values for 1 columns"),
        ({"recipe": "d3sr-tinny"}, r"recipe 'd3sr-tinny' is neither .* did you mean 'd3sr-tiny'"),
    ],
)
def test_mistakes_in_the_file_are_named(micro_suite: Path, changes: dict[str, object], message: str) -> None:
    edit(micro_suite, **changes)
    with pytest.raises(UserError, match=message):
        plan(micro_suite)


def test_names_are_suggested_and_held_out_photos_asked_for(micro_suite: Path) -> None:
    with pytest.raises(UserError, match=r"suite 'd3sr-tiny-loses' is neither .* did you mean 'd3sr-tiny-losses'"):
        load_suite("d3sr-tiny-loses")
    with pytest.raises(UserError, match="has no variant 'dist': did you mean 'dists'"):
        load_suite(str(micro_suite), [held_out(micro_suite)]).chosen(["dist"])
    with pytest.raises(UserError, match="add validation=FOLDER"):
        load_suite(str(micro_suite))


def packaged(name: str) -> Suite:
    photos = [] if name == "d3sr-sd21-table4" else ["data.paths=[photos]"]  # its variants differ in their photos
    return load_suite(name, [*photos, "validation=[one, other]"])


@pytest.mark.parametrize("name", suite_names())
def test_packaged_suites_hold_together(name: str) -> None:
    suite = packaged(name)
    assert suite.config.evaluation.data.paths == (Path("one"), Path("other"))
    runs = plan_runs(suite, suite.chosen(), [0], Path("out"))
    settings = [to_mapping(run.config) | {"out": ""} for run in runs]
    assert len(runs) >= 2
    assert all(a != b for i, a in enumerate(settings) for b in settings[:i]), "two variants are the same run"


@pytest.mark.parametrize("name", ["d3sr-sd21-table5", "d3sr-sd21-table6"])
def test_suites_and_recipes_of_the_same_row_agree(name: str) -> None:
    rows = {"noise_aware": "nad-sd21", "noise_aware_sdxl": "nad-sdxl"}
    suite = packaged(name)
    for run in plan_runs(suite, suite.chosen(), [0], Path("out")):
        recipe = f"{name}-{rows.get(run.variant, run.variant.replace('_', '-'))}"
        alone = load_run("d3sr", recipe, ["data.paths=[photos]", "train.seed=0"])
        check_resumable(to_mapping(alone), run.config)
        assert alone.train.steps == run.config.train.steps


def test_the_two_small_suites_share_a_run() -> None:
    planned = {}
    for name in ("d3sr-tiny-losses", "d3sr-tiny-discriminators"):
        suite = packaged(name)
        for run in plan_runs(suite, suite.chosen(), [0], Path("out")):
            planned[run.variant] = to_mapping(run.config) | {"out": ""}
    assert planned["ea_dists"] == planned["noise_aware"]

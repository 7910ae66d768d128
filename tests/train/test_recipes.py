from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError
from onestepsr.methods.base import get_method
from onestepsr.train.memory_estimate import estimate
from onestepsr.train.recipes import check_resumable, load_run, read_recipe, recipe_names
from onestepsr.train.run import config_text

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
        ("config.kl_weight=-1", "config: kl_weight must not be negative, got -1"),
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


def write(path: Path, values: dict[str, object]) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_a_recipe_extends_another(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    write(tmp_path / "middle.yaml", {"extends": "small.yaml", "out": "runs/middle", "train": {"steps": 11}})
    last = write(
        tmp_path / "more" / "last.yaml",
        {"extends": "../middle.yaml", "train": {"optimizer": {"lr": 1.0}, "mixed_precision": False}},
    )
    base, run = load_run("autoencoder", recipe), load_run("autoencoder", last, ["train.seed=3"])
    assert run.out == Path("runs/last"), "an output folder is not inherited"
    assert (run.train.steps, run.train.seed, run.train.mixed_precision) == (11, 3, "no")
    assert (run.train.optimizer.lr, run.train.optimizer.betas) == (1.0, (0.5, 0.9)), "mappings are merged"
    assert run.train.optimizer_of("autoencoder").lr == 1.0, "the common optimiser is completed after merging"
    assert run.data == base.data


def test_a_packaged_recipe_can_be_extended(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", {"extends": "autoencoder-tiny", "data": {"crop": 64}})
    base, run = load_run("autoencoder", "autoencoder-tiny"), load_run("autoencoder", mine)
    assert (base.data.crop, run.data.crop) == (128, 64)
    assert run.train == base.train


def test_wrong_ways_to_extend_are_named(tmp_path: Path) -> None:
    circle = write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    cases = {
        circle: r"a\.yaml: extends itself \(a\.yaml -> b\.yaml -> a\.yaml\)",
        write(tmp_path / "c.yaml", {"extends": "autoencoder-tyni"}): "did you mean 'autoencoder-tiny'",
        write(tmp_path / "d.yaml", {"extends": ["autoencoder-tiny"]}): "extends: expected the name or path of one",
        write(tmp_path / "e.yaml", {"extends": "autoencoder-tiny", "trian": {}}): "'trian': did you mean 'train'",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            load_run("autoencoder", path)


PACKAGED_METHODS = {name: str(read_recipe(name)["method"]) for name in recipe_names()}
PAPER = {
    "config.backbone": "sd21-base",
    "config.tuning": "lora",
    "config.lora.rank": 16,
    "config.lora.alpha": 16.0,
    "config.extras.train_decoder": False,
    "config.discriminator.tuning": "lora",
    "config.discriminator.lora.rank": 16,
    "config.discriminator.lora.alpha": 16.0,
    "config.perceptual.features": "vgg16",
    "data.crop": 512,
    "data.scale": 4,
    "data.degradation": "real_esrgan",
    "train.steps": 100_000,
    "train.batch_size": 16,
    "train.optimizer.kind": "adamw",
    "train.optimizer.lr": 5e-5,
    "train.schedule.kind": "constant",
}
"""What the paper fixes (section 4.1), and every recipe of Stable Diffusion's size keeps."""
ROWS: dict[str, dict[str, object]] = {
    "d3sr-sd21-sd21": {},
    "d3sr-sd21-sdxl": {"config.discriminator.backbone": "sdxl-base", "train.accumulation": 2},
    "d3sr-sd21-24gb": {
        "config.discriminator.backbone": "sdxl-base",
        "config.gradient_checkpointing": True,
        "train.accumulation": 8,
    },
    "d3sr-sd21-table4-own": {"data.paths": ["data/own"]},
    "d3sr-sd21-table4-lsdir-ffhq": {"data.paths": ["data/LSDIR", "data/FFHQ"], "data.first": [0, 10000]},
    "d3sr-sd21-table5-mse": {"config.perceptual_weight": 0.0},
    "d3sr-sd21-table5-lpips": {"config.perceptual.distance": "lpips"},
    "d3sr-sd21-table5-ea-lpips": {"config.perceptual.distance": "ea_lpips"},
    "d3sr-sd21-table6-cnn": {
        "config.adversarial_weight": 0.0,
        "config.extras.critic.weight": 0.5,
        "config.extras.critic.widths": [96, 192, 256],
    },
    "d3sr-sd21-table5-dists": {"config.perceptual.distance": "dists"},
    "d3sr-sd21-table5-ea-dists": {},
    "d3sr-sd21-table6-none": {"config.adversarial_weight": 0.0},
    "d3sr-sd21-table6-vanilla": {"config.discriminator.kind": "vanilla"},
    "d3sr-sd21-table6-diffusion-gan": {"config.discriminator.kind": "diffusion_gan"},
    "d3sr-sd21-table6-nad-sd21": {},
    "d3sr-sd21-table6-nad-sdxl": {"config.discriminator.backbone": "sdxl-base", "train.accumulation": 2},
}
"""What each of them changes of the first: a row of a table differs in what the table compares, and in nothing else but
the number of micro-batches, which changes no result."""


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_is_valid(name: str) -> None:
    run = load_run(PACKAGED_METHODS[name], name)
    assert run.out == Path("runs") / name
    run.train.micro_batch(1)


def flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in values.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return result


def test_rows_of_the_tables_differ_in_what_is_compared() -> None:
    assert set(ROWS) == {name for name in recipe_names() if name.startswith("d3sr-sd21-")}
    base = flat(to_mapping(load_run("d3sr", "d3sr-sd21-sd21")))
    assert {name: base[name] for name in PAPER} == PAPER
    for name, changes in ROWS.items():
        values = flat(to_mapping(load_run("d3sr", name)))
        assert {key: value for key, value in values.items() if value != base[key] and key != "out"} == changes, name
    assert all(load_run("d3sr", "d3sr-sd21-sdxl").train.micro_batch(processes) for processes in (1, 2, 4, 8))


def test_a_run_of_an_older_version_is_continued_where_its_settings_are_known(recipe: str) -> None:
    run = load_run("autoencoder", recipe)
    saved = to_mapping(run)
    del saved["train"]["frozen_dtype"], saved["validation"]["best"]
    check_resumable(saved, run)
    saved["train"]["no_longer_there"] = 1
    with pytest.raises(UserError, match=r"settings unknown to this version: .*no_longer_there"):
        check_resumable(saved, run)


def test_micro_batches_may_follow_the_number_of_processes(recipe: str) -> None:
    saved = to_mapping(load_run("autoencoder", recipe))
    split = load_run("autoencoder", recipe, ["train.accumulation=4"])
    with pytest.raises(UserError, match=r"train\.accumulation: .* started with 1, now it is 4"):
        check_resumable(saved, split)
    check_resumable(saved, split, other_processes=True)


PUBLISHED_LOOP = {
    "data.crop": 256,
    "data.scale": 4,
    "data.degradation": "resshift",
    "train.seed": 123456,
    "train.optimizer.lr": 5e-5,
    "train.optimizer.weight_decay": 0.0,
    "train.schedule.kind": "constant",
    "train.schedule.warmup_steps": 5000,
    "train.gradient_clip": None,
    "train.ema_decay": 0.999,
    "train.batch_size": 64,
}
"""What ResShift's and SinSR's published configurations have in common."""
VERSION_3 = {
    "config.schedule.steps": 4,
    "config.schedule.min_noise": 0.2,
    "config.perceptual_weight": 1.0,
    "train.steps": 400_000,
    "train.batch_size": 96,
    "train.schedule.kind": "cosine",
    "train.schedule.final_ratio": 0.4,  # 2e-5
}
RESIDUAL: dict[str, dict[str, object]] = {
    "resshift-realsr-v1": {"train.steps": 300_000, "config.schedule.steps": 15, "config.perceptual_weight": 0.0},
    "resshift-realsr-v2": {"train.steps": 500_000, "config.schedule.min_noise": 0.04, "config.perceptual_weight": 0.0},
    "resshift-realsr-v3": VERSION_3,
    "resshift-bicubic": VERSION_3 | {"data.degradation": "bicubic"},
    "sinsr-realsr": {
        "train.steps": 30_000,
        "config.teacher_steps": None,
        "config.distillation_weight": 1.0,
        "config.inverse_weight": 1.0,
        "config.ground_truth_weight": 1.0,
    },
}
"""Where the recipes of published models differ from that."""


@pytest.mark.parametrize("name", RESIDUAL)
def test_recipes_of_published_residual_models_say_what_was_published(name: str) -> None:
    values = flat(to_mapping(load_run(PACKAGED_METHODS[name], name)))
    expected = PUBLISHED_LOOP | RESIDUAL[name]
    assert {key: values[key] for key in expected} == expected


@pytest.mark.filterwarnings("ignore:.*is a no-op")
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("resshift-realsr-v1", ["config.model=random:resshift-micro"]),
        ("resshift-realsr-v3", ["config.model=random:resshift-micro", "config.perceptual.features=oriented"]),
        ("sinsr-realsr", ["config.teacher=random:resshift-micro"]),
    ],
)
def test_memory_of_residual_recipes_is_known_before_any_weights(name: str, overrides: list[str]) -> None:
    run = load_run(PACKAGED_METHODS[name], name, overrides)
    with torch.device("meta"):
        method = get_method(run.method).build(run.config)
    found = estimate(method, run.train, {"hr": (3, 64, 64), "lr": (3, 16, 16)})
    assert found.micro_batch == run.train.batch_size // run.train.accumulation
    assert found.peak > found.held > 0

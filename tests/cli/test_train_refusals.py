"""What is wrong with a run is said in one line, with exit code 2, before anything long starts; nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from onestepsr.cli.main import main
from onestepsr.core.config import to_mapping
from onestepsr.methods.pretraining import AutoencoderConfig, build_autoencoder
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyConfig
from onestepsr.weights.files import save_model

SMALL = {"encoder_width": 8, "decoder_width": 8, "widths": (8, 16), "down_blocks": (1, 1), "up_blocks": (1, 1)}


def write_backbone(path: Path, **sizes: Any) -> str:
    config = TinyGeneratorConfig(model=TinyConfig(**SMALL, **sizes))
    state = tiny_generator(config).state_dict()
    save_model(path, architecture="tiny-latent-diffusion", config=to_mapping(config), state_dict=state)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, weights of several kinds, and a recipe that works."""
    path = tmp_path_factory.mktemp("refusals")
    (path / "photos").mkdir()
    (path / "empty").mkdir()
    Image.fromarray(np.full((96, 96, 3), 90, dtype=np.uint8)).save(path / "photos" / "a.png")
    (path / "quarters").mkdir()
    Image.fromarray(np.full((24, 24, 3), 90, dtype=np.uint8)).save(path / "quarters" / "a.png")
    write_backbone(path / "backbone.safetensors")
    write_backbone(path / "other-latent.safetensors", luma_channels=4)
    exported = build_autoencoder(AutoencoderConfig(model=TinyConfig(**SMALL))).export
    assert exported is not None
    found = exported(build_autoencoder(AutoencoderConfig(model=TinyConfig(**SMALL))).networks)
    save_model(
        path / "autoencoder.safetensors",
        architecture=found.architecture,
        config=found.config,
        state_dict=found.state_dict,
    )
    (path / "half.safetensors").write_bytes((path / "backbone.safetensors").read_bytes()[:1000])
    recipe = {
        "method": "d3sr",
        "config": {
            "backbone": str(path / "backbone.safetensors"),
            "tuning": "full",
            "discriminator": {"tuning": "full", "hidden": [8]},
        },
        "data": {"paths": [str(path / "photos")], "crop": 32},
        "train": {"steps": 1, "batch_size": 2, "device": "cpu", "threads": 1},
        "validation": {"images": 1, "rows": 1},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *changes: str) -> str:
    """The one line with which a run with ``changes`` ends."""
    out = folder / "never"
    with pytest.raises(SystemExit) as end:
        main(["train", "d3sr", *changes, "--recipe", str(folder / "recipe.yaml"), "--out", str(out)])
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.out == ""
    assert not out.exists(), "nothing is written"
    lines = said.err.splitlines()
    assert len(lines) == 1
    return lines[0]


CASES = {
    "an autoencoder as backbone": (
        ["config.backbone={folder}/autoencoder.safetensors"],
        "autoencoder.safetensors: holds a TinyAutoencoder, expected a latent-diffusion backbone",
    ),
    "an upscaler without network": (["config.backbone=bicubic"], "bicubic"),
    "a discriminator of other latents": (
        ["config.discriminator.backbone={folder}/other-latent.safetensors"],
        "takes latents of 10 channels, those of {folder}/backbone.safetensors have 20",
    ),
    "an autoencoder as discriminator": (["config.discriminator.backbone={folder}/autoencoder.safetensors"], "autoenc"),
    "weights that are not there": (["config.backbone={folder}/nothing.safetensors"], "nothing.safetensors"),
    "half a file": (["config.backbone={folder}/half.safetensors"], "half.safetensors"),
    "a misspelt field": (["config.timstep=250"], "unknown setting 'config.timstep': did you mean 'timestep'?"),
    "a misspelt field below": (["config.discriminator.hiden=[8]"], "did you mean 'hidden'?"),
    "a batch in uneven parts": (["train.accumulation=3"], "batch_size 2 is no multiple of accumulation 3"),
    "no photos": (["data.paths=[{folder}/empty]"], "{folder}/empty"),
    "no folder": (["data.paths=[{folder}/nowhere]"], "{folder}/nowhere"),
    "photos smaller than the crop": (["data.crop=128"], "96x96 is the largest photo"),
    "a crop that networks cannot take": (
        ["data.crop=36"],
        "data.crop: 36, but the networks of this run take multiples",
    ),
    "another scale": (["data.scale=2"], "data.scale: 2, but the backbone of this run enlarges 4 times"),
    "a network that is not trained": (["train.optimizers.judge.lr=1"], "train.optimizers.judge: no such network"),
    "nothing to train towards": (["config.mse_weight=0", "config.perceptual_weight=0"], "both 0"),
    "a step beyond the schedule": (["config.timestep=1000"], "config.timestep: 1000, but"),
    "noise beyond the schedule": (["config.discriminator.t_max=5000"], "discriminator.t_max: 5000, but the diffusion"),
    "a discriminator of negative width": (["config.discriminator.hidden=[-1]"], "hidden widths of at least 1"),
    "a date as folder of photos": (["data.paths=[2026-01-02]"], "2026-01-02: no such folder"),
    "whole images in batches": (
        ["data.kind=pairs", "data.lr_paths=[{folder}/quarters]", "data.crop=0"],
        "data.crop: 0 keeps whole images",
    ),
}


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_line(folder: Path, capsys: pytest.CaptureFixture[str], case: str, dry: bool) -> None:
    changes, message = CASES[case]
    materialize = [change.format(folder=folder) for change in changes]
    assert message.format(folder=folder) in refusal(folder, capsys, *materialize, *(["--dry-run"] if dry else []))


def test_a_batch_for_other_processes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "train.batch_size: 2 does not divide among 4 processes" in refusal(folder, capsys)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without one")
def test_a_type_that_only_a_gpu_computes_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "train.mixed_precision: fp16 needs a GPU" in refusal(folder, capsys, "train.mixed_precision=fp16")


@pytest.mark.parametrize(("native", "lines"), [(True, 0), (False, 1)])
def test_a_type_that_this_processor_is_slow_in_is_no_refusal(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, native: bool, lines: int
) -> None:
    monkeypatch.setattr("onestepsr.train.run.prefers_bfloat16", lambda: native)
    recipe, change = str(folder / "recipe.yaml"), "train.mixed_precision=bf16"
    with pytest.raises(SystemExit) as end:
        main(["train", "d3sr", change, "--recipe", recipe, "--dry-run", "--out", str(folder / "never")])
    assert end.value.code == 0
    assert caplog.text.count("train.mixed_precision: bf16 takes") == lines


def test_a_missing_package(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    said = refusal(folder, capsys, "train.optimizers.generator.kind=adamw8bit")
    assert said.endswith("pip install 'onestepsr[eightbit]'")


@pytest.mark.parametrize("name", ["sd21-base", "sdxl-base"])
def test_published_weights_that_are_not_here(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.delenv("ONESTEPSR_OFFLINE", raising=False)
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path))
    key = "config.backbone" if name == "sd21-base" else "config.discriminator.backbone"
    said = refusal(folder, capsys, f"{key}={name}", "--dry-run")
    assert f"error: {name}: " in said
    assert "could not be fetched (a dry run fetches nothing). Three ways to provide it" in said


def test_a_number_gone_wrong_names_step_and_term(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from onestepsr.methods.shared import adversarial

    def poisoned(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return (real.mean() + fake.mean()) * float("nan")

    monkeypatch.setattr(adversarial, "bce_discriminator_loss", poisoned)
    out = tmp_path / "run"
    changes = ["config.discriminator.start=3", "train.steps=6", "train.checkpoint_steps=1"]
    with pytest.raises(SystemExit) as end:
        main(["train", "d3sr", *changes, "--recipe", str(folder / "recipe.yaml"), "--out", str(out)])
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "step 4: loss term 'discriminator.discriminator' is nan; training stopped" in said
    assert said.endswith("step_000000003")
    assert (out / "checkpoints" / "step_000000003").is_dir()

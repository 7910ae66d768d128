"""What tests of several folders share."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image


def write_photos(folder: Path, count: int, seed: int) -> None:
    """Smooth coloured noise, 64 x 64."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")


def write_backbone(path: Path) -> None:
    """A random latent-diffusion backbone of a few thousand parameters."""
    import torch

    from onestepsr.core.config import to_mapping
    from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
    from onestepsr.models.tiny.networks import TinyConfig
    from onestepsr.weights.files import save_model

    small = TinyConfig(
        encoder_width=8, decoder_width=8, widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16
    )
    config = TinyGeneratorConfig(model=small)
    torch.manual_seed(0)
    weights = tiny_generator(config).state_dict()
    save_model(path, architecture="tiny-latent-diffusion", config=to_mapping(config), state_dict=weights)


@pytest.fixture(autouse=True, scope="session")
def heard_interrupts() -> None:
    """Processes of pytest-xdist ignore Ctrl-C, as would all that they start; here it is what it is for a user."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def micro_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of two variants of two steps each, with its recipe, photos and backbone; runs in seconds."""
    monkeypatch.delenv("ONESTEPSR_NIQE_PARAMETERS", raising=False)
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path / "cache"))  # without the statistics that someone has downloaded
    write_photos(tmp_path / "photos", 2, seed=0)
    write_photos(tmp_path / "held-out", 3, seed=1)
    write_backbone(tmp_path / "backbone.safetensors")
    recipe: dict[str, Any] = {
        "method": "d3sr",
        "config": {
            "backbone": str(tmp_path / "backbone.safetensors"),
            "tuning": "full",
            "discriminator": {"tuning": "full", "hidden": [8]},
        },
        "data": {"paths": [str(tmp_path / "photos")], "crop": 32, "degradation": "bicubic"},
        "train": {"steps": 9, "batch_size": 1, "device": "cpu", "threads": 1, "log_every": 1},
        "validation": {"every": 9, "images": 1, "rows": 1},
    }
    suite: dict[str, Any] = {
        "title": "Two losses",
        "source": "nothing but this test",
        "recipe": str(tmp_path / "micro.yaml"),
        "overrides": {"train.steps": 2, "config": {"adversarial_weight": 0.1}},
        "variants": {
            "mse": {"title": "MSE", "overrides": ["config.perceptual_weight=0"]},
            "dists": {"title": "MSE + DISTS", "overrides": {"config.perceptual": {"distance": "dists"}}},
        },
        "published": {"columns": ["NIQE ↓"], "rows": {"MSE": [7.5], "DISTS": [None]}, "note": "Other photos."},
        "evaluation": {"data": {"crop": 32, "degradation": "camera"}, "images": 3, "shown": 2, "shown_side": 24},
    }
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(recipe))
    path = tmp_path / "micro-suite.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return path

"""Runs as a user starts them: by a launcher over two processes, and at Stable Diffusion's size as far as a dry run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from micro_training import weights_of
from PIL import Image
from safetensors import safe_open


def write_photo(folder: Path, side: int) -> str:
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (side // 4, side // 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(folder / "photo.png")
    return str(folder)


@pytest.mark.slow
def test_two_launched_processes_train_d3sr_to_a_model(tmp_path: Path) -> None:
    recipe = {
        "method": "d3sr",
        "out": str(tmp_path / "run"),
        "config": {
            "backbone": str(weights_of("diffusion", tmp_path)),
            "tuning": "full",
            "discriminator": {"tuning": "full", "hidden": [8]},
        },
        "data": {"paths": [write_photo(tmp_path / "photos", 96)], "crop": 32},
        "train": {"steps": 2, "batch_size": 4, "threads": 1, "log_every": 1},
        "validation": {"images": 1, "rows": 1, "best": None},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    # What torchrun is; Accelerate's own launcher starts several processes on GPUs only.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "onestepsr"]
    done = subprocess.run(
        [*launcher, "train", "d3sr", "--recipe", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as model:
        assert model.metadata()["step"] == "2"
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in steps] == [1, 2], "one process reports"
    assert all(record["peak_memory_mb"] > 50 and record["images_per_second"] > 0 for record in steps)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_000000002" / "state.json").read_text())
    assert state["processes"] == 2


@pytest.mark.slow
def test_dry_run_at_the_size_of_stable_diffusion_needs_no_weights_and_little_memory(tmp_path: Path) -> None:
    settings = {
        "config.backbone": '"random:sd21-base"',
        "config.discriminator.backbone": '"random:sdxl-base"',
        "config.perceptual.features": "oriented",
        "data.paths": f"[{write_photo(tmp_path / 'photos', 512)}]",
    }
    arguments = ["d3sr", *(f"{name}={value}" for name, value in settings.items()), "--recipe", "d3sr-sd21-24gb"]
    script = (
        "import sys; from onestepsr.cli.main import app; from onestepsr.core.machine import peak_memory;"
        "app(args=sys.argv[1:], standalone_mode=False);"
        "print('peak', round(peak_memory()['peak_memory_mb']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "train", *arguments, "--out", str(tmp_path / "run"), "--dry-run"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    assert re.search(r"generator\W+1[67],\d{3},\d{3}\W+949,564,587", shown), "adapters and prompt; UNet and autoencoder"
    assert "batch: 16 = 1 processes x 8 micro-batches x 2" in shown
    memory = re.search(r"memory per device: ([\d.]+) GB", shown)
    assert memory is not None
    assert 8 < float(memory[1]) < 16, "it is for a card of 24 GB"
    peak = re.search(r"peak (\d+)", shown)
    assert peak is not None
    assert int(peak[1]) < 3_000, "MB: weights alone would take 9 GB"
    assert not (tmp_path / "run").exists()

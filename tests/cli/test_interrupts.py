"""SIGTERM and Ctrl-C: what is done is said, with the way to go on, and nothing unfinished is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from onestepsr.core.files import PARTIAL_PREFIX, partial_path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def put(folder: Path, count: int, side: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")


def stopped(folder: Path, words: list[str], first: str, number: int) -> tuple[int, str]:
    """Exit code and stderr of the command, which gets a signal as soon as a line begins with ``first``."""
    command = [sys.executable, "-m", "onestepsr", *words]
    process = subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(first):
            process.send_signal(number)
            break
    _, rest = process.communicate(timeout=100)
    return process.returncode, "".join(lines) + rest


def test_degrade(tmp_path: Path) -> None:
    put(tmp_path / "in", 60, 256)
    returned, err = stopped(tmp_path, ["degrade", "in", "out"], "Degrading 1/60: 000.png", signal.SIGINT)
    assert returned == 130
    assert re.search(r"\n\d+ of 60 pairs made; the same command with --skip-existing goes on\n", err)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(PARTIAL_PREFIX)]


def test_evaluate(tmp_path: Path) -> None:
    put(tmp_path / "hr", 60, 256)
    words = ["evaluate", "hr", "--hr", "hr", "--metrics", "psnr,ssim", "--json", "out.json"]
    returned, err = stopped(tmp_path, words, "Measuring 1/60: 000", signal.SIGTERM)
    assert returned == 143
    assert re.search(r"\n\d+ of 60 images measured; nothing was written", err)
    assert not (tmp_path / "out.json").exists()


def test_train_and_the_leftovers_of_a_run_that_was_killed(tmp_path: Path) -> None:
    put(tmp_path / "photos", 2, 64)
    train = {"steps": 100_000, "batch_size": 1, "device": "cpu", "log_every": 1, "threads": 1}
    values = {"method": "autoencoder", "data": {"paths": ["photos"], "crop": 32}, "train": train}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**values, "validation": {"every": 100_000}}))
    left = partial_path(tmp_path / "run/previews/step.png")
    left.parent.mkdir(parents=True)
    left.touch()
    words = ["train", "autoencoder", "--recipe", "small.yaml", "--out", "run", "--resume"]
    returned, err = stopped(tmp_path, words, "step ", signal.SIGTERM)
    assert returned == 143
    assert re.search(r"\nrun: step \d+ of 100,000 is saved; the same command with --resume goes on\n", err)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith((PARTIAL_PREFIX, ".writing"))]

"""Killed and resumed must equal never killed, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import ToyImages, killable, toy_config, toy_method, weights

from onestepsr.train.trainer import Hooks, StepRecord, Trainer

TOY = Path(__file__).parent / "toy_training.py"


def start(folder: Path, steps: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOY), "run", str(folder), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def tensors_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoints" / f"step_{step:09d}").glob("*.safetensors"))
    return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


def assert_identical(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert left, "nothing was compared"
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def test_sigkill_and_resume_equal_an_uninterrupted_run(tmp_path: Path) -> None:
    killed = start(tmp_path / "killed", 16)
    assert killed.stdout is not None
    for line in killed.stdout:
        if int(line) == 8:  # two steps past the checkpoint of step 6
            os.kill(killed.pid, signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    resumed = start(tmp_path / "killed", 16)
    killable(tmp_path / "whole", 16, Hooks()).run()
    first_line = resumed.communicate()[0].splitlines()[0]
    assert 6 < int(first_line) < 16, "the second process must go on, not start again"
    assert_identical(tensors_of(tmp_path / "whole", 16), tensors_of(tmp_path / "killed", 16))


def run(folder: Path, stop_at: int | None = None, resume: bool = False, **changes: object) -> Trainer:
    def stop(record: StepRecord) -> None:
        if record.step == stop_at:
            raise KeyboardInterrupt

    config = toy_config(steps=12, **changes)
    trainer = Trainer(toy_method(), ToyImages(), config, folder, hooks=Hooks(on_step=stop))
    if resume:
        latest = trainer.checkpoints.latest()
        assert latest is not None
        trainer.resume(latest)
    trainer.run()
    return trainer


@pytest.mark.parametrize("channels_last", [False, True])
def test_resume_in_one_process(tmp_path: Path, channels_last: bool) -> None:
    whole = run(tmp_path / "whole", channels_last=channels_last)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=5, channels_last=channels_last)
    resumed = run(tmp_path / "cut", resume=True, channels_last=channels_last)
    assert_identical(weights(whole), weights(resumed))
    assert resumed.seconds > 0


def test_sigterm_saves_before_leaving(tmp_path: Path) -> None:
    def leave(record: StepRecord) -> None:
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    config = toy_config(steps=50, checkpoint_steps=50)
    trainer = Trainer(toy_method(), ToyImages(), config, tmp_path, hooks=Hooks(on_step=leave))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    latest = trainer.checkpoints.latest()
    assert latest is not None
    assert latest.step == trainer.step == 4

"""Killed and resumed must equal never killed, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from micro_training import build, trainer_of, weights_of
from safetensors.torch import load_file
from toy_training import ToyImages, killable, toy_config, toy_method, weights

from onestepsr.core.errors import UserError
from onestepsr.models.architectures import describe
from onestepsr.models.loading import load_residual_generator
from onestepsr.train.checkpoint import Checkpoints
from onestepsr.train.trainer import Hooks, StepRecord, Trainer
from onestepsr.weights.files import save_model

TOY = Path(__file__).parent / "toy_training.py"


def start(folder: Path, steps: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOY), "run", str(folder), str(steps)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)


def stop_at(step: int, process: subprocess.Popen[str], number: signal.Signals) -> int:
    """Signal the whole process group, data workers included, after ``step``; returns the exit status."""
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == step:
            os.killpg(process.pid, number)
            break
    process.communicate(timeout=300)
    return process.returncode


def tensors_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoints" / f"step_{step:09d}").glob("*.safetensors"))
    return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


def assert_identical(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert left, "nothing was compared"
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def test_killed_and_asked_to_leave_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    assert stop_at(8, start(folder, 30), signal.SIGKILL) == -signal.SIGKILL
    assert [path.name for path in sorted((folder / "checkpoints").glob("step*"))][-1] == "step_000000006"
    assert stop_at(13, start(folder, 30), signal.SIGTERM) == -signal.SIGINT
    latest = Checkpoints(folder / "checkpoints").latest()
    assert latest is not None
    assert latest.step >= 13, "a request to leave is answered with a checkpoint"
    steps: list[int] = []
    last = killable(folder, 30, Hooks(on_step=lambda record: steps.append(record.step)))
    last.resume(latest)
    last.run()
    assert steps[0] == latest.step + 1, "the last run must go on, not start again"
    killable(tmp_path / "whole", 30, Hooks()).run()
    assert_identical(tensors_of(tmp_path / "whole", 30), tensors_of(folder, 30))


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


@pytest.mark.parametrize("name", ["osediff in 16 bits", "resshift", "sinsr in 16 bits", "tadsr", "tadsr official"])
def test_resume_of_distilled_methods(tmp_path: Path, name: str) -> None:
    def stop(record: StepRecord) -> None:
        if record.step == 4:
            raise KeyboardInterrupt

    build(name, tmp_path)
    whole = trainer_of(name, tmp_path, steps=6)
    whole.run()
    expected = tensors_of(tmp_path / name, 6)
    (tmp_path / name).rename(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trainer_of(name, tmp_path, steps=6, hooks=Hooks(on_step=stop)).run()
    resumed = trainer_of(name, tmp_path, steps=6)
    latest = resumed.checkpoints.latest()
    assert latest is not None
    assert latest.step == 3
    resumed.resume(latest)
    resumed.run()
    assert_identical(expected, tensors_of(tmp_path / name, 6))


def test_resume_with_another_teacher_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of("sinsr", tmp_path)
    trainer.run()
    latest = trainer.checkpoints.latest()
    assert latest is not None
    teacher = load_residual_generator(weights_of("resshift", tmp_path))
    with torch.no_grad():
        next(teacher.unet.parameters()).mul_(1.01)
    architecture, config = describe(teacher)
    path = weights_of("resshift", tmp_path)
    save_model(path, architecture=architecture, config=config, state_dict=teacher.state_dict())
    with pytest.raises(UserError, match="the frozen weights of 'teacher' are not those this run started with"):
        trainer_of("sinsr", tmp_path).resume(latest)

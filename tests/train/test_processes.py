"""Two processes that exchange gradients over gloo: they agree with each other, with one process, and after a kill."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from micro_training import CHECKPOINT_STEPS, KILLED_STEPS, LOOPS, RUNS, build, trainer_of
from safetensors.torch import load_file
from toy_training import weights

from onestepsr.core.errors import UserError
from onestepsr.methods.base import method_names
from onestepsr.train.batches import Share
from onestepsr.train.checkpoint import Checkpoints
from onestepsr.train.recipes import load_methods

SCRIPT = Path(__file__).parent / "micro_training.py"
KILLED = "d3sr, adaptive noise"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_pair(*arguments: str) -> list[subprocess.Popen[str]]:
    """The script in two processes that find each other, in a process group of their own."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in ("0", "1")
    ]


def finish(pair: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for both; returns what each wrote. A pair that does not end is killed, workers included."""
    try:
        written = [process.communicate(timeout=240) for process in pair]
    except subprocess.TimeoutExpired:
        for process in pair:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    assert [process.returncode for process in pair] == [0, 0], [errors for _, errors in written]
    return [output for output, _ in written]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a pair of processes has trained every method."""
    path = tmp_path_factory.mktemp("pair")
    for name in RUNS:
        build(name, path)
    finish(start_pair("all", str(path)))
    return path


def test_every_method_is_here() -> None:
    load_methods()
    assert {method for method, _ in RUNS.values()} == set(method_names())


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_agree_with_each_other_and_with_one(folder: Path, name: str) -> None:
    first, second = (load_file(folder / f"{name}.rank{rank}.safetensors") for rank in (0, 1))
    start = {f"{key}.{k}": v for key, net in build(name, folder).networks.items() for k, v in net.state_dict().items()}
    trainer = trainer_of(name, folder, keep_checkpoints=1)
    trainer.run()
    alone = weights(trainer)
    assert first.keys() == second.keys() == alone.keys()
    # A step is 3e-3. A latent at the bound of what the UNet sees falls to either side of it with the last bit.
    error = 5e-5 if name not in LOOPS else 2e-3
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=error, msg=lambda text, key=key: f"{key}: {text}")
    moved = [key for key, value in start.items() if not torch.equal(value, alone[key])]
    assert len(moved) > 5, "something was trained"


def wait_for(step: int, pair: list[subprocess.Popen[str]]) -> None:
    output = pair[0].stdout
    assert output is not None
    assert any(int(line) >= step for line in output), [process.communicate() for process in pair]


@pytest.mark.slow
def test_a_pair_asked_to_leave_then_killed_equals_an_uninterrupted_pair(folder: Path, tmp_path: Path) -> None:
    build(KILLED, tmp_path)
    pair = start_pair("killable", KILLED, str(tmp_path))
    wait_for(1, pair)
    pair[1].send_signal(signal.SIGTERM)  # one process is asked, both leave, at the same step
    said = [process.communicate(timeout=60)[1] for process in pair]
    assert all("KeyboardInterrupt" in errors for errors in said), said
    asked = latest_step(tmp_path)
    assert 1 <= asked < KILLED_STEPS

    pair = start_pair("killable", KILLED, str(tmp_path))
    wait_for(max(asked, CHECKPOINT_STEPS) + 1, pair)
    for process in pair:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    assert latest_step(tmp_path) >= CHECKPOINT_STEPS

    whole = folder / "whole"
    whole.mkdir()
    for file in folder.glob("*.safetensors"):
        (whole / file.name).hardlink_to(file)
    resumed, uninterrupted = start_pair("killable", KILLED, str(tmp_path)), start_pair("killable", KILLED, str(whole))
    assert int(finish(resumed)[0].split()[0]) > CHECKPOINT_STEPS, "it must go on, not start anew"
    assert len(finish(uninterrupted)[0].split()) == KILLED_STEPS
    left, right = (final_tensors(path / KILLED) for path in (tmp_path, whole))
    assert left.keys() == right.keys()
    assert {"generator.average", "discriminator.optimizer"} <= {name.split("/")[0] for name in left}
    assert left["discriminator.weights/noise.largest"] > 5, "adaptive noise has moved"
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def latest_step(folder: Path) -> int:
    latest = Checkpoints(folder / KILLED / "checkpoints").latest()
    assert latest is not None
    return latest.step


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoints" / f"step_{KILLED_STEPS:09d}").glob("*.safetensors"))
    return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


def test_another_number_of_processes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of("autoencoder", tmp_path)
    trainer.run()
    latest = trainer.checkpoints.latest()
    assert latest is not None
    trainer.share = Share(0, 2)
    with caplog.at_level(logging.WARNING):
        trainer.resume(latest)
    assert "was written by 1 processes, now there are 2" in caplog.text
    assert "within float error, not bit for bit" in caplog.text


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.batch_size: 6 does not divide among 2 processes with 2 micro-batches"):
        trainer_of("autoencoder", tmp_path, batch_size=6, accumulation=2).config.micro_batch(2)

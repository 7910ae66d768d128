"""Two processes that exchange gradients over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from toy_training import ToyImages, toy_config, toy_method, weights

from onestepsr.train.trainer import Trainer

TOY = Path(__file__).parent / "toy_training.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_agree_with_each_other_and_with_one(tmp_path: Path) -> None:
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, str(TOY), "rank", str(tmp_path)],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    single = Trainer(toy_method(noise=False), ToyImages(), toy_config(accumulation=1), tmp_path / "single")
    single.run()
    for name, value in weights(single).items():
        assert torch.equal(first[name], second[name]), name
        if not name.endswith("calls"):
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5, msg=name)

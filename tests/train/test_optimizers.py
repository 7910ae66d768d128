"""Optimisers: what they keep is saved and restored to the last bit, whatever it is."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from toy_training import ToyImages, toy_config, toy_method, weights

from onestepsr.core.errors import MissingExtra
from onestepsr.methods.base import Method
from onestepsr.train.networks import collect, optimizer_bytes, require_optimizer
from onestepsr.train.recipes import OptimizerConfig
from onestepsr.train.trainer import Trainer

EIGHT_BIT = OptimizerConfig(kind="adamw8bit", lr=3e-3)


def wide_toy() -> Method:
    """The toy with one layer large enough for 8-bit state."""
    method = toy_method()
    torch.manual_seed(3)
    judge = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.SiLU(), torch.nn.Conv2d(64, 16, 3))
    return dataclasses.replace(method, networks={**method.networks, "judge": judge})


def run(folder: Path, steps: int, *, resume: bool = False, channels_last: bool = False) -> Trainer:
    config = toy_config(steps=steps, optimizer=EIGHT_BIT, channels_last=channels_last)
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, kind="constant"))
    trainer = Trainer(wide_toy(), ToyImages(), config, folder)
    if resume:
        latest = trainer.checkpoints.latest()
        assert latest is not None
        trainer.resume(latest)
    trainer.run()
    return trainer


@pytest.mark.parametrize("channels_last", [False, True])
def test_eight_bit_state_is_restored_to_the_last_bit(tmp_path: Path, channels_last: bool) -> None:
    pytest.importorskip("bitsandbytes")
    whole = run(tmp_path / "whole", 8, channels_last=channels_last)
    run(tmp_path / "cut", 4, channels_last=channels_last)
    resumed = run(tmp_path / "cut", 8, resume=True, channels_last=channels_last)
    state = collect(whole.networks.states)["judge.optimizer"]
    assert state["2.weight/state1"].dtype == torch.uint8, "9,216 values: kept in 8 bits"
    assert state["2.weight/step:int"].item() == 8
    for left, right in zip(groups(whole), groups(resumed), strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(value, right[name]) for name, value in left.items())


def groups(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
    return [weights(trainer), *collect(trainer.networks.states).values()]


def test_eight_bits_train_much_as_float32_does(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    small = run(tmp_path / "8", 8)
    method = wide_toy()
    before = {name: value.clone() for name, value in method.networks["judge"].state_dict().items()}
    full = Trainer(
        method, ToyImages(), dataclasses.replace(small.config, optimizer=OptimizerConfig(lr=3e-3)), tmp_path / "32"
    )
    full.run()
    moved = {name: (value - before[name[6:]]) for name, value in weights(full).items() if name.startswith("judge.")}
    moved8 = {name: (value - before[name[6:]]) for name, value in weights(small).items() if name.startswith("judge.")}
    for name, value in moved.items():
        assert (moved8[name] - value).norm() < 0.1 * value.norm(), name


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_bytes_are_those_that_the_optimiser_takes(tmp_path: Path, kind: str) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    settings = dataclasses.replace(EIGHT_BIT, kind=kind)
    trainer = Trainer(wide_toy(), ToyImages(), toy_config(steps=1, optimizer=settings), tmp_path)
    trainer.run()
    counts = [parameter.numel() for parameter in trainer.networks.states["judge"].parameters.values()]
    state = collect(trainer.networks.states)["judge.optimizer"]
    # Step counts, and the two code books that all tensors share, are left out.
    taken = sum(t.numel() * t.element_size() for name, t in state.items() if "step" not in name and "qmap" not in name)
    assert taken == sum(optimizer_bytes(settings, count) for count in counts)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingExtra, match=r"adamw8bit.* pip install 'onestepsr\[eightbit\]'"):
        require_optimizer(EIGHT_BIT)
    require_optimizer(OptimizerConfig())

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from toy_training import ToyImages, toy_config, toy_method

from onestepsr.core.errors import UserError
from onestepsr.train.checkpoint import Checkpoint, Checkpoints
from onestepsr.train.trainer import Trainer

GROUPS = {"net.weights": {"w": torch.arange(6.0).reshape(2, 3)}, "net.optimizer": {}}


def latest(checkpoints: Checkpoints) -> Checkpoint:
    found = checkpoints.latest()
    assert found is not None
    return found


def test_round_trip_and_only_the_newest_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (5, 20, 100):
        checkpoints.save(step, GROUPS, {"note": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000020", "step_000000100"]
    checkpoint = latest(checkpoints)
    assert (checkpoint.step, checkpoint.record["note"]) == (100, 100)
    assert torch.equal(checkpoint.tensors("net.weights")["w"], GROUPS["net.weights"]["w"])
    assert checkpoint.tensors("net.optimizer") == {}


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, GROUPS, {"note": "old"})
    checkpoints.save(1, GROUPS, {"note": "new"})
    assert latest(checkpoints).record["note"] == "new"


@pytest.mark.parametrize("damage", ["no record", "half a record", "short tensors", "lost tensors"])
def test_what_is_not_complete_is_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, GROUPS, {})
    broken = checkpoints.save(2, GROUPS, {})
    record, tensors = broken / "state.json", broken / "net.weights.safetensors"
    if damage == "no record":
        record.unlink()
    elif damage == "half a record":
        record.write_text(record.read_text()[:20])
    elif damage == "short tensors":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    else:
        tensors.unlink()
    assert latest(checkpoints).step == 1


def test_a_damaged_later_one_does_not_push_out_what_is_written_after_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1000, GROUPS, {})
    (checkpoints.save(2000, GROUPS, {}) / "state.json").unlink()
    checkpoints.save(1500, GROUPS, {})
    assert latest(checkpoints).step == 1500
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001500"]


def test_unfinished_writes_are_ignored_and_cleared(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, GROUPS, {})
    (tmp_path / ".writing_step_000000002").mkdir()
    assert latest(checkpoints).step == 1
    checkpoints.save(2, GROUPS, {})
    assert not list(tmp_path.glob(".writing*"))


def test_other_networks_are_refused(tmp_path: Path) -> None:
    Trainer(toy_method(), ToyImages(), toy_config(steps=1), tmp_path).run()
    method = toy_method()
    other = {**method.networks, "judge": torch.nn.Conv2d(3, 1, 3)}
    trainer = Trainer(dataclasses.replace(method, networks=other), ToyImages(), toy_config(), tmp_path)
    with pytest.raises(UserError, match=r"judge\.weights .* tensor '.*'; the method's networks have changed"):
        trainer.resume(latest(trainer.checkpoints))


def test_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    Trainer(toy_method(), ToyImages(), toy_config(steps=1), tmp_path).run()
    method = toy_method()
    with torch.no_grad():
        method.networks["generator"].get_parameter("fixed.bias").add_(1)
    trainer = Trainer(method, ToyImages(), toy_config(), tmp_path)
    with pytest.raises(UserError, match="frozen weights of 'generator'"):
        trainer.resume(latest(trainer.checkpoints))

"""Optimisers: what they keep is saved and restored to the last bit, whatever it is; Muon's step."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from toy_training import ToyImages, toy_config, toy_method, weights

from onestepsr.core.errors import MissingExtra
from onestepsr.methods.base import Method
from onestepsr.train.muon import Muon, orthogonalized
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


def run(
    folder: Path,
    steps: int,
    *,
    optimizer: OptimizerConfig = EIGHT_BIT,
    resume: bool = False,
    channels_last: bool = False,
) -> Trainer:
    config = toy_config(steps=steps, optimizer=optimizer, channels_last=channels_last)
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


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
def test_bytes_are_those_that_the_optimiser_takes(tmp_path: Path, kind: str) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    settings = dataclasses.replace(EIGHT_BIT, kind=kind)
    trainer = Trainer(wide_toy(), ToyImages(), toy_config(steps=1, optimizer=settings), tmp_path)
    trainer.run()
    shapes = [parameter.shape for parameter in trainer.networks.states["judge"].parameters.values()]
    state = collect(trainer.networks.states)["judge.optimizer"]
    # Step counts, and the two code books that all tensors share, are left out.
    taken = sum(t.numel() * t.element_size() for name, t in state.items() if "step" not in name and "qmap" not in name)
    assert taken == sum(optimizer_bytes(settings, shape) for shape in shapes)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingExtra, match=r"adamw8bit.* pip install 'onestepsr\[eightbit\]'"):
        require_optimizer(EIGHT_BIT)
    require_optimizer(OptimizerConfig())


# ---- Muon ----


@pytest.mark.parametrize("channels_last", [False, True])
def test_muon_is_restored_to_the_last_bit(tmp_path: Path, channels_last: bool) -> None:
    muon = OptimizerConfig(kind="muon", lr=3e-3)
    whole = run(tmp_path / "whole", 8, optimizer=muon, channels_last=channels_last)
    run(tmp_path / "cut", 4, optimizer=muon, channels_last=channels_last)
    resumed = run(tmp_path / "cut", 8, optimizer=muon, resume=True, channels_last=channels_last)
    state = collect(whole.networks.states)["judge.optimizer"]
    assert state["2.weight/momentum"].shape == (16, 64, 3, 3)
    assert {"2.bias/exp_avg", "2.bias/exp_avg_sq", "2.bias/step"} <= state.keys(), "AdamW for what is no kernel"
    for left, right in zip(groups(whole), groups(resumed), strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize(("rows", "columns"), [(12, 108), (32, 8), (16, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(rows: int, columns: int) -> None:
    matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0)) * 1e-6
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalized(matrices)
    reached = torch.einsum("krs,krc,ksc->ks", left, result, right)
    assert reached.min() > 0.6
    assert reached.max() < 1.3
    torch.testing.assert_close(result, left @ torch.diag_embed(reached) @ right, atol=1e-4, rtol=0)


def test_the_iteration_is_that_of_the_published_one() -> None:
    matrix = torch.randn(24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonalized(matrix[None])[0], x)


def test_a_muon_step_by_hand() -> None:
    torch.manual_seed(2)
    kernel, bias = torch.nn.Parameter(torch.randn(8, 4, 3, 3)), torch.nn.Parameter(torch.randn(8))
    other = torch.nn.Parameter(bias.detach().clone())
    before, gradients = kernel.detach().clone(), [torch.randn(8, 4, 3, 3) for _ in range(2)]
    optimizer = Muon([kernel, bias], momentum=0.9, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8)
    adamw = torch.optim.AdamW([other], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8)
    running, expected = torch.zeros_like(before), before
    for gradient in gradients:
        kernel.grad, bias.grad, other.grad = gradient.clone(), torch.ones(8), torch.ones(8)
        optimizer.step()
        adamw.step()
        running = 0.9 * running + gradient
        direction = orthogonalized((gradient + 0.9 * running).reshape(1, 8, 36)).view(8, 4, 3, 3)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 6 * direction  # 6 = sqrt(36), the longer side
    torch.testing.assert_close(kernel.detach(), expected)
    torch.testing.assert_close(bias, other)


def test_muon_leaves_kernels_without_gradient_alone() -> None:
    kernel = torch.nn.Parameter(torch.randn(4, 4, 3, 3))
    before = kernel.detach().clone()
    Muon([kernel], momentum=0.9, lr=0.1).step()
    assert torch.equal(kernel, before)
    with pytest.raises(ValueError, match="momentum in"):
        OptimizerConfig(kind="muon", momentum=1.0)

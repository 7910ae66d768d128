"""The estimate against what training really takes, counted by the same rule while it trains on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from micro_training import RUNS, build, trainer_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy_training import toy_config

from onestepsr.methods.base import Batch, Method, Networks, Phase, SampleRandom
from onestepsr.models.lora import LoraConfig, add_lora
from onestepsr.train.memory_estimate import Estimate, LiveMemory, estimate
from onestepsr.train.recipes import TrainConfig
from onestepsr.train.trainer import Trainer


class Block(nn.Module):
    """What diffusion networks are made of: normalisation, convolution and attention, computed again when asked."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        self.norm = nn.GroupNorm(4, 32)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.to_qkv = nn.Linear(32, 96)

    def compute(self, x: Tensor) -> Tensor:
        h = self.conv(F.silu(self.norm(x)))
        q, k, v = self.to_qkv(h.flatten(2).transpose(1, 2))[:, None].chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + attended.transpose(1, 2).reshape(h.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.again and torch.is_grad_enabled():
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x)


def method_of(*, lora: bool, again: bool) -> Method:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block(again) for _ in range(4)))
    if lora:
        add_lora(blocks, LoraConfig(rank=2, alpha=2.0, targets=r".*(conv|to_qkv)"))
    network = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), blocks, nn.Conv2d(32, 3, 1))

    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        return {"mse": F.mse_loss(networks["net"](batch["hr"]), batch["hr"])}

    return Method(networks={"net": network}, phases=(Phase(network="net", loss=loss),), ema=("net",))


def measured(method: Method, config: TrainConfig, batches: list[Batch], folder: Path) -> int:
    """Peak of the live bytes in an iteration after the first, weights and optimiser included."""
    trainer = Trainer(method, None, config, folder)  # type: ignore[arg-type]
    trainer.iterate([dict(batch) for batch in batches])
    held: list[Tensor] = [tensor for batch in batches for tensor in batch.values()]
    for network in (*trainer.networks.modules.values(), *method.frozen.values()):
        held += [*network.parameters(), *network.buffers()]
    for state in trainer.networks.states.values():
        held += [value for values in state.optimizer.state.values() for value in values.values()]
        held += state.average.values.values() if state.average else []
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
    live = LiveMemory(torch.device("cpu"), held)
    with live:
        trainer.iterate([dict(batch) for batch in batches])
    return sum(storages.values()) + live.peak


PICTURES = {"hr": (3, 32, 32), "lr": (3, 8, 8)}


def batches_of(config: TrainConfig) -> list[Batch]:
    size = config.micro_batch(1)
    return [{name: torch.rand(size, *shape) for name, shape in PICTURES.items()} for _ in range(config.accumulation)]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("frozen", ["float32", "bfloat16"])
@pytest.mark.parametrize(("lora", "again"), [(False, False), (True, False), (True, True)])
def test_estimate_equals_what_training_takes(
    tmp_path: Path, precision: Any, frozen: Any, lora: bool, again: bool
) -> None:
    config = toy_config(batch_size=8, accumulation=2, mixed_precision=precision, frozen_dtype=frozen)
    found = estimate(method_of(lora=lora, again=again), config, PICTURES)
    taken = measured(method_of(lora=lora, again=again), config, batches_of(config), tmp_path)
    assert found.peak == pytest.approx(taken, rel=0.05)
    assert found.micro_batch == 4


@pytest.mark.filterwarnings("ignore:.*is a no-op")
@pytest.mark.parametrize("name", RUNS)
def test_estimate_holds_for_every_method(tmp_path: Path, name: str) -> None:
    build(name, tmp_path)
    config = trainer_of(name, tmp_path, batch_size=16).config
    with torch.device("meta"):
        method = build(name, tmp_path)
    found = estimate(method, config, PICTURES)
    assert found.peak == pytest.approx(measured(build(name, tmp_path), config, batches_of(config), tmp_path), rel=0.1)
    assert {phase.network for phase in found.phases} == set(method.networks)


def test_what_each_switch_saves() -> None:
    def of(again: bool = False, lora: bool = True, **changes: Any) -> Estimate:
        with torch.device("meta"):
            method = method_of(lora=lora, again=again)
        return estimate(method, toy_config(**{"batch_size": 8, **changes}), PICTURES)

    base = of()
    assert of(again=True).peak < 0.6 * base.peak
    assert of(batch_size=16).phases[0].peak > 1.8 * base.phases[0].peak
    assert of(accumulation=4).phases[0].peak < 0.4 * base.phases[0].peak
    halved = of(frozen_dtype="bfloat16").networks[0]
    assert halved.weights < 0.8 * base.networks[0].weights
    assert (halved.optimizer, halved.average) == (2 * halved.gradients, halved.gradients)
    assert of(lora=False).networks[0].frozen == 0


def test_several_processes_keep_buckets_and_smaller_shares() -> None:
    with torch.device("meta"):
        method = method_of(lora=True, again=False)
    pair = estimate(method, toy_config(batch_size=8), PICTURES, processes=2)
    assert pair.micro_batch == 4
    assert pair.networks[0].buckets == pair.networks[0].gradients > 0


def test_phases_that_join_later_are_shown() -> None:
    method = method_of(lora=False, again=False)
    late = dataclasses.replace(method.phases[0], start=100)
    early = dataclasses.replace(method.phases[0], stop=100)
    found = estimate(dataclasses.replace(method, phases=(early, late)), toy_config(steps=200), PICTURES)
    assert len(found.phases) == 2

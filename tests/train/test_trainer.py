"""The loop itself: who learns from what, accumulation, averages, and stopping when numbers go wrong."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_training import ToyImages, generator_phase, toy_config, toy_method, weights

from onestepsr.core.errors import OneStepSRError, UserError
from onestepsr.methods.base import Batch, Networks, Phase, SampleRandom
from onestepsr.train.batches import MicroBatchNumbers, Share
from onestepsr.train.networks import MovingAverage, learning_rate_factor
from onestepsr.train.recipes import OptimizerConfig, ScheduleConfig
from onestepsr.train.trainer import Hooks, StepRecord, Trainer


def test_a_phase_changes_its_own_network_only(tmp_path: Path) -> None:
    method = dataclasses.replace(toy_method(), phases=(Phase(network="generator", loss=generator_phase),))
    trainer = Trainer(method, ToyImages(), toy_config(steps=2), tmp_path)
    before = weights(trainer)
    trainer.run()
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"generator.body.weight", "generator.head.bias", "generator.calls"} <= changed
    assert not any(name.startswith(("judge.", "generator.fixed.")) for name in changed)
    assert all(parameter.grad is None for parameter in method.networks["judge"].parameters())


def test_the_other_network_is_differentiable_through_its_input(tmp_path: Path) -> None:
    def only_adversarial(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        return {"adversarial": generator_phase(networks, batch, random)["adversarial"]}

    method = dataclasses.replace(toy_method(), phases=(Phase(network="generator", loss=only_adversarial),))
    records: list[StepRecord] = []
    Trainer(method, ToyImages(), toy_config(steps=1), tmp_path, hooks=Hooks(on_step=records.append)).run()
    assert records[0].gradient_norms["generator"] > 0


def test_gradient_switches_are_put_back(tmp_path: Path) -> None:
    method = toy_method()
    before = {name: p.requires_grad for net in method.networks.values() for name, p in net.named_parameters()}
    Trainer(method, ToyImages(), toy_config(steps=1), tmp_path).run()
    after = {name: p.requires_grad for net in method.networks.values() for name, p in net.named_parameters()}
    assert before == after
    assert not after["fixed.weight"]


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    results = []
    for accumulation in (1, 2, 4):
        config = toy_config(batch_size=8, accumulation=accumulation)
        trainer = Trainer(toy_method(), ToyImages(), config, tmp_path / str(accumulation))
        trainer.run()
        results.append({name: value for name, value in weights(trainer).items() if not name.endswith("calls")})
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(value, results[2][name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_accumulation_of_a_launcher_leaves_gradients_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    norms = []
    for launched in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", launched)
        method = toy_method()
        hooks = Hooks(on_step=lambda record: norms.append(record.gradient_norms))
        Trainer(method, ToyImages(), toy_config(steps=1), tmp_path / launched, hooks=hooks).run()
    assert norms[0] == norms[1]


def test_every_sample_is_seen_once_whatever_the_split() -> None:
    config = toy_config(steps=5, batch_size=12, accumulation=2)
    for processes in (1, 2, 3):
        shares = [list(MicroBatchNumbers(config, Share(rank, processes), 3)) for rank in range(processes)]
        assert all(len(share) == len(MicroBatchNumbers(config, Share(0, processes), 3)) == 4 for share in shares)
        first_step = sorted(number for share in shares for micro in share[:2] for number in micro)
        assert first_step == list(range(36, 48))


def test_phases_run_when_they_say(tmp_path: Path) -> None:
    method = toy_method()
    late = dataclasses.replace(method.phases[1], start=2, every=2)
    records: list[StepRecord] = []
    method = dataclasses.replace(method, phases=(method.phases[0], late))
    Trainer(method, ToyImages(), toy_config(steps=6), tmp_path, hooks=Hooks(on_step=records.append)).run()
    assert [record.step for record in records if "judge.judge" in record.losses] == [3, 5]
    assert all("generator.mse" in record.losses for record in records)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    records: list[StepRecord] = []
    config = toy_config(steps=60, batch_size=8, optimizer=OptimizerConfig(lr=1e-2), checkpoint_steps=60)
    Trainer(toy_method(), ToyImages(), config, tmp_path, hooks=Hooks(on_step=records.append)).run()
    assert records[-1].losses["generator.mse"] < 0.25 * records[0].losses["generator.mse"]


def test_moving_average_follows_its_formula() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = MovingAverage({"w": parameter}, decay=0.5)
    expected = 0.0
    for step in range(20):
        value = float(step + 1)
        parameter.data.fill_(value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.values["w"], torch.full((3,), expected))
    with average.swapped_in():
        torch.testing.assert_close(parameter.data, torch.full((3,), expected))
    assert torch.equal(parameter.data, torch.full((3,), 20.0))


def test_learning_rate_schedule() -> None:
    config = toy_config(steps=11, schedule=ScheduleConfig(kind="cosine", warmup_steps=2, final_ratio=0.1))
    factors = [learning_rate_factor(config, step) for step in range(11)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[6] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)
    constant = toy_config(schedule=ScheduleConfig(warmup_steps=1))
    assert [learning_rate_factor(constant, step) for step in (0, 1, 5)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_gone_wrong_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path, bad: float) -> None:
    method = toy_method()
    seen = {"step": 0}

    def explode(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        terms = generator_phase(networks, batch, random)
        return {**terms, "mse": terms["mse"] * (bad if seen["step"] == 4 else 1.0)}

    phases = (Phase(network="generator", loss=explode), method.phases[1])
    hooks = Hooks(on_step=lambda record: seen.update(step=record.step))
    trainer = Trainer(dataclasses.replace(method, phases=phases), ToyImages(), toy_config(), tmp_path, hooks=hooks)
    with pytest.raises(OneStepSRError, match=r"step 5: loss term 'generator\.mse' is (nan|inf).*step_000000004"):
        trainer.run()
    latest = trainer.checkpoints.latest()
    assert latest is not None
    assert latest.step == 4
    assert all(bool(value.isfinite().all()) for value in weights(trainer).values())


def test_gradients_are_clipped(tmp_path: Path) -> None:
    def step_sizes(clip: float | None) -> float:
        records: list[StepRecord] = []
        config = toy_config(steps=1, gradient_clip=clip, optimizer=OptimizerConfig(lr=1e-3, eps=1.0))
        folder = tmp_path / str(clip)
        trainer = Trainer(toy_method(), ToyImages(), config, folder, hooks=Hooks(on_step=records.append))
        before = weights(trainer)["generator.head.bias"]
        trainer.run()
        assert records[0].gradient_norms["generator"] > 1e-2, "the norm before clipping is reported"
        return float((weights(trainer)["generator.head.bias"] - before).abs().max())

    assert step_sizes(1e-4) < 0.2 * step_sizes(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3, "accumulation": 2}, "batch_size 3 is no multiple of accumulation 2"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"gradient_clip": 0.0}, "gradient_clip"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_config(**changes)


def test_batches_must_divide_among_processes() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size: 4 does not divide among 3 processes"):
        toy_config().micro_batch(3)


def test_optimizer_settings_for_no_network_are_refused(tmp_path: Path) -> None:
    config = toy_config(optimizers={"generater": OptimizerConfig()})
    with pytest.raises(UserError, match=r"optimizers\.generater.*did you mean 'generator'"):
        Trainer(toy_method(), ToyImages(), config, tmp_path)


def test_bf16_computes_in_bf16_and_keeps_float32(tmp_path: Path) -> None:
    inside: list[torch.dtype] = []

    class Teacher(torch.nn.Conv2d):
        def forward(self, image: Tensor) -> Tensor:
            inside.append(super().forward(image).dtype)
            return super().forward(image)

    def with_teacher(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        sr = networks["generator"](batch["lr"])
        distance = networks["teacher"](sr) - networks["teacher"](batch["hr"])
        assert sr.dtype == distance.dtype == torch.float32
        return {"distance": distance.square().mean()}

    teacher = Teacher(3, 2, 1)
    phases = (Phase(network="generator", loss=with_teacher),)
    method = dataclasses.replace(toy_method(), phases=phases, frozen={"teacher": teacher})
    before = teacher.weight.clone()
    config = toy_config(steps=2, mixed_precision="bf16")
    trainer = Trainer(method, ToyImages(), config, tmp_path)
    trainer.run()
    assert set(inside) == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in weights(trainer).values())
    assert torch.equal(teacher.weight, before)
    assert not teacher.training

"""A method small enough for tests that still has what real ones have: two networks, noise, and a tensor handed on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from onestepsr.core.rng import generator
from onestepsr.methods.base import Batch, Exported, Method, Networks, Phase, SampleRandom
from onestepsr.train.recipes import OptimizerConfig, ScheduleConfig, TrainConfig
from onestepsr.train.trainer import Hooks, StepRecord, Trainer


class ToyGenerator(nn.Module):
    """(N, 3, h, w) -> (N, 3, 2h, 2w), with one frozen layer, a buffer that moves, and dropout when asked."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.fixed = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.head = nn.Conv2d(4, 12, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, lr: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return F.pixel_shuffle(self.head(self.fixed(self.dropout(F.silu(self.body(lr))))), 2)


NOISE = 0.01


def generator_phase(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
    sr = networks["generator"](batch["lr"])
    batch["sr"] = sr  # left attached on purpose: the loop must cut it off
    noisy = sr + NOISE * random.normal(sr)
    return {"mse": F.mse_loss(sr, batch["hr"]), "adversarial": 0.1 * F.softplus(-networks["judge"](noisy)).mean()}


def judge_phase(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
    noise = NOISE * random.normal(batch["sr"])
    real, fake = networks["judge"](batch["hr"] + noise), networks["judge"](batch["sr"] + noise)
    return {"judge": F.softplus(-real).mean() + F.softplus(fake).mean()}


def toy_method(dropout: float = 0.0) -> Method:
    """Generator and judge; without dropout, runs that are split differently can be compared."""
    torch.manual_seed(7)
    judge = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.SiLU(), nn.Conv2d(4, 1, 3))
    return Method(
        networks={"generator": ToyGenerator(dropout), "judge": judge},
        phases=(Phase(network="generator", loss=generator_phase), Phase(network="judge", loss=judge_phase)),
        ema=("generator",),
        preview=lambda networks, batch: {"SR": networks["generator"](batch["lr"]).clamp(0, 1), "HR": batch["hr"]},
        export=lambda networks: Exported(
            state_dict=networks["generator"].state_dict(), architecture="toy", config={"width": 4}
        ),
    )


class ToyImages:
    """Smooth random images (3, 8, 8) and their halves (3, 4, 4)."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        coarse = torch.rand(1, 3, 3, 3, generator=generator(self.seed, "toy", index))
        hr = F.interpolate(coarse, size=(8, 8), mode="bilinear")[0]
        return {"hr": hr, "lr": F.avg_pool2d(hr, 2)}


def toy_config(**changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "steps": 6,
        "batch_size": 4,
        "optimizer": OptimizerConfig(lr=3e-3),
        "schedule": ScheduleConfig(kind="cosine", warmup_steps=2),
        "device": "cpu",
        "threads": 1,
        "checkpoint_steps": 2,
    }
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """Everything a run produces: weights, buffers and averages, by full name."""
    result = {}
    for name, state in trainer.networks.states.items():
        result.update({f"{name}.{key}": value.clone() for key, value in state.network.state_dict().items()})
        if state.average is not None:
            result.update({f"{name}.average.{key}": value.clone() for key, value in state.average.values.items()})
    return result


def run_and_announce(folder: str, steps: str) -> None:
    """Resumes where it can and says each finished step: something to kill."""

    def announce(record: StepRecord) -> None:
        sys.stdout.write(f"{record.step}\n")
        sys.stdout.flush()

    trainer = killable(Path(folder), int(steps), Hooks(on_step=announce))
    latest = trainer.checkpoints.latest()
    if latest is not None:
        trainer.resume(latest)
    trainer.run()


def killable(folder: Path, steps: int, hooks: Hooks) -> Trainer:
    """The same run in this process or in one that can be killed."""
    config = toy_config(steps=steps, num_workers=1, accumulation=2, checkpoint_steps=3)
    return Trainer(toy_method(dropout=0.2), ToyImages(), config, folder, hooks=hooks)


def run_one_rank(folder: str) -> None:
    """One of several processes: leaves its weights in a file."""
    trainer = Trainer(toy_method(), ToyImages(), toy_config(accumulation=2), Path(folder))
    trainer.run()
    save_file(weights(trainer), Path(folder) / f"rank{os.environ['RANK']}.safetensors")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    {"run": run_and_announce, "rank": run_one_rank}[sys.argv[1]](*sys.argv[2:])

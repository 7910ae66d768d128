"""Every registered method at a size that trains in milliseconds, alone or as one of several processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import Tensor
from toy_training import weights

from onestepsr.core.config import from_mapping
from onestepsr.core.rng import generator
from onestepsr.methods.base import Method, get_method
from onestepsr.train.recipes import OptimizerConfig, TrainConfig, load_methods
from onestepsr.train.trainer import Hooks, StepRecord, Trainer
from onestepsr.weights.files import save_model

STEPS = 3
KILLED_STEPS, CHECKPOINT_STEPS = 9, 3
SIZES = {
    "luma_channels": 4,
    "chroma_channels": 2,
    "encoder_width": 8,
    "decoder_width": 8,
    "widths": [8, 16],
    "down_blocks": [1, 1],
    "up_blocks": [1, 1],
    "time_width": 16,
    "prompt_width": 16,
}
LORA = {"rank": 2, "alpha": 2.0}
ADAPTERS = {"backbone": "diffusion", "lora": LORA, "discriminator": {"hidden": [8], "lora": LORA}}
DENOISER = {"latent_channels": 8, "widths": [8, 16], "down_blocks": [1, 1], "up_blocks": [1, 1], "time_width": 16}
LPIPS = {"distance": "lpips", "features": "oriented"}
JUDGE = {"architecture": "paper", "head": {"width": 4, "norm_groups": 4}}
OFFICIAL_JUDGE = {"official": {"logit_maps": 2, "norm_groups": 4}}
PROMPTLESS = {
    "backbone": "diffusion",
    "timestep": 399,
    "posterior": "sample",
    "lora": LORA,
    "autoencoder_lora": LORA,
    "vsd": {"lora": LORA},
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "autoencoder": ("autoencoder", {"model": SIZES}),
    "diffusion": ("diffusion", {"autoencoder": "autoencoder", "backbone": {"model": SIZES}}),
    "d3sr": ("d3sr", ADAPTERS),
    "d3sr in 16 bits": ("d3sr", ADAPTERS),
    "d3sr, adaptive noise": (
        "d3sr",
        {
            "backbone": "diffusion",
            "tuning": "full",
            "extras": {"train_decoder": True, "lattice_weight": 1.0},
            "discriminator": {"kind": "diffusion_gan", "tuning": "full", "hidden": [8], "adaptive": {"images": 50}},
        },
    ),
    "distillation": (
        "distillation",
        {
            "backbone": "diffusion",
            "teacher": {"model": "bicubic", "live": True},
            "perceptual": {"features": "oriented"},
            "discriminators": {"unet_weight": 0.05, "unet_widths": [4, 8]},
        },
    ),
    "osediff": ("osediff", PROMPTLESS),
    "osediff in 16 bits": ("osediff", PROMPTLESS),
    "resshift": (
        "resshift",
        {"autoencoder": "autoencoder", "denoiser": DENOISER, "perceptual_weight": 1.0, "perceptual": LPIPS},
    ),
    "sinsr": ("sinsr", {"teacher": "resshift", "teacher_steps": 3}),
    "sinsr in 16 bits": ("sinsr", {"teacher": "resshift", "teacher_steps": 3}),
    "tadsr": ("tadsr", {"teacher": "resshift", "teacher_steps": 3, "discriminator": JUDGE}),
    "tadsr official": ("tadsr", {"teacher": "resshift", "teacher_steps": 3, "discriminator": OFFICIAL_JUDGE}),
    # one scale: on the coarser one, of 16 positions, gradients are so small that rounding decides their signs
    "tadsr in 16 bits": (
        "tadsr",
        {"teacher": "resshift", "teacher_steps": 3, "discriminator": JUDGE | {"scales": [0]}},
    ),
}
"""Method and configuration by name; where weights of an earlier stage are needed, the name of its run stands."""


IN_16_BITS = {"mixed_precision": "bf16", "frozen_dtype": "bfloat16"}
LOOPS: dict[str, dict[str, Any]] = dict.fromkeys(
    (f"{name} in 16 bits" for name in ("d3sr", "osediff", "sinsr", "tadsr")), IN_16_BITS
)
"""Settings of the loop in which a run differs from the others."""


class MicroImages:
    """Smooth random images (3, 32, 32) and bicubic quarters (3, 8, 8)."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        coarse = torch.rand(1, 3, 8, 8, generator=generator("micro", index))
        hr = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)
        lr = torch.nn.functional.interpolate(hr, size=(8, 8), mode="bicubic", antialias=True)
        return {"hr": hr[0], "lr": lr[0].clamp(0, 1)}


def build(name: str, folder: Path) -> Method:
    """The method of run ``name``; weights of earlier stages are made in ``folder`` when they are not there."""
    load_methods()
    method, config = RUNS[name]
    for key in ("autoencoder", "backbone", "teacher"):
        stage = config.get(key)
        if isinstance(stage, str):
            config = {**config, key: str(weights_of(stage, folder))}
    torch.manual_seed(7)
    entry = get_method(method)
    return entry.build(from_mapping(entry.config, config))


def weights_of(stage: str, folder: Path) -> Path:
    """Random weights as run ``stage`` would export them."""
    path = folder / f"{stage}.safetensors"
    if not path.exists():
        method = build(stage, folder)
        with torch.no_grad():
            for parameter in next(iter(method.networks.values())).parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        assert method.export is not None
        exported = method.export(method.networks)
        save_model(path, architecture=exported.architecture, config=exported.config, state_dict=exported.state_dict)
    return path


def trainer_of(name: str, folder: Path, *, hooks: Hooks | None = None, **changes: Any) -> Trainer:
    """Run ``name``, ready to start; results go to ``folder``/``name``."""
    values = {"steps": STEPS, "batch_size": 4, "threads": 1, "device": "cpu", **LOOPS.get(name, {}), **changes}
    # With the usual eps, a gradient of 0 and one of 1e-9 would make steps of different size.
    config = TrainConfig(optimizer=OptimizerConfig(lr=3e-3, eps=1e-4), checkpoint_steps=CHECKPOINT_STEPS, **values)
    AcceleratorState._reset_state()  # Accelerate keeps one precision per process
    return Trainer(build(name, folder), MicroImages(), config, folder / name, hooks=hooks)


def run_all(folder: str) -> None:
    """All methods in turn; leaves what this process holds in files."""
    for name in RUNS:
        trainer = trainer_of(name, Path(folder))
        trainer.run()
        save_file(weights(trainer), Path(folder) / f"{name}.rank{os.environ['RANK']}.safetensors")
    trainer.accelerator.end_training()


def run_killable(name: str, folder: str) -> None:
    """Resumes where it can and says each finished step: something to kill."""

    def announce(record: StepRecord) -> None:
        sys.stdout.write(f"{record.step}\n")
        sys.stdout.flush()

    hooks = Hooks(on_step=announce)
    trainer = trainer_of(name, Path(folder), hooks=hooks, steps=KILLED_STEPS, accumulation=2, num_workers=1)
    latest = trainer.checkpoints.latest()
    if latest is not None:
        trainer.resume(latest)
    trainer.run()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"all": run_all, "killable": run_killable}
    commands[sys.argv[1]](*sys.argv[2:])

"""From a configuration to a finished run: every check first, then the loop, its reports and the exported model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from onestepsr.config import to_mapping
from onestepsr.data.datasets import Pool, build_dataset
from onestepsr.data.sampling import derived_seed
from onestepsr.errors import UserError
from onestepsr.files import replacing
from onestepsr.methods.base import Method, get_method
from onestepsr.train.checkpoint import Checkpoint, Checkpoints
from onestepsr.train.networks import NetworkSet, parameter_counts
from onestepsr.train.previews import Validator
from onestepsr.train.recipes import RunConfig, check_resumable
from onestepsr.train.report import Reporter
from onestepsr.train.trainer import Hooks, Trainer

VALIDATION_SEED = 0
"""Not the run's seed, so that runs are compared on the same crops and degradations."""
MODEL, BEST, CONFIG = "model.safetensors", "best.safetensors", "config.yaml"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that has been checked and not begun."""

    run: RunConfig
    method: Method
    source: Any
    validation_source: Any
    checkpoint: Checkpoint | None

    @property
    def photos(self) -> int:
        """Training photos, or pairs of them."""
        return len(self.source.source if isinstance(self.source, Pool) else self.source)

    @property
    def parameters(self) -> dict[str, tuple[int, int]]:
        """Trainable and frozen parameters by network."""
        frozen = {name: (0, sum(counts)) for name, counts in parameter_counts(self.method.frozen).items()}
        return {**parameter_counts(self.method.networks), **frozen}

    @property
    def state_bytes(self) -> int:
        """Memory of weights, gradients, AdamW's moments and moving averages, all float32; activations come on top."""
        total = 0
        for name, (trainable, frozen) in self.parameters.items():
            copies = 4 + (name in self.method.ema)
            total += 4 * (trainable * copies + frozen)
        return total


def prepare(run: RunConfig, *, resume: bool) -> Plan:
    """Check everything that can be wrong with a run; nothing is written."""
    checkpoint = _find_checkpoint(run, resume)
    run.train.micro_batch(int(os.environ.get("WORLD_SIZE", "1")))
    entry = get_method(run.method)
    source = build_dataset(run.data, run.train.seed, entry.needs_lr)
    held_out = run.validation.data
    validation = source if held_out is None else build_dataset(held_out, VALIDATION_SEED, entry.needs_lr)
    torch.manual_seed(derived_seed(run.train.seed, "initial weights"))
    method = entry.build(run.config)
    run.train.check_networks(method.networks)
    return Plan(run=run, method=method, source=source, validation_source=validation, checkpoint=checkpoint)


def execute(plan: Plan) -> Path:
    """Train to the end; returns the folder with the model."""
    run = plan.run
    if _is_first_process():
        _write_config(run)
    hooks = Hooks(validation_every=run.validation.every)
    trainer = Trainer(plan.method, plan.source, run.train, run.out, identity=to_mapping(run), hooks=hooks)
    if plan.checkpoint is not None:
        trainer.resume(plan.checkpoint)
    if not trainer.accelerator.is_main_process:
        trainer.run()
        return run.out
    with Reporter(run.out, run.train, trainer.step) as reporter:
        hooks.on_step = reporter.on_step
        hooks.on_validation = Validations(plan, trainer, reporter)
        trainer.run()
    trainer.accelerator.end_training()
    return run.out


class Validations:
    """What happens at a validation: previews and scores, then the model in its present and in its best state."""

    def __init__(self, plan: Plan, trainer: Trainer, reporter: Reporter) -> None:
        self.plan, self.trainer, self.reporter = plan, trainer, reporter

    def __call__(self, step: int, networks: NetworkSet) -> None:
        """Validate after ``step`` iterations."""
        scores = self._preview(step, networks)
        folder = self.plan.run.out
        export(self.plan.method, networks, folder / MODEL, self._notes(step))
        best = self.trainer.hooks.memory.get("best_psnr_y")
        if "psnr_y" in scores and (best is None or scores["psnr_y"] > best):
            self.trainer.hooks.memory["best_psnr_y"] = scores["psnr_y"]
            export(self.plan.method, networks, folder / BEST, self._notes(step))

    def _preview(self, step: int, networks: NetworkSet) -> dict[str, float]:
        run, method = self.plan.run, self.plan.method
        if method.preview is None:
            return {}
        validator = Validator(method.preview, self.plan.validation_source, run.validation, run.out)
        found = validator.run(step, networks, self.trainer.accelerator.device, run.train.channels_last)
        self.reporter.on_validation(step, found.scores, found.picture)
        return found.scores

    def _notes(self, step: int) -> dict[str, str]:
        return {"method": self.plan.run.method, "step": str(step), "seed": str(self.plan.run.train.seed)}


def export(method: Method, networks: NetworkSet, path: Path, notes: dict[str, str]) -> None:
    """Write the method's model, with averaged weights where they are kept; a method may have nothing to export."""
    if method.export is None:
        return
    from onestepsr.models.registry import save_model

    with networks.evaluating():
        exported = method.export(networks.modules)
        save_model(
            path,
            architecture=exported.architecture,
            config=exported.config,
            state_dict=exported.state_dict,
            extra=notes,
        )


def _find_checkpoint(run: RunConfig, resume: bool) -> Checkpoint | None:
    occupied = run.out.exists() and (not run.out.is_dir() or any(run.out.iterdir()))
    if not resume:
        if occupied and _is_first_process():
            raise UserError(f"{run.out}: exists already; add --resume to go on with that run, or choose another --out")
        return None
    checkpoint = Checkpoints(run.out / "checkpoints").latest()
    if checkpoint is not None:
        check_resumable(checkpoint.record["identity"], run)
        if checkpoint.step > run.train.steps:
            raise UserError(f"train.steps: {run.train.steps}, but {run.out} has {checkpoint.step} steps behind it")
    return checkpoint


def _write_config(run: RunConfig) -> None:
    run.out.mkdir(parents=True, exist_ok=True)
    with replacing(run.out / CONFIG) as temporary:
        temporary.write_text(config_text(run), encoding="utf-8")


def config_text(run: RunConfig) -> str:
    """The resolved configuration as YAML; it is a recipe itself."""
    return yaml.safe_dump(to_mapping(run), sort_keys=False, allow_unicode=True)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"

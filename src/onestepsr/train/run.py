"""From a configuration to a finished run: every check first, then the loop, its reports and the exported model."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.files import PARTIAL_PREFIX, locked, write_text, writing
from onestepsr.core.machine import prefers_bfloat16
from onestepsr.core.rng import derived_seed
from onestepsr.data.datasets import DataConfig, Pool, build_dataset, fingerprint
from onestepsr.methods.base import Exported, Method, get_method
from onestepsr.methods.shared.taught import TaughtPool
from onestepsr.train.batches import with_prompts
from onestepsr.train.checkpoint import Checkpoint, Checkpoints
from onestepsr.train.memory_estimate import Estimate, estimate
from onestepsr.train.networks import NetworkSet, as_float32, require_optimizer
from onestepsr.train.recipes import RunConfig, check_resumable
from onestepsr.train.report import Reporter, Validator, is_better
from onestepsr.train.trainer import Hooks, Trainer, trains_on_cpu

logger = logging.getLogger(__name__)

VALIDATION_SEED = 0
"""Independent of the run's seed, so that runs are compared on the same crops and degradations."""
MODEL, BEST, CONFIG, LOCK = "model.safetensors", "best.safetensors", "config.yaml", ".lock"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that has been checked and not begun."""

    run: RunConfig
    method: Method
    source: Any
    validator: Validator | None
    checkpoint: Checkpoint | None
    content: str
    """A hash of the training photos' names, sizes and bytes."""

    @property
    def photos(self) -> int:
        """Training photos, or pairs of them."""
        return len(self._photo_source)

    @property
    def _photo_source(self) -> Any:
        return self.source.source if isinstance(self.source, Pool) else self.source

    def estimate(self) -> Estimate:
        """Memory of one process; uses the method up. The first sample is made for its size, which tries the data."""
        shapes = {name: image.shape for name, image in self._photo_source[0].items()}
        return estimate(self.method, self.run.train, shapes, process_count())


def prepare(run: RunConfig, *, resume: bool, dry: bool = False) -> Plan:
    """Check everything that can be wrong with a run; nothing is written.

    With ``dry`` the networks are built without values where they need none: such a plan can be shown, not executed.
    """
    checkpoint = _find_checkpoint(run, resume)
    run.train.micro_batch(process_count())
    for optimizer in (run.train.optimizer, *run.train.optimizers.values()):
        require_optimizer(optimizer)
    if run.train.mixed_precision == "fp16" and not dry and trains_on_cpu(run.train):
        raise UserError("train.mixed_precision: fp16 needs a GPU; on a CPU it can be bf16 or no")
    entry = get_method(run.method)
    source = build_dataset(run.data, run.train.seed, entry.needs_lr)
    held_out = run.validation.data
    validation = source if held_out is None else build_dataset(held_out, VALIDATION_SEED, entry.needs_lr)
    method = _build(run, dry)
    run.train.check_networks({*method.networks, *method.optional})
    if run.data.crop == 0:
        raise UserError("data.crop: 0 keeps whole images, which is for measuring; samples of a batch need one size")
    check_sizes(method, run.data, "data")
    content = fingerprint(source.content())
    source = with_prompts(source, run.data, method, "data", dry=dry)
    if held_out is None:
        validation = source
    else:
        check_sizes(method, held_out, "validation.data")
        validation = with_prompts(validation, held_out, method, "validation.data", dry=dry)
    if method.targets is not None:
        source = method.targets(source, run.data, run.train.seed)
        validation = source if held_out is None else validation
    validator = None
    if method.preview is not None:
        validator = Validator(method.preview, validation, run.validation, run.out, multiple=method.hr_multiple)
    if run.train.mixed_precision == "bf16" and trains_on_cpu(run.train) and not prefers_bfloat16():
        logger.warning("train.mixed_precision: bf16 takes 1.4 to 8 times as long as 'no' on this processor")
    return Plan(run=run, method=method, source=source, validator=validator, checkpoint=checkpoint, content=content)


def check_sizes(method: Method, data: DataConfig, where: str) -> None:
    """Refuse images that the method's networks cannot take."""
    if method.scale is not None and data.scale != method.scale:
        raise UserError(f"{where}.scale: {data.scale}, but the backbone of this run enlarges {method.scale} times")
    if data.crop % method.hr_multiple:
        multiple = method.hr_multiple
        raise UserError(f"{where}.crop: {data.crop}, but the networks of this run take multiples of {multiple}")


def _build(run: RunConfig, dry: bool) -> Method:
    torch.manual_seed(derived_seed(run.train.seed, "initial weights"))
    build = get_method(run.method).build
    if not dry:
        return build(run.config)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is a no-op")  # weights of a file, copied to where no values are
        return build(run.config)


def execute(plan: Plan) -> Path:
    """Train to the end; returns the folder with the model. Raises UserError while another run is at work there."""
    if not _is_first_process():
        return _execute(plan)
    # Two runs in one folder, such as a second --resume, would take away each other's checkpoints.
    with writing(plan.run.out):
        plan.run.out.mkdir(parents=True, exist_ok=True)
    with locked(plan.run.out / LOCK, wait=False) as alone:
        if not alone:
            raise UserError(f"{plan.run.out}: another process trains there; wait for it or choose another --out")
        for leftover in plan.run.out.rglob(f"{PARTIAL_PREFIX}*"):  # of a run that was killed, as this one is alone
            leftover.unlink(missing_ok=True)
        write_text(plan.run.out / CONFIG, config_text(plan.run))
        return _execute(plan)


def _execute(plan: Plan) -> Path:
    accelerator = _run(plan)
    # Wrappers that outlive the group of processes can abort the interpreter at its end, after all is done.
    accelerator.free_memory()
    accelerator.end_training()
    return plan.run.out


def _run(plan: Plan) -> Accelerator:
    """Train to the end; afterwards only the returned accelerator holds the wrapped networks."""
    run = plan.run
    hooks = Hooks(validation_every=run.validation.every)
    identity = to_mapping(run)
    if isinstance(plan.source, TaughtPool):
        # Several processes start at once: the first one makes the targets, the others wait and find them there.
        plan.source.folder.mkdir(parents=True, exist_ok=True)
        with locked(plan.source.folder / LOCK, wait=True):
            plan.source.fill()
    trainer = Trainer(plan.method, plan.source, run.train, run.out, identity=identity, photos=plan.content, hooks=hooks)
    if trainer.share.processes != process_count():
        together = f"WORLD_SIZE is {process_count()}, but {trainer.share.processes} would train together"
        raise UserError(f"{together}: start processes with torchrun or accelerate launch")
    if plan.checkpoint is not None:
        trainer.resume(plan.checkpoint)
    if trainer.accelerator.is_main_process:
        with Reporter(run.out, run.train, trainer.step) as reporter:
            hooks.on_step = reporter.on_step
            hooks.on_validation = Validations(plan, trainer, reporter)
            trainer.run()
    else:
        trainer.run()
    return trainer.accelerator


class Validations:
    """Validation during the run: previews and scores, then the model in its present and in its best state."""

    def __init__(self, plan: Plan, trainer: Trainer, reporter: Reporter) -> None:
        self.plan, self.trainer, self.reporter = plan, trainer, reporter

    def __call__(self, step: int, networks: NetworkSet) -> None:
        """Validate after ``step`` iterations."""
        folder, scores = self.plan.run.out, dict[str, float]()
        if self.plan.validator is not None:
            device, channels_last = self.trainer.accelerator.device, self.plan.run.train.channels_last
            found = self.plan.validator.run(step, networks, device, channels_last)
            self.reporter.on_validation(step, found.scores, found.image)
            scores = found.scores
        export(self.plan.method, networks, folder / MODEL, self._notes(step))
        name, memory = self.plan.run.validation.best, self.trainer.hooks.memory
        if name in scores and is_better(name, scores[name], memory.get(f"best_{name}")):
            memory[f"best_{name}"] = scores[name]
            export(self.plan.method, networks, folder / BEST, self._notes(step))

    def _notes(self, step: int) -> dict[str, str]:
        return {"method": self.plan.run.method, "step": str(step), "seed": str(self.plan.run.train.seed)}


def export(method: Method, networks: NetworkSet, path: Path, notes: dict[str, str]) -> None:
    """Write the method's model, with averaged weights where they are kept; a method may have nothing to export."""
    if method.export is None:
        return
    with networks.evaluating():
        exported = method.export(networks.modules)
        write_exported(exported, path, notes)


def write_exported(exported: Exported, path: Path, notes: dict[str, str]) -> None:
    """Write a model in float32, and the files beside it."""
    from onestepsr.weights.files import save_model

    save_model(
        path,
        architecture=exported.architecture,
        config=exported.config,
        state_dict=as_float32(exported.state_dict),
        extra=notes,
    )
    for word, other in exported.beside.items():
        write_exported(other, path.with_suffix(f".{word}{path.suffix}"), notes)


def _find_checkpoint(run: RunConfig, resume: bool) -> Checkpoint | None:
    occupied = run.out.exists() and (not run.out.is_dir() or any(run.out.iterdir()))
    if not resume:
        if occupied and _is_first_process():
            raise UserError(f"{run.out}: exists already; add --resume to continue that run, or choose another --out")
        return None
    checkpoint = Checkpoints(run.out / "checkpoints").latest()
    if checkpoint is not None:
        other_processes = checkpoint.record.get("processes", 1) != process_count()
        check_resumable(checkpoint.record["identity"], run, other_processes=other_processes)
        if checkpoint.step > run.train.steps:
            raise UserError(
                f"train.steps: {run.train.steps}, but {run.out} has finished {checkpoint.step} steps already"
            )
    return checkpoint


def config_text(run: RunConfig) -> str:
    """The resolved configuration as YAML; it is a recipe itself."""
    return yaml.safe_dump(to_mapping(run), sort_keys=False, allow_unicode=True)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """Number of processes of this run, from the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))

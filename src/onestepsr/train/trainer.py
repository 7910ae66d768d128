"""The one training loop.

An iteration fetches its micro-batches once, then runs the method's phases in order, each of them one optimiser step on
one network over all the micro-batches. Tensors that a phase leaves in a micro-batch are there for later phases of the
same iteration. An iteration depends on nothing but the seed, the step and the state that checkpoints hold, so a run
that was killed and resumed ends with the bytes of one that was not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor

from onestepsr.core.errors import OneStepSRError, UserError
from onestepsr.core.machine import largest_peak_memory
from onestepsr.core.rng import derived_seed
from onestepsr.core.signals import Interruption
from onestepsr.methods.base import Batch, Method, Phase, SampleRandom
from onestepsr.train.batches import SampleSource, Share, micro_batches, sample_numbers
from onestepsr.train.checkpoint import Checkpoint, Checkpoints
from onestepsr.train.networks import NetworkSet, check_fingerprints, collect, learning_rate_factor, restore
from onestepsr.train.recipes import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Results of one iteration, averaged over processes."""

    step: int
    """Iterations finished, this one included."""
    seconds: float
    """Time since the run began, without the gaps between an interruption and its resumption."""
    losses: dict[str, float]
    """Weighted loss terms, ``network.term``."""
    gradient_norms: dict[str, float]
    """Before clipping, by network."""
    learning_rates: dict[str, float]
    """By network."""
    images: int
    """Samples of the iteration, over all processes."""
    peak_memory: dict[str, float] = field(default_factory=dict)
    """MB of the process that needed most so far, of its host and of its accelerator; in iterations that are logged."""


@dataclass(kw_only=True)
class Hooks:
    """Callbacks of the loop, in the first process only."""

    on_step: Callable[[StepRecord], None] = lambda record: None
    """After every iteration."""
    on_validation: Callable[[int, NetworkSet], None] = lambda step, networks: None
    """After every ``validation_every`` iterations and after the last one."""
    validation_every: int = 1000
    memory: dict[str, Any] = field(default_factory=dict)
    """Small values that checkpoints keep for the hooks, such as the best score so far."""


class Trainer:
    """Runs a method over a dataset, from step 0 or from a checkpoint in ``folder``."""

    def __init__(
        self,
        method: Method,
        source: SampleSource,
        config: TrainConfig,
        folder: Path,
        *,
        identity: Mapping[str, Any] | None = None,
        photos: str = "",
        hooks: Hooks | None = None,
    ) -> None:
        """``identity`` and ``photos`` are kept in checkpoints: the run's settings, and a hash of its training data."""
        self.method, self.source, self.config = method, source, config
        self.photos = photos
        self.identity, self.hooks = dict(identity or {}), hooks or Hooks()
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.accelerator = build_accelerator(config)
        self.share = Share(self.accelerator.process_index, self.accelerator.num_processes)
        config.micro_batch(self.share.processes)
        config.check_networks({*method.networks, *method.optional})
        self.networks = NetworkSet(method, config, self.accelerator)
        self.step = 0
        self._seconds_before = 0.0
        self._started = self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent in this run so far, over all its resumptions."""
        return self._seconds_before + time.monotonic() - self._started

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from ``checkpoint``."""
        check_fingerprints(checkpoint, self.networks.fingerprints)
        before, now = checkpoint.record.get("processes", 1), self.share.processes
        if before != now:
            logger.warning(
                "%s was written by %d processes, now there are %d: the result will equal that of an uninterrupted run "
                "within float error, not bit for bit",
                checkpoint.path,
                before,
                now,
            )
        if checkpoint.record.get("photos", self.photos) != self.photos:
            logger.warning(
                "training photos were added, removed or changed since %s was written: the result will not equal "
                "that of an uninterrupted run",
                checkpoint.path,
            )
        restore(self.networks.states, checkpoint)
        self.step = checkpoint.step
        self._seconds_before = float(checkpoint.record.get("seconds", 0.0))
        self.hooks.memory.update(checkpoint.record.get("memory", {}))
        if self.accelerator.scaler is not None and checkpoint.record.get("scaler"):
            self.accelerator.scaler.load_state_dict(checkpoint.record["scaler"])

    def run(self) -> None:
        """Train to the last step; the final state is validated and saved."""
        self._check_same_start()
        batches = micro_batches(self.source, self.config, self.share, self.step, self.accelerator.device)
        self._started = self._saved = time.monotonic()
        # Closed explicitly: that is what tells data workers to leave, however the loop ends.
        with Interruption() as interruption, closing(batches):
            while self.step < self.config.steps:
                record = self.iterate([next(batches) for _ in range(self.config.accumulation)])
                stopping = self._any(interruption.requested)
                self._after_iteration(record, stopping=stopping)
                if stopping:
                    raise KeyboardInterrupt

    def iterate(self, batches: list[Batch]) -> StepRecord:
        """One iteration: every phase that takes part in it, then the moving averages."""
        # For dropout alone: everything else draws from the generators that losses are handed.
        torch.manual_seed(derived_seed(self.config.seed, "dropout", self.accelerator.process_index, self.step))
        losses: dict[str, float] = {}
        norms: dict[str, float] = {}
        rates: dict[str, float] = {}
        for index, phase in enumerate(self.method.phases):
            if phase.runs_at(self.step):
                terms, norms[phase.network] = self._run_phase(index, phase, batches)
                losses.update({f"{phase.network}.{name}": value for name, value in terms.items()})
                rates[phase.network] = self.networks.optimizers[phase.network].param_groups[0]["lr"]
        self.networks.update_averages(self.step)
        self.step += 1
        logged = self.step % self.config.log_every == 0 or self.step == self.config.steps
        return StepRecord(
            step=self.step,
            seconds=self.seconds,
            losses=losses,
            gradient_norms=norms,
            learning_rates=rates,
            images=self.config.batch_size,
            peak_memory=largest_peak_memory(self.accelerator) if logged else {},
        )

    def _run_phase(self, index: int, phase: Phase, batches: list[Batch]) -> tuple[dict[str, float], float]:
        optimizer = self.networks.optimizers[phase.network]
        sums: dict[str, Tensor] = {}
        with self.networks.training(phase.network):
            for micro, batch in enumerate(batches):
                last = micro == len(batches) - 1
                with self.networks.synchronizing(phase.network if last else None):
                    terms = self._backward(index, phase, batch, micro)
                for name, value in terms.items():
                    sums[name] = sums[name] + value if name in sums else value
            means = self._finite_means(phase, sums)
            self.accelerator.unscale_gradients(optimizer)
            clip, own = self.config.gradient_clip, self.config.optimizer_of(phase.network)
            limit = clip if clip is not None and own.clipped else math.inf
            parameters = self.networks.states[phase.network].parameters.values()
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()
            # The loss scaler of fp16 meets infinities on purpose, skips the step and lowers its scale.
            if not math.isfinite(norm) and self.accelerator.scaler is None:
                self._fail(f"the gradient of network '{phase.network}' is {norm}")
            rate = own.lr * learning_rate_factor(self.config, self.step, phase.network)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        return means, norm

    def _backward(self, index: int, phase: Phase, batch: Batch, micro: int) -> dict[str, Tensor]:
        """Gradients of one micro-batch; returns its loss terms divided by the number of micro-batches."""
        samples = sample_numbers(self.config, self.share, self.step, micro)
        random = SampleRandom(self.config.seed, "loss", self.step, index, samples=samples)
        terms = phase.loss(self.networks.callables, batch, random)
        scaled = {name: value / self.config.accumulation for name, value in terms.items()}
        self.accelerator.backward(torch.stack(list(scaled.values())).sum())
        for name, tensor in batch.items():  # a graph kept for the next phase would be a leak, never a gradient
            batch[name] = tensor.detach()
        return {name: value.detach() for name, value in scaled.items()}

    def _finite_means(self, phase: Phase, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over processes, in one exchange; all processes stop together when one of them saw nan or inf."""
        values = self.accelerator.reduce(torch.stack(list(terms.values())).float(), reduction="mean").tolist()
        means: dict[str, float] = dict(zip(terms, values, strict=True))
        for name, value in means.items():
            if not math.isfinite(value):
                self._fail(f"loss term '{phase.network}.{name}' is {value}")
        return means

    def _any(self, mine: bool) -> bool:
        """True if it is in any process: signals reach processes at different steps, and all stop together."""
        if self.share.processes == 1:
            return mine
        return bool(self.accelerator.reduce(torch.tensor(float(mine), device=self.accelerator.device)).item())

    def _check_same_start(self) -> None:
        """Processes on another machine see the checkpoints only if the folder is shared."""
        if self.share.processes == 1:
            return
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            found = ", ".join(str(step) for step in sorted(set(steps)))
            raise UserError(
                f"{self.checkpoints.folder}: processes would start at different steps ({found}); "
                "machines that train together need one folder that all of them see"
            )

    def _fail(self, what: str) -> None:
        latest = self.checkpoints.latest()
        kept = f"the last good state is {latest.path}" if latest else "no checkpoint had been written yet"
        raise OneStepSRError(f"step {self.step + 1}: {what}; training stopped, {kept}")

    def _after_iteration(self, record: StepRecord, *, stopping: bool) -> None:
        if not self.accelerator.is_main_process:
            return
        self.hooks.on_step(record)
        finished = self.step == self.config.steps
        if finished or self.step % self.hooks.validation_every == 0:
            self.hooks.on_validation(self.step, self.networks)
        minutes = (time.monotonic() - self._saved) / 60
        due = self.step % self.config.checkpoint_steps == 0 or minutes >= self.config.checkpoint_minutes
        if finished or due or stopping:
            self.save()

    def save(self) -> Path:
        """Write a checkpoint of the present state."""
        scaler = self.accelerator.scaler
        record = {
            "seconds": self.seconds,
            "processes": self.accelerator.num_processes,
            "identity": self.identity,
            "photos": self.photos,
            "memory": self.hooks.memory,
            "frozen_weights": self.networks.fingerprints,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        path = self.checkpoints.save(self.step, collect(self.networks.states), record)
        self._saved = time.monotonic()
        return path


def build_accelerator(config: TrainConfig) -> Accelerator:
    """One accelerator per process; the loop itself accumulates gradients."""
    wrapping = DistributedDataParallelKwargs(
        # Buffers change in the forward pass of some networks; overwriting them between two passes breaks gradients.
        broadcast_buffers=False,
        find_unused_parameters=config.find_unused_parameters,
    )
    # The others wait while the first process validates, exports and saves.
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    handlers = [wrapping, waiting]
    return Accelerator(
        # Left to itself, Accelerate makes processes on a machine without a GPU train one by one, each the whole batch.
        cpu=trains_on_cpu(config),
        mixed_precision=config.mixed_precision,
        # Given, because otherwise a launcher's number of micro-batches would divide the gradients once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=handlers,
    )


def trains_on_cpu(config: TrainConfig) -> bool:
    """Tell whether a run on this machine uses no accelerator, by its settings or for lack of one."""
    return config.device == "cpu" or not torch.accelerator.is_available()

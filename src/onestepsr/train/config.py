"""Settings of the training loop itself: everything under ``train:`` in a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from onestepsr.core.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW on one network (Loshchilov & Hutter, "Decoupled Weight Decay Regularization")."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """``adamw8bit`` keeps the two running means in 8 bits per value, in blocks with a scale each (Dettmers et al.,
    "8-bit Optimizers via Block-wise Quantization"): 2 bytes per parameter instead of 8. Needs bitsandbytes."""
    lr: float = 1e-4
    """Peak learning rate, scaled by the schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    weight_decay: float = 0.01
    """Decoupled weight decay, multiplied by the learning rate in each step."""
    eps: float = 1e-8
    """Added to the denominator."""

    def __post_init__(self) -> None:
        if not self.lr > 0.0 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"need lr > 0 and betas in [0, 1), got lr={self.lr} betas={self.betas}")
        if self.weight_decay < 0.0 or self.eps <= 0.0:
            raise ValueError(f"need weight_decay >= 0 and eps > 0, got {self.weight_decay} and {self.eps}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Factor on every network's learning rate as a function of the step."""

    kind: Literal["constant", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the factor rises linearly to 1."""
    final_ratio: float = 0.0
    """Factor that ``cosine`` reaches in the last step; ``constant`` has no use for it."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0.0 <= self.final_ratio <= 1.0:
            raise ValueError(f"need warmup_steps >= 0 and final_ratio in [0, 1], got {self}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of the loop."""

    steps: int
    """Iterations in total; every phase of the method takes at most one optimiser step in each."""
    batch_size: int = 16
    """Samples per optimiser step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches per optimiser step: more of them need less memory for the same gradient."""
    seed: int = 0
    """Start of every random number of the run: initial weights, data, and noise inside the losses."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser of each network that ``optimizers`` does not name."""
    optimizers: dict[str, OptimizerConfig] = field(default_factory=dict)
    """Optimiser by network name; a recipe may give some of the fields, the rest comes from ``optimizer``."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule of all networks."""
    gradient_clip: float | None = 1.0
    """Largest gradient norm of a network; none leaves gradients as they are."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, reached by the warm-up min(decay, (1 + step) / (10 + step))."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Type in which the forward passes are computed; weights, optimiser and average stay in float32."""
    frozen_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which linear and convolution layers that are not trained are kept, and computed in. What is trained
    (adapters, heads, prompts) stays in float32, and so does the feature network of a perceptual loss. 16 bits halve
    the memory of a frozen backbone."""
    channels_last: bool = False
    """Keep weights and images in NHWC memory order: faster convolutions with bf16 on recent hardware."""
    device: Literal["auto", "cpu"] = "auto"
    """Train on the accelerator when there is one, or on the CPU whatever there is."""
    threads: int = 0
    """CPU threads of the arithmetic; 0 leaves the choice to PyTorch. Bit-exact resume needs the same number."""
    num_workers: int = 0
    """Processes that prepare batches, each with one thread; 0 prepares them in the training process."""
    find_unused_parameters: bool = False
    """Needed with several processes when some trained parameters take no part in a step."""
    log_every: int = 50
    """Steps between two log records."""
    checkpoint_minutes: float = 15.0
    """Longest time between two checkpoints."""
    checkpoint_steps: int = 1000
    """Most steps between two checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "threads", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.checkpoint_minutes <= 0 or not 0.0 <= self.ema_decay < 1.0:
            raise ValueError("need checkpoint_minutes > 0 and ema_decay in [0, 1)")
        if self.gradient_clip is not None and self.gradient_clip <= 0:
            raise ValueError(f"gradient_clip must be above 0 or null, got {self.gradient_clip}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}")

    def optimizer_of(self, network: str) -> OptimizerConfig:
        """Optimiser settings of ``network``."""
        return self.optimizers.get(network, self.optimizer)

    def micro_batch(self, processes: int) -> int:
        """Samples that one process handles at a time."""
        share = processes * self.accumulation
        if self.batch_size % share:
            raise UserError(
                f"train.batch_size: {self.batch_size} does not divide among {processes} processes "
                f"with {self.accumulation} micro-batches each; take a multiple of {share}"
            )
        return self.batch_size // share

    def check_networks(self, networks: Iterable[str]) -> None:
        """Refuse optimiser settings for a network that the method does not train."""
        known = sorted(networks)
        for name in self.optimizers:
            if name not in known:
                raise UserError(f"train.optimizers.{name}: no such network: {did_you_mean(name, known)}")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """How often a run is looked at, and on how many images; none of it changes the weights."""

    every: int = 1000
    """Steps between two validations; the last step is always followed by one."""
    images: int = 8
    """Validation samples, always the first ones."""
    rows: int = 4
    """How many of them the preview image shows."""
    best: Literal["psnr_y", "ssim_y", "dists", "lpips"] | None = "psnr_y"
    """Score by which ``best.safetensors`` is chosen; null keeps the newest model alone, as adversarial training needs:
    the sharpest of its states is rarely the one with the highest PSNR. ``dists`` and ``lpips`` take published
    weights."""

    def __post_init__(self) -> None:
        for name in ("every", "images", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

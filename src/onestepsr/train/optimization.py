"""What turns gradients into weights: optimiser, learning-rate schedule, exponential moving average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onestepsr.core.errors import MissingExtra
from onestepsr.train.config import OptimizerConfig, TrainConfig

EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4096, 256
"""The 8-bit optimiser keeps smaller tensors in float32; the others have a scale per block of values."""


def trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with ``requires_grad``, by name, shared ones once."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser that ``config`` names, over ``parameters``."""
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "eps": config.eps,
    }
    trained = list(parameters.values())
    if config.kind == "adamw":  # the fused kernel does the whole step in one pass over memory
        return torch.optim.AdamW(trained, fused=True, **settings)
    for parameter in trained:  # its kernels count values in memory order, which must not change under them
        parameter.data = parameter.data.contiguous()
    optimizer: torch.optim.Optimizer = _eight_bit_adamw()(trained, **settings)
    return optimizer


def require_optimizer(config: OptimizerConfig) -> None:
    """Report a missing package before anything long starts."""
    if config.kind == "adamw8bit":
        _eight_bit_adamw()


def optimizer_bytes(config: OptimizerConfig, values: int) -> int:
    """Memory of the optimiser's state for a parameter tensor of so many values."""
    if config.kind == "adamw" or values < EIGHT_BIT_FROM:
        return 8 * values
    return 2 * values + 8 * math.ceil(values / EIGHT_BIT_BLOCK)


def _eight_bit_adamw() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingExtra("train.optimizer.kind 'adamw8bit'", "eightbit") from error
    return AdamW8bit


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Factor on the learning rate in iteration ``step`` (0-based): linear warm-up, then constant or half a cosine."""
    schedule = config.schedule
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return 1.0
    span = max(1, config.steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    return schedule.final_ratio + (1.0 - schedule.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def ema_decay(decay: float, step: int) -> float:
    """Decay after iteration ``step`` (0-based): a young average forgets its random start quickly."""
    return min(decay, (1 + step) / (10 + step))


class MovingAverage:
    """Float32 average of a network's trainable parameters; everything else is taken from the network itself."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = dict(parameters)
        self.values = {name: parameter.detach().clone().float() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- d * average + (1 - d) * weights, with d of :func:`ema_decay`."""
        weight = 1.0 - ema_decay(self.decay, step)
        current = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.values.values()), current, weight)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Replace the average by saved values."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the network carry the averaged weights for a while."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._write(self.values)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

"""Training methods: named networks and the optimiser steps taken on them.

A method is data for the one loop in :mod:`onestepsr.train.trainer`, never a subclass of it. Losses see the networks
through a mapping of callables, because the loop may have wrapped each of them for several processes: a wrapped network
is only ever called, and never reached through (that would skip gradient synchronisation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.core.rng import generator
from onestepsr.imaging.resize import bicubic
from onestepsr.models.architectures import describe
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.lora import merged_state_dict

if TYPE_CHECKING:
    from onestepsr.data.datasets import DataConfig
    from onestepsr.prompts.embedder import EmbeddingCache, PromptEmbedder

Networks = Mapping[str, Callable[..., Any]]
"""Every network of a method by name, trainable ones possibly wrapped: call them, nothing else."""

Batch = dict[str, Tensor]
"""``hr`` (N, 3, H, W) and, for super-resolution, ``lr`` (N, 3, H/s, W/s), RGB in [0, 1]; where photos have texts
``prompt`` (N, L, C), their embeddings.

A phase may leave detached tensors here for the phases after it in the same iteration: D3SR's discriminator judges the
latents that the generator phase has just made.
"""


class SampleRandom:
    """The random numbers of one phase in one iteration: every sample of the batch has a stream of its own.

    A sample draws the same numbers whichever process and micro-batch it falls to, so that a run over several processes,
    or with accumulated micro-batches, computes what one process would.
    """

    def __init__(self, *path: int | str, samples: Sequence[int]) -> None:
        """``path`` names the purpose, such as (seed, "loss", step, phase); ``samples`` are global sample numbers."""
        self._streams = [generator(*path, number) for number in samples]

    def __len__(self) -> int:
        """N, the number of samples."""
        return len(self._streams)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape (N, ...), device and type of ``like``; drawn on the CPU."""
        drawn = [torch.randn(like.shape[1:], generator=stream) for stream in self._streams]
        return torch.stack(drawn).to(like.device, like.dtype)

    def integers(self, low: int, high: int) -> Tensor:
        """Integers (N,) from ``low`` to ``high`` - 1, on the CPU."""
        return torch.cat([torch.randint(low, high, (1,), generator=stream) for stream in self._streams])

    def uniform_noise(self, like: Tensor) -> Tensor:
        """Numbers from U[0, 1) of the shape (N, ...), device and type of ``like``; drawn on the CPU."""
        drawn = [torch.rand(like.shape[1:], generator=stream) for stream in self._streams]
        return torch.stack(drawn).to(like.device, like.dtype)

    def uniform(self) -> Tensor:
        """Numbers (N,) from U[0, 1), on the CPU."""
        return torch.cat([torch.rand(1, generator=stream) for stream in self._streams])


LossFn = Callable[[Networks, Batch, SampleRandom], dict[str, Tensor]]
"""Scalar loss terms of one phase by name, already weighted: their sum is what is differentiated.

Each term is a mean over samples, and :class:`SampleRandom` is the only source of randomness: that is what makes the
number of processes and micro-batches a matter of memory alone.
"""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One optimiser step on one named network."""

    network: str
    """Key in :attr:`Method.networks`."""
    loss: LossFn
    every: int = 1
    """Run in every ``every``-th iteration only."""
    start: int = 0
    """First iteration in which the phase runs."""
    stop: int | None = None
    """First iteration in which it no longer runs."""

    def runs_at(self, step: int) -> bool:
        """Tell whether the phase takes part in iteration ``step`` (0-based)."""
        in_range = step >= self.start and (self.stop is None or step < self.stop)
        return in_range and (step - self.start) % self.every == 0


@dataclass(frozen=True, kw_only=True)
class Method:
    """Networks, phases and what to show and export, built by a method's ``build`` function."""

    networks: dict[str, nn.Module]
    """Trainable networks. Parameters with ``requires_grad=False`` stay as they are."""
    phases: tuple[Phase, ...]
    optional: frozenset[str] = frozenset()
    """Names that trainable networks have with other settings of the method: a recipe's optimisers may name them too, so
    that one setting alone leaves a network out."""
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    """Networks without optimiser, without wrapper and always in eval mode."""
    ema: tuple[str, ...] = ()
    """Names of the networks of which an exponential moving average is kept."""
    preview: Callable[[Networks, Batch], dict[str, Tensor]] | None = None
    """Validation images by column title, each (N, 3, H, W) in [0, 1], for example LR | SR | HR. No gradients."""
    export: Callable[[Mapping[str, nn.Module]], Exported] | None = None
    """Turns unwrapped networks (EMA weights where kept) into what ``export`` writes."""
    embedder: Callable[[EmbeddingCache], PromptEmbedder] | None = None
    """Makes the embedder of photos' texts, which become the batch's ``prompt``, from the cache of embeddings; none
    where the networks read no text or learn their prompt."""
    check_texts: Callable[[Sequence[str], EmbeddingCache], None] | None = None
    """Raises for these texts what ``embedder`` would, and computes nothing: the dry run's replacement."""
    targets: Callable[[Any, DataConfig, int], Any] | None = None
    """Adds further images to the training samples: maps a dataset, its configuration and seed to the dataset with them,
    whose ``fill()``, if it is a :class:`onestepsr.methods.shared.taught.TaughtPool`, is called before training."""
    scale: int | None = None
    """Factor between the sides of ``hr`` and ``lr`` that the networks are made for; none where they take any."""
    hr_multiple: int = 1
    """Sides of ``hr`` must be multiples of this."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Weights to ship: a state dict, the architecture that reads it and its configuration."""

    state_dict: dict[str, Tensor]
    architecture: str
    config: dict[str, Any]
    beside: Mapping[str, Exported] = field(default_factory=dict)
    """Further files by a word in their name: with ``adapters``, ``model.adapters.safetensors`` joins
    ``model.safetensors``."""


def preview_columns(sr: Tensor, batch: Batch, scale: int) -> dict[str, Tensor]:
    """Columns of :attr:`Method.preview` for a restored batch: LR enlarged ``scale`` times, SR and HR, (N, 3, H, W)."""
    return {"LR (bicubic)": bicubic(batch["lr"], scale).clamp(0, 1), "SR": sr.clamp(0, 1), "HR": batch["hr"]}


# ---- Registry --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """A registered method: the configuration class of its recipe and the function that builds it."""

    name: str
    config: type[Any]
    build: Callable[[Any], Method]
    needs_lr: bool
    """Batches must carry degraded images beside the HR ones."""


_METHODS: dict[str, MethodEntry] = {}
Build = TypeVar("Build", bound=Callable[[Any], Method])


def register(name: str, config: type[Any], *, needs_lr: bool = True) -> Callable[[Build], Build]:
    """Add the decorated function as the method ``name``; a second one of the same name is a defect."""

    def add(build: Build) -> Build:
        if name in _METHODS:
            raise ValueError(f"method '{name}' is registered twice")
        _METHODS[name] = MethodEntry(name=name, config=config, build=build, needs_lr=needs_lr)
        return build

    return add


def get_method(name: str) -> MethodEntry:
    """The registered method called ``name``."""
    if name not in _METHODS:
        raise UserError(f"unknown method '{name}': {did_you_mean(name, _METHODS)}")
    return _METHODS[name]


def method_names() -> list[str]:
    """Names of all registered methods."""
    return sorted(_METHODS)


# ---- Helpers of several methods --------------------------------------------------------------------------------------


def check_timestep(timestep: int, backbone: OneStepLatentGenerator, name: str) -> None:
    """Refuse a step T_L that the diffusion of ``backbone``, called ``name`` by the user, does not have."""
    last = backbone.schedule.steps - 1
    if not 0 <= timestep <= last:
        raise UserError(f"config.timestep: {timestep}, but {name} has steps from 0 to {last}")


def checkpoint_gradients(*networks: nn.Module) -> None:
    """Let networks compute activations again in the backward pass; :class:`UserError` for one that cannot."""
    for network in networks:
        enable = getattr(network, "enable_gradient_checkpointing", None)
        if enable is None:
            raise UserError(f"gradient_checkpointing: a {type(network).__name__} is too small to offer it")
        enable()


def exported(generator: nn.Module, beside: Mapping[str, Exported] | None = None) -> Exported:
    """A trained generator as it is shipped, its adapters merged; ``beside`` are further files of it."""
    architecture, config = describe(generator)
    state = merged_state_dict(generator)
    return Exported(state_dict=state, architecture=architecture, config=config, beside=beside or {})

"""What each network of a generator takes of a tile, so that encoder, UNet and decoder can have tiles of their own.

A generator that offers this has ``stage_demands(dtype)``, ``latent_channels`` and a method for each of the stages:
``encode_lr(lr)``, ``restore_latent(latent, lr)`` and ``decode(latent)``. The first two may take ``rng``, ``origin`` and
``prompt_embedding`` as its ``forward`` does. Between the stages the latents of all tiles are joined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn

Stage = Literal["encode", "unet", "decode"]


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """What a network takes of a tile, in latent positions."""

    per_cell: float
    """Peak bytes per position of the feature maps, without gradients."""
    balance: float = math.inf
    """Positions of a tile at which attention over all of them takes as long as everything else."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What a stage takes of a tile, in LR pixels."""

    per_pixel: float
    """Peak bytes per pixel of the feature maps."""
    multiple: int
    """Tiles start at multiples of this: of the encoder, and in every stage, of an LR image's latent positions."""
    balance: float = math.inf
    """Pixels of a tile at which attention over all of it takes as long as everything else."""


@runtime_checkable
class AutoencoderWithMemoryCost(Protocol):
    """An autoencoder whose halves can have tiles of their own."""

    factor: int
    latent_channels: int

    def network_costs(self, dtype: torch.dtype) -> tuple[NetworkCost, NetworkCost]:
        """Those of encoder and decoder."""
        ...


@runtime_checkable
class UNetWithMemoryCost(Protocol):
    """A UNet that can have tiles of its own."""

    size_multiple: int

    def network_cost(self, dtype: torch.dtype) -> NetworkCost:
        """What it takes of a tile."""
        ...


def stage_costs(
    autoencoder: nn.Module, unet: nn.Module, scale: int, dtype: torch.dtype
) -> dict[Stage, StageCost] | None:
    """The demands of a generator of these networks, which enlarges by ``scale``; None if it cannot have tiles of their
    own: where a network does not tell, or a latent position is smaller than an LR pixel."""
    if not isinstance(autoencoder, AutoencoderWithMemoryCost) or not isinstance(unet, UNetWithMemoryCost):
        return None
    if autoencoder.factor % scale:
        return None
    cell = autoencoder.factor // scale
    encoder, decoder = autoencoder.network_costs(dtype)
    networks: dict[Stage, tuple[NetworkCost, int]] = {
        "encode": (encoder, 1),
        "unet": (unet.network_cost(dtype), unet.size_multiple),
        "decode": (decoder, 1),
    }
    return {
        stage: StageCost(per_pixel=network.per_cell / cell**2, multiple=cells * cell, balance=network.balance * cell**2)
        for stage, (network, cells) in networks.items()
    }

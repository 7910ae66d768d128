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
class NetworkDemand:
    """What a network takes of a tile, in latent positions."""

    per_cell: float
    """Peak bytes per position of the feature maps, without gradients."""
    balance: float = math.inf
    """Positions of a tile at which attention over all of them takes as long as everything else."""


@dataclass(frozen=True, kw_only=True)
class StageDemand:
    """What a stage takes of a tile, in LR pixels."""

    per_pixel: float
    """Peak bytes per pixel of the feature maps."""
    multiple: int
    """Tiles start at multiples of this: of the encoder, and in every stage, of an LR picture's latent positions."""
    balance: float = math.inf
    """Pixels of a tile at which attention over all of it takes as long as everything else."""


@runtime_checkable
class DemandingAutoencoder(Protocol):
    """An autoencoder whose halves can have tiles of their own."""

    factor: int
    latent_channels: int

    def network_demands(self, dtype: torch.dtype) -> tuple[NetworkDemand, NetworkDemand]:
        """Those of encoder and decoder."""
        ...


@runtime_checkable
class DemandingUNet(Protocol):
    """A UNet that can have tiles of its own."""

    size_multiple: int

    def network_demand(self, dtype: torch.dtype) -> NetworkDemand:
        """What it takes of a tile."""
        ...


def stage_demands(
    autoencoder: nn.Module, unet: nn.Module, scale: int, dtype: torch.dtype
) -> dict[Stage, StageDemand] | None:
    """The demands of a generator of these networks, which enlarges by ``scale``; None if it cannot have tiles of their
    own: where a network does not tell, or a latent position is smaller than an LR pixel."""
    if not isinstance(autoencoder, DemandingAutoencoder) or not isinstance(unet, DemandingUNet):
        return None
    if autoencoder.factor % scale:
        return None
    cell = autoencoder.factor // scale
    encoder, decoder = autoencoder.network_demands(dtype)
    networks: dict[Stage, tuple[NetworkDemand, int]] = {
        "encode": (encoder, 1),
        "unet": (unet.network_demand(dtype), unet.size_multiple),
        "decode": (decoder, 1),
    }
    return {
        stage: StageDemand(
            per_pixel=network.per_cell / cell**2, multiple=cells * cell, balance=network.balance * cell**2
        )
        for stage, (network, cells) in networks.items()
    }

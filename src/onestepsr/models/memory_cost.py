"""Memory and attention cost of networks and generators per unit of a tile, from which tiles are planned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["encode", "unet", "decode"]
STAGES: tuple[Stage, ...] = ("encode", "unet", "decode")
"""The stages of a latent generator, in the order in which they run."""


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """Cost of one network, in latent positions."""

    bytes_per_position: float
    """Peak bytes of the feature maps per position, without gradients."""
    attention_breakeven: float = math.inf
    """Positions of a tile at which attention over all of them takes as long as everything else."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Cost of one stage of a generator, in LR pixels."""

    bytes_per_pixel: float
    """Peak bytes of the feature maps per pixel."""
    multiple: int = 1
    """Tiles start at multiples of this; that of the encoder is the side of a latent position."""
    attention_breakeven: float = math.inf
    """Pixels of a tile at which attention over all of it takes as long as everything else."""
    takes_batches: bool = True
    """Several tiles of one image may be given together; not where each draws noise of its own."""


@dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """Cost of a generator, in LR pixels."""

    bytes_per_pixel: float
    """Peak bytes of the feature maps per pixel when all stages run on one tile."""
    stages: Mapping[Stage, StageCost] = field(default_factory=dict)
    """Cost of the stages that can have tiles of their own: all three or none."""
    latent_bytes_per_pixel: float = 0.0
    """Bytes per pixel of a joined latent in float32, of which two are kept between stages."""

"""What a generator takes of memory and time for an image, as it says itself, and how large an image is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from onestepsr.inference.tile_runner import STAGES, WHOLE, takes_batches
from onestepsr.models.memory_cost import Stage, StageCost

DEFAULT_MEMORY_PER_PIXEL = 6000.0
"""Peak bytes per input pixel assumed of a generator that does not tell, at 4 bytes per number."""
MAX_OVERHEAD_UNTILED: dict[Stage, float] = {"encode": 1.6, "unet": 1.25, "decode": 1.6}
"""So much of the work of tiles is done for the whole, which has no joins, where attention makes tiles less work. Before
tiles of the autoencoder, a reduced copy of the image goes through all of the network for the sake of its norms."""
MAX_OVERHEAD_CONTEXT: dict[Stage, float] = {"encode": 1.0, "unet": 1.08, "decode": 1.0}
"""So much of the least work is done for larger tiles of the UNet: it makes up detail, which joins should interrupt as
rarely as may be, and takes less memory than the decoder. OSEDiff's code has tiles of 96 x 96 latent positions; so have
Stable Diffusion's networks by this."""
COLOUR_BYTES = 200
"""Peak bytes per input pixel that the colour fix takes, at scale 4."""


@dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """What a generator takes and asks for; :meth:`of` reads it from the generator."""

    name: str
    """What the model is called."""
    dtype: torch.dtype
    """Number format that the rest is said of."""
    scale: int
    """Output side / input side."""
    weights: int
    """Bytes of its weights."""
    per_pixel: float
    """Peak bytes per input pixel of its feature maps and of the colour fix."""
    multiple: int = 1
    """Tiles start at multiples of this."""
    largest_tile: int | None = None
    """Side that tiles chosen by memory stay below."""
    takes_batches: bool = True
    """Whether it may be given several tiles of one image at once."""
    balance: float = math.inf
    """Input pixels of a tile at which attention over all of it takes as long as everything else."""
    work_for_whole: float = 1.0
    """The whole is preferred to tiles that take less work until it takes so many times theirs."""
    work_for_context: float = 1.0
    """So many times the least work is done for tiles that are as large as this allows."""
    joined_per_pixel: float | None = None
    """Bytes per input pixel that tiles are joined in; None: an image in float32."""
    padding: int = 1
    """Sides are padded to multiples of this even where tiles start at others."""
    latents_per_pixel: float = 0.0
    """Bytes per input pixel of the latents that are kept between stages."""
    stages: dict[Stage, MemoryCost] | None = None
    """What encoder, UNet and decoder take and ask for, if they can have tiles of their own."""

    @staticmethod
    def of(generator: nn.Module, dtype: torch.dtype, name: str) -> MemoryCost:
        """The demand of ``generator`` once its weights are in ``dtype``."""
        whole = MemoryCost._of_whole(generator, dtype, name)
        tell = getattr(generator, "stage_costs", None)
        told: dict[Stage, StageCost] | None = tell(dtype) if callable(tell) else None
        if told is None:
            return whole
        latent = 4.0 * int(cast(int, generator.latent_channels)) / told["encode"].multiple ** 2
        stages: dict[Stage, MemoryCost] = {
            stage: replace(
                whole,
                per_pixel=demand.per_pixel + (_color_fix_cost(whole.scale) if stage == "decode" else 0.0),
                multiple=demand.multiple,
                balance=demand.balance,
                work_for_whole=MAX_OVERHEAD_UNTILED[stage],
                work_for_context=MAX_OVERHEAD_CONTEXT[stage],
                largest_tile=None,
                takes_batches=takes_batches(generator, STAGES[stage]),
                padding=whole.multiple,
                joined_per_pixel=None if stage == "decode" else latent,
                latents_per_pixel=2 * latent,
            )
            for stage, demand in told.items()
        }
        return replace(whole, stages=stages)

    @staticmethod
    def _of_whole(generator: nn.Module, dtype: torch.dtype, name: str) -> MemoryCost:
        scale = int(cast(int, generator.scale))
        tell = getattr(generator, "memory_per_pixel", None)
        own = float(tell(dtype)) if callable(tell) else DEFAULT_MEMORY_PER_PIXEL * dtype.itemsize / 4
        largest = getattr(generator, "largest_tile", None)
        return MemoryCost(
            name=name,
            dtype=dtype,
            scale=scale,
            weights=sum(parameter.numel() for parameter in generator.parameters()) * dtype.itemsize,
            per_pixel=own + _color_fix_cost(scale),
            multiple=int(getattr(generator, "lr_multiple", 1)),
            largest_tile=None if largest is None else int(largest),
            takes_batches=takes_batches(generator, WHOLE),
        )


def _color_fix_cost(scale: int) -> float:
    """Peak bytes per input pixel that the colour fix takes."""
    return COLOUR_BYTES * scale**2 / 16


@dataclass(frozen=True, kw_only=True)
class InputSize:
    """The size of an image."""

    height: int
    """Rows."""
    width: int
    """Columns."""
    pixel_bytes: int = 3
    """Bytes of a pixel: samples times bytes per sample."""
    alpha_bytes: int = 0
    """Bytes of a pixel's transparency: those of one sample, or none."""

"""Options of upscaling an image, and the size of the result."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, cast, get_args

from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.imaging.color import ColorTransfer
from onestepsr.inference.tiling import OVERLAP, TileBlend

TileNorms = Literal["image", "tile"]
ColorFix = Literal["auto", ColorTransfer]
Alpha = Literal["bicubic", "network"]
Tile = int | Literal["auto", "off"]
SCALE_RANGE = (1, 8)
"""Smallest and largest factor between input and output along either axis."""
SMALLEST_TILE = 16
"""Smallest side of a tile that can be asked for, in input pixels."""


@dataclass(frozen=True, kw_only=True)
class UpscaleOptions:
    """Options of upscaling an image; the defaults suit photographs."""

    scale: float = 4.0
    """Output side / input side, 1 to 8; ignored when ``width`` or ``height`` is given."""
    width: int | None = None
    """Output columns; with ``height`` absent the aspect ratio is kept."""
    height: int | None = None
    """Output rows."""
    tile: Tile = "auto"
    """Tile side in input pixels; "auto" follows the free memory, "off" runs the whole image at once."""
    tile_batch: int | Literal["auto"] = "auto"
    """Tiles of one image that go through the network together, where it takes several; "auto" follows the free memory
    on a CUDA GPU and is 1 elsewhere."""
    memory: float | None = None
    """Most gigabytes (10^9 bytes) to plan with, on the device that computes: weights, feature maps and, on a CPU, the
    image and the enlarged one; what Python and its libraries take comes on top. None is what is free."""
    overlap: int = OVERLAP
    """Overlap of neighbouring tiles in input pixels, at most a third of a tile."""
    tile_blend: TileBlend = "smooth"
    """The way tiles are joined. "average" is that of ResShift and SinSR, for comparison: the plain mean where tiles
    overlap, and tiles at any pixel, whatever a network's stride; those of 512, 256 and 64 overlap by 64, 32 and 16."""
    tile_norms: TileNorms = "image"
    """Statistics of an autoencoder's group norms: those of the whole "image", so that its tiles equal the whole, at the
    price of a reduced copy that goes through the network first; or those of each "tile", as with
    ``tile_blend`` "average" and in a compiled network."""
    color_fix: ColorFix = "auto"
    """Colours that the output takes from the input: its low frequencies ("wavelet"), these where the network's differ
    by more than eight levels ("drift"), mean and deviation of each channel ("adain"), or none; "auto" is what suits the
    model."""
    alpha: Alpha = "bicubic"
    """The way transparency is enlarged: "bicubic" is smooth and adds nothing; "network" draws it as the colours are, as
    a gray image, which gives hard masks sharp edges and takes as long as the image itself."""
    seed: int | None = None
    """For generators that draw noise; None is 0. Others ignore it."""
    prompt_embedding: Tensor | None = field(default=None, compare=False, repr=False)
    """Embedding (1, 77, C) of a text about the image for a generator that reads text, see ``onestepsr.prompts``; None
    leaves it to the prompt that it was saved with. An error for other generators."""

    def __post_init__(self) -> None:
        if self.color_fix not in get_args(ColorFix):
            raise UserError(f"color fix '{self.color_fix}': accepted: {', '.join(get_args(ColorFix))}")
        if self.alpha not in get_args(Alpha):
            raise UserError(f"alpha '{self.alpha}': accepted: {', '.join(get_args(Alpha))}")
        if self.tile_norms not in get_args(TileNorms):
            raise UserError(f"tile norms '{self.tile_norms}': accepted: {', '.join(get_args(TileNorms))}")
        if self.tile_blend not in get_args(TileBlend):
            raise UserError(f"tile blend '{self.tile_blend}': accepted: {', '.join(get_args(TileBlend))}")
        if isinstance(self.tile, str) and self.tile not in ("auto", "off"):
            raise UserError(f"tile '{self.tile}': accepted: auto, off or a number of input pixels")
        if isinstance(self.tile, int) and self.tile < SMALLEST_TILE:
            raise UserError(f"tile {self.tile}: accepted: auto, off or {SMALLEST_TILE} input pixels and more")
        if self.tile_batch != "auto" and not (isinstance(self.tile_batch, int) and self.tile_batch >= 1):
            raise UserError(f"tile batch {self.tile_batch}: accepted: auto or 1 tile and more")
        if self.memory is not None and not 0.0 < self.memory < math.inf:  # also refuses NaN
            raise UserError(f"memory {self.memory:g}: accepted: more than 0 gigabytes")
        if self.overlap < 0:
            raise UserError(f"overlap {self.overlap}: accepted: 0 input pixels and more")


def target_size(width: int, height: int, options: UpscaleOptions) -> tuple[int, int]:
    """Output (width, height): input x factor, rounded half up, at least 1. Raises UserError beyond 1x to 8x."""
    low, high = SCALE_RANGE
    wide, tall = options.width, options.height
    if wide is None and tall is None:
        if not low <= options.scale <= high:  # also refuses NaN
            raise UserError(f"scale {options.scale:g}: accepted: {low} to {high}")
        factor = Fraction(str(options.scale))  # the decimal number that was written, not its binary neighbour
        return _round(width * factor), _round(height * factor)
    for name, new, old in (("width", wide, width), ("height", tall, height)):
        if new is not None and not low * old <= new <= high * old:
            raise UserError(f"{name} {new}: the input has {old}, accepted: {low * old} to {high * old}")
    return (
        wide if wide is not None else _round(Fraction(cast(int, tall) * width, height)),
        tall if tall is not None else _round(Fraction(cast(int, wide) * height, width)),
    )


def _round(value: Fraction) -> int:
    return max(1, math.floor(value + Fraction(1, 2)))


def tile_of(text: str) -> Tile:
    """``--tile`` as :class:`UpscaleOptions` takes it, which refuses what is neither a number nor one of the words."""
    return int(text) if text.removeprefix("-").isdecimal() else cast(Tile, text)

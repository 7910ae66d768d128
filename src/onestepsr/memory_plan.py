"""How much of a picture goes through a network at once, so that the memory suffices.

What a network takes follows from what it says of itself: peak bytes per input pixel, measured for each kind of network
as growth of the resident memory. One tile shape serves encoder, UNet and decoder (``docs/benchmark.md`` says why).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from onestepsr.errors import UserError
from onestepsr.machine import free_memory
from onestepsr.tiling import PUBLISHED_OVERLAPS, Sides, TileJoin, join_of, starts_along
from onestepsr.upscale_options import UpscaleOptions, target_size

DEFAULT_MEMORY_PER_PIXEL = 6000.0
"""Peak bytes per input pixel assumed of a generator that does not tell, at 4 bytes per number."""
COLOUR_BYTES = 200
"""Peak bytes per input pixel that the colour fix takes, at scale 4."""
LARGEST_TILE = {"cpu": 320, "cuda": 768}
"""Side of a square tile beyond whose area a larger one saves no time worth its memory: the overlap costs a fifth or
less."""
WORK_FOR_MEMORY = 1.03
"""So much of the least work is done for smaller tiles, which take less memory."""
LARGEST_BATCH = 8
"""So many tiles at once are enough to keep a GPU busy; beyond it they only take memory."""
SHARE = 0.6
"""Part of the free memory that is planned with; the rest is for what the estimate does not know of."""
BANDS = 1.5
"""Bytes of joined rows over those of one row of tiles: the row itself and what of it the next row overlaps."""
FIRST_USE = 50_000_000
"""Bytes that the libraries themselves take once a network has run on a CPU, whatever its size: measured, with
``d3sr-tiny``."""
HELD_SHARE = 0.65
"""What the C library holds back of freed memory on a CPU, as part of what is worked with: blocks of many sizes come and
go, and the gaps between them stay. Measured with two threads: 1.3 GB of 2.1 with Stable Diffusion's networks in a tile
of 256, which would be 0.1 if freed memory went back to the system at once; 0.2 of 0.4 with ``d3sr-tiny``."""
RESIZE_BYTES, RESIZE_BAND_BYTES = 12, 32_000_000
"""Bytes per output pixel that resampling works with, and the most of them: it goes over the picture in bands."""
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|alloc_failed|bad_alloc"
    r"|could not create a (primitive(?! desc)|memory)",  # all that oneDNN says when an allocation of its own fails
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a picture goes through the network."""

    tile: Sides
    """Height and width of a tile in input pixels; the picture's where one tile is all of it."""
    tiles: int
    """How many there are."""
    batch: int
    """Tiles that go through the network together."""
    pixels: int
    """Input pixels that do so, padding included."""
    dtype: str
    """Number format of the network."""
    device: str
    """Where it runs."""
    expected_peak: int
    """Bytes that this takes on the device: weights, feature maps and, on a CPU, the picture and the enlarged one."""
    retries: int = 0
    """How often less had to be tried, because memory ran out."""

    def __str__(self) -> str:
        cut = "whole" if self.tiles == 1 else f"{self.tiles} tiles of {self.tile_name} pixels"
        batch = f", {self.batch} at once" if self.batch > 1 else ""
        tried = f", after running out of it {self.retries}x" if self.retries else ""
        where = f"{self.dtype} on {self.device}"
        return f"{cut}{batch}, {where}: about {self.expected_peak / 1e9:.2f} GB of memory{tried}"

    @property
    def tile_name(self) -> str:
        """Height and width of a tile as messages say them."""
        return "{}x{}".format(*self.tile)

    def as_json(self) -> dict[str, Any]:
        """Its fields by name; bytes as ``expected_peak``."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Demand:
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
    """Whether it may be given several tiles of one picture at once."""

    @staticmethod
    def of(generator: nn.Module, dtype: torch.dtype, name: str, *, takes_batches: bool = True) -> Demand:
        """The demand of ``generator`` once its weights are in ``dtype``."""
        scale = int(cast(int, generator.scale))
        tell = getattr(generator, "memory_per_pixel", None)
        own = float(tell(dtype)) if callable(tell) else DEFAULT_MEMORY_PER_PIXEL * dtype.itemsize / 4
        largest = getattr(generator, "largest_tile", None)
        return Demand(
            name=name,
            dtype=dtype,
            scale=scale,
            weights=sum(parameter.numel() for parameter in generator.parameters()) * dtype.itemsize,
            per_pixel=own + COLOUR_BYTES * scale**2 / 16,
            multiple=int(getattr(generator, "lr_multiple", 1)),
            largest_tile=None if largest is None else int(largest),
            takes_batches=takes_batches,
        )


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The size of a picture."""

    height: int
    """Rows."""
    width: int
    """Columns."""
    pixel_bytes: int = 3
    """Bytes of a pixel: samples times bytes per sample."""
    alpha_bytes: int = 0
    """Bytes of a pixel's transparency: those of one sample, or none."""


class Planner:
    """Chooses how a picture of one extent goes through one generator."""

    def __init__(self, extent: Extent, demand: Demand, options: UpscaleOptions, device: torch.device) -> None:
        self.extent, self.demand, self.options, self.device = extent, demand, options, device
        self.on_host = device.type != "cuda"
        self.free = free_memory(device)
        self.pictures = self._picture_bytes() if self.on_host else 0
        self.idle_pictures = self._idle_picture_bytes() if self.on_host else 0
        free_for_tiles = SHARE * min(self.free - self.pictures, (self.free - self.idle_pictures) / HELD_SHARE)
        allowed = math.inf
        if options.memory is not None:
            allowed = self._workable(options.memory * 1e9 - demand.weights)
        self.limited = allowed < free_for_tiles
        self.budget = min(allowed, free_for_tiles)
        """Bytes for feature maps and, on a CPU, for the rows that tiles are joined in."""

    def plan(self, most_pixels: int | None = None) -> Plan:
        """The plan; with ``most_pixels``, no more input pixels at once than these where tiles can be so small.

        :class:`UserError` if the memory, or ``options.memory``, does not suffice for the smallest tiles, or the latter
        not for those that ``options.tile`` asks for.
        """
        tile = self._tile()
        if most_pixels is not None and self._geometry(tile)[0] > most_pixels:
            side = max(math.isqrt(most_pixels), smallest_side(self.options))
            tile = (side, side)
        plan = self._of_tile(tile, most_pixels)
        limit = self.options.memory
        if limit is not None and plan.expected_peak > limit * 1e9:
            raise UserError(self._over_the_limit(plan, limit))
        return plan

    def _tile(self) -> Sides:
        height, width, wanted = self.extent.height, self.extent.width, self.options.tile
        whole = (height, width)
        if wanted == "off":
            return whole
        if wanted != "auto":
            return wanted, wanted
        together = 1 if self.options.tile_batch == "auto" else self.options.tile_batch
        side = largest_side(self.budget, together * self.demand.per_pixel, self._row_bytes())
        smallest = smallest_side(self.options)
        if side < smallest:
            self._require(smallest)
            side = smallest
        cells = side - side % self.demand.multiple  # tiles consist of whole cells, and would be rounded up
        side = cells if cells >= smallest else side
        side = min(side, max(LARGEST_TILE.get(self.device.type, 320), smallest), self.demand.largest_tile or side)
        if height * width <= side * side and self._needed(whole) <= self.budget:  # a long one is padded by more
            return whole
        if self.options.tile_blend == "average":
            side = max((known for known in PUBLISHED_OVERLAPS if known <= side), default=side)
        elif self.device.type == "cpu":
            return self._least_work(side, together)
        return side, side

    def _least_work(self, side: int, together: int) -> Sides:
        """The tiles of at most ``side`` x ``side`` pixels that have the fewest in all, or nearly, and are smallest.

        The last tile of a row is moved inward until it ends with the picture; of tiles that do not divide it, it would
        mostly do again what its neighbour has done. On a GPU one shape for all pictures is worth more: that is what
        gets compiled.
        """
        join = join_of((side, side), self.options.overlap, self.demand.multiple, self.options.tile_blend)
        padded, longest = self._padded(join), self.demand.largest_tile or math.inf
        choice: list[tuple[int, int, Sides]] = []
        for (height, rows), (width, columns) in itertools.product(*(self._divisions(n, join) for n in padded)):
            area = min(height, padded[0]) * min(width, padded[1])
            needed = together * area * self.demand.per_pixel + self._rows((height, width))
            if area <= side * side and needed <= self.budget and max(height, width) <= longest:
                choice.append((area * rows * columns, area, (height, width)))
        if not choice:
            return side, side
        good_enough = WORK_FOR_MEMORY * min(work for work, *_ in choice)
        return min((area, work, tile) for work, area, tile in choice if work <= good_enough)[2]

    def _divisions(self, length: int, join: TileJoin) -> Iterator[tuple[int, int]]:
        """Sides with which 1, 2, 3 ... tiles cover ``length``, each as small as their number allows, and how many."""
        cells = join.multiple
        # In smaller tiles, the overlap of ``join``, which is whole cells, would be more than a third of a side.
        smallest = max(smallest_side(self.options), 2 * cells, 3 * join.overlap)
        for count in range(1, length + 1):
            least = -(-(length + (count - 1) * join.overlap) // count)
            side = -(-max(least, smallest) // cells) * cells
            yield side, len(starts_along(length, side, join.overlap))
            if least <= smallest:
                return

    def _padded(self, join: TileJoin) -> Sides:
        height, width = self.extent.height, self.extent.width
        return -(-height // join.multiple) * join.multiple, -(-width // join.multiple) * join.multiple

    def _require(self, smallest: int) -> None:
        """Raise unless tiles of this side, or the whole of a smaller picture, fit."""
        needed = self._needed((smallest, smallest))
        if needed <= self.budget:
            return
        if self.limited and self.options.memory is not None:
            raise UserError(self._over_the_limit(self._of_tile((smallest, smallest), 0), self.options.memory))
        work = needed / SHARE
        in_all = max(work + self.pictures, HELD_SHARE * work + self.idle_pictures)
        raise UserError(
            f"not enough memory on {self.device}: {self.free / 1e9:.1f} GB free, about {in_all / 1e9:.1f} GB needed "
            f"for the smallest tile ({smallest} px): free some, or set --tile yourself"
        )

    def _needed(self, tile: Sides) -> float:
        """Bytes to work with for one tile at a time."""
        return self._geometry(tile)[0] * self.demand.per_pixel + self._rows(tile)

    def _of_tile(self, tile: Sides, most_pixels: int | None) -> Plan:
        area, tiles = self._geometry(tile)
        batch = self._batch(area, tiles, most_pixels)
        work = batch * area * self.demand.per_pixel + self._rows(tile)
        return Plan(
            tile=tile,
            tiles=tiles,
            batch=batch,
            pixels=batch * area,
            dtype=str(self.demand.dtype).removeprefix("torch."),
            device=str(self.device),
            expected_peak=round(self.demand.weights + self._held(work) + max(self.pictures + work, self.idle_pictures)),
        )

    def _geometry(self, tile: Sides) -> tuple[int, int]:
        """Input pixels of a tile, and how many tiles there are."""
        join = join_of(tile, self.options.overlap, self.demand.multiple, self.options.tile_blend)
        padded = self._padded(join)
        counts = (len(starts_along(*lengths, join.overlap)) for lengths in zip(padded, join.tile, strict=True))
        return math.prod(map(min, join.tile, padded)), math.prod(counts)

    def _batch(self, area: int, tiles: int, most_pixels: int | None) -> int:
        """Tiles at once: as many as fit, spread evenly over the batches."""
        if not self.demand.takes_batches:
            return 1
        wanted, most = self.options.tile_batch, 1
        if wanted != "auto":
            most = wanted
        elif self.device.type == "cuda":
            most = min(LARGEST_BATCH, int(self.budget / (area * self.demand.per_pixel)))
        if most_pixels is not None:
            most = min(most, most_pixels // area)
        return -(-tiles // -(-tiles // max(1, min(most, tiles))))

    def _picture_bytes(self) -> int:
        """Bytes of the picture, with its padded copy, and of the enlarged one; AdaIN keeps that in 16 bits too.

        With transparency there is one copy more, in which hidden pixels have the colour of their surroundings.
        """
        own, alpha, area = self.extent.pixel_bytes, self.extent.alpha_bytes, self.demand.scale**2
        fine = 6 if self.options.color_fix == "adain" else 0
        copies = 3 if alpha else 2
        return self.extent.height * self.extent.width * (copies * own + alpha + area * (own + fine))

    def _idle_picture_bytes(self) -> int:
        """Bytes of pictures while no tile is at work: before the first one, or after the last, whichever are more.

        Before, hidden pixels are given a colour, in float32. Afterwards transparency is enlarged, and what the network
        has made is resampled beside itself if another size is wanted.
        """
        height, width, scale = self.extent.height, self.extent.width, self.demand.scale
        own, alpha = self.extent.pixel_bytes, self.extent.alpha_bytes
        columns, rows = target_size(width, height, self.options)
        before = height * width * (17 * own // alpha + 6) if alpha else 0  # measured: 23 bytes of grey, 57 of RGB
        resampled = alpha if (columns, rows) == (width * scale, height * scale) else alpha + own
        after = height * width * scale**2 * own + rows * columns * resampled
        if resampled:
            after += min(RESIZE_BYTES * rows * columns, RESIZE_BAND_BYTES)
        return height * width * (own + alpha) + max(before, after)

    def _row_bytes(self) -> float:
        """Bytes of joined rows per input row of a tile: three float32 channels over the whole width."""
        return BANDS * 12 * self.demand.scale**2 * self.extent.width if self.on_host else 0.0

    def _rows(self, tile: Sides) -> float:
        return min(tile[0], self.extent.height) * self._row_bytes()

    def _held(self, work: float) -> float:
        """Bytes beyond those that are worked with."""
        return FIRST_USE + HELD_SHARE * work if self.on_host else 0.0

    def _workable(self, allowed: float) -> float:
        """Bytes that can be worked with such that they, what is held and the pictures are ``allowed``."""
        if not self.on_host:
            return allowed
        allowed -= FIRST_USE
        return min((allowed - self.pictures) / (1 + HELD_SHARE), (allowed - self.idle_pictures) / HELD_SHARE)

    def _over_the_limit(self, plan: Plan, limit: float) -> str:
        needed = math.ceil(plan.expected_peak / 1e8) / 10
        other = "" if self.options.tile == "auto" else ", or --tile auto"
        return (
            f"memory {limit:g} GB: {self.demand.name} in {plan.dtype} needs about {needed:g} GB for this picture with "
            f"tiles of {plan.tile_name} pixels; accepted: {needed:g} and more{other}"
        )


def smallest_side(options: UpscaleOptions) -> int:
    """Side of the smallest tiles chosen by memory: smaller ones would be mostly overlap."""
    return max(3 * options.overlap, 16)


def largest_side(budget: float, per_pixel: float, per_row: float = 0.0) -> int:
    """Side of the tiles, a multiple of 16, that takes ``budget`` bytes: side^2 x ``per_pixel`` + side x ``per_row``."""
    if budget <= 0:
        return 0
    root = math.sqrt(per_row**2 + 4 * per_pixel * budget) - per_row
    return int(root / (2 * per_pixel)) // 16 * 16


def smaller(plan: Plan, options: UpscaleOptions) -> int | None:
    """Input pixels to try at once after ``plan`` ran out of memory: half the side; None below the smallest tiles."""
    smallest = smallest_side(options)
    side = math.isqrt(plan.pixels)
    return None if side <= smallest else max(side // 2, smallest) ** 2


@contextmanager
def lack_of_memory_named(message: str) -> Iterator[None]:
    """Inside, memory that runs out is a :class:`UserError` with ``message``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, whatever the device says that with."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None

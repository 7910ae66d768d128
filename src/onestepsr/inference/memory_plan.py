"""How much of an image goes through a network at once, so that the memory suffices.

What a network takes follows from what it says of itself: peak bytes per input pixel, measured for each kind of network
as growth of the resident memory. Where encoder, UNet and decoder each tell, they have tiles of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from onestepsr.core.errors import UserError
from onestepsr.core.machine import free_memory
from onestepsr.inference.generator_cost import InputSize, MemoryCost
from onestepsr.inference.options import UpscaleOptions, target_size
from onestepsr.inference.tiling import OVERLAP, PUBLISHED_OVERLAPS, Sides, TileJoin, join_of, starts_along
from onestepsr.models.memory_cost import Stage

LARGEST_TILE = {"cpu": 320, "cuda": 768}
"""Side, at scale 4, of a square tile beyond whose area a larger one saves no time worth its memory: the overlap costs a
fifth or less. What takes time and memory is the size of the output."""
MAX_OVERHEAD_MEMORY = 1.03
"""So much of the least work is done for smaller tiles, which take less memory."""
LEAST_SIDE = 3 * OVERLAP
"""Side of a tile below which no network gets to see enough, whatever its attention takes."""
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
"""Bytes per output pixel that resampling works with, and the most of them: it goes over the image in bands."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """How an image goes through encoder, UNet or decoder."""

    tile: Sides
    """Height and width of a tile in input pixels."""
    tiles: int
    """How many there are."""
    batch: int
    """Tiles that go through the network together."""
    multiple: int
    """Input pixels at multiples of which tiles start, unless they are joined by plain averages."""

    @property
    def tile_name(self) -> str:
        """Height and width of a tile as messages say them."""
        return "{}x{}".format(*self.tile)

    def __str__(self) -> str:
        cut = "whole" if self.tiles == 1 else f"{self.tiles} tiles of {self.tile_name} pixels"
        return f"{cut}, {self.batch} at once" if self.batch > 1 else cut


@dataclass(frozen=True, kw_only=True)
class Plan(StagePlan):
    """How an image goes through the network. Where its stages have tiles of their own, these are the decoder's."""

    pixels: int
    """Input pixels that go through it together, padding included; as many as take the memory of the largest stage."""
    dtype: str
    """Number format of the network."""
    device: str
    """Where it runs."""
    expected_peak: int
    """Bytes that this takes on the device: weights, feature maps and, on a CPU, the image and the enlarged one."""
    retries: int = 0
    """How often less had to be tried, because memory ran out."""
    stages: dict[Stage, StagePlan] | None = None
    """Tiles of encoder, UNet and decoder; None where all three are done with one tile before the next."""

    def __str__(self) -> str:
        cut = super().__str__()
        if self.stages is not None:
            cut = "; ".join(f"{stage} {plan}" for stage, plan in self.stages.items())
        tried = f", after running out of it {self.retries}x" if self.retries else ""
        where = f"{self.dtype} on {self.device}"
        return f"{cut}, {where}: about {self.expected_peak / 1e9:.2f} GB of memory{tried}"

    def stage_plan(self) -> StagePlan:
        """What of it is said of a stage."""
        return StagePlan(tile=self.tile, tiles=self.tiles, batch=self.batch, multiple=self.multiple)

    @property
    def cell(self) -> int:
        """Input pixels along an axis of a latent position, where there are stages: the encoder's tiles start at any."""
        return 1 if self.stages is None else self.stages["encode"].multiple

    @property
    def steps(self) -> int:
        """Tiles of all stages."""
        return sum(plan.tiles for plan in self.stages.values()) if self.stages else self.tiles

    @property
    def cuts_autoencoder(self) -> bool:
        """Whether encoder or decoder see less than the whole."""
        return self.tiles > 1 or (self.stages is not None and self.stages["encode"].tiles > 1)

    def as_json(self) -> dict[str, Any]:
        """Its fields by name; bytes as ``expected_peak``."""
        return asdict(self)


class Planner:
    """Chooses how an image of one extent goes through one generator."""

    def __init__(self, extent: InputSize, demand: MemoryCost, options: UpscaleOptions, device: torch.device) -> None:
        self.extent, self.demand, self.options, self.device = extent, demand, options, device
        self.on_host = device.type != "cuda"
        self.free = free_memory(device)
        self.images = self._image_bytes() if self.on_host else 0
        self.idle_images = self._idle_image_bytes() if self.on_host else 0
        free_for_tiles = SHARE * min(self.free - self.images, (self.free - self.idle_images) / HELD_SHARE)
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
        plan = self._staged(most_pixels) or self._chosen(most_pixels)
        limit = self.options.memory
        if limit is not None and plan.expected_peak > limit * 1e9:
            raise UserError(self._over_the_limit(plan, limit))
        return plan

    def _chosen(self, most_pixels: int | None) -> Plan:
        tile = self._tile()
        if most_pixels is not None and self._geometry(tile)[0] > most_pixels:
            cells = math.isqrt(most_pixels) // self.demand.multiple  # whole ones: tiles would be rounded up to them
            side = max(cells * self.demand.multiple, smallest_side(self.options))
            tile = (side, side)
        return self._of_tile(tile, most_pixels)

    def _staged(self, most_pixels: int | None) -> Plan | None:
        """A plan with tiles of their own for all stages, unless one is all of it; None where they have none."""
        stages, options = self.demand.stages, self.options
        if stages is None or options.tile == "off" or options.tile_blend == "average":
            return None
        plans = dict[Stage, Plan]()
        for stage, demand in sorted(stages.items(), key=lambda item: -item[1].per_pixel):  # the first to lack memory
            share = self.demand.per_pixel / demand.per_pixel
            most = None if most_pixels is None else int(most_pixels * share)
            plans[stage] = Planner(self.extent, demand, options, self.device)._chosen(most)
        fits = self._needed((self.extent.height, self.extent.width)) <= self.budget
        if fits and all(plan.tiles == 1 for plan in plans.values()):
            whole = self._chosen(most_pixels)
            if whole.tiles == 1:
                return whole
        most_work = max(plan.pixels * stages[stage].per_pixel for stage, plan in plans.items())
        return replace(
            plans["decode"],
            pixels=math.ceil(most_work / self.demand.per_pixel),
            expected_peak=max(plan.expected_peak for plan in plans.values()),
            stages={stage: plans[stage].stage_plan() for stage in stages},
        )

    def _tile(self) -> Sides:
        wanted, padding = self.options.tile, self.demand.padding
        height, width = (-(-side // padding) * padding for side in (self.extent.height, self.extent.width))
        whole = (height, width)
        if wanted == "off":
            return whole
        if wanted != "auto":
            return wanted, wanted
        batch = self.options.tile_batch
        together = 1 if batch == "auto" or not self.demand.takes_batches else batch
        side = largest_side(self.budget, together * self.demand.per_pixel, self._row_bytes())
        smallest = smallest_side(self.options)
        if side < smallest:
            self._require(smallest)
            side = smallest
        cells = side - side % self.demand.multiple  # tiles consist of whole cells, and would be rounded up
        side = max(cells, smallest)
        pays = max(LARGEST_TILE.get(self.device.type, 320) * 4 // self.demand.scale, smallest, padding)
        side = min(side, pays, self.demand.largest_tile or side)
        fits = height * width <= side * side and self._needed(whole) <= self.budget  # a long one is padded by more
        if fits and self.demand.balance == math.inf:
            return whole
        if self.options.tile_blend == "average":
            side = max((known for known in PUBLISHED_OVERLAPS if known <= side), default=side)
            tile = side, side
        elif self.device.type == "cpu":
            tile = self._least_work(side, together)
        else:
            tile = (self._best_side(side),) * 2
        return whole if fits and self._work(whole) <= self.demand.work_for_whole * self._work(tile) else tile

    def _work(self, tile: Sides) -> float:
        """Input pixels of all tiles together, and what attention takes in such pixels."""
        area, tiles = self._geometry(tile)
        return tiles * area * self._attention(area)

    def _attention(self, area: int) -> float:
        """Time of a tile of ``area`` pixels over what it would take without attention."""
        return 1 + area / self.demand.balance

    def _best_side(self, largest: int) -> int:
        """Side of square tiles, at most ``largest``, that have the least work for the area that they add, or nearly."""
        if self.demand.balance == math.inf:
            return largest
        step = self.demand.multiple
        works = {side: self._work_of_squares(side) for side in range(largest, max(self._least_side(), step) - 1, -step)}
        least = min(works.values(), default=math.inf)
        return next((side for side, work in works.items() if work <= self.demand.work_for_context * least), largest)

    def _least_side(self) -> int:
        """Side of the smallest tiles that are chosen for less work; attention alone, without an overlap, asks for 1."""
        least = smallest_side(self.options)
        return least if self.demand.balance == math.inf else max(least, LEAST_SIDE)

    def _work_of_squares(self, side: int) -> float:
        overlap = join_of((side, side), self.options.overlap, self.demand.multiple, self.options.tile_blend).overlap
        return self._attention(side**2) * (side / (side - overlap)) ** 2

    def _least_work(self, side: int, together: int) -> Sides:
        """The tiles of at most ``side`` x ``side`` pixels that have the fewest in all, or nearly, and are smallest, or,
        where a network is to see much, largest.

        The last tile of a row is moved inward until it ends with the image; of tiles that do not divide it, it would
        mostly do again what its neighbour has done. On a GPU one shape for all images is worth more: that is what
        gets compiled.
        """
        join = join_of((side, side), self.options.overlap, self.demand.multiple, self.options.tile_blend)
        padded, longest = self._padded(join), self.demand.largest_tile or math.inf
        choice: list[tuple[float, int, Sides]] = []
        for (height, rows), (width, columns) in itertools.product(*(self._divisions(n, join) for n in padded)):
            area = min(height, padded[0]) * min(width, padded[1])
            needed = together * area * self.demand.per_pixel + self._rows((height, width))
            if area <= side * side and needed <= self.budget and max(height, width) <= longest:
                choice.append((area * rows * columns * self._attention(area), area, (height, width)))
        if not choice:
            return side, side
        least = min(work for work, *_ in choice)
        if self.demand.work_for_context > MAX_OVERHEAD_MEMORY:
            good_enough = self.demand.work_for_context * least
            return max((min(tile), -work, tile) for work, _, tile in choice if work <= good_enough)[2]
        return min((area, work, tile) for work, area, tile in choice if work <= MAX_OVERHEAD_MEMORY * least)[2]

    def _divisions(self, length: int, join: TileJoin) -> Iterator[tuple[int, int]]:
        """Sides with which 1, 2, 3 ... tiles cover ``length``, each as small as their number allows, and how many."""
        cells = join.multiple
        # In smaller tiles, the overlap of ``join``, which is whole cells, would be more than a third of a side.
        smallest = max(self._least_side(), 2 * cells, 3 * join.overlap)
        for count in range(1, length + 1):
            least = -(-(length + (count - 1) * join.overlap) // count)
            side = -(-max(least, smallest) // cells) * cells
            yield side, len(starts_along(length, side, join.overlap))
            if least <= smallest:
                return

    def _padded(self, join: TileJoin) -> Sides:
        multiple = join.multiple if join.blend == "average" else max(join.multiple, self.demand.padding)
        height, width = self.extent.height, self.extent.width
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple

    def _require(self, smallest: int) -> None:
        """Raise unless tiles of this side, or the whole of a smaller image, fit."""
        needed = self._needed((smallest, smallest))
        if needed <= self.budget:
            return
        if self.limited and self.options.memory is not None:
            raise UserError(self._over_the_limit(self._of_tile((smallest, smallest), 0), self.options.memory))
        work = needed / SHARE
        in_all = max(work + self.images, HELD_SHARE * work + self.idle_images)
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
            multiple=self.demand.multiple,
            pixels=batch * area,
            dtype=str(self.demand.dtype).removeprefix("torch."),
            device=str(self.device),
            expected_peak=round(self.demand.weights + self._held(work) + max(self.images + work, self.idle_images)),
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

    def _image_bytes(self) -> int:
        """Bytes of the image, with its padded copy, and of the enlarged one; AdaIN keeps that in 16 bits too.

        With transparency there is one copy more, in which hidden pixels have the colour of their surroundings.
        """
        own, alpha, area = self.extent.pixel_bytes, self.extent.alpha_bytes, self.demand.scale**2
        fine = 6 if self.options.color_fix == "adain" else 0
        copies = 3 if alpha else 2
        between = math.ceil(self.demand.latents_per_pixel)
        return self.extent.height * self.extent.width * (copies * own + alpha + area * (own + fine) + between)

    def _idle_image_bytes(self) -> int:
        """Bytes of images while no tile is at work: before the first one, or after the last, whichever are more.

        Before, hidden pixels are given a colour, in float32. Afterwards transparency is enlarged, and what the network
        has made is resampled beside itself if another size is wanted.
        """
        height, width, scale = self.extent.height, self.extent.width, self.demand.scale
        own, alpha = self.extent.pixel_bytes, self.extent.alpha_bytes
        columns, rows = target_size(width, height, self.options)
        before = height * width * (17 * own // alpha + 6) if alpha else 0  # measured: 23 bytes of gray, 57 of RGB
        resampled = alpha if (columns, rows) == (width * scale, height * scale) else alpha + own
        after = height * width * scale**2 * own + rows * columns * resampled
        if resampled:
            after += min(RESIZE_BYTES * rows * columns, RESIZE_BAND_BYTES)
        return height * width * (own + alpha) + max(before, after)

    def _row_bytes(self) -> float:
        """Bytes of joined rows per input row of a tile: three float32 channels over the whole width, or latents."""
        joined = self.demand.joined_per_pixel
        per_pixel = 12 * self.demand.scale**2 if joined is None else joined
        return BANDS * per_pixel * self.extent.width if self.on_host else 0.0

    def _rows(self, tile: Sides) -> float:
        return min(tile[0], self.extent.height) * self._row_bytes()

    def _held(self, work: float) -> float:
        """Bytes beyond those that are worked with."""
        return FIRST_USE + HELD_SHARE * work if self.on_host else 0.0

    def _workable(self, allowed: float) -> float:
        """Bytes that can be worked with such that they, what is held and the images are ``allowed``."""
        if not self.on_host:
            return allowed
        allowed -= FIRST_USE
        return min((allowed - self.images) / (1 + HELD_SHARE), (allowed - self.idle_images) / HELD_SHARE)

    def _over_the_limit(self, plan: Plan, limit: float) -> str:
        needed = math.ceil(plan.expected_peak / 1e8) / 10
        other = "" if self.options.tile == "auto" else ", or --tile auto"
        return (
            f"memory {limit:g} GB: {self.demand.name} in {plan.dtype} needs about {needed:g} GB for this image with "
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

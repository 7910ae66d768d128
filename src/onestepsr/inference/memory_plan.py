"""Planning how much of an image goes through a network at once, so that the memory suffices.

Memory follows from what a generator says of itself: peak bytes per input pixel, measured for each kind of network as
growth of the resident memory. Tiles are chosen in three steps, each a function without state: :func:`candidates` lists
the tiles that fit, :func:`compute_cost` rates them, :func:`choose` weighs compute against memory and context. Where
encoder, UNet and decoder each have a cost, each is planned by itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from onestepsr.core.errors import UserError
from onestepsr.core.machine import free_memory, multiplies_bfloat16
from onestepsr.inference.options import UpscaleOptions, target_size
from onestepsr.inference.tiling import OVERLAP, PUBLISHED_OVERLAPS, Sides, TileJoin, join_of, starts_along
from onestepsr.models.generators import STAGES, Generator, Stage, StageCost

# ---- policy ----

LARGEST_TILE = {"cpu": 320, "cuda": 768}
"""Side, at scale 4, of a square tile beyond whose area a larger one saves no time worth its memory: the overlap costs a
fifth or less. Time and memory depend on the size of the output."""
SMALLEST_TILE = 16
"""Side of the smallest tiles without an overlap; with one, it is three overlaps: smaller tiles would be mostly that."""
SMALLEST_ATTENDED = 3 * OVERLAP
"""Side of a tile below which no network sees enough context, however much its attention costs."""
LARGEST_BATCH = 8
"""Enough tiles at once to keep a GPU busy; beyond it they only take memory."""
MAX_OVERHEAD_MEMORY = 1.03
"""Accept 3 % more compute than the least for smaller tiles, which take less memory."""
MAX_OVERHEAD_CONTEXT: dict[Stage, float] = {"encode": 1.0, "unet": 1.08, "decode": 1.0}
"""Accept 8 % more compute for larger tiles of the UNet: it makes up detail, which joins should interrupt as rarely as
may be, and takes less memory than the decoder. OSEDiff's code has tiles of 96 x 96 latent positions; so have Stable
Diffusion's networks by this."""
MAX_OVERHEAD_UNTILED: dict[Stage, float] = {"encode": 1.6, "unet": 1.25, "decode": 1.6}
"""Accept so much compute of tiles for the whole, which has no joins, where attention makes tiles less work. Before
tiles of the autoencoder, a reduced copy of the image goes through all of the network for the sake of its norms."""
PLANNED_SHARE = 0.6
"""Part of the free memory that is planned with; the rest is for what the estimate does not know of."""
COLOUR_FIX_BYTES = 200
"""Peak bytes per input pixel that the colour fix takes, at scale 4."""
BANDS = 1.5
"""Bytes of joined rows over those of one row of tiles: the row itself and what of it the next row overlaps."""
FIRST_USE = 50_000_000
"""Bytes that the libraries themselves take once a network has run on a CPU, whatever its size: measured, with
``d3sr-tiny``."""
HELD_SHARE = 0.65
"""Freed memory that the C library holds back on a CPU, as part of what is worked with: blocks of many sizes come and
go, and the gaps between them stay. Measured with two threads: 1.3 GB of 2.1 with Stable Diffusion's networks in a tile
of 256, which would be 0.1 if freed memory went back to the system at once; 0.2 of 0.4 with ``d3sr-tiny``."""
RESIZE_BYTES, RESIZE_BAND_BYTES = 12, 32_000_000
"""Bytes per output pixel that resampling works with, and the most of them: it goes over the image in bands."""


# ---- sizes and plans ----


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


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Tiles of an image for encoder, UNet or decoder."""

    tile: Sides
    """Height and width of a tile in input pixels."""
    tiles: int
    """Number of tiles."""
    batch: int
    """Tiles that go through the network together."""
    multiple: int
    """Input pixels at multiples of which tiles start, unless they are joined by plain averages."""

    @property
    def tile_name(self) -> str:
        """Height and width of a tile as messages show them."""
        return "{}x{}".format(*self.tile)

    def __str__(self) -> str:
        cut = "whole" if self.tiles == 1 else f"{self.tiles} tiles of {self.tile_name} pixels"
        return f"{cut}, {self.batch} at once" if self.batch > 1 else cut


@dataclass(frozen=True, kw_only=True)
class Plan(StagePlan):
    """Tiles of an image for a generator. Where its stages have tiles of their own, these are the decoder's."""

    pixels: int
    """Input pixels that go through it together, padding included; as many as take the memory of the largest stage."""
    dtype: str
    """Dtype of the network."""
    device: str
    """Where it runs."""
    expected_peak: int
    """Bytes that this takes on the device: weights, feature maps and, on a CPU, the image and the enlarged one."""
    retries: int = 0
    """Number of plans before it with which memory ran out."""
    stages: dict[Stage, StagePlan] | None = None
    """Tiles of encoder, UNet and decoder; None where all three are done with one tile before the next."""

    def __str__(self) -> str:
        cut = super().__str__()
        if self.stages is not None:
            cut = "; ".join(f"{stage} {plan}" for stage, plan in self.stages.items())
        tried = f", after running out of it {self.retries}x" if self.retries else ""
        return f"{cut}, {self.dtype} on {self.device}: about {self.expected_peak / 1e9:.2f} GB of memory{tried}"

    @property
    def stage_plan(self) -> StagePlan:
        """Its part that concerns one stage."""
        return StagePlan(tile=self.tile, tiles=self.tiles, batch=self.batch, multiple=self.multiple)

    @property
    def position(self) -> int:
        """Input pixels along an axis of a latent position, where there are stages: the encoder's tiles start at any."""
        return 1 if self.stages is None else self.stages["encode"].multiple

    @property
    def steps(self) -> int:
        """Tiles of all stages."""
        return sum(plan.tiles for plan in self.stages.values()) if self.stages else self.tiles

    @property
    def cuts_autoencoder(self) -> bool:
        """True if encoder or decoder see less than the whole."""
        return self.tiles > 1 or (self.stages is not None and self.stages["encode"].tiles > 1)

    def as_json(self) -> dict[str, Any]:
        """Its fields by name; bytes as ``expected_peak``."""
        return asdict(self)


# ---- the memory that an image takes ----


@dataclass(frozen=True, kw_only=True)
class Workload:
    """An image for a generator, or for one of its stages, on a device; the memory it takes. Sizes are in input
    pixels."""

    generator: Generator
    """The generator."""
    name: str
    """The model's name."""
    dtype: torch.dtype
    """Dtype of the weights, in which they may not be yet."""
    size: InputSize
    """The image."""
    options: UpscaleOptions
    """The user's choices."""
    device: torch.device
    """Device of the network."""
    stage: Stage | None = None
    """The stage; None: all of the generator on one tile after the other."""
    count: int = 1
    """Images of this size that may go through the network together where each is one tile."""

    @property
    def computed(self) -> torch.dtype:
        """Dtype of the products: float32 for bfloat16 weights where the processor has no instructions for these."""
        wide = self.device.type == "cpu" and self.dtype == torch.bfloat16 and not multiplies_bfloat16()
        return torch.float32 if wide else self.dtype

    @cached_property
    def cost(self) -> StageCost:
        """Cost of the stage or of the whole, with the colour fix where an image comes out."""
        if self.stage is None:
            return StageCost(
                bytes_per_pixel=bytes_per_pixel(self.generator, self.computed),
                multiple=self.generator.lr_multiple,
                takes_batches=self.generator.takes_batches,
            )
        own = self.generator.memory_cost(self.computed).stages[self.stage]
        fix = _colour_fix_bytes(self.generator) if self.stage == "decode" else 0.0
        return replace(own, bytes_per_pixel=own.bytes_per_pixel + fix)

    @property
    def attends(self) -> bool:
        """True if attention over a whole tile makes small tiles less work."""
        return self.cost.attention_breakeven < math.inf

    @property
    def largest_tile(self) -> float:
        """Side beyond which no tile is chosen."""
        return math.inf if self.stage or self.generator.largest_tile is None else self.generator.largest_tile

    # ---- geometry ----

    @property
    def padding(self) -> int:
        """Sides of the image are padded to multiples of this even where tiles start at others."""
        return 1 if self.stage is None else self.generator.lr_multiple

    @property
    def whole(self) -> Sides:
        """Sides of the padded image as one tile."""
        return _rounded_up(self.size, self.padding)

    def join(self, tile: Sides) -> TileJoin:
        """Layout and join of tiles of about these sides."""
        return join_of(tile, self.options.overlap, self.cost.multiple, self.options.tile_blend)

    def padded(self, join: TileJoin) -> Sides:
        """Sides of the image padded for tiles that are joined so."""
        return _rounded_up(self.size, join.multiple if join.blend == "average" else max(join.multiple, self.padding))

    def geometry(self, tile: Sides) -> tuple[int, int]:
        """Pixels of a tile, and number of tiles."""
        join = self.join(tile)
        padded = self.padded(join)
        counts = (len(starts_along(*lengths, join.overlap)) for lengths in zip(padded, join.tile, strict=True))
        return math.prod(map(min, join.tile, padded)), math.prod(counts)

    # ---- memory ----

    @property
    def on_host(self) -> bool:
        """True if image and joined rows lie in the memory that is planned."""
        return self.device.type != "cuda"

    @cached_property
    def free(self) -> float:
        """Bytes of memory that are free on the device."""
        return free_memory(self.device)

    @cached_property
    def weights(self) -> int:
        """Bytes of the weights."""
        return sum(parameter.numel() for parameter in self.generator.parameters()) * self.dtype.itemsize

    @cached_property
    def budget(self) -> float:
        """Bytes for feature maps and, on a CPU, for the rows that tiles are joined in."""
        free = PLANNED_SHARE * min(self.free - self.images, (self.free - self.idle_images) / HELD_SHARE)
        return min(free, self.allowed)

    @cached_property
    def allowed(self) -> float:
        """Bytes for the same that ``options.memory`` leaves beside weights, images and what is held back."""
        if self.options.memory is None:
            return math.inf
        left = self.options.memory * 1e9 - self.weights
        if not self.on_host:
            return left
        left -= FIRST_USE
        return min((left - self.images) / (1 + HELD_SHARE), (left - self.idle_images) / HELD_SHARE)

    def needed(self, tile: Sides, batch: int = 1) -> float:
        """Bytes of the same for ``batch`` tiles at a time."""
        rows = min(tile[0], self.size.height) * self.row_bytes
        return batch * self.geometry(tile)[0] * self.cost.bytes_per_pixel + rows

    def peak(self, work: float) -> int:
        """Bytes in all when ``work`` bytes are worked with."""
        held = FIRST_USE + HELD_SHARE * work if self.on_host else 0.0
        return round(self.weights + held + max(self.images + work, self.idle_images))

    @property
    def latent_bytes_per_pixel(self) -> float:
        """Bytes per pixel of a joined latent, of which two are kept between stages."""
        return 0.0 if self.stage is None else self.generator.memory_cost(self.computed).latent_bytes_per_pixel

    @property
    def row_bytes(self) -> float:
        """Bytes of joined rows per row of a tile: three float32 channels over the whole width, or latents."""
        is_image = self.stage not in ("encode", "unet")
        per_pixel = 12 * self.generator.scale**2 if is_image else self.latent_bytes_per_pixel
        return BANDS * per_pixel * self.size.width if self.on_host else 0.0

    @cached_property
    def images(self) -> int:
        """Bytes of the image, with its padded copy, and of the enlarged one; AdaIN keeps that in 16 bits too.

        With transparency there is one copy more, in which hidden pixels have the colour of their surroundings.
        """
        if not self.on_host:
            return 0
        own, alpha, area = self.size.pixel_bytes, self.size.alpha_bytes, self.generator.scale**2
        fine = 6 if self.options.color_fix == "adain" else 0
        copies = 3 if alpha else 2
        between = math.ceil(2 * self.latent_bytes_per_pixel)
        return self.size.height * self.size.width * (copies * own + alpha + area * (own + fine) + between)

    @cached_property
    def idle_images(self) -> int:
        """Bytes of images while no tile is at work: before the first one, or after the last, whichever are more.

        Before, hidden pixels are given a colour, in float32. Afterwards transparency is enlarged, and the network's
        output is resampled beside itself if another size is wanted.
        """
        if not self.on_host:
            return 0
        height, width, scale = self.size.height, self.size.width, self.generator.scale
        own, alpha = self.size.pixel_bytes, self.size.alpha_bytes
        columns, rows = target_size(width, height, self.options)
        before = height * width * (17 * own // alpha + 6) if alpha else 0  # measured: 23 bytes of gray, 57 of RGB
        resampled = alpha if (columns, rows) == (width * scale, height * scale) else alpha + own
        after = height * width * scale**2 * own + rows * columns * resampled
        if resampled:
            after += min(RESIZE_BYTES * rows * columns, RESIZE_BAND_BYTES)
        return height * width * (own + alpha) + max(before, after)


def bytes_per_pixel(generator: Generator, dtype: torch.dtype) -> float:
    """Peak bytes that the generator needs per input pixel, and the colour fix with it."""
    return generator.memory_cost(dtype).bytes_per_pixel + _colour_fix_bytes(generator)


def _colour_fix_bytes(generator: Generator) -> float:
    return COLOUR_FIX_BYTES * generator.scale**2 / 16


def _rounded_up(size: InputSize, multiple: int) -> Sides:
    return -(-size.height // multiple) * multiple, -(-size.width // multiple) * multiple


# ---- the choice of tiles ----


def largest_side(budget: float, per_pixel: float, per_row: float = 0.0) -> int:
    """Side of the tiles, a multiple of 16, that takes ``budget`` bytes: side^2 x ``per_pixel`` + side x ``per_row``."""
    if budget <= 0:
        return 0
    root = math.sqrt(per_row**2 + 4 * per_pixel * budget) - per_row
    return int(root / (2 * per_pixel)) // 16 * 16


def smallest_side(options: UpscaleOptions) -> int:
    """Side of the smallest tiles chosen by memory."""
    return max(3 * options.overlap, SMALLEST_TILE)


def candidates(load: Workload, side: int, batch: int) -> Iterator[Sides]:
    """Tiles of at most ``side`` x ``side`` pixels that fit the memory, ``batch`` at a time.

    On a CPU they are rectangles that divide the image: the last tile of a row is moved inward until it ends with the
    image, and with other sides would mostly repeat what its neighbour has done. On a GPU they are squares: one shape
    for all images is worth more there, since that is what gets compiled.
    """
    if load.options.tile_blend == "average":
        published = max((known for known in PUBLISHED_OVERLAPS if known <= side), default=side)
        yield published, published
    elif load.device.type != "cpu":
        smallest = max(smallest_side(load.options), SMALLEST_ATTENDED, load.cost.multiple) if load.attends else side
        yield from ((square, square) for square in range(side, smallest - 1, -load.cost.multiple))
    else:
        join = load.join((side, side))
        heights, widths = (_divisions(load, length, join) for length in load.padded(join))
        for tile in itertools.product(heights, widths):
            fits = load.geometry(tile)[0] <= side * side and load.needed(tile, batch) <= load.budget
            if fits and max(tile) <= load.largest_tile:
                yield tile


def _divisions(load: Workload, length: int, join: TileJoin) -> Iterator[int]:
    """Sides with which 1, 2, 3 ... tiles cover ``length``, each as small as their number allows."""
    least = max(smallest_side(load.options), SMALLEST_ATTENDED if load.attends else 0)
    # In smaller tiles, the overlap of ``join``, a multiple of its own, would be more than a third of a side.
    smallest = max(least, 2 * join.multiple, 3 * join.overlap)
    for count in range(1, length + 1):
        even = -(-(length + (count - 1) * join.overlap) // count)
        yield -(-max(even, smallest) // join.multiple) * join.multiple
        if even <= smallest:
            return


def compute_cost(load: Workload, tile: Sides) -> float:
    """Compute of an image in tiles: their pixels together, and in such pixels what attention takes."""
    area, tiles = load.geometry(tile)
    return tiles * area * (1 + area / load.cost.attention_breakeven)


def compute_cost_per_pixel(load: Workload, tile: Sides) -> float:
    """The same for square tiles per pixel of an endless image: what matters where a tile is for images of all sizes."""
    side, overlap = tile[0], load.join(tile).overlap
    return (1 + side**2 / load.cost.attention_breakeven) * (side / (side - overlap)) ** 2


def choose(load: Workload, tiles: list[Sides]) -> Sides:
    """Of the tiles with nearly the least compute the smallest, or, where context matters more, the largest."""
    rate = compute_cost if load.device.type == "cpu" else compute_cost_per_pixel
    costs = {tile: rate(load, tile) for tile in tiles}
    context = 1.0 if load.stage is None else MAX_OVERHEAD_CONTEXT[load.stage]
    wants_context = load.device.type != "cpu" or context > MAX_OVERHEAD_MEMORY
    overhead = context if wants_context else MAX_OVERHEAD_MEMORY
    least = min(costs.values())
    accepted = [tile for tile in tiles if costs[tile] <= overhead * least]
    if wants_context:
        return max(accepted, key=lambda tile: (min(tile), -costs[tile], tile))
    return min(accepted, key=lambda tile: (load.geometry(tile)[0], costs[tile], tile))


def _tile_by_memory(load: Workload) -> Sides:
    """The tile for ``--tile auto``; raises :class:`UserError` if not even the smallest fits."""
    wanted, smallest = load.options.tile_batch, smallest_side(load.options)
    batch = 1 if wanted == "auto" or not load.cost.takes_batches else wanted
    side = largest_side(load.budget, batch * load.cost.bytes_per_pixel, load.row_bytes)
    if side < smallest:
        _require(load, smallest)
        side = smallest
    side = max(side - side % load.cost.multiple, smallest)  # tiles would be rounded up to whole multiples
    worthwhile = max(LARGEST_TILE.get(load.device.type, 320) * 4 // load.generator.scale, smallest, load.padding)
    side = int(min(side, worthwhile, load.largest_tile))
    whole = load.whole
    fits = whole[0] * whole[1] <= side * side and load.needed(whole) <= load.budget  # a long one is padded by more
    if fits and not load.attends:
        return whole
    tiles = list(candidates(load, side, batch))
    tile = choose(load, tiles) if tiles else (side, side)
    untiled = 1.0 if load.stage is None else MAX_OVERHEAD_UNTILED[load.stage]
    whole_pays = fits and compute_cost(load, whole) <= untiled * compute_cost(load, tile)
    return whole if whole_pays else tile


def _require(load: Workload, smallest: int) -> None:
    """Raise unless tiles of this side, or the whole of a smaller image, fit."""
    needed = load.needed((smallest, smallest))
    if needed <= load.budget:
        return
    if load.options.memory is not None and load.budget == load.allowed:
        raise _over_the_limit(load, _plan_of(load, (smallest, smallest), 0), load.options.memory)
    work = needed / PLANNED_SHARE
    in_all = max(work + load.images, HELD_SHARE * work + load.idle_images)
    raise UserError(
        f"not enough memory on {load.device}: {load.free / 1e9:.1f} GB free, about {in_all / 1e9:.1f} GB needed "
        f"for the smallest tile ({smallest} px): free some, or set --tile yourself"
    )


def _over_the_limit(load: Workload, plan: Plan, limit: float) -> UserError:
    needed = math.ceil(plan.expected_peak / 1e8) / 10
    other = "" if load.options.tile == "auto" else ", or --tile auto"
    return UserError(
        f"memory {limit:g} GB: {load.name} in {plan.dtype} needs about {needed:g} GB for this image with "
        f"tiles of {plan.tile_name} pixels; accepted: {needed:g} and more{other}"
    )


# ---- plans ----


def plan_image(load: Workload, most_pixels: int | None = None) -> Plan:
    """The plan for an image and all of a generator.

    With ``most_pixels``, no more input pixels at once than these where tiles can be so small. Raises
    :class:`UserError` if the memory, or ``options.memory``, does not suffice for the smallest tiles, or the latter
    not for those that ``options.tile`` asks for.
    """
    plan = _staged_plan(load, most_pixels) or _single_plan(load, most_pixels)
    limit = load.options.memory
    if limit is not None and plan.expected_peak > limit * 1e9:
        raise _over_the_limit(load, plan, limit)
    return plan


def _staged_plan(load: Workload, most_pixels: int | None) -> Plan | None:
    """A plan with tiles of their own for all stages; None where one tile for all does as well."""
    stages = {stage: replace(load, stage=stage) for stage in load.generator.memory_cost(load.computed).stages}
    if not stages or load.options.tile == "off" or load.options.tile_blend == "average":
        return None
    plans = dict[Stage, Plan]()
    for stage, own in sorted(stages.items(), key=lambda item: -item[1].cost.bytes_per_pixel):  # first to lack memory
        share = load.cost.bytes_per_pixel / own.cost.bytes_per_pixel
        plans[stage] = _single_plan(own, None if most_pixels is None else int(most_pixels * share))
    fits = load.needed((load.size.height, load.size.width)) <= load.budget
    if fits and all(plan.tiles == 1 for plan in plans.values()):
        whole = _single_plan(load, most_pixels)
        if whole.tiles == 1:
            return whole
    most_work = max(plan.pixels * stages[stage].cost.bytes_per_pixel for stage, plan in plans.items())
    return replace(
        plans["decode"],
        pixels=math.ceil(most_work / load.cost.bytes_per_pixel),
        expected_peak=max(plan.expected_peak for plan in plans.values()),
        stages={stage: plans[stage].stage_plan for stage in STAGES},
    )


def _single_plan(load: Workload, most_pixels: int | None) -> Plan:
    wanted = load.options.tile
    tile = load.whole if wanted == "off" else _tile_by_memory(load) if wanted == "auto" else (wanted, wanted)
    if most_pixels is not None and load.geometry(tile)[0] > most_pixels:
        multiples = math.isqrt(most_pixels) // load.cost.multiple  # whole ones: tiles would be rounded up to them
        side = max(multiples * load.cost.multiple, smallest_side(load.options))
        tile = (side, side)
    return _plan_of(load, tile, most_pixels)


def _plan_of(load: Workload, tile: Sides, most_pixels: int | None) -> Plan:
    area, tiles = load.geometry(tile)
    batch = _batch(load, area, tiles if tiles > 1 else load.count, most_pixels)
    return Plan(
        tile=tile,
        tiles=tiles,
        batch=batch,
        multiple=load.cost.multiple,
        pixels=batch * area,
        dtype=str(load.dtype).removeprefix("torch."),
        device=str(load.device),
        expected_peak=load.peak(load.needed(tile, batch)),
    )


def _batch(load: Workload, area: int, tiles: int, most_pixels: int | None) -> int:
    """Tiles at once: as many as fit, spread evenly over the batches."""
    if not load.cost.takes_batches:
        return 1
    wanted, most = load.options.tile_batch, 1
    if wanted != "auto":
        most = wanted
    elif load.device.type == "cuda":
        most = min(max(LARGEST_BATCH, load.count), int(load.budget / (area * load.cost.bytes_per_pixel)))
    if most_pixels is not None:
        most = min(most, most_pixels // area)
    return -(-tiles // -(-tiles // max(1, min(most, tiles))))


def fewer_pixels(plan: Plan, options: UpscaleOptions) -> int | None:
    """Input pixels to try at once after ``plan`` ran out of memory: half the side; None below the smallest tiles."""
    smallest = smallest_side(options)
    side = math.isqrt(plan.pixels)
    return None if side <= smallest else max(side // 2, smallest) ** 2

"""Work on pictures of any size in tiles: where they lie, how they are joined, how large they may be.

Tiles are laid over each other from left to right and from top to bottom, each with an opacity that is zero on the
outermost pixels of a tile (where a network lacks context), rises smoothly across the rest of the overlap and is one
beyond. Whatever the sizes, the weights of all tiles then add up to one at every pixel, and equal tiles give exactly
equal results.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from onestepsr.errors import UserError

TileBlend = Literal["smooth", "average"]
OVERLAP = 32
"""Default overlap of neighbouring tiles, in input pixels."""
MARGIN = 8
"""Default width of the edge of a tile that is never used, in input pixels; at scale 4 it covers the wavelet
correction."""

PUBLISHED_OVERLAPS = {512: 64, 256: 32, 64: 16}
"""Tile sides of ResShift's and SinSR's commands at scale 4, and how far neighbours overlap there, in input pixels."""

_LARGEST_TILE = {"cpu": 320, "cuda": 768}
"""Beyond these sides a larger tile saves no time worth its memory: the overlap costs a fifth or less."""
_MEMORY_SHARE = 0.6
_FALLBACK_BYTES = 2_000_000_000


@dataclass(frozen=True, kw_only=True)
class TileJoin:
    """Where tiles lie and how they become one picture; sides in input pixels. :func:`join_of` makes it."""

    tile: int
    """Side of a tile."""
    overlap: int
    """Overlap of neighbours."""
    multiple: int
    """Tiles start at multiples of this; the picture must have been padded to them."""
    blend: TileBlend
    """``smooth`` is :func:`tiled_rows`, ``average`` :func:`averaged_rows`."""

    def rows(self, fn: Callable[[Tensor], Tensor], source: Tensor, scale: int) -> Iterator[Tensor]:
        """``fn`` over all tiles of ``source`` (1, C, H, W), as bands of finished rows (1, D, rows, W * scale)."""
        if self.blend == "average":
            return averaged_rows(fn, source, scale, self.tile, self.overlap)
        return tiled_rows(fn, source, scale, self.tile, self.overlap, margin=min(MARGIN, self.overlap // 3))


def join_of(tile: int, overlap: int, multiple: int, blend: TileBlend) -> TileJoin:
    """How tiles of about ``tile`` and ``overlap`` are joined for a network whose cells are ``multiple`` pixels wide.

    A network with strided layers sees a tile as it sees the whole only if the tile starts where its cells do. The
    published way does not care.
    """
    if blend == "average":
        return TileJoin(tile=tile, overlap=published_overlap(tile, overlap), multiple=1, blend=blend)
    tile = -(-tile // multiple) * multiple
    return TileJoin(tile=tile, overlap=_whole_cells(overlap, tile, multiple), multiple=multiple, blend=blend)


def _whole_cells(overlap: int, tile: int, multiple: int) -> int:
    """The overlap in multiples of ``multiple``: at most a third of a tile, except that one is better than a seam."""
    cells = min(overlap, tile // 3) // multiple
    if cells == 0 and overlap > 0 and tile >= 2 * multiple:
        cells = 1
    return cells * multiple


def plan(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of the tiles that cover ``length`` pixels, each ``min(tile, length)`` long; the last is shifted inward."""
    if not 0 <= overlap < tile or length < 1:
        raise ValueError(f"need length >= 1 and 0 <= overlap < tile, got {length}, {tile}, {overlap}")
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def opacity(length: int, overlap: int, margin: int) -> Tensor:
    """Weight (length,) of a tile over the ones before it: 0 on ``margin``, a raised cosine across the overlap, then
    1."""
    rise = max(overlap - 2 * margin, 0)
    ramp = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(rise) + 0.5) / max(rise, 1))
    return torch.cat([torch.zeros(min(margin, overlap // 2)), ramp, torch.ones(length)])[:length]


def tiled(
    fn: Callable[[Tensor], Tensor], x: Tensor, scale: int, tile: int, overlap: int = OVERLAP, *, margin: int = MARGIN
) -> Tensor:
    """``fn`` over the whole of ``x`` (1, C, H, W) in tiles: (1, D, H * scale, W * scale), on the CPU in float32.

    ``fn`` maps (1, C, h, w) to (1, D, h * scale, w * scale). When the value of ``fn`` at a pixel depends on at most
    ``margin`` input pixels around it, the result equals that of one call on the whole.
    """
    return torch.cat(list(tiled_rows(fn, x, scale, tile, overlap, margin=margin)), dim=2)


def tiled_rows(
    fn: Callable[[Tensor], Tensor], x: Tensor, scale: int, tile: int, overlap: int = OVERLAP, *, margin: int = MARGIN
) -> Iterator[Tensor]:
    """The result of :func:`tiled` as consecutive bands of finished rows (1, D, rows, W * scale).

    No more than one row of tiles is in memory at a time, so that the caller can round and store each band.
    """
    height, width = x.shape[-2:]
    starts, columns = plan(height, tile, overlap), plan(width, tile, overlap)
    side, tail = min(tile, height), None
    for top, following in zip(starts, [*starts[1:], height], strict=True):
        rows = x[..., top : top + side, :]
        band = _row_of_tiles(fn, rows, scale, columns, side=min(tile, width), overlap=overlap, margin=margin)
        if tail is not None:
            weights = opacity(tail.shape[2], overlap * scale, margin * scale)[:, None]
            band[:, :, : tail.shape[2]] = torch.lerp(tail, band[:, :, : tail.shape[2]], weights)
        done = (following - top) * scale
        tail = band[:, :, done:].clone()
        yield band[:, :, :done]
        del band


def places(height: int, width: int, tile: int, overlap: int = OVERLAP) -> list[tuple[int, int]]:
    """Row and column where each tile of a picture of this size starts, in the order in which ``fn`` is called."""
    return list(itertools.product(plan(height, tile, overlap), plan(width, tile, overlap)))


def averaged(fn: Callable[[Tensor], Tensor], x: Tensor, scale: int, tile: int, overlap: int) -> Tensor:
    """:func:`tiled` as ResShift and SinSR join tiles, for comparison: the plain mean where they overlap, seams and all.

    Their own settings are in :data:`PUBLISHED_OVERLAPS`.
    """
    return torch.cat(list(averaged_rows(fn, x, scale, tile, overlap)), dim=2)


def averaged_rows(fn: Callable[[Tensor], Tensor], x: Tensor, scale: int, tile: int, overlap: int) -> Iterator[Tensor]:
    """The result of :func:`averaged` as consecutive bands of finished rows, one row of tiles in memory at a time."""
    height, width = x.shape[-2:]
    starts, columns = plan(height, tile, overlap), plan(width, tile, overlap)
    side, above = min(tile, height), None
    for top, following in zip(starts, [*starts[1:], height], strict=True):
        sums = _sum_of_tiles(fn, x[..., top : top + side, :], scale, columns, side=min(tile, width))
        if above is not None:
            sums[:, :, : above.shape[2]] += above
        done = (following - top) * scale
        above = sums[:, :, done:].clone()
        yield sums[:, :-1, :done] / sums[:, -1:, :done]


def published_overlap(tile: int, overlap: int = OVERLAP) -> int:
    """The overlap of ResShift's and SinSR's tiles of side ``tile``; for a side they do not name, ``overlap``, at most a
    third of it."""
    return PUBLISHED_OVERLAPS.get(tile, min(overlap, tile // 3))


def gaussian_blended(fn: Callable[[Tensor], Tensor], z: Tensor, tile: int = 96, overlap: int = 32) -> Tensor:
    """A latent (N, C, h, w) through ``fn`` in tiles as OSEDiff joins them, for comparison: means by a Gaussian weight.

    ``fn`` keeps shapes; the published code blends what the UNet predicts, one call for each tile of a latent of more
    than 96 x 96 cells. A tile is no larger than the latent's shorter side.
    """
    side = min(tile, z.shape[-2], z.shape[-1])
    weights = gaussian_weights(side, side).to(z.device)
    total, sums = torch.zeros_like(z, dtype=torch.float32), torch.zeros_like(z[:1, :1], dtype=torch.float32)
    for top, left in places(z.shape[-2], z.shape[-1], side, overlap):
        window = (..., slice(top, top + side), slice(left, left + side))
        total[window] += fn(z[window]) * weights
        sums[window] += weights
    return (total / sums).to(z.dtype)


def gaussian_weights(height: int, width: int) -> Tensor:
    """OSEDiff's weights of a tile (height, width), float64: a narrow bell, centred half a row low there."""
    columns = _bell(width, (width - 1) / 2)
    rows = _bell(height, height / 2)  # not (height - 1) / 2: kept, so that results are the published ones
    return torch.outer(rows, columns)


def _bell(length: int, middle: float, variance: float = 0.01) -> Tensor:
    """A Gaussian (length,) float64 of ``variance`` in units of the squared length."""
    distance = (torch.arange(length, dtype=torch.float64) - middle) / length
    return torch.exp(-(distance**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def _row_of_tiles(
    fn: Callable[[Tensor], Tensor], x: Tensor, scale: int, starts: list[int], *, side: int, overlap: int, margin: int
) -> Tensor:
    band: Tensor | None = None
    filled = 0
    for left in starts:
        piece = fn(x[..., left : left + side]).to("cpu", torch.float32)
        if band is None:
            band = piece.new_empty((*piece.shape[:3], x.shape[-1] * scale))
        start = left * scale
        shared = filled - start
        if shared > 0:
            weights = opacity(shared, overlap * scale, margin * scale)
            piece[..., :shared] = torch.lerp(band[..., start:filled], piece[..., :shared], weights)
        filled = start + piece.shape[-1]
        band[..., start:filled] = piece
    assert band is not None
    return band


def _sum_of_tiles(fn: Callable[[Tensor], Tensor], x: Tensor, scale: int, starts: list[int], *, side: int) -> Tensor:
    """The sum of a row of tiles (1, D + 1, h * scale, W * scale); the last channel counts the tiles at each pixel."""
    sums: Tensor | None = None
    for left in starts:
        piece = fn(x[..., left : left + side]).to("cpu", torch.float32)
        if sums is None:
            sums = piece.new_zeros((1, piece.shape[1] + 1, piece.shape[2], x.shape[-1] * scale))
        window = sums[..., left * scale : (left + side) * scale]
        window[:, :-1] += piece
        window[:, -1:] += 1
    assert sums is not None
    return sums


def choose_tile(bytes_per_pixel: float, device: torch.device, overlap: int = OVERLAP) -> int:
    """Side of the tiles, in input pixels, that fits the free memory of ``device``.

    ``bytes_per_pixel`` is what the network needs per input pixel. Raises UserError when not even the smallest tile
    fits.
    """
    budget = _MEMORY_SHARE * free_memory(device)
    side = int(math.sqrt(budget / bytes_per_pixel)) // 16 * 16
    smallest = max(3 * overlap, 16)
    if side < smallest:
        needed = smallest**2 * bytes_per_pixel / _MEMORY_SHARE
        raise UserError(
            f"not enough memory on {device}: {budget / _MEMORY_SHARE / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB "
            f"needed for the smallest tile ({smallest} px): free some, or set --tile yourself"
        )
    return min(side, max(_LARGEST_TILE.get(device.type, 320), smallest))


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated: of the GPU, or of the machine within the limits of its container."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    known = [value for value in (_available_memory(), *_container_headroom()) if value is not None]
    return min(known, default=_FALLBACK_BYTES)


def _available_memory() -> float | None:
    text = _read(Path("/proc/meminfo"))
    for line in (text or "").splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    try:  # macOS and others: what is installed, of which half is taken to be free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (AttributeError, ValueError, OSError):
        return None


def _container_headroom() -> Iterator[float]:
    """What the control groups of this process (version 2, then 1) still allow."""
    lines = (_read(Path("/proc/self/cgroup")) or "").splitlines()
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for folder in {root / name.lstrip("/"), root}:  # inside a container the group is mounted as the root
            limit, used = (_read(folder / file) for file in names)
            if limit and used and limit.strip().isdigit():
                yield max(0.0, float(limit) - float(used))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None

"""Work on images of any size in tiles: where they lie and how they are joined.

Tiles are laid over each other from left to right and from top to bottom, each with an opacity that is zero on the
outermost pixels of a tile (where a network lacks context), rises smoothly across the rest of the overlap and is one
beyond. Whatever the sizes, the weights of all tiles then add up to one at every pixel, and equal tiles give exactly
equal results.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TileBlend = Literal["smooth", "average"]
OVERLAP = 32
"""Default overlap of neighbouring tiles, in input pixels."""
MARGIN = 8
"""Default width of the edge of a tile that is never used, in input pixels; at scale 4 it covers the wavelet
correction."""

PUBLISHED_OVERLAPS = {512: 64, 256: 32, 64: 16}
"""Tile sides of ResShift's and SinSR's commands at scale 4, and how far neighbours overlap there, in input pixels."""
Sides = tuple[int, int]
"""Height and width of a tile in input pixels."""


@dataclass(frozen=True, kw_only=True)
class TileJoin:
    """Where tiles lie and how they become one image; sides in input pixels. :func:`join_of` makes it."""

    tile: Sides
    """Height and width of a tile."""
    overlap: int
    """Overlap of neighbours."""
    multiple: int
    """Tiles start at multiples of this; the image must have been padded to them."""
    blend: TileBlend
    """``smooth`` is :func:`tiled_rows`, ``average`` :func:`averaged_rows`."""
    margin: int = 0
    """Width of the edge of a tile that is never used, for ``smooth``."""

    def rows(self, pieces: Iterable[Tensor], size: Sides, scale: int) -> Iterator[Tensor]:
        """``pieces`` (1, D, h * scale, w * scale), one for each tile of a padded image of ``size``, as bands of
        finished rows (1, D, rows, width * scale)."""
        if self.blend == "average":
            return averaged_rows(pieces, size, scale, self.tile, self.overlap)
        return tiled_rows(pieces, size, scale, self.tile, self.overlap, margin=self.margin)

    def cut(self, source: Tensor) -> Iterator[Tensor]:
        """The tiles of ``source`` (1, C, H, W), as views of it."""
        return cut(source, self.tile, self.overlap)

    def in_cells(self, cell: int) -> TileJoin:
        """The same tiles in units of ``cell`` pixels, of which all sides are multiples."""
        return TileJoin(
            tile=(self.tile[0] // cell, self.tile[1] // cell),
            overlap=self.overlap // cell,
            multiple=self.multiple // cell,
            blend=self.blend,
            margin=self.margin // cell,
        )

    def starts(self, height: int, width: int) -> list[tuple[int, int]]:
        """Row and column where each tile of a padded image starts, in order."""
        return places(height, width, self.tile, self.overlap)


def join_of(tile: Sides, overlap: int, multiple: int, blend: TileBlend) -> TileJoin:
    """How tiles of about ``tile`` and ``overlap`` are joined for a network whose cells are ``multiple`` pixels wide.

    A network with strided layers sees a tile as it sees the whole only if the tile starts where its cells do. The
    published way does not care.
    """
    if blend == "average":
        return TileJoin(tile=tile, overlap=published_overlap(min(tile), overlap), multiple=1, blend=blend)
    tile = (-(-tile[0] // multiple) * multiple, -(-tile[1] // multiple) * multiple)
    overlap = _whole_cells(overlap, min(tile), multiple)
    return TileJoin(tile=tile, overlap=overlap, multiple=multiple, blend=blend, margin=min(MARGIN, overlap // 3))


def _whole_cells(overlap: int, tile: int, multiple: int) -> int:
    """The overlap in multiples of ``multiple``: at most a third of a tile, except that one is better than a seam."""
    cells = min(overlap, tile // 3) // multiple
    if cells == 0 and overlap > 0 and tile >= 2 * multiple:
        cells = 1
    return cells * multiple


def starts_along(length: int, tile: int, overlap: int) -> list[int]:
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
    fn: Callable[[Tensor], Tensor], x: Tensor, scale: int, tile: Sides, overlap: int = OVERLAP, *, margin: int = MARGIN
) -> Tensor:
    """``fn`` over the whole of ``x`` (1, C, H, W) in tiles: (1, D, H * scale, W * scale), on the CPU in float32.

    ``fn`` maps (1, C, h, w) to (1, D, h * scale, w * scale). When the value of ``fn`` at a pixel depends on at most
    ``margin`` input pixels around it, the result equals that of one call on the whole.
    """
    pieces = map(fn, cut(x, tile, overlap))
    size = x.shape[-2], x.shape[-1]
    return torch.cat(list(tiled_rows(pieces, size, scale, tile, overlap, margin=margin)), dim=2)


def tiled_rows(
    pieces: Iterable[Tensor], size: Sides, scale: int, tile: Sides, overlap: int = OVERLAP, *, margin: int = MARGIN
) -> Iterator[Tensor]:
    """The result of :func:`tiled` as consecutive bands of finished rows (1, D, rows, W * scale): of what comes of the
    tiles that :func:`cut` makes of an image of ``size``, in their order.

    No more than one row of tiles is in memory at a time, so that the caller can round and store each band. All tiles
    have one shape.
    """
    height, width = size
    starts, columns = starts_along(height, tile[0], overlap), starts_along(width, tile[1], overlap)
    pieces, tail = iter(pieces), None
    for top, following in zip(starts, [*starts[1:], height], strict=True):
        band = _row_of_tiles(pieces, columns, width * scale, scale, overlap=overlap, margin=margin)
        if tail is not None:
            weights = opacity(tail.shape[2], overlap * scale, margin * scale)[:, None]
            band[:, :, : tail.shape[2]] = torch.lerp(tail, band[:, :, : tail.shape[2]], weights)
        done = (following - top) * scale
        tail = band[:, :, done:].clone()
        yield band[:, :, :done]
        del band


def places(height: int, width: int, tile: Sides, overlap: int = OVERLAP) -> list[tuple[int, int]]:
    """Row and column where each tile of an image of this size starts, in the order in which ``fn`` is called."""
    return list(itertools.product(starts_along(height, tile[0], overlap), starts_along(width, tile[1], overlap)))


def cut(x: Tensor, tile: Sides, overlap: int = OVERLAP) -> Iterator[Tensor]:
    """The tiles of ``x`` (1, C, H, W) in the order of :func:`places`, as views of it."""
    for top, left in places(x.shape[-2], x.shape[-1], tile, overlap):
        yield x[..., top : top + tile[0], left : left + tile[1]]


def averaged(fn: Callable[[Tensor], Tensor], x: Tensor, scale: int, tile: Sides, overlap: int) -> Tensor:
    """:func:`tiled` as ResShift and SinSR join tiles, for comparison: the plain mean where they overlap, seams and all.

    Their own settings are in :data:`PUBLISHED_OVERLAPS`.
    """
    pieces = map(fn, cut(x, tile, overlap))
    size = x.shape[-2], x.shape[-1]
    return torch.cat(list(averaged_rows(pieces, size, scale, tile, overlap)), dim=2)


def averaged_rows(pieces: Iterable[Tensor], size: Sides, scale: int, tile: Sides, overlap: int) -> Iterator[Tensor]:
    """The result of :func:`averaged` as consecutive bands of finished rows, one row of tiles in memory at a time."""
    height, width = size
    starts, columns = starts_along(height, tile[0], overlap), starts_along(width, tile[1], overlap)
    pieces, above = iter(pieces), None
    for top, following in zip(starts, [*starts[1:], height], strict=True):
        sums = _sum_of_tiles(pieces, columns, width * scale, scale)
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
    for top, left in places(z.shape[-2], z.shape[-1], (side, side), overlap):
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
    pieces: Iterator[Tensor], starts: list[int], width: int, scale: int, *, overlap: int, margin: int
) -> Tensor:
    """The next tiles of ``pieces``, one for each start, joined to a band (1, D, h * scale, ``width``)."""
    band: Tensor | None = None
    filled = 0
    for left in starts:
        piece = next(pieces).to("cpu", torch.float32)
        if band is None:
            band = piece.new_empty((*piece.shape[:3], width))
        start = left * scale
        shared = filled - start
        if shared > 0:
            weights = opacity(shared, overlap * scale, margin * scale)
            piece[..., :shared] = torch.lerp(band[..., start:filled], piece[..., :shared], weights)
        filled = start + piece.shape[-1]
        band[..., start:filled] = piece
    assert band is not None
    return band


def _sum_of_tiles(pieces: Iterator[Tensor], starts: list[int], width: int, scale: int) -> Tensor:
    """Their sum (1, D + 1, h * scale, ``width``) instead; the last channel counts the tiles at each pixel."""
    sums: Tensor | None = None
    for left in starts:
        piece = next(pieces).to("cpu", torch.float32)
        if sums is None:
            sums = piece.new_zeros((1, piece.shape[1] + 1, piece.shape[2], width))
        window = sums[..., left * scale : left * scale + piece.shape[-1]]
        window[:, :-1] += piece
        window[:, -1:] += 1
    assert sums is not None
    return sums

"""Positions of the tiles of an image, and joining them.

Tiles are laid over each other from left to right and from top to bottom, each with an opacity that is zero on the
outermost pixels of a tile (where a network lacks context), rises smoothly across the rest of the overlap and is one
beyond. Whatever the sizes, the weights of all tiles then add up to one at every pixel, and equal tiles give exactly
equal results.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
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
    """Positions of tiles and the way they are joined; sides in input pixels. Made by :func:`join_of`."""

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

    def in_units_of(self, side: int) -> TileJoin:
        """The same tiles in units of ``side`` pixels, of which all lengths are multiples."""
        return TileJoin(
            tile=(self.tile[0] // side, self.tile[1] // side),
            overlap=self.overlap // side,
            multiple=self.multiple // side,
            blend=self.blend,
            margin=self.margin // side,
        )

    def origins(self, height: int, width: int) -> list[tuple[int, int]]:
        """Row and column where each tile of a padded image starts, in order."""
        return tile_origins(height, width, self.tile, self.overlap)


def join_of(tile: Sides, overlap: int, multiple: int, blend: TileBlend) -> TileJoin:
    """The join of tiles of about ``tile`` and ``overlap`` for a network with a total stride of ``multiple`` pixels.

    A network with strided layers sees a tile as it sees the whole only if the tile starts at a multiple of its stride.
    The published way ignores that.
    """
    if blend == "average":
        return TileJoin(tile=tile, overlap=published_overlap(min(tile), overlap), multiple=1, blend=blend)
    tile = (-(-tile[0] // multiple) * multiple, -(-tile[1] // multiple) * multiple)
    overlap = _whole_multiples(overlap, min(tile), multiple)
    return TileJoin(tile=tile, overlap=overlap, multiple=multiple, blend=blend, margin=min(MARGIN, overlap // 3))


def _whole_multiples(overlap: int, tile: int, multiple: int) -> int:
    """The overlap in multiples of ``multiple``: at most a third of a tile, except that one is better than a seam."""
    count = min(overlap, tile // 3) // multiple
    if count == 0 and overlap > 0 and tile >= 2 * multiple:
        count = 1
    return count * multiple


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


def tiled_rows(
    pieces: Iterable[Tensor], size: Sides, scale: int, tile: Sides, overlap: int = OVERLAP, *, margin: int = MARGIN
) -> Iterator[Tensor]:
    """Consecutive bands of finished rows (1, D, rows, W * scale), float32 on the CPU, from the outputs ``pieces`` of
    the tiles that :func:`cut` makes of an image of ``size``, in their order.

    No more than one row of tiles is in memory at a time, so that the caller can round and store each band. All tiles
    have one shape. Where an output depends on at most ``margin`` input pixels around it, the result equals that of the
    whole.
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


def tile_origins(height: int, width: int, tile: Sides, overlap: int = OVERLAP) -> list[tuple[int, int]]:
    """Row and column where each tile of an image of this size starts, from left to right and from top to bottom."""
    return list(itertools.product(starts_along(height, tile[0], overlap), starts_along(width, tile[1], overlap)))


def cut(x: Tensor, tile: Sides, overlap: int = OVERLAP) -> Iterator[Tensor]:
    """The tiles of ``x`` (1, C, H, W) in the order of :func:`tile_origins`, as views of it."""
    for top, left in tile_origins(x.shape[-2], x.shape[-1], tile, overlap):
        yield x[..., top : top + tile[0], left : left + tile[1]]


def averaged_rows(pieces: Iterable[Tensor], size: Sides, scale: int, tile: Sides, overlap: int) -> Iterator[Tensor]:
    """:func:`tiled_rows` as ResShift and SinSR join tiles, for comparison: the plain mean where they overlap, seams and
    all. Their own settings are in :data:`PUBLISHED_OVERLAPS`."""
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

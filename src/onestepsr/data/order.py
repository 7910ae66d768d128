"""In which order an epoch goes through the data: a pure function of (seed, index), for folders and for tar shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onestepsr.core.rng import derived_seed

BLOCKS_PER_WINDOW = 64
"""Blocks that are read side by side. As many tar files are open at most, and a few more."""


def epoch_position(length: int, index: int, seed: int) -> int:
    """Which of ``length`` things comes at place ``index`` when each epoch runs through all of them in a new order."""
    epoch, place = _epoch_and_place(length, index)
    return int(_permutation(length, derived_seed(seed, "order", epoch))[place])


class BlockOrder:
    """A new order each epoch in which places near each other hold photos that are stored near each other.

    Every shard is cut into blocks of at most ``block`` neighbouring photos. An epoch puts all blocks, of all shards,
    into a new order, and shuffles the photos of every ``BLOCKS_PER_WINDOW`` blocks' worth among each other. A block of
    one photo is thus a full shuffle. Memory: about 24 bytes per block, and 8 bytes per photo of one window.
    """

    def __init__(self, counts: Sequence[int], block: int, seed: int) -> None:
        """``counts`` holds the photos of each shard; they are numbered through, shard after shard."""
        if block < 1:
            raise ValueError(f"block is {block}: expected 1 or more")
        self.seed, self.window = seed, block * BLOCKS_PER_WINDOW
        self.first = _block_starts(counts, block)
        self.length = int(sum(counts))
        self._epoch: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._window: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def position(self, index: int) -> int:
        """Number of the photo that comes at place ``index`` >= 0 of the endless stream."""
        epoch, place = _epoch_and_place(self.length, index)
        window, inside = divmod(place, self.window)
        place = window * self.window + int(self._places(epoch, window)[inside])
        blocks, ends = self._blocks(epoch)
        rank = int(np.searchsorted(ends, place, side="right"))
        return int(self.first[blocks[rank] + 1]) - int(ends[rank]) + place

    def _blocks(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The blocks in the epoch's order, and the place behind the last photo of each."""
        if self._epoch is None or self._epoch[0] != epoch:
            blocks = _shuffled(len(self.first) - 1, derived_seed(self.seed, "blocks", epoch))
            self._epoch = (epoch, blocks, np.cumsum(np.diff(self.first)[blocks]))
        return self._epoch[1:]

    def _places(self, epoch: int, window: int) -> NDArray[np.int64]:
        """How one window's places are permuted; the last window of an epoch may be shorter."""
        if self._window is None or self._window[0] != (epoch, window):
            length = min(self.window, self.length - window * self.window)
            self._window = ((epoch, window), _shuffled(length, derived_seed(self.seed, "window", epoch, window)))
        return self._window[1]


def _epoch_and_place(length: int, index: int) -> tuple[int, int]:
    if index < 0:
        raise IndexError(f"sample {index}: the stream starts at 0")
    return divmod(index, length)


def _block_starts(counts: Sequence[int], block: int) -> NDArray[np.int64]:
    """First photo of each block, and the number of photos at the end; a shard's blocks differ by one photo at most."""
    pieces, before = [], 0
    for count in counts:
        blocks = -(-count // block)
        pieces.append(before + np.arange(blocks, dtype=np.int64) * count // max(blocks, 1))
        before += count
    return np.concatenate([*pieces, np.array([before], dtype=np.int64)])


def _shuffled(length: int, seed: int) -> NDArray[np.int64]:
    order: NDArray[np.int64] = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).numpy()
    return order


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))

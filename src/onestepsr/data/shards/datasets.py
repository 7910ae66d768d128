"""Photos and pairs in tar shards, for sets that do not fit a folder listing.

A shard is a plain tar file. Its images are found through an index (:mod:`onestepsr.data.shards.index`), so any sample
can be read at once, and a resumed run or another number of processes sees the same stream. All that stays in memory is
12 bytes per image.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onestepsr.core.errors import UserError
from onestepsr.data.config import DataConfig
from onestepsr.data.order import BlockOrder
from onestepsr.data.pair_dataset import SHOWN_NAMES, PairStream
from onestepsr.data.photo_dataset import HRStream
from onestepsr.data.shards.index import HR, LR, OTHER, TarIndex, name_of, open_indexes
from onestepsr.data.shards.reader import TarImages, find_tars
from onestepsr.imaging.read import EXTENSIONS

logger = logging.getLogger(__name__)

Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]


class HRShards(HRStream):
    """Random crops of photos in tar files, degraded on the fly; block by block in a new order each epoch."""

    def __init__(self, config: DataConfig, seed: int, with_lr: bool) -> None:
        indexes = open_indexes(find_tars(config.paths), config.cache_dir)
        chosen = select_photos(indexes, config.crop)
        self.images = TarImages(indexes, chosen)
        self.order = BlockOrder([len(numbers) for numbers in chosen], config.shuffle_block, seed)
        super().__init__(config, seed, with_lr, self.images)

    def __len__(self) -> int:
        return len(self.images)

    def position(self, index: int) -> int:
        """A new order of all photos in each epoch, in which neighbours of a tar stay near each other."""
        return self.order.position(index)

    def content(self) -> list[Any]:
        """Name and size of each tar, and where the photos lie."""
        return self.images.content()


class PairShards(PairStream):
    """Crops of pairs ``KEY.hr.EXT`` and ``KEY.lr.EXT`` that lie in the same tar file."""

    def __init__(self, config: DataConfig, seed: int, with_lr: bool) -> None:
        indexes = open_indexes(find_tars(config.paths), config.cache_dir)
        chosen = select_pairs(indexes, config)
        self.images = TarImages(indexes, chosen)
        self.order = BlockOrder([len(numbers) // 2 for numbers in chosen], config.shuffle_block, seed)
        super().__init__(config, seed, with_lr, self.images)

    def __len__(self) -> int:
        return len(self.images) // 2

    def position(self, index: int) -> int:
        """A new order of all pairs in each epoch, in which neighbours of a tar stay near each other."""
        return self.order.position(index)

    def content(self) -> list[Any]:
        """Name and size of each tar, and where the images lie."""
        return self.images.content()


def select_photos(indexes: Sequence[TarIndex], crop: int) -> list[Numbers]:
    """Which members of each tar are photos of at least ``crop`` pixels; the LR half of a pair is none.

    What is left out is reported in one log line for each reason; UserError if nothing remains.
    """
    photos = [(index.members["role"] != LR) | (index.members["partner"] < 0) for index in indexes]
    if not _count(photos):
        raise UserError(f"{_those(indexes)}: no images inside (looked for {', '.join(EXTENSIONS)})")
    readable = _readable(indexes, photos)
    usable = [mask & (_short_side(index) >= crop) for index, mask in zip(indexes, readable, strict=True)]
    small = _count(readable) - _count(usable)
    if not _count(usable):
        largest = max(int(_short_side(index).max(initial=0)) for index in indexes)
        sides = f"the largest photo has a short side of {largest}, expected at least crop = {crop}"
        raise UserError(f"{_those(indexes)}: {sides}")
    if small:
        logger.warning("%d of %d photos are left out: smaller than crop = %d", small, _count(readable), crop)
    return [np.flatnonzero(mask) for mask in usable]


def select_pairs(indexes: Sequence[TarIndex], config: DataConfig) -> list[Numbers]:
    """The members of each tar's pairs as HR, LR, HR, LR, ...; images that belong to no pair are passed over.

    UserError for a KEY.hr or KEY.lr without partner, for pairs whose sizes do not fit ``config``, or if there are none.
    """
    paired = [index.members["partner"] >= 0 for index in indexes]
    for index, mask in zip(indexes, paired, strict=True):
        _require_partners(index, mask)
    if not _count(paired):
        raise UserError(f"{_those(indexes)}: no pairs inside (looked for KEY.hr.png with KEY.lr.png and the like)")
    readable = _readable(indexes, paired)
    return [_pairs_of(index, mask, config) for index, mask in zip(indexes, readable, strict=True)]


def _pairs_of(index: TarIndex, readable: Mask, config: DataConfig) -> Numbers:
    members = index.members
    hr = np.flatnonzero(readable & (members["role"] == HR))
    hr = hr[readable[members["partner"][hr]]]
    lr = members["partner"][hr].astype(np.int64)
    fits = np.ones(len(hr), dtype=bool)
    for side in ("width", "height"):
        fits &= members[side][hr] == members[side][lr].astype(np.int64) * config.scale
    if not fits.all():
        number = int(np.flatnonzero(~fits)[0])
        sizes = " against ".join(f"{members['width'][n]}x{members['height'][n]}" for n in (hr[number], lr[number]))
        wrong = int((~fits).sum())
        name = name_of(index, int(hr[number]))
        raise UserError(f"{name}: {sizes}, expected {config.scale} times as large ({wrong} such pairs in this tar)")
    small = hr[_short_side(index)[hr] < config.crop]
    if len(small):
        size = f"{members['width'][small[0]]}x{members['height'][small[0]]}"
        name = name_of(index, int(small[0]))
        raise UserError(f"{name}: {size}, expected at least crop = {config.crop} ({len(small)} such pairs in this tar)")
    return np.stack([hr, lr], axis=1).ravel()


def _require_partners(index: TarIndex, paired: Mask) -> None:
    lonely = np.flatnonzero((index.members["role"] != OTHER) & ~paired)
    if len(lonely):
        names = ", ".join(name_of(index, int(number)).rpartition(": ")[2] for number in lonely[:SHOWN_NAMES])
        more = f" and {len(lonely) - SHOWN_NAMES} more" if len(lonely) > SHOWN_NAMES else ""
        raise UserError(f"{index.path}: no partner for {names}{more}")


def _readable(indexes: Sequence[TarIndex], wanted: Sequence[Mask]) -> list[Mask]:
    """``wanted`` without what is no image after all, which is reported in one log line; UserError if none is left."""
    readable = [mask & (index.members["width"] > 0) for index, mask in zip(indexes, wanted, strict=True)]
    lost = _count(wanted) - _count(readable)
    if lost:
        first = next(
            name_of(index, int(np.flatnonzero(mask & ~kept)[0]))
            for index, mask, kept in zip(indexes, wanted, readable, strict=True)
            if (mask & ~kept).any()
        )
        if not _count(readable):
            raise UserError(f"{first}: none of the {lost} images in the tar files can be read")
        logger.warning("%d unreadable images are left out, the first is %s", lost, first)
    return readable


def _short_side(index: TarIndex) -> Numbers:
    sides: Numbers = np.minimum(index.members["width"], index.members["height"]).astype(np.int64)
    return sides


def _count(masks: Sequence[Mask]) -> int:
    return sum(int(mask.sum()) for mask in masks)


def _those(indexes: Sequence[TarIndex]) -> str:
    more = f" and {len(indexes) - 1} more tar files" if len(indexes) > 1 else ""
    return f"{indexes[0].path}{more}"

"""LR and HR images in two folders, matched by name; what every set of pairs shares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from onestepsr.core.errors import UserError, join_names
from onestepsr.core.rng import generator, integer
from onestepsr.data.config import DataConfig
from onestepsr.data.order import epoch_position
from onestepsr.data.photo_dataset import MAX_REPLACEMENTS, Sample, augment, photo_mark, to_float
from onestepsr.data.photos import Photo, PhotoCache, PhotoFiles, PhotoSource, Pixels, scan

SHOWN_NAMES = 5


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two files of one scene."""

    hr: Photo
    lr: Photo


class PairStream(Dataset[Sample]):
    """Aligned random crops of matched images from any source; whole images where ``crop`` is 0.

    ``source`` numbers the HR image of pair ``n`` with ``2 n`` and the LR image with ``2 n + 1``.
    """

    def __init__(self, config: DataConfig, seed: int, with_lr: bool, source: PhotoSource) -> None:
        self.config, self.seed, self.with_lr = config, seed, with_lr
        self.cache = PhotoCache(source, config.cache_bytes)

    @abstractmethod
    def __len__(self) -> int:
        """Number of pairs."""

    @abstractmethod
    def position(self, index: int) -> int:
        """Which pair sample ``index`` shows a crop of."""

    @abstractmethod
    def content(self) -> list[Any]:
        """The files, as plain values."""

    def __getitem__(self, index: int) -> Sample:
        rng = generator(self.seed, "sample", index)
        number, hr, lr = self._pair(self.position(index)) if self.config.crop else self._whole(index % len(self))
        sample = {"hr": to_float(hr), "lr": to_float(lr)}
        if self.config.crop:
            sample = augment(self._crop(sample, rng), self.config, rng)
        mark = photo_mark(number, self.config)
        return sample | mark if self.with_lr else {"hr": sample["hr"], **mark}

    def _pair(self, position: int) -> tuple[int, Pixels, Pixels]:
        """The pair at ``position``, or the next one that can be decoded and has the sizes that its headers say; its own
        position before it."""
        tries = min(len(self), MAX_REPLACEMENTS)
        for step in range(tries):
            number = (position + step) % len(self)
            hr, lr = self.cache.get(2 * number), self.cache.get(2 * number + 1)
            if hr is not None and lr is not None and self._usable(hr, lr):
                return number, hr, lr
        _, name = self.cache.source.fetch(2 * position)
        raise UserError(f"{name}: none of the {tries} pairs from this one on can be decoded")

    def _whole(self, position: int) -> tuple[int, Pixels, Pixels]:
        """Exactly the pair at ``position``: whole images are for validation, where a replacement would mislead."""
        hr, lr = self.cache.get(2 * position), self.cache.get(2 * position + 1)
        if hr is None or lr is None:
            _, name = self.cache.source.fetch(2 * position + (hr is not None))
            raise UserError(f"{name}: cannot be decoded")
        return position, hr, lr

    def _usable(self, hr: Pixels, lr: Pixels) -> bool:
        scale = self.config.scale
        return hr.shape[:2] == (lr.shape[0] * scale, lr.shape[1] * scale) and min(hr.shape[:2]) >= self.config.crop

    def _crop(self, sample: Sample, rng: Any) -> Sample:
        side, scale = self.config.crop // self.config.scale, self.config.scale
        height, width = sample["lr"].shape[-2:]
        top, left = integer(height - side + 1, rng), integer(width - side + 1, rng)
        hr = sample["hr"][:, top * scale : (top + side) * scale, left * scale : (left + side) * scale]
        return {"hr": hr.contiguous(), "lr": sample["lr"][:, top : top + side, left : left + side].contiguous()}


class PairsFolder(PairStream):
    """Pairs that lie in two folders as files of the same name."""

    def __init__(self, config: DataConfig, seed: int, with_lr: bool) -> None:
        self.pairs = [
            pair
            for hr_folder, lr_folder in zip(config.paths, config.lr_paths, strict=True)
            for pair in match_pairs(hr_folder, lr_folder)
        ]
        check_sizes(self.pairs, config)
        super().__init__(config, seed, with_lr, PhotoFiles(self._photos()))

    def __len__(self) -> int:
        return len(self.pairs)

    def position(self, index: int) -> int:
        """A new order of all pairs in each epoch."""
        return epoch_position(len(self), index, self.seed)

    def content(self) -> list[Any]:
        """Name, size and bytes of each file."""
        return [[photo.name, photo.width, photo.height, photo.bytes] for photo in self._photos()]

    def names(self) -> list[str]:
        """Name of each HR image, relative to its folder."""
        return [pair.hr.name for pair in self.pairs]

    def _photos(self) -> list[Photo]:
        return [photo for pair in self.pairs for photo in (pair.hr, pair.lr)]


def match_pairs(hr_folder: Path, lr_folder: Path) -> list[Pair]:
    """Match by relative name without suffix; every image that has no partner is an error, all in one message."""
    hr, lr = _by_stem(scan([hr_folder])), _by_stem(scan([lr_folder]))
    problems = [_missing(hr.keys() - lr.keys(), lr_folder), _missing(lr.keys() - hr.keys(), hr_folder)]
    if any(problems):
        raise UserError("; ".join(filter(None, problems)))
    return [Pair(hr=hr[stem], lr=lr[stem]) for stem in sorted(hr)]


def check_sizes(pairs: list[Pair], config: DataConfig) -> None:
    """Every HR image must be ``scale`` times its LR image, and not smaller than the crop."""
    wrong = [pair for pair in pairs if not _fits(pair, config.scale)]
    if wrong:
        hr, lr = wrong[0].hr, wrong[0].lr
        sizes = f"{hr.width}x{hr.height} against {lr.width}x{lr.height}"
        raise UserError(f"{hr.path}: {sizes}, expected {config.scale} times as large ({len(wrong)} such pairs)")
    small = [pair.hr for pair in pairs if min(pair.hr.width, pair.hr.height) < config.crop]
    if small:
        photo = small[0]
        size = f"{photo.width}x{photo.height}"
        raise UserError(f"{photo.path}: {size}, expected at least crop = {config.crop} ({len(small)} such pairs)")


def _fits(pair: Pair, scale: int) -> bool:
    return (pair.hr.width, pair.hr.height) == (pair.lr.width * scale, pair.lr.height * scale)


def _by_stem(photos: list[Photo]) -> dict[str, Photo]:
    result: dict[str, Photo] = {}
    for photo in photos:
        stem = photo.name.rpartition(".")[0]
        if stem in result:
            raise UserError(f"{photo.path}: a second image called '{stem}' beside {result[stem].path.name}")
        result[stem] = photo
    return result


def _missing(stems: set[str] | Mapping[str, Any], folder: Path) -> str:
    if not stems:
        return ""
    return f"{folder}: no partner for {join_names(sorted(stems), SHOWN_NAMES)}"

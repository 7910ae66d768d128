"""LR and HR pictures in two folders, matched by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from onestepsr.data.config import DataConfig
from onestepsr.data.hr_folder import Sample, augment, epoch_position, to_float
from onestepsr.data.photos import Photo, PhotoCache, Pixels, scan
from onestepsr.data.sampling import generator, integer
from onestepsr.errors import UserError

SHOWN_NAMES = 5


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two files of one scene."""

    hr: Photo
    lr: Photo


class PairsFolder(Dataset[Sample]):
    """Aligned random crops of matched pictures; whole pictures where ``crop`` is 0."""

    def __init__(self, config: DataConfig, seed: int, with_lr: bool) -> None:
        self.config, self.seed, self.with_lr = config, seed, with_lr
        self.pairs = [
            pair
            for hr_folder, lr_folder in zip(config.paths, config.lr_paths, strict=True)
            for pair in match_pairs(hr_folder, lr_folder)
        ]
        check_sizes(self.pairs, config)
        paths = [photo.path for pair in self.pairs for photo in (pair.hr, pair.lr)]
        self.cache = PhotoCache(paths, config.cache_bytes)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        rng = generator(self.seed, "sample", index)
        position = epoch_position(len(self), index, self.seed) if self.config.crop else index % len(self)
        hr, lr = self._pixels(2 * position), self._pixels(2 * position + 1)
        sample = {"hr": to_float(hr), "lr": to_float(lr)}
        if self.config.crop:
            sample = augment(self._crop(sample, rng), self.config, rng)
        return sample if self.with_lr else {"hr": sample["hr"]}

    def content(self) -> list[Any]:
        """Name, size and bytes of each file."""
        photos = [photo for pair in self.pairs for photo in (pair.hr, pair.lr)]
        return [[photo.name, photo.width, photo.height, photo.bytes] for photo in photos]

    def _pixels(self, number: int) -> Pixels:
        pixels = self.cache.get(number)
        if pixels is None:
            raise UserError(f"{self.cache.paths[number]}: cannot be decoded")
        return pixels

    def _crop(self, sample: Sample, rng: Any) -> Sample:
        side, scale = self.config.crop // self.config.scale, self.config.scale
        height, width = sample["lr"].shape[-2:]
        top, left = integer(height - side + 1, rng), integer(width - side + 1, rng)
        hr = sample["hr"][:, top * scale : (top + side) * scale, left * scale : (left + side) * scale]
        return {"hr": hr.contiguous(), "lr": sample["lr"][:, top : top + side, left : left + side].contiguous()}


def match_pairs(hr_folder: Path, lr_folder: Path) -> list[Pair]:
    """Match by relative name without suffix; every picture that has no partner is an error, all in one message."""
    hr, lr = _by_stem(scan([hr_folder])), _by_stem(scan([lr_folder]))
    problems = [_missing(hr.keys() - lr.keys(), lr_folder), _missing(lr.keys() - hr.keys(), hr_folder)]
    if any(problems):
        raise UserError("; ".join(filter(None, problems)))
    return [Pair(hr=hr[stem], lr=lr[stem]) for stem in sorted(hr)]


def check_sizes(pairs: list[Pair], config: DataConfig) -> None:
    """Every HR picture must be ``scale`` times its LR picture, and not smaller than the crop."""
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
            raise UserError(f"{photo.path}: a second picture called '{stem}' beside {result[stem].path.name}")
        result[stem] = photo
    return result


def _missing(stems: set[str] | Mapping[str, Any], folder: Path) -> str:
    if not stems:
        return ""
    names = sorted(stems)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"{folder}: no partner for {', '.join(names[:SHOWN_NAMES])}{more}"

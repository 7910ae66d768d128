"""Photos as an endless stream of training samples; the pieces that every kind of dataset shares."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from onestepsr.core.errors import UserError
from onestepsr.core.rng import generator, integer, uniform
from onestepsr.data.config import DataConfig
from onestepsr.data.degradation.pipeline import degrade_pair
from onestepsr.data.order import epoch_position
from onestepsr.data.photos import Photo, PhotoCache, PhotoFiles, PhotoSource, Pixels, scan

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 1000
"""So many photos in a row that cannot be decoded are the end of the run."""

Sample = dict[str, Tensor]
"""``hr`` (3, H, W) and mostly ``lr`` (3, H / scale, W / scale), float32 RGB in [0, 1] on the 256 levels of 8 bit."""
PHOTO = "photo"
"""Where photos have texts: the number of the photo that a sample shows, a tensor without axes."""


class SampleStream(Protocol):
    """What the datasets have in common."""

    with_lr: bool

    def __len__(self) -> int:
        """Samples per epoch: the number of photos, pairs or pool entries."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` of the endless stream."""
        ...

    def content(self) -> list[Any]:
        """What the samples depend on besides configuration and seed: the files, as plain values."""
        ...


class HRStream(Dataset[Sample]):
    """Random crops of photos from any source, degraded on the fly."""

    def __init__(self, config: DataConfig, seed: int, with_lr: bool, source: PhotoSource) -> None:
        self.config, self.seed, self.with_lr = config, seed, with_lr
        self.cache = PhotoCache(source, config.cache_bytes)
        self.recipe = config.recipe()

    @abstractmethod
    def __len__(self) -> int:
        """Number of photos."""

    @abstractmethod
    def position(self, index: int) -> int:
        """Which photo sample ``index`` shows."""

    @abstractmethod
    def content(self) -> list[Any]:
        """The files, as plain values."""

    def __getitem__(self, index: int) -> Sample:
        rng = generator(self.seed, "sample", index)
        number, pixels = self._photo(self.position(index))
        hr = to_float(random_crop(pixels, self.config, rng))
        hr = augment({"hr": hr}, self.config, rng)["hr"]
        if not self.with_lr:
            return {"hr": hr, **photo_mark(number, self.config)}
        target, lr = degrade_pair(hr, self.recipe, rng, self.config.scale)
        return {"hr": target, "lr": lr, **photo_mark(number, self.config)}

    def _photo(self, position: int) -> tuple[int, Pixels]:
        """The photo at ``position``, or the next one that can be decoded and is as large as its header says; and its
        own position."""
        tries = min(len(self), MAX_REPLACEMENTS)
        for step in range(tries):
            number = (position + step) % len(self)
            pixels = self.cache.get(number)
            if pixels is not None and min(pixels.shape[:2]) >= self.config.crop:
                return number, pixels
        _, name = self.cache.source.fetch(position)
        raise UserError(f"{name}: none of the {tries} photos from this one on can be decoded")


class HRFolder(HRStream):
    """Photos that lie in folders as files of their own."""

    def __init__(self, config: DataConfig, seed: int, with_lr: bool) -> None:
        self.photos = _large_enough(scan(config.paths), config.crop)
        super().__init__(config, seed, with_lr, PhotoFiles(self.photos))

    def __len__(self) -> int:
        return len(self.photos)

    def position(self, index: int) -> int:
        """A new order of all photos in each epoch."""
        return epoch_position(len(self), index, self.seed)

    def content(self) -> list[Any]:
        """Name, size and bytes of each photo."""
        return [[photo.name, photo.width, photo.height, photo.bytes] for photo in self.photos]

    def names(self) -> list[str]:
        """Name of each photo, relative to its folder."""
        return [photo.name for photo in self.photos]


def photo_mark(number: int, config: DataConfig) -> Sample:
    """The entry of a sample that says which photo it shows, where ``config`` gives photos texts."""
    return {} if config.prompts is None else {PHOTO: torch.tensor(number)}


def random_crop(pixels: Pixels, config: DataConfig, rng: torch.Generator) -> Pixels:
    """A (crop, crop, 3) window of ``pixels`` (H, W, 3) after shrinking by a factor from ``hr_scale``, antialiased."""
    height, width = pixels.shape[:2]
    low = max(config.hr_scale[0], config.crop / min(height, width))
    factor = uniform(low, max(low, config.hr_scale[1]), rng)
    side = min(max(config.crop, round(config.crop / factor)), height, width)
    top, left = integer(height - side + 1, rng), integer(width - side + 1, rng)
    window = pixels[top : top + side, left : left + side]
    if side == config.crop:
        return window
    image = Image.fromarray(window).resize((config.crop, config.crop), Image.Resampling.BICUBIC)
    return np.asarray(image)


def augment(sample: Sample, config: DataConfig, rng: torch.Generator) -> Sample:
    """Mirror and turn all images of ``sample`` alike, as ``config`` allows."""
    mirror = config.flips and integer(2, rng) == 1
    turns = integer(4, rng) if config.rotations else 0
    return {name: _oriented(image, mirror, turns) for name, image in sample.items()}


def to_float(pixels: Pixels) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255


def _oriented(image: Tensor, mirror: bool, turns: int) -> Tensor:
    if mirror:
        image = image.flip(-1)
    return torch.rot90(image, turns, (-2, -1)).contiguous() if turns else image


def _large_enough(photos: list[Photo], crop: int) -> list[Photo]:
    usable = [photo for photo in photos if min(photo.width, photo.height) >= crop]
    if not usable:
        largest = max(photos, key=lambda photo: min(photo.width, photo.height))
        size = f"{largest.width}x{largest.height}"
        raise UserError(f"{largest.path}: {size} is the largest photo, expected a short side of at least crop = {crop}")
    if len(usable) < len(photos):
        logger.warning(
            "%d of %d photos are left out: smaller than crop = %d", len(photos) - len(usable), len(photos), crop
        )
    return usable

"""Endless datasets of photos and of LR/HR pairs, and a pool that keeps finished samples on disk.

Sample ``i`` of any i >= 0 depends on (seed, i) and the files alone. Every epoch goes through the photos in a new order,
so ``dataset[i]`` with i = 0, 1, 2, ... is the whole training stream and a resumed run just continues counting. A sample
is ``{"hr": (3, H, W), "lr": (3, H / scale, W / scale)}``, float32 RGB in [0, 1] on the 256 levels of 8 bit; without LR
images it is ``{"hr": ...}``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError, join_names
from onestepsr.core.rng import derived_seed, generator, integer, uniform
from onestepsr.data.degradation.pipeline import DegradationConfig, FaceDegradationConfig, Recipe, degrade_pair
from onestepsr.data.degradation.presets import get_preset, mix
from onestepsr.data.pair_names import divided, matched
from onestepsr.data.photos import Photo, PhotoCache, Pixels, first_of, scan

# ---- Configuration ---------------------------------------------------------------------------------------------------

MAX_CROP = 4096


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Photos, their crops and their LR versions."""

    kind: Literal["hr_folder", "pairs"] = "hr_folder"
    """``hr_folder``: photos are degraded on the fly. ``pairs``: LR and HR images are matched by name,
    without the endings of datasets (``a_LR4`` and ``a_HR``, ``0801x4`` and ``0801``)."""
    paths: tuple[Path, ...] = ()
    """Folders of HR photos, searched recursively. At least one is needed."""
    lr_paths: tuple[Path, ...] = ()
    """Only for pairs: the folders of LR images, in the order of ``paths``."""
    taught_paths: tuple[Path, ...] = ()
    """Only for pairs, and methods that imitate a teacher: the folders of the images that it has made of the LR images,
    of the HR images' sizes and names, in the order of ``paths``."""
    first: tuple[int, ...] = ()
    """Photos taken from each folder of ``paths``, the first ones by name; 0 takes all, as does an empty list. "The
    first 10,000 of FFHQ" is 10000. A folder that has fewer is refused."""
    crop: int = 256
    """Side of the square HR crop in pixels, a multiple of ``scale``. For pairs, 0 keeps whole images, to
    measure on: training needs one size."""
    scale: int = 4
    """HR size divided by LR size; 1 where images are restored at their own size, as faces are."""
    degradation: str | dict[str, float] | FaceDegradationConfig | DegradationConfig = "mixed"
    """A preset's name, relative weights of several presets by name, or all settings (second-order or of faces)."""
    hr_scale: tuple[float, float] = (0.5, 1.0)
    """Photos are shrunk by a factor from this range first, which also removes traces of their own JPEG compression.

    A photo is never shrunk below the crop: where the low end would do that, the range ends at what fits.
    """
    flips: bool = True
    """Mirror half of the crops."""
    rotations: bool = False
    """Turn crops by multiples of 90 degrees. Off by default: gravity is information for a generative model."""
    pool_size: int = 0
    """Number of distinct samples kept on disk and reused with new flips (and rotations); 0 makes every sample afresh.

    Worth it where degradation would take processor time from training. Takes crop^2 * 3.2 bytes per sample at scale 4.
    """
    prompts: Path | None = None
    """Texts about the photos, for methods whose networks read text: a folder with ``NAME.txt`` for ``NAME.jpg``, one
    text file for all, or a JSON or YAML table of names and texts. All crops of a photo have its text. Not with a
    pool."""
    cache_dir: Path = Path("cache")
    """Folder of the pools, each named by a hash of everything its content depends on, and of the embeddings of
    ``prompts``."""
    cache_bytes: int = 2_000_000_000
    """Limit on decoded photos kept in memory, shared out among the loader's workers."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty: expected one or more folders of photos")
        if self.first and (len(self.first) != len(self.paths) or min(self.first) < 0):
            raise ValueError(f"first is {list(self.first)}: expected a number of at least 0 for each of the paths")
        if not 1 <= self.scale <= 16:
            raise ValueError(f"scale is {self.scale}: expected 1 to 16")
        whole = self.crop == 0 and self.kind == "pairs"
        if not whole and (self.crop % self.scale or not self.scale <= self.crop <= MAX_CROP):
            raise ValueError(f"crop is {self.crop}: expected a multiple of {self.scale} up to {MAX_CROP}")
        if whole and self.pool_size:
            raise ValueError("pool_size needs images of one size: set crop")
        if not 0 < self.hr_scale[0] <= self.hr_scale[1] <= 1:
            raise ValueError(f"hr_scale is {self.hr_scale}: expected 0 < low <= high <= 1")
        if self.pool_size < 0 or self.cache_bytes < 0:
            raise ValueError(f"pool_size {self.pool_size}, cache_bytes {self.cache_bytes}: expected 0 or more")
        if self.kind == "pairs" and len(self.lr_paths) != len(self.paths):
            raise ValueError(
                f"lr_paths has {len(self.lr_paths)} folders: expected one for each of {len(self.paths)} paths"
            )
        if self.kind != "pairs" and self.lr_paths:
            raise ValueError("lr_paths is set: expected only with kind 'pairs'")
        if self.taught_paths and (self.kind != "pairs" or len(self.taught_paths) != len(self.paths)):
            raise ValueError(
                f"taught_paths has {len(self.taught_paths)} folders: expected one for each of {len(self.paths)} paths "
                "of pairs"
            )
        if self.prompts is not None and self.pool_size:
            raise ValueError(f"prompts with a pool_size of {self.pool_size}: expected pool_size 0")
        self.recipe()

    def recipe(self) -> Recipe:
        """The degradation that ``degradation`` stands for."""
        if isinstance(self.degradation, str):
            return get_preset(self.degradation)
        if isinstance(self.degradation, (DegradationConfig, FaceDegradationConfig)):
            return self.degradation
        return mix(self.degradation)


logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 1000
"""A run ends after so many photos in a row that cannot be decoded."""
SHOWN_NAMES = 5
PHOTO = "photo"
"""Entry of a sample where photos have texts: the number of its photo, a tensor without axes."""
TAUGHT = "taught"
"""Entry of a teacher's image (3, H, W)."""
Sample = dict[str, Tensor]
"""``hr`` (3, H, W) and mostly ``lr`` (3, H / scale, W / scale), float32 RGB in [0, 1] on the 256 levels of 8 bit."""


def build_dataset(config: DataConfig, seed: int, with_lr: bool = True) -> PhotoStream | Pool:
    """Open the dataset that ``config`` describes; everything that is wrong with files or sizes is reported here."""
    source = (HRFolder if config.kind == "hr_folder" else PairsFolder)(config, seed, with_lr)
    return Pool(source, config, seed) if config.pool_size else source


def epoch_position(length: int, index: int, seed: int) -> int:
    """Entry, of ``length``, at ``index`` >= 0 of the stream; each epoch visits every entry once in a new order."""
    if index < 0:
        raise IndexError(f"sample {index}: the stream starts at 0")
    epoch, offset = divmod(index, length)
    return int(_permutation(length, derived_seed(seed, "order", epoch))[offset])


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


# ---- Photos and pairs ------------------------------------------------------------------------------------------------


class PhotoStream(Dataset[Sample]):
    """Random crops of image files; entry ``n`` consists of the ``files`` photos from ``files * n`` on."""

    files = 1

    def __init__(self, config: DataConfig, seed: int, with_lr: bool, photos: list[Photo]) -> None:
        self.config, self.seed, self.with_lr, self.photos = config, seed, with_lr, photos
        self.cache = PhotoCache(photos, config.cache_bytes)

    def __len__(self) -> int:
        return len(self.photos) // self.files

    def content(self) -> list[Any]:
        """Name, size and bytes of each file, as plain values: the data that samples depend on."""
        return [[photo.name, photo.width, photo.height, photo.bytes] for photo in self.photos]

    def names(self) -> list[str]:
        """Name of each photo, or of the HR image of each pair, relative to its folder."""
        return [photo.name for photo in self.photos[:: self.files]]

    def fits(self, images: list[Pixels]) -> bool:
        """Tell whether decoded images have the sizes that their headers promised."""
        return bool(min(images[0].shape[:2]) >= self.config.crop)

    def decoded(self, position: int) -> tuple[int, list[Pixels]]:
        """Number and images of the entry at ``position``, or of the next one that can be decoded and fits."""
        tries = min(len(self), MAX_REPLACEMENTS)
        for step in range(tries):
            number = (position + step) % len(self)
            images = [self.cache.get(self.files * number + file) for file in range(self.files)]
            found = [image for image in images if image is not None]
            if len(found) == self.files and self.fits(found):
                return number, found
        name = self.photos[self.files * position].path
        kind = "photos" if self.files == 1 else "pairs"
        raise UserError(f"{name}: none of the {tries} {kind} from this one on can be decoded")

    def mark(self, number: int) -> Sample:
        """The entry that names the photo of a sample, where photos have texts."""
        return {} if self.config.prompts is None else {PHOTO: torch.tensor(number)}


class HRFolder(PhotoStream):
    """Random crops of photos in folders, degraded on the fly."""

    def __init__(self, config: DataConfig, seed: int, with_lr: bool) -> None:
        super().__init__(config, seed, with_lr, _large_enough(scan(config.paths, config.first), config.crop))
        self.recipe = config.recipe()

    def __getitem__(self, index: int) -> Sample:
        rng = generator(self.seed, "sample", index)
        number, (pixels,) = self.decoded(epoch_position(len(self), index, self.seed))
        hr = to_float(random_crop(pixels, self.config, rng))
        hr = augment({"hr": hr}, self.config, rng)["hr"]
        if not self.with_lr:
            return {"hr": hr, **self.mark(number)}
        target, lr = degrade_pair(hr, self.recipe, rng, self.config.scale)
        return {"hr": target, "lr": lr, **self.mark(number)}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two files of one scene."""

    hr: Photo
    lr: Photo


class PairsFolder(PhotoStream):
    """Aligned random crops of LR and HR images of the same name in two folders; whole images where ``crop`` is 0."""

    files = 2

    def __init__(self, config: DataConfig, seed: int, with_lr: bool) -> None:
        folders = zip(config.paths, config.lr_paths, strict=True)
        found = [match_pairs(hr, lr) for hr, lr in folders]
        firsts = config.first or (0,) * len(found)
        chosen = [first_of(*item) for item in zip(found, firsts, config.paths, strict=True)]
        self.pairs = [pair for pairs in chosen for pair in pairs]
        check_sizes(self.pairs, config)
        photos = [[pair.hr, pair.lr] for pair in self.pairs]
        if config.taught_paths:
            self.files = 3
            folders = zip(config.paths, config.taught_paths, strict=True)
            taught = {pair.hr.path: pair.lr for hr, images in folders for pair in match_pairs(hr, images)}
            for images in photos:
                images.append(taught[images[0].path])
                sizes = [(image.width, image.height) for image in (images[2], images[0])]
                if sizes[0] != sizes[1]:
                    actual, expected = (f"{width}x{height}" for width, height in sizes)
                    raise UserError(f"{images[2].path}: {actual}, expected the size of the HR image, {expected}")
        super().__init__(config, seed, with_lr, [photo for images in photos for photo in images])

    def __getitem__(self, index: int) -> Sample:
        rng = generator(self.seed, "sample", index)
        if self.config.crop:
            number, images = self.decoded(epoch_position(len(self), index, self.seed))
            whole = {name: to_float(image) for name, image in zip(self._names(), images, strict=True)}
            sample = augment(self._crop(whole, rng), self.config, rng)
        else:
            number = index % len(self)
            first = self.files * number
            sample = {name: to_float(self._whole(first + file)) for file, name in enumerate(self._names())}
        return {**(sample if self.with_lr else {"hr": sample["hr"]}), **self.mark(number)}

    def fits(self, images: list[Pixels]) -> bool:
        """Tell whether decoded images are a pair of the scale, and large enough."""
        (height, width), scale = images[1].shape[:2], self.config.scale
        return images[0].shape[:2] == (height * scale, width * scale) and super().fits(images)

    def _names(self) -> tuple[str, ...]:
        """Entries of a sample, in the order of its files."""
        return ("hr", "lr", TAUGHT)[: self.files]

    def _whole(self, number: int) -> Pixels:
        """Exactly this image: whole images are for validation, where a replacement would mislead."""
        pixels = self.cache.get(number)
        if pixels is None:
            raise UserError(f"{self.photos[number].path}: cannot be decoded")
        return pixels

    def _crop(self, sample: Sample, rng: torch.Generator) -> Sample:
        side, scale = self.config.crop // self.config.scale, self.config.scale
        height, width = sample["lr"].shape[-2:]
        top, left = integer(height - side + 1, rng), integer(width - side + 1, rng)
        cut = {}
        for name, image in sample.items():
            factor = 1 if name == "lr" else scale
            rows, columns = (slice(start * factor, (start + side) * factor) for start in (top, left))
            cut[name] = image[:, rows, columns].contiguous()
        return cut


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


def match_pairs(hr_folder: Path, lr_folder: Path) -> list[Pair]:
    """Match by relative name, see :mod:`onestepsr.data.pair_names`; every image that has no partner is an error, all in
    one message. The two may be one folder, whose names tell HR from LR images."""
    hr_photos = scan([hr_folder])
    lr_photos = hr_photos if lr_folder == hr_folder else scan([lr_folder])
    both = divided([Path(photo.name) for photo in hr_photos]) if lr_folder == hr_folder else None
    if both is not None:
        low, high = ({path.as_posix() for path in files} for files in both[1:])
        lr_photos = [photo for photo in lr_photos if photo.name in low]
        hr_photos = [photo for photo in hr_photos if photo.name in high]
    hr, lr = _by_stem(hr_photos), _by_stem(lr_photos)
    found = matched({stem: photo.path for stem, photo in lr.items()}, hr.keys())
    problems = [_missing(hr.keys() - set(found.values()), lr_folder), _missing(lr.keys() - found.keys(), hr_folder)]
    if any(problems):
        raise UserError("; ".join(filter(None, problems)))
    return [Pair(hr=hr[stem], lr=lr[other]) for other, stem in sorted(found.items(), key=lambda pair: pair[1])]


def check_sizes(pairs: list[Pair], config: DataConfig) -> None:
    """Refuse HR images that are not ``scale`` times as large as their LR image, or smaller than the crop."""
    wrong = [p for p in pairs if (p.hr.width, p.hr.height) != (p.lr.width * config.scale, p.lr.height * config.scale)]
    if wrong:
        hr, lr = wrong[0].hr, wrong[0].lr
        sizes = f"{hr.width}x{hr.height} against {lr.width}x{lr.height}"
        raise UserError(f"{hr.path}: {sizes}, expected {config.scale} times as large ({len(wrong)} such pairs)")
    small = [pair.hr for pair in pairs if min(pair.hr.width, pair.hr.height) < config.crop]
    if small:
        photo = small[0]
        size = f"{photo.width}x{photo.height}"
        raise UserError(f"{photo.path}: {size}, expected at least crop = {config.crop} ({len(small)} such pairs)")


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


def _by_stem(photos: list[Photo]) -> dict[str, Photo]:
    result: dict[str, Photo] = {}
    for photo in photos:
        stem = photo.name.rpartition(".")[0]
        if stem in result:
            raise UserError(f"{photo.path}: a second image called '{stem}' beside {result[stem].path.name}")
        result[stem] = photo
    return result


def _missing(stems: AbstractSet[str], folder: Path) -> str:
    return f"{folder}: no partner for {join_names(sorted(stems), SHOWN_NAMES)}" if stems else ""


# ---- Pool: samples made on first demand, then reused with new flips in every epoch -----------------------------------

FORMAT = 1
"""Part of the pool's name: raise it when the same configuration makes other pixels than before."""
MADE = 1 << 32
"""Set above the CRC-32 of a finished entry, so that an untouched entry (all zeros) never counts."""


class Pool(Dataset[Sample]):
    """The first ``config.pool_size`` samples of ``source``, kept on disk, in a new order and orientation each epoch.

    The pool is a folder of plain arrays, mapped into memory by every process that uses it. An entry counts only if its
    checksum fits, and the checksum is written after the data: an entry half written by a killed process or lost in a
    power cut is simply made again, and two processes that make the same entry write the same bytes.

    ``source`` must give 8-bit images of one size. Sample ``i`` depends on (seed, i) and the source alone.
    """

    def __init__(self, source: PhotoStream, config: DataConfig, seed: int) -> None:
        self.source, self.config, self.seed, self.size = source, config, seed, config.pool_size
        self.folder = config.cache_dir / f"pool-{_pool_name(source, config, seed)}"
        self._arrays: dict[str, np.memmap[Any, Any]] | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        entry = self.entry(epoch_position(self.size, index, self.seed))
        return augment(entry, self.config, generator(self.seed, "pool", index))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}

    def content(self) -> list[Any]:
        """The source's files, as plain values."""
        return self.source.content()

    def entry(self, number: int) -> Sample:
        """Sample ``number`` of the source, from disk if it is there; exactly what the source itself gives."""
        arrays = self._open()
        if int(arrays["made"][number]) != self._checksum(number):
            for name, image in self.source[number].items():
                arrays[name][number] = (image * 255).round().to(torch.uint8).numpy()
            arrays["made"][number] = self._checksum(number)
        return {name: torch.from_numpy(arrays[name][number].astype(np.float32)) / 255 for name in self._names()}

    def _names(self) -> list[str]:
        return [name for name in self._open() if name != "made"]

    def _checksum(self, number: int) -> int:
        code = 0
        for name in self._names():
            code = zlib.crc32(self._open()[name][number], code)
        return MADE | code

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every image of an entry."""
        return {name: tuple(image.shape) for name, image in self.source[0].items()}

    def _open(self) -> dict[str, np.memmap[Any, Any]]:
        if self._arrays is None:
            shapes = self._shapes()
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                # The arrays start as holes: running out of room later would kill the process, so it is checked now.
                length = self.size * sum(int(np.prod(shape)) for shape in shapes.values())
                needed = length - sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())
                free = shutil.disk_usage(self.folder).free
                if needed > free:
                    sizes = f"needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free"
                    raise UserError(f"{self.folder}: the pool {sizes}; lower data.pool_size")
                self._arrays = {name: self._map(name, np.uint8, shape) for name, shape in shapes.items()}
                self._arrays["made"] = self._map("made", np.uint64, ())
            except OSError as error:
                raise UserError(f"{self.folder}: the pool cannot be opened ({error.strerror})") from error
        return self._arrays

    def _map(self, name: str, kind: type[np.generic], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
        """Map one array file, which starts as a hole of zeros that takes no room."""
        path = self.folder / f"{name}.bin"
        full_shape = (self.size, *shape)
        length = int(np.prod(full_shape)) * np.dtype(kind).itemsize
        with path.open("ab"):
            os.truncate(path, length)
        return np.memmap(path, dtype=kind, mode="r+", shape=full_shape)


def fingerprint(values: Any) -> str:
    """A hash of plain values: lists, mappings, texts and numbers."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=12).hexdigest()


def _pool_name(source: PhotoStream, config: DataConfig, seed: int) -> str:
    """A hash of everything that the entries depend on."""
    settings = to_mapping(config)
    for name in ("cache_dir", "cache_bytes", "paths", "lr_paths", "taught_paths", "prompts"):
        del settings[name]
    settings["with_lr"] = source.with_lr
    settings["degradation"] = to_mapping(config.recipe())
    return fingerprint({"format": FORMAT, "seed": seed, "settings": settings, "files": source.content()})

"""Photos on disk: found recursively, decoded once, kept in memory as 8-bit arrays up to a limit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import get_worker_info

from onestepsr.core.errors import UserError
from onestepsr.core.progress import progress
from onestepsr.imaging.folders import list_images
from onestepsr.imaging.formats import READABLE
from onestepsr.imaging.read import read_image, to_eight_bits

ORIENTATION_TAG = 0x0112
logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Photo:
    """One file whose header could be read. There may be a million of these, so the path is put together on demand."""

    folder: Path
    name: str
    """Path relative to ``folder``, with forward slashes."""
    width: int
    """In pixels, as displayed (orientation applied)."""
    height: int
    bytes: int
    """Length of the file."""

    @property
    def path(self) -> Path:
        """Folder and name joined."""
        return self.folder / self.name


def find_images(folder: Path, *, recursive: bool = True) -> list[Path]:
    """Every image file in ``folder``, sorted by relative name; an absent or empty folder is an error."""
    return [folder / name for name in find_names(folder, recursive=recursive)]


def find_names(folder: Path, *, recursive: bool = True) -> list[str]:
    """As :func:`find_images`, but the names relative to ``folder``, with forward slashes; a warning for the rest."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    found = list_images(folder, recursive)
    if not found.names:
        raise UserError(
            f"{folder}: no images in it (looked for {', '.join(READABLE)})"
            + "".join(f"; {line}" for line in found.left_out)
        )
    for line in found.left_out:
        logger.warning("left out: %s", line if line in found.notes else f"{folder}: {line}")
    return found.names


Item = TypeVar("Item")


def first_of(items: list[Item], count: int, folder: Path) -> list[Item]:
    """The first ``count`` of the images in ``folder``, all if that is 0; UserError if there are fewer."""
    if len(items) < count:
        raise UserError(f"{folder}: {len(items):,} images, expected at least {count:,} (data.first)")
    return items[:count] if count else items


def scan(folders: Sequence[Path], first: Sequence[int] = ()) -> list[Photo]:
    """Read the headers of every image in ``folders``; unreadable ones are left out and reported in one log line.

    ``first`` has the number of images to take from each folder, in the order of their names; 0 takes all.
    """
    photos: list[Photo] = []
    unreadable: list[Path] = []
    for folder, count in zip(folders, first or (0,) * len(folders), strict=True):
        names = first_of(find_names(folder), count, folder)
        for name in progress(names, f"reading the headers in {folder}"):
            path = folder / name
            size = read_size(path)
            if size is None:
                unreadable.append(path)
                continue
            length = path.stat().st_size
            photos.append(Photo(folder=folder, name=name, width=size[0], height=size[1], bytes=length))
    if unreadable:
        logger.warning("%d unreadable images are left out, the first is %s", len(unreadable), unreadable[0])
    if not photos:
        raise UserError(f"{unreadable[0]}: none of the {len(unreadable)} images here can be read")
    return photos


def read_size(path: Path) -> tuple[int, int] | None:
    """(width, height) as displayed, from the header alone; None if it is no image or beyond Pillow's limit."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            width, height = image.size
            # Asking a PNG for EXIF that is not in its header would decode the whole image.
            has_exif = image.format != "PNG" or "exif" in image.info
            turned = has_exif and image.getexif().get(ORIENTATION_TAG, 1) >= 5
    except Exception:  # noqa: BLE001  (Pillow raises errors of every kind on damaged files)
        return None
    return (height, width) if turned else (width, height)


def read_pixels(path: Path) -> Pixels:
    """Decode a file to RGB uint8 (H, W, 3), upright, in its own colour space, without alpha; UserError if it fails."""
    pixels = to_eight_bits(read_image(path)).pixels
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


class PhotoCache:
    """Decoded photos by number. The first ones read stay in memory until ``limit`` bytes are used.

    Loader workers are separate processes, so each keeps its share of the limit.
    """

    def __init__(self, photos: Sequence[Photo], limit: int) -> None:
        self.photos, self.limit, self.used = photos, limit, 0
        self._pixels: dict[int, Pixels] = {}
        self._broken: set[int] = set()

    def get(self, number: int) -> Pixels | None:
        """Photo ``number`` as uint8 (H, W, 3), or None (with one log line) if it cannot be decoded."""
        if number in self._pixels:
            return self._pixels[number]
        if number in self._broken:
            return None
        try:
            pixels = read_pixels(self.photos[number].path)
        except UserError as error:
            self._broken.add(number)
            logger.warning("left out: %s", error)
            return None
        if self.used + pixels.nbytes <= self._share():
            self._pixels[number] = pixels
            self.used += pixels.nbytes
        return pixels

    def _share(self) -> int:
        worker = get_worker_info()
        return self.limit // (worker.num_workers if worker else 1)

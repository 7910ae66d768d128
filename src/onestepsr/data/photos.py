"""Photos on disk: found recursively, decoded once, kept in memory as 8-bit arrays up to a limit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import get_worker_info

from onestepsr.errors import UserError
from onestepsr.image import EXTENSIONS, read_picture, to_eight_bits

ORIENTATION_TAG = 0x0112
UNREADABLE_HEADER = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One file whose header could be read."""

    path: Path
    name: str
    """Path relative to the folder it was found in, with forward slashes."""
    width: int
    """In pixels, as displayed (orientation applied)."""
    height: int
    bytes: int
    """Length of the file."""


def find_images(folder: Path, *, recursive: bool = True) -> list[Path]:
    """Every picture file in ``folder``, sorted by relative name; an absent or empty folder is an error."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    paths = folder.rglob("*") if recursive else folder.iterdir()
    found = sorted((path for path in paths if _is_image(path)), key=lambda path: path.relative_to(folder).as_posix())
    if not found:
        raise UserError(f"{folder}: no pictures in it (looked for {', '.join(EXTENSIONS)})")
    return found


def scan(folders: Iterable[Path]) -> list[Photo]:
    """Read the headers of every picture in ``folders``; unreadable ones are left out and reported in one log line."""
    photos: list[Photo] = []
    unreadable: list[Path] = []
    for folder in folders:
        for path in find_images(folder):
            size = read_size(path)
            if size is None:
                unreadable.append(path)
                continue
            name = path.relative_to(folder).as_posix()
            length = path.stat().st_size
            photos.append(Photo(path=path, name=name, width=size[0], height=size[1], bytes=length))
    if unreadable:
        logger.warning("%d unreadable pictures are left out, the first is %s", len(unreadable), unreadable[0])
    if not photos:
        raise UserError(f"{unreadable[0]}: none of the {len(unreadable)} pictures here can be read")
    return photos


def read_size(path: Path) -> tuple[int, int] | None:
    """(width, height) as displayed, from the header alone; None if the file is no picture or beyond Pillow's limit."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            width, height = image.size
            # Asking a PNG for EXIF that does not stand in its header would decode the whole picture.
            has_exif = image.format != "PNG" or "exif" in image.info
            turned = has_exif and image.getexif().get(ORIENTATION_TAG, 1) >= 5
    except UNREADABLE_HEADER:
        return None
    return (height, width) if turned else (width, height)


def read_pixels(path: Path) -> Pixels:
    """Decode to RGB uint8 (H, W, 3), upright, in the file's own colour space, without alpha; UserError if it fails."""
    pixels = to_eight_bits(read_picture(path)).pixels
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


class PhotoCache:
    """Decoded photos by index. The first ones read stay in memory until ``limit`` bytes are used.

    Loader workers are separate processes, so each keeps its share of the limit.
    """

    def __init__(self, paths: Sequence[Path], limit: int) -> None:
        self.paths, self.limit, self.used = paths, limit, 0
        self._pixels: dict[int, Pixels] = {}
        self._broken: set[int] = set()

    def get(self, index: int) -> Pixels | None:
        """Photo ``index`` as uint8 (H, W, 3), or None (with one log line) if it cannot be decoded."""
        if index in self._pixels:
            return self._pixels[index]
        if index in self._broken:
            return None
        try:
            pixels = read_pixels(self.paths[index])
        except UserError as error:
            self._broken.add(index)
            logger.warning("left out: %s", error)
            return None
        if self.used + pixels.nbytes <= self._share():
            self._pixels[index] = pixels
            self.used += pixels.nbytes
        return pixels

    def _share(self) -> int:
        worker = get_worker_info()
        return self.limit // (worker.num_workers if worker else 1)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()

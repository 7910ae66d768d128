"""Metadata beside the samples: orientation, EXIF, XMP and print resolution."""

from __future__ import annotations

import copy
import io
import logging
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

logger = logging.getLogger(__name__)

# In a TIFF the metadata shares its directory with the layout of the samples, which must not travel to another file:
# sizes, bits, compression, photometric, strips, tiles, palette, predictor, extra samples, XMP, IPTC, Photoshop, ICC ...
_TIFF_STRUCTURE = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 330, 332, 338, 339}
    | {347, 512, 513, 514, 529, 530, 531, 532, 700, 33723, 34377, 34675}
    | {33550, 33922, 34264, 34735, 34736, 34737}  # where on earth the old pixels lie (GeoTIFF)
    | {37724, 50255}  # Photoshop's layers and annotations, of the old size
)


def upright(samples: NDArray[Any], orientation: Any) -> NDArray[Any]:
    """Apply an EXIF orientation (1 to 8; TIFF 6.0, tag 274) to (H, W, ...) samples."""
    if orientation not in range(2, 9):
        return samples
    if orientation >= 5:
        samples = np.swapaxes(samples, 0, 1)
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    return np.ascontiguousarray(samples)


def tiff_exif(data: bytes, byte_order: str, bigtiff_offset: int | None, orientation: int) -> Image.Exif:
    """The tags of a TIFF's first directory, at ``bigtiff_offset`` if it is a BigTIFF; all but the orientation are left
    out, with a warning, where Pillow cannot read them."""
    exif = Image.Exif()
    try:
        if bigtiff_offset is None:
            exif.load(data)
        else:
            exif.endian, exif.bigtiff = byte_order, True
            exif.load_from_fp(io.BytesIO(data), bigtiff_offset)
    except Exception as error:  # noqa: BLE001  (whatever is wrong with the tags, the image is worth more)
        logger.warning("EXIF data cannot be read and is left out (%s)", error)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
    return exif


def exif_block(exif: Image.Exif) -> bytes | None:
    """The block without its orientation and without what describes the layout of the old file; None when empty."""
    if not exif:
        return None
    exif = copy.deepcopy(exif)  # Pillow hands out the image's own
    exif.bigtiff = False  # EXIF outside of a TIFF has the layout of the classic one
    if ExifTags.Base.Orientation in exif:
        exif[ExifTags.Base.Orientation] = 1
    for tag in _TIFF_STRUCTURE.intersection(exif):
        del exif[tag]
    try:
        return exif.tobytes() if exif else None
    except Exception as error:  # noqa: BLE001  (whatever is wrong in it, it is worth less than the image)
        logger.warning("EXIF data is damaged and left out (%s)", error)
        return None


def xmp_packet(value: Any) -> bytes | None:
    """The XMP packet that a file holds, if it is one, its orientation set to 1."""
    value = value.encode() if isinstance(value, str) else value
    if not isinstance(value, bytes):
        return None
    value = re.sub(rb'(tiff:Orientation=")[0-9](")', rb"\g<1>1\2", value)
    return re.sub(rb"(<tiff:Orientation>)[0-9](</tiff:Orientation>)", rb"\g<1>1\2", value)


def resolution(stated: Any) -> tuple[float, float] | None:
    """Dots per inch across and down, where the file states sensible ones."""
    try:
        across, down = (float(value) for value in stated or ())
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if 1 < across < 1e6 and 1 < down < 1e6 else None

"""Metadata beside the samples: orientation, EXIF, XMP, IPTC, texts and print resolution.

What describes the old file alone does not travel: sizes, strips, thumbnails, pointers into it, and the gain map, depth
map or video that stood beside the image.
"""

from __future__ import annotations

import copy
import io
import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

logger = logging.getLogger(__name__)

Texts = tuple[tuple[str, str], ...]
"""Keywords and texts of a PNG; a JPEG's comment is the text "Comment"."""
COMMENT = "Comment"

# In a TIFF the metadata shares its directory with the layout of the samples, which must not travel to another file:
# sizes, bits, compression, photometric, strips, tiles, palette, predictor, extra samples, XMP, IPTC, Photoshop, ICC ...
_TIFF_STRUCTURE = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 330, 332, 338, 339}
    | {347, 400, 512, 513, 514, 529, 530, 531, 532, 700, 33723, 34377, 34675}
    | {33550, 33922, 34264, 34735, 34736, 34737}  # where on earth the old pixels lie (GeoTIFF)
    | {37724, 50255}  # Photoshop's layers and annotations, of the old size
)
DIRECTORIES = (int(ExifTags.IFD.Exif), int(ExifTags.IFD.GPSInfo))
"""Tags of EXIF that point to a directory which is written."""
_OLD_PIXELS = (0x9102, 0x9214, 0xA214)  # compressed bits a pixel, subject area and location
_OLD_SIZES = (0x1001, 0x1002)  # of the related image
_MAKER_NOTE = int(ExifTags.Base.MakerNote)
# Maker notes whose pointers count from the beginning of the old file's EXIF.
_FIXED_NOTES = (b"SONY", b"Panasonic\0", b"Nikon\0\1", b"MLT0", b"MLY0", b"KC")
_FIXED_NOTE_MAKERS = ("canon", "minolta", "konica minolta", "casio", "sanyo")


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


# ---- EXIF ----


def tiff_exif(data: bytes, byte_order: str, bigtiff_offset: int | None) -> Image.Exif:
    """The tags of a TIFF's first directory, at ``bigtiff_offset`` if it is a BigTIFF."""
    exif = Image.Exif()
    if bigtiff_offset is None:
        exif.load(data)
    else:
        exif.endian, exif.bigtiff = byte_order, True
        exif.load_from_fp(io.BytesIO(data), bigtiff_offset)
    return exif


def exif_block(exif: Image.Exif, label: str, *, keep_maker_note: bool = True) -> bytes | None:
    """The block without its orientation and what describes the old file; None when empty, or damaged (a warning)."""
    if not exif:
        return None
    try:
        exif = copy.deepcopy(exif)  # Pillow hands out the image's own
        inner = exif.get_ifd(ExifTags.IFD.Exif)
        interoperability = exif.get_ifd(ExifTags.IFD.Interop) if ExifTags.IFD.Interop in inner else {}
        exif.bigtiff = False  # EXIF outside of a TIFF has the layout of the classic one
        if ExifTags.Base.Orientation in exif:
            exif[ExifTags.Base.Orientation] = 1
        for tags, dropped in ((exif, _TIFF_STRUCTURE), (inner, _OLD_PIXELS), (interoperability, _OLD_SIZES)):
            for tag in set(dropped).intersection(tags):
                del tags[tag]
        note, maker = inner.get(_MAKER_NOTE, b""), str(exif.get(ExifTags.Base.Make, "")).strip("\0 ").lower()
        fixed = isinstance(note, bytes) and note.startswith(_FIXED_NOTES)
        if note and (fixed or maker in _FIXED_NOTE_MAKERS or not keep_maker_note):
            logger.info("%s: the maker note of its EXIF describes or points into the old file and is left out", label)
            del inner[_MAKER_NOTE]
        block = exif.tobytes() if exif else None
        if block is not None:  # some values are read, but not written again
            again = resized_exif(block, 1, 1)
            again.tobytes()
            for tag in DIRECTORIES:
                directory_block(again, tag, 8)
        return block
    except Exception as error:  # noqa: BLE001  (whatever is wrong in it, it is worth less than the image)
        logger.warning("%s: EXIF data is damaged and left out (%s)", label, error)
        return None


def resized_exif(block: bytes, width: int, height: int) -> Image.Exif:
    """``block`` with the size of the image that it states brought up to date."""
    exif = Image.Exif()
    exif.load(block)
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    for tag, side in ((ExifTags.Base.ExifImageWidth, width), (ExifTags.Base.ExifImageHeight, height)):
        if tag in inner:
            inner[tag] = side
    return exif


def directory_block(exif: Image.Exif, tag: int, offset: int) -> bytes:
    """The directory that the pointer ``tag`` of ``exif`` leads to, for ``offset`` in a little-endian TIFF."""
    directory = ImageFileDirectory_v2(b"II*\0\0\0\0\0")
    for inner, value in exif.get_ifd(tag).items():
        directory[inner] = exif.get_ifd(inner) if inner == ExifTags.IFD.Interop else value
    return directory.tobytes(offset)


def is_adobe_rgb(exif: Image.Exif) -> bool:
    """True if EXIF states Adobe RGB (DCF 2.0: interoperability index R03)."""
    try:
        inner = exif.get_ifd(ExifTags.IFD.Exif)
        return ExifTags.IFD.Interop in inner and exif.get_ifd(ExifTags.IFD.Interop).get(1) in ("R03", "R03\0")
    except Exception:  # noqa: BLE001  (damaged EXIF states nothing)
        return False


# ---- XMP ----

_MOST_XMP = 1_000_000
# What stood beside the image and is gone: gain maps, depth, embedded originals, motion photos, XMP in further segments.
_GONE_SPACES = rb"(?:hdrgm|HDRGainMap|apdi|GDepth|GImage|GContainer|Container|Item|Device)"
_GONE_NAME = _GONE_SPACES + rb":\w+|(?:GCamera|Camera):(?:MicroVideo|MotionPhoto)\w*|xmpNote:HasExtendedXMP"
_VALUE = rb"\s*=\s*(?:\"[^\"]*\"|'[^']*')"
_GONE_ELEMENT = re.compile(rb"<(" + _GONE_NAME + rb")(?:\s[^<>]*)?/?>")
_GONE_ATTRIBUTE = re.compile(rb"\s(?:" + _GONE_NAME + rb"|xmlns:" + _GONE_SPACES + rb")" + _VALUE)


def xmp_packet(value: Any, label: str) -> bytes | None:
    """The XMP packet that a file holds, if it is one, its orientation set to 1 and without what is gone."""
    value = value.encode() if isinstance(value, str) else value
    if not isinstance(value, bytes):
        return None
    packet = _without_gone_elements(value) if len(value) <= _MOST_XMP else None
    if packet is None:
        logger.warning("%s: XMP data of %d bytes is damaged or too long and left out", label, len(value))
        return None
    return _with_property(_GONE_ATTRIBUTE.sub(b"", packet), rb"tiff:Orientation", b"1")


def _without_gone_elements(packet: bytes) -> bytes | None:
    """``packet`` without the elements of what is gone; None where one of them does not end."""
    parts, position = list[bytes](), 0
    while (opening := _GONE_ELEMENT.search(packet, position)) is not None:
        parts.append(packet[position : opening.start()])
        position = opening.end()
        if not opening[0].endswith(b"/>"):
            closing = packet.find(b"</" + opening[1] + b">", position)
            if closing < 0:
                return None
            position = closing + len(opening[1]) + 3
    return b"".join([*parts, packet[position:]])


def resized_xmp(packet: bytes, width: int, height: int) -> bytes:
    """``packet`` with the sizes it states brought up to date."""
    for names, side in (
        (rb"tiff:ImageWidth|exif:PixelXDimension", width),
        (rb"tiff:ImageLength|exif:PixelYDimension", height),
    ):
        packet = _with_property(packet, names, str(side).encode())
    return packet


def _with_property(packet: bytes, name: bytes, value: bytes) -> bytes:
    """``packet`` with another value of a numeric property, which is an attribute or an element."""
    packet = re.sub(rb"\b(" + name + rb")(\s*=\s*[\"'])\d+", rb"\g<1>\g<2>" + value, packet)
    return re.sub(rb"<(" + name + rb")>\s*\d+\s*</", rb"<\g<1>>" + value + b"</", packet)


# ---- Texts, IPTC, resolution ----

_PHOTOSHOP, _IPTC_RESOURCE = b"Photoshop 3.0\0", 0x0404


def image_texts(info: Mapping[Any, Any], texts: Mapping[str, str]) -> Texts:
    """A PNG's ``texts`` and the comment of a JPEG or GIF; not those that hold other metadata or tell of thumbnails."""
    found = {
        key: str(text)
        for key, text in texts.items()
        if not key.startswith(("XML:com.adobe.xmp", "Raw profile type", "Thumb::", "png:"))
    }
    comment = info.get("comment")
    if isinstance(comment, bytes) and comment:
        found[COMMENT] = comment.decode("utf-8", "surrogateescape")
    return tuple(found.items())


def iptc_block(info: Mapping[Any, Any]) -> bytes | None:
    """The IPTC record (caption, keywords, credits) among the Photoshop resources of a JPEG."""
    resources = info.get("photoshop")
    block = resources.get(_IPTC_RESOURCE) if isinstance(resources, dict) else None
    return block if isinstance(block, bytes) and block else None


def iptc_segment(block: bytes) -> bytes:
    """A JPEG's segment APP13 with an IPTC record."""
    resource = (
        b"8BIM" + _IPTC_RESOURCE.to_bytes(2) + b"\0\0" + len(block).to_bytes(4) + block + b"\0" * (len(block) % 2)
    )
    return b"\xff\xed" + (2 + len(_PHOTOSHOP) + len(resource)).to_bytes(2) + _PHOTOSHOP + resource


def resolution(stated: Any) -> tuple[float, float] | None:
    """Dots per inch across and down, where the file states sensible ones."""
    try:
        across, down = (float(value) for value in stated or ())
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if 1 < across < 1e6 and 1 < down < 1e6 else None

"""Writing images: one temporary file in the target's folder, renamed when complete, so that no half image is ever
seen."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from onestepsr.core.errors import UserError
from onestepsr.core.files import partial_path, remove_leftovers, replacing, writing
from onestepsr.imaging.deep import write_png, write_tiff
from onestepsr.imaging.read import EXTENSIONS, LoadedImage, Samples, to_eight_bits

logger = logging.getLogger(__name__)

_SIDE_LIMITS = {"jpeg": 65_535, "webp": 16_383, "tiff": 2**31 - 1, "png": 2**31 - 1, "bmp": 2**31 - 1}
PNG_COMPRESSION = 4
"""zlib's level: less than half the time of its usual 6, for files that are 2 % larger."""
_JPEG_QUALITY = 95
_WEBP_QUALITY = 95
_MAX_JPEG_BLOCK = 65_000  # bytes of EXIF or XMP that one JPEG segment can hold


def format_of(path: Path) -> str:
    """The format that a file name's ending stands for: jpeg, png, webp, tiff or bmp."""
    try:
        return EXTENSIONS[path.suffix.lower()]
    except KeyError:
        known = ", ".join(EXTENSIONS)
        raise UserError(
            f"{path}: the ending '{path.suffix}' is no image format that can be written; accepted: {known}"
        ) from None


def check_size(file_format: str, width: int, height: int, label: str) -> None:
    """Raise UserError when ``file_format`` cannot hold ``width`` x ``height`` pixels; ``label`` names the file."""
    limit = _SIDE_LIMITS[file_format]
    if max(width, height) > limit:
        larger = "png or tiff" if file_format == "jpeg" else "png, tiff or jpg"
        raise UserError(
            f"{label}: {width} x {height} pixels, but {file_format.upper()} holds at most {limit} a side: "
            f"choose --format {larger}, or a smaller scale"
        )


def write_image(picture: LoadedImage, path: Path, file_format: str | None = None, *, sweep: bool = True) -> None:
    """Write ``image`` to ``path``, replacing it in one step; the format follows the name's ending unless given.

    PNG and TIFF keep 16 bits, the others are rounded to 8. JPEG (quality 95, no chroma subsampling) and BMP cannot hold
    transparency: it is laid over white, with a warning. WebP is written with quality 95, or without loss when the
    image came from such a WebP. Raises UserError when the format cannot hold the size or the place cannot be written.
    """
    chosen = file_format or format_of(path)
    check_size(chosen, picture.width, picture.height, str(path))
    with _replacing(path, sweep) as stream:
        _encode(picture, stream, chosen, str(path))


def encode_image(picture: LoadedImage, file_format: str) -> bytes:
    """The bytes that :func:`write_image` would write."""
    check_size(file_format, picture.width, picture.height, "output")
    stream = io.BytesIO()
    _encode(picture, stream, file_format, "output")
    return stream.getvalue()


def check_writable(path: Path) -> None:
    """Raise UserError unless a file can be created at ``path``, making missing folders on the way."""
    with writing(path):
        if path.is_dir():
            raise UserError(f"{path}: is a folder, expected a file name")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = partial_path(path)
        probe.touch()
        probe.unlink()


@contextmanager
def _replacing(path: Path, sweep: bool) -> Iterator[BinaryIO]:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if sweep:
            remove_leftovers(path)
        with replacing(path) as partial, partial.open("wb") as stream:
            yield stream


def _encode(picture: LoadedImage, stream: BinaryIO, file_format: str, label: str) -> None:
    if file_format == "tiff":  # 16-bit gray with alpha is a layout that few readers know
        write_tiff(stream, _planes(picture, gray_alpha=picture.pixels.dtype == np.uint8), _tiff_tags(picture))
        return
    if file_format == "png" and picture.pixels.dtype == np.uint16:
        write_png(stream, _planes(picture), _png_chunks(picture))
        return
    if picture.pixels.dtype == np.uint16:
        logger.info("%s: %s holds 8 bits per channel, the 16 bits are rounded", label, file_format.upper())
    picture = to_eight_bits(picture)
    if picture.alpha is not None and file_format in ("jpeg", "bmp"):
        logger.warning("%s: %s cannot hold transparency, the image is laid over white", label, file_format.upper())
        picture = _over_white(picture)
    samples = picture.pixels[..., 0] if picture.gray else picture.pixels
    image = Image.fromarray(samples)
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
    _SAVERS[file_format](image, stream, picture)


def _over_white(picture: LoadedImage) -> LoadedImage:
    """Composite 8-bit samples over white, row band by row band."""
    assert picture.alpha is not None
    result = np.empty(picture.pixels.shape, np.uint8)
    for top in range(0, picture.height, 256):
        rows = slice(top, top + 256)
        share = picture.alpha[rows, :, None].astype(np.uint32)
        result[rows] = (picture.pixels[rows] * share + 255 * (255 - share) + 127) // 255
    return replace(picture, pixels=result, alpha=None)


def _save_jpeg(image: Image.Image, stream: BinaryIO, picture: LoadedImage) -> None:
    blocks = {name: data for name, data in _notes(picture).items() if name not in ("exif", "xmp") or _fits(name, data)}
    image.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0, **blocks)


def _fits(name: str, data: bytes) -> bool:
    if len(data) <= _MAX_JPEG_BLOCK:
        return True
    logger.warning("%s data of %d bytes does not fit into a JPEG and is left out", name.upper(), len(data))
    return False


def _save_png(image: Image.Image, stream: BinaryIO, picture: LoadedImage) -> None:
    notes = _notes(picture)
    xmp = notes.pop("xmp", None)
    if xmp is not None:
        texts = PngInfo()
        texts.add(b"iTXt", _xmp_chunk(xmp))
        notes["pnginfo"] = texts
    image.save(stream, "PNG", compress_level=PNG_COMPRESSION, **notes)


def _xmp_chunk(xmp: bytes) -> bytes:
    return b"XML:com.adobe.xmp\0\0\0\0\0" + xmp


def _save_webp(image: Image.Image, stream: BinaryIO, picture: LoadedImage) -> None:
    lossless = picture.lossless and picture.format == "webp"
    notes = {name: value for name, value in _notes(picture).items() if name != "dpi"}
    image.save(stream, "WEBP", quality=_WEBP_QUALITY, lossless=lossless, **notes)


def _save_bmp(image: Image.Image, stream: BinaryIO, picture: LoadedImage) -> None:
    image.save(stream, "BMP", **({"dpi": picture.dpi} if picture.dpi else {}))


_SAVERS: dict[str, Callable[[Image.Image, BinaryIO, LoadedImage], None]] = {
    "jpeg": _save_jpeg,
    "png": _save_png,
    "webp": _save_webp,
    "bmp": _save_bmp,
}


def _exif(picture: LoadedImage) -> Image.Exif | None:
    """The EXIF block with its image size brought up to date."""
    if picture.exif is None:
        return None
    exif = Image.Exif()
    exif.load(picture.exif)
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    for tag, side in ((ExifTags.Base.ExifImageWidth, picture.width), (ExifTags.Base.ExifImageHeight, picture.height)):
        if tag in inner:
            inner[tag] = side
    return exif


def _notes(picture: LoadedImage) -> dict[str, Any]:
    exif = _exif(picture)
    notes = {
        "icc_profile": picture.icc,
        "exif": exif.tobytes() if exif else None,
        "xmp": picture.xmp,
        "dpi": picture.dpi,
    }
    return {name: value for name, value in notes.items() if value is not None}


def _planes(picture: LoadedImage, gray_alpha: bool = True) -> Samples:
    """Colour and alpha side by side (H, W, C); gray with alpha as RGBA unless ``gray_alpha``."""
    if picture.alpha is None:
        return picture.pixels
    colour = [picture.pixels] * (3 if picture.gray and not gray_alpha else 1)
    return np.concatenate([*colour, picture.alpha[..., None]], axis=2)


def _png_chunks(picture: LoadedImage) -> list[tuple[bytes, bytes]]:
    chunks: list[tuple[bytes, bytes]] = []
    exif = _exif(picture)
    if picture.icc is not None:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(picture.icc)))
    if picture.dpi is not None:
        across, down = (round(value / 0.0254) for value in picture.dpi)
        chunks.append((b"pHYs", struct.pack(">IIB", across, down, 1)))
    if exif is not None:
        chunks.append((b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    if picture.xmp is not None:
        chunks.append((b"iTXt", _xmp_chunk(picture.xmp)))
    return chunks


def _tiff_tags(picture: LoadedImage) -> dict[int, Any]:
    tags: dict[int, Any] = {}
    exif = _exif(picture)
    for tag in exif or ():
        nested = tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
        assert exif is not None
        tags[int(tag)] = dict(exif.get_ifd(tag)) if nested else exif[tag]
    if picture.icc is not None:
        tags[34675] = picture.icc
    if picture.xmp is not None:
        tags[700] = picture.xmp
    if picture.dpi is not None:
        tags |= {282: picture.dpi[0], 283: picture.dpi[1], 296: 2}
    return tags

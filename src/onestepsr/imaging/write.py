"""Writing images: one temporary file in the target's folder, renamed when complete, so that no half image is ever
seen."""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from onestepsr.core.errors import UserError
from onestepsr.core.files import partial_path, remove_leftovers, replacing, writing
from onestepsr.imaging.read import EXTENSIONS, LoadedImage, interleaved, to_eight_bits

logger = logging.getLogger(__name__)

_SIDE_LIMITS = {"jpeg": 65_535, "webp": 16_383, "tiff": 2**31 - 1, "png": 2**31 - 1, "bmp": 2**31 - 1}
PNG_COMPRESSION = 4
"""zlib's level: less than half the time of its usual 6, for files that are 2 % larger."""
_PNG16_SIDE_LIMIT = 1_000_000  # libpng's
_PNG_HEADER = 33  # bytes: signature and IHDR
_TIFF_RESOLUTION = (282, 283, 296)
# Free tags between the same neighbours: tifffile itself writes no pointers to directories of EXIF and GPS.
_STAND_INS = {ExifTags.IFD.Exif: 34666, ExifTags.IFD.GPSInfo: 34854}
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


def write_image(image: LoadedImage, path: Path, file_format: str | None = None, *, sweep: bool = True) -> None:
    """Write ``image`` to ``path``, replacing it in one step; the format follows the name's ending unless given.

    PNG and TIFF keep 16 bits, the others are rounded to 8. JPEG (quality 95, no chroma subsampling) and BMP cannot hold
    transparency: it is laid over white, with a warning. WebP is written with quality 95, or without loss when the
    image came from such a WebP. Raises UserError when the format cannot hold the size or the target cannot be written.
    """
    chosen = file_format or format_of(path)
    check_size(chosen, image.width, image.height, str(path))
    with _replacing(path, sweep) as stream:
        _encode(image, stream, chosen, str(path))


def encode_image(image: LoadedImage, file_format: str) -> bytes:
    """The bytes that :func:`write_image` would write."""
    check_size(file_format, image.width, image.height, "output")
    stream = io.BytesIO()
    _encode(image, stream, file_format, "output")
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
        with replacing(path) as partial, partial.open("w+b") as stream:
            yield stream


def _encode(image: LoadedImage, stream: BinaryIO, file_format: str, label: str) -> None:
    deep = image.pixels.dtype == np.uint16
    if file_format == "tiff":
        _encode_tiff(image, stream)
    elif file_format == "png" and deep:
        _encode_png16(image, stream, label)
    else:
        if deep:
            logger.info("%s: %s holds 8 bits per channel, the 16 bits are rounded", label, file_format.upper())
            image = to_eight_bits(image)
        if image.alpha is not None and file_format in ("jpeg", "bmp"):
            logger.warning("%s: %s cannot hold transparency, the image is laid over white", label, file_format.upper())
            image = _over_white(image)
        _save(Image.fromarray(interleaved(image)), stream, file_format, image)


def _over_white(image: LoadedImage) -> LoadedImage:
    """Composite 8-bit samples over white, row band by row band."""
    assert image.alpha is not None
    result = np.empty(image.pixels.shape, np.uint8)
    for top in range(0, image.height, 256):
        rows = slice(top, top + 256)
        share = image.alpha[rows, :, None].astype(np.uint32)
        result[rows] = (image.pixels[rows] * share + 255 * (255 - share) + 127) // 255
    return replace(image, pixels=result, alpha=None)


def _save(encoded: Image.Image, stream: BinaryIO, file_format: str, image: LoadedImage) -> None:
    """Save ``encoded`` of 8 bits through Pillow, with the metadata of ``image`` that the format can hold."""
    notes = _notes(image)
    if file_format == "jpeg":
        blocks = {name: data for name, data in notes.items() if name not in ("exif", "xmp") or _fits(name, data)}
        encoded.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0, **blocks)
    elif file_format == "png":
        texts = PngInfo()
        if "xmp" in notes:
            texts.add(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + notes.pop("xmp"))
        encoded.save(stream, "PNG", compress_level=PNG_COMPRESSION, pnginfo=texts, **notes)
    elif file_format == "webp":
        notes.pop("dpi", None)
        lossless = image.lossless and image.format == "webp"
        encoded.save(stream, "WEBP", quality=_WEBP_QUALITY, lossless=lossless, **notes)
    else:
        encoded.save(stream, "BMP", **{name: value for name, value in notes.items() if name == "dpi"})


def _fits(name: str, data: bytes) -> bool:
    if len(data) <= _MAX_JPEG_BLOCK:
        return True
    logger.warning("%s data of %d bytes does not fit into a JPEG and is left out", name.upper(), len(data))
    return False


def _exif(image: LoadedImage) -> Image.Exif | None:
    """The EXIF block with its image size brought up to date."""
    if image.exif is None:
        return None
    exif = Image.Exif()
    exif.load(image.exif)
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    for tag, side in ((ExifTags.Base.ExifImageWidth, image.width), (ExifTags.Base.ExifImageHeight, image.height)):
        if tag in inner:
            inner[tag] = side
    return exif


def _notes(image: LoadedImage) -> dict[str, Any]:
    exif = _exif(image)
    notes = {
        "icc_profile": image.icc,
        "exif": exif.tobytes() if exif else None,
        "xmp": image.xmp,
        "dpi": image.dpi,
    }
    return {name: value for name, value in notes.items() if value is not None}


# ---- 16-bit PNG and TIFF, through libpng and tifffile ----


def _encode_png16(image: LoadedImage, stream: BinaryIO, label: str) -> None:
    import imagecodecs

    if max(image.width, image.height) > _PNG16_SIDE_LIMIT:
        size, limit = f"{image.width} x {image.height}", f"{_PNG16_SIDE_LIMIT:,}"
        raise UserError(f"{label}: {size} pixels, but a PNG of 16 bits holds at most {limit} a side: use --format tiff")
    # libpng writes the samples; the chunks of the metadata, behind the header (IHDR), are those that Pillow writes.
    one_pixel = io.BytesIO()
    _save(Image.new("L", (1, 1)), one_pixel, "png", image)
    encoded = memoryview(imagecodecs.png_encode(interleaved(image), level=PNG_COMPRESSION))
    stream.write(encoded[:_PNG_HEADER])
    stream.write(_ancillary_chunks(one_pixel.getvalue()))
    stream.write(encoded[_PNG_HEADER:])


def _ancillary_chunks(data: bytes) -> bytes:
    """The chunks between header and samples of a PNG that is all right."""
    offset = _PNG_HEADER
    while data[offset + 4 : offset + 8] != b"IDAT":
        offset += 12 + int.from_bytes(data[offset : offset + 4])
    return data[_PNG_HEADER:offset]


def _encode_tiff(image: LoadedImage, stream: BinaryIO) -> None:
    """Write deflated strips with horizontal differencing (TIFF 6.0, section 14); BigTIFF from 4 GB on."""
    import tifffile

    if image.gray and image.alpha is not None and image.pixels.dtype == np.uint16:  # which few readers know
        image = replace(image, pixels=image.pixels.repeat(3, axis=2))
    samples = interleaved(image)
    exif, tags = _exif(image), []
    if exif is not None:
        exif.endian = "<"
        with tifffile.TiffFile(io.BytesIO(exif.tobytes().removeprefix(b"Exif\0\0"))) as block:
            tags = [tag.astuple() for tag in block.pages.first.tags if tag.code not in _TIFF_RESOLUTION]
        tags += [(stand_in, tifffile.DATATYPE.LONG, 1, 0, True) for tag, stand_in in _STAND_INS.items() if tag in exif]
    if image.xmp is not None:
        tags.append((700, tifffile.DATATYPE.BYTE, len(image.xmp), image.xmp, True))
    tifffile.imwrite(
        stream,
        samples,
        byteorder="<",
        photometric="minisblack" if image.gray else "rgb",
        planarconfig="contig" if samples.ndim == 3 else None,
        extrasamples=None if image.alpha is None else ["unassalpha"],
        compression="zlib",
        compressionargs={"level": 6},
        predictor=True,
        rowsperstrip=64,
        iccprofile=image.icc,
        resolution=image.dpi,
        resolutionunit="inch" if image.dpi else None,
        software=False,
        metadata=None,
        extratags=tags,
    )
    if exif is not None:
        _add_directories(exif, stream)


def _add_directories(exif: Image.Exif, stream: BinaryIO) -> None:
    """Append the directories of EXIF and GPS to a TIFF, and turn the stand-ins into pointers to them."""
    import tifffile

    stream.seek(0)
    with tifffile.TiffFile(stream) as file:
        page, form = file.pages.first, "<HHQQ" if file.is_bigtiff else "<HHII"
    for tag, stand_in in _STAND_INS.items():
        if tag in exif:
            directory = ImageFileDirectory_v2(b"II*\0\0\0\0\0")
            for inner, value in exif.get_ifd(tag).items():
                directory[inner] = value
            offset = stream.seek(0, io.SEEK_END)
            stream.write(directory.tobytes(offset))
            stream.seek(page.tags[stand_in].offset)
            stream.write(struct.pack(form, tag, tifffile.DATATYPE.LONG, 1, offset))

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
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from onestepsr.core.errors import UserError, error_context, first_line
from onestepsr.core.files import partial_path, remove_leftovers, replacing, writing
from onestepsr.imaging.formats import EXTENSIONS, FORMATS, PNG_HEADER
from onestepsr.imaging.icc import color_profile, is_hdr
from onestepsr.imaging.image import LoadedImage, interleaved, samples_to_tensor, tensor_to_samples, to_eight_bits
from onestepsr.imaging.metadata import COMMENT, DIRECTORIES, directory_block, iptc_segment, resized_exif, resized_xmp
from onestepsr.imaging.read import load_plugin

logger = logging.getLogger(__name__)

PNG_COMPRESSION = 4
"""zlib's level: less than half the time of its usual 6, for files that are 2 % larger."""
_PNG16_SIDE_LIMIT = 1_000_000  # libpng's
_TIFF_RESOLUTION = (282, 283, 296)
# Free tags between the same neighbours: tifffile itself writes no pointers to directories of EXIF and GPS.
_STAND_INS = dict(zip(DIRECTORIES, (34666, 34854), strict=True))
_QUALITY = 95
_OPTIONS: dict[str, dict[str, Any]] = {"avif": {"speed": 6, "subsampling": "4:4:4"}, "jxl": {"effort": 4}}
_HEIF_QUALITY = 90  # libheif's scale, on which 95 is near lossless
_MAX_JPEG_BLOCK = 65_000  # bytes of EXIF or XMP that one JPEG segment can hold


def format_of(path: Path) -> str:
    """The format that a file name's ending stands for, by its name in :data:`FORMATS`."""
    try:
        return EXTENSIONS[path.suffix.lower()]
    except KeyError:
        known = ", ".join(EXTENSIONS)
        raise UserError(
            f"{path}: the ending '{path.suffix}' is no image format that can be written; accepted: {known}"
        ) from None


def check_size(file_format: str, width: int, height: int, label: str) -> None:
    """Raise UserError when ``file_format`` cannot hold ``width`` x ``height`` pixels, or its plug-in is not installed;
    ``label`` names the file."""
    if FORMATS[file_format].package:
        with error_context(label):
            load_plugin(file_format)
    limit = FORMATS[file_format].side_limit
    if max(width, height) > limit:
        larger = "png or tiff" if limit == FORMATS["jpeg"].side_limit else "png, tiff or jpg"
        raise UserError(
            f"{label}: {width} x {height} pixels, but {FORMATS[file_format].name} holds at most {limit} a side: "
            f"choose --format {larger}, or a smaller scale"
        )


def write_image(image: LoadedImage, path: Path, file_format: str | None = None, *, sweep: bool = True) -> None:
    """Write ``image`` to ``path``, replacing it in one step; the format follows the name's ending unless given.

    PNG and TIFF keep 16 bits, HEIF 10 of them, the others are rounded to 8. JPEG (quality 95, no chroma subsampling)
    and BMP cannot hold transparency: it is laid over white, with a warning. WebP is written with quality 95, or without
    loss when the image came from such a WebP. What a format cannot hold of the metadata is said in a warning. Raises
    UserError when the format cannot hold the size or the target cannot be written.
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
    held, deep = FORMATS[file_format], image.pixels.dtype == np.uint16
    _warn_of_losses(image, file_format, label)
    if image.alpha is not None and not held.alpha:
        image = _over_white(to_eight_bits(image))
    if file_format == "jxl" and image.icc is not None:
        image = _as_srgb(image, label)
    try:
        if file_format == "tiff":
            _encode_tiff(image, stream)
        elif file_format == "png" and deep:
            _encode_png16(image, stream, label)
        elif file_format == "heif":
            _encode_heif(image, stream)
        else:
            image = to_eight_bits(image)
            _save(Image.fromarray(interleaved(image)), stream, file_format, image, label)
    except (UserError, MemoryError, OSError):
        raise
    except Exception as error:  # what codecs raise on unusual metadata
        raise UserError(f"{label}: cannot be written as {held.name} ({first_line(error)})") from error


def _warn_of_losses(image: LoadedImage, file_format: str, label: str) -> None:
    """Say what of ``image`` the format cannot hold."""
    held = FORMATS[file_format]
    if image.pixels.dtype == np.uint16 and "16" not in str(held.write_bits):
        most = str(held.write_bits).rpartition(" ")[2]
        logger.info("%s: %s holds %s bits per channel, the 16 bits are rounded", label, held.name, most)
    if image.alpha is not None and not held.alpha:
        logger.warning("%s: %s cannot hold transparency, the image is laid over white", label, held.name)
    if image.cicp is not None and is_hdr(image.cicp) and file_format != "png":
        logger.warning("%s: %s is not told of the HDR coding of the samples; --format png keeps it", label, held.name)
    lost = {
        "EXIF": image.exif is not None and "EXIF" not in held.metadata,
        "XMP": image.xmp is not None and "XMP" not in held.metadata,
        "IPTC": image.iptc is not None and "IPTC" not in held.metadata,
        "colour profile": image.icc is not None and not held.profile and file_format != "jxl",
    }
    names = [name for name, is_lost in lost.items() if is_lost]
    if "texts" not in held.metadata:
        names += [f"text '{key}'" for key, _ in image.texts if key != COMMENT or "comment" not in held.metadata]
    if names:
        logger.warning("%s: %s cannot hold %s, left out", label, held.name, ", ".join(names))


def _over_white(image: LoadedImage) -> LoadedImage:
    """Composite 8-bit samples over white, row band by row band."""
    assert image.alpha is not None
    result = np.empty(image.pixels.shape, np.uint8)
    for top in range(0, image.height, 256):
        rows = slice(top, top + 256)
        share = image.alpha[rows, :, None].astype(np.uint32)
        result[rows] = (image.pixels[rows] * share + 255 * (255 - share) + 127) // 255
    return replace(image, pixels=result, alpha=None)


def _as_srgb(image: LoadedImage, label: str) -> LoadedImage:
    """``image`` in sRGB instead of the space of its profile, which cannot be written."""
    profile = None if image.gray else color_profile(image.icc)
    if profile is None:
        return replace(image, icc=None)
    logger.warning("%s: colours are converted to sRGB, since no profile can be written", label)
    pixels = tensor_to_samples(profile.to_srgb(samples_to_tensor(image.pixels)), image.pixels.dtype.type)
    return replace(image, pixels=pixels, icc=None)


def _save(encoded: Image.Image, stream: BinaryIO, file_format: str, image: LoadedImage, label: str) -> None:
    """Save ``encoded`` of 8 bits through Pillow, with the metadata of ``image`` that the format can hold."""
    notes = _notes(image)
    name = FORMATS[file_format].pillow[0]
    if file_format == "jpeg":
        blocks = {name: data for name, data in notes.items() if name not in ("exif", "xmp") or _fits(name, data, label)}
        comment = dict(image.texts).get(COMMENT)
        if comment:
            blocks["comment"] = comment.encode("utf-8", "surrogateescape")[:_MAX_JPEG_BLOCK]
        if image.iptc is not None and _fits("IPTC", image.iptc, label):
            blocks["extra"] = iptc_segment(image.iptc)
        encoded.save(stream, name, quality=_QUALITY, subsampling=0, **blocks)
    elif file_format == "png":
        encoded.save(stream, name, compress_level=PNG_COMPRESSION, pnginfo=_png_info(image, notes), **notes)
    elif file_format == "webp":
        notes.pop("dpi", None)
        if image.gray:  # WebP has three channels, a profile of gray does not fit them
            notes.pop("icc_profile", None)
        encoded.save(stream, name, quality=_QUALITY, lossless=image.lossless and image.format == "webp", **notes)
    elif file_format == "bmp":
        encoded.save(stream, name, **{name: value for name, value in notes.items() if name == "dpi"})
    else:
        notes.pop("dpi", None)
        encoded.save(stream, name, quality=_QUALITY, **_OPTIONS[file_format], **notes)


def _png_info(image: LoadedImage, notes: dict[str, Any]) -> PngInfo:
    """The chunks of XMP, which is taken out of ``notes``, of texts and of code points."""
    info = PngInfo()
    if image.cicp is not None:
        info.add(b"cICP", bytes(image.cicp))
    if "xmp" in notes:
        info.add(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + notes.pop("xmp"))
    for key, text in image.texts:
        keyword, readable = key.encode("latin-1", "replace")[:79].decode("latin-1"), text.encode("utf-8", "replace")
        if keyword.strip():
            info.add_text(keyword, readable.decode())  # as iTXt where it is not Latin-1
    return info


def _fits(name: str, data: bytes, label: str) -> bool:
    if len(data) <= _MAX_JPEG_BLOCK:
        return True
    logger.warning("%s: %s of %d bytes does not fit into a JPEG and is left out", label, name.upper(), len(data))
    return False


def _notes(image: LoadedImage) -> dict[str, Any]:
    exif = _exif(image)
    notes = {
        "icc_profile": image.icc,
        "exif": exif.tobytes() if exif else None,
        "xmp": _xmp(image),
        "dpi": image.dpi,
    }
    return {name: value for name, value in notes.items() if value is not None}


def _exif(image: LoadedImage) -> Image.Exif | None:
    return None if image.exif is None else resized_exif(image.exif, image.width, image.height)


def _xmp(image: LoadedImage) -> bytes | None:
    return None if image.xmp is None else resized_xmp(image.xmp, image.width, image.height)


def _encode_heif(image: LoadedImage, stream: BinaryIO) -> None:
    """Write 8 bits, or 10 of 16, through libheif."""
    import pillow_heif

    samples = interleaved(image.gray_as_rgb() if image.gray else image)
    mode = ("RGB" if image.alpha is None else "RGBA") + (";16" if samples.dtype == np.uint16 else "")
    file = pillow_heif.from_bytes(mode=mode, size=(image.width, image.height), data=samples.tobytes())
    if image.icc is not None and not image.gray:
        file.info["icc_profile"] = image.icc
    notes = {name: value for name, value in _notes(image).items() if name in ("exif", "xmp")}
    file.save(stream, quality=_HEIF_QUALITY, chroma=444, **notes)


# ---- 16-bit PNG and TIFF, through libpng and tifffile ----


def _encode_png16(image: LoadedImage, stream: BinaryIO, label: str) -> None:
    import imagecodecs

    if max(image.width, image.height) > _PNG16_SIDE_LIMIT:
        size, limit = f"{image.width} x {image.height}", f"{_PNG16_SIDE_LIMIT:,}"
        raise UserError(f"{label}: {size} pixels, but a PNG of 16 bits holds at most {limit} a side: use --format tiff")
    # libpng writes the samples; the chunks of the metadata, behind the header (IHDR), are those that Pillow writes.
    one_pixel = io.BytesIO()
    _save(Image.new("L", (1, 1)), one_pixel, "png", image, label)
    encoded = memoryview(imagecodecs.png_encode(interleaved(image), level=PNG_COMPRESSION))
    stream.write(encoded[:PNG_HEADER])
    stream.write(_ancillary_chunks(one_pixel.getvalue()))
    stream.write(encoded[PNG_HEADER:])


def _ancillary_chunks(data: bytes) -> bytes:
    """The chunks between header and samples of a PNG that is all right."""
    offset = PNG_HEADER
    while data[offset + 4 : offset + 8] != b"IDAT":
        offset += 12 + int.from_bytes(data[offset : offset + 4])
    return data[PNG_HEADER:offset]


def _encode_tiff(image: LoadedImage, stream: BinaryIO) -> None:
    """Write deflated strips with horizontal differencing (TIFF 6.0, section 14); BigTIFF from 4 GB on."""
    import tifffile

    if image.gray and image.alpha is not None and image.pixels.dtype == np.uint16:  # which few readers know
        image = image.gray_as_rgb()
    samples = interleaved(image)
    exif, tags = _exif(image), []
    if exif is not None:
        exif.endian = "<"
        with tifffile.TiffFile(io.BytesIO(exif.tobytes().removeprefix(b"Exif\0\0"))) as block:
            tags = [tag.astuple() for tag in block.pages.first.tags if tag.code not in _TIFF_RESOLUTION]
        tags += [(stand_in, tifffile.DATATYPE.LONG, 1, 0, True) for tag, stand_in in _STAND_INS.items() if tag in exif]
    for tag, content in ((700, _xmp(image)), (33723, image.iptc)):
        if content is not None:
            tags.append((tag, tifffile.DATATYPE.BYTE, len(content), content, True))
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
            offset = stream.seek(0, io.SEEK_END)
            stream.write(directory_block(exif, tag, offset))
            stream.seek(page.tags[stand_in].offset)
            stream.write(struct.pack(form, tag, tifffile.DATATYPE.LONG, 1, offset))

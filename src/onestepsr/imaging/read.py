"""Reading images: every mode of every format becomes a :class:`LoadedImage`.

Pillow decodes 8 bits, the libraries of the formats what has more of them. Formats and limits are in
:mod:`onestepsr.imaging.formats`, colour spaces in :mod:`onestepsr.imaging.icc`.
"""

from __future__ import annotations

import importlib
import io
import logging
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from onestepsr.core.errors import MissingExtra, UserError, error_context, first_line
from onestepsr.imaging.formats import (
    ACCEPTED,
    EXTENSIONS,
    FORMATS,
    MAX_BYTES,
    MAX_PIXELS,
    PNG_MAGIC,
    check_pixels,
    check_png,
    check_structure,
    check_tiff,
    identify,
    jxl_header,
    png_chunks,
)
from onestepsr.imaging.icc import (
    Cicp,
    adobe_rgb_profile,
    cicp_profile,
    cmyk_or_lab_to_rgb,
    gamma_profile,
    is_hdr,
    is_hdr_profile,
)
from onestepsr.imaging.image import (
    LoadedImage,
    Samples,
    from_array,
    narrowed,
    samples_to_tensor,
    split_alpha,
    tensor_to_samples,
    to_eight_bits,
    to_pil,
)
from onestepsr.imaging.metadata import (
    exif_block,
    image_texts,
    iptc_block,
    is_adobe_rgb,
    resolution,
    tiff_exif,
    upright,
    xmp_packet,
)

if TYPE_CHECKING:
    import tifffile

__all__ = [
    "ACCEPTED",
    "EXTENSIONS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "LoadedImage",
    "Samples",
    "from_array",
    "from_pil",
    "read_image",
    "samples_to_tensor",
    "tensor_to_samples",
    "to_eight_bits",
    "to_pil",
]

logger = logging.getLogger(__name__)
for _library in ("imagecodecs", "tifffile"):  # their warnings name no file; what matters raises
    logging.getLogger(_library).setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow's name none either

_SAMPLE_FORMATS = {1: "", 2: " with a sign", 3: " in floating point", 4: "", 5: " as complex numbers"}
_ASSOCIATED, _UNASSOCIATED = 1, 2
_SEPARATED = 5
_COLOURS = {0: 1, 1: 1, 2: 3, _SEPARATED: 4}
"""Channels of colour by photometric interpretation, for those that tifffile decodes."""
_FAX_AND_JPEG = (2, 3, 4, 6, 7)  # compressions that Pillow decodes
_GAIN_MAPS = (b"hdrgm:Version", b"urn:iso:std:iso:ts:21496", b"hdrgainmap", b"HDRGainMapVersion")
_UPRIGHT_BY_DECODER = ("heif", "jxl")
ACCEPTED_SAMPLES = "accepted: whole numbers of 8 or 16 bits per channel"
ACCEPTED_LAYOUTS = "accepted: gray, RGB, palette, CMYK and Lab of 8 bits, gray, RGB and CMYK of 16"
_open_lock = threading.Lock()


def read_image(source: Path | bytes | BinaryIO, name: str | None = None, max_pixels: int = MAX_PIXELS) -> LoadedImage:
    """Decode a file, a pipe, or bytes and streams (called ``name`` in messages) into a :class:`LoadedImage`.

    CMYK and Lab become sRGB through their profile; of animations and multi-page files the first image is taken, with
    a warning. Raises UserError for anything that is no readable image of an accepted format or is beyond the limits.
    """
    label = name or (str(source) if isinstance(source, Path) else "<bytes>")
    with error_context(label):
        data = source if isinstance(source, bytes) else _read_bytes(source)
        if not data:
            raise UserError(f"the file is empty (0 bytes); {ACCEPTED}")
        kind = identify(data)
        check_structure(data, kind, max_pixels)
        with _damage_reported(FORMATS[kind].name):
            return _READERS.get(kind, _read_with_pillow)(data, kind, label, max_pixels)


def from_pil(image: Image.Image) -> LoadedImage:
    """The :class:`LoadedImage` of a Pillow image, with the metadata Pillow attached; orientation is applied."""
    with error_context("<image>"):
        return _decode(image, b"", None, "<image>")


def _read_bytes(source: Path | BinaryIO) -> bytes:
    """All bytes of a file, pipe or stream, up to the limit."""
    if not isinstance(source, Path):
        return _read_stream(source)
    try:
        status = source.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"is a folder, expected an image; {ACCEPTED}")
        if status.st_size > MAX_BYTES:
            raise UserError(f"{status.st_size:,} bytes is more than the limit of {MAX_BYTES:,}")
        if stat.S_ISREG(status.st_mode):
            return source.read_bytes()
        with source.open("rb") as pipe:
            return _read_stream(pipe)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from error


def _read_stream(stream: BinaryIO) -> bytes:
    blocks, length = [], 0
    while block := stream.read(2**20):
        if not isinstance(block, bytes):
            raise UserError("not a binary stream; accepted: files opened with 'rb', and bytes")
        blocks.append(block)
        length += len(block)
        if length > MAX_BYTES:
            raise UserError(f"more than the limit of {MAX_BYTES:,} bytes")
    return b"".join(blocks)


@contextmanager
def _damage_reported(kind: str) -> Iterator[None]:
    """Inside, whatever a decoder raises becomes a UserError of one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of every kind on damaged files
        reason = "its structure" if isinstance(error, LookupError) else first_line(error, 120)
        raise UserError(f"truncated or damaged {kind} file ({reason}); {ACCEPTED}") from error


# ---- Through Pillow ----


def _read_with_pillow(data: bytes, kind: str, label: str, max_pixels: int) -> LoadedImage:
    note = None
    if kind == "png":
        chunks = list(png_chunks(data))
        check_png(chunks, max_pixels)
        data, note = _mended_png(data, chunks)
    elif kind == "webp":
        data, note = _mended_webp(data)
    try:
        with _opened(data, kind, label, max_pixels) as image:
            result = _decode(image, data, kind, label)
    except OSError:
        if kind != "jpeg":
            raise
        result, note = _read_jpeg_without_end(data, label, max_pixels), "no end marker"
    if note:
        logger.warning("%s: is damaged (%s), but has all its samples", label, note)
    return result


@contextmanager
def _opened(data: bytes, kind: str, label: str, max_pixels: int) -> Iterator[Image.Image]:
    if FORMATS[kind].package:
        load_plugin(kind)
    # Pillow's own limit is a process-wide variable: it is set for the moment of opening only, then put back.
    with _open_lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS[kind].pillow)
        except Exception as error:
            if kind == "tiff" or not (isinstance(error, UnidentifiedImageError) or FORMATS[kind].package):
                raise
            raise UserError(f"truncated or damaged {FORMATS[kind].name} file (its header); {ACCEPTED}") from error
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with image:
        check_pixels(*image.size, max_pixels)
        frames = 1 if kind == "tiff" else getattr(image, "n_frames", 1)
        if frames > 1 and image.format == "MPO":
            logger.info("%s: holds %d images, such as a preview or a depth map; only the first is used", label, frames)
        else:
            _warn_of_frames(frames, label)
        yield image


def load_plugin(kind: str) -> None:
    """Register the plug-in of a format that Pillow itself does not read."""
    try:
        module = importlib.import_module({"heif": "pillow_heif", "jxl": "pillow_jxl"}[kind])
    except ImportError as error:
        raise MissingExtra(f"{FORMATS[kind].name}", "formats") from error
    if kind == "heif":
        module.register_heif_opener()


def _warn_of_frames(count: int, label: str) -> None:
    if count > 1:
        logger.warning("%s: has %d frames or pages, only the first is used", label, count)


def _decode(image: Image.Image, data: bytes, kind: str | None, label: str) -> LoadedImage:
    loaded = _decode_samples(image, data, kind, label)  # first: in a PNG metadata may stand behind the samples
    exif = _exif_of(image, kind, label)
    lossless = kind not in ("jpeg", "avif", "heif", "jxl") and (kind != "webp" or _is_lossless_webp(data))
    if image.mode not in ("CMYK", "LAB"):
        loaded = _with_stated_colours(loaded, image, data, exif, label)
    return _finished(
        loaded,
        data,
        label,
        exif,
        xmp=xmp_packet(_xmp_box(data) if kind == "jxl" else image.info.get("xmp"), label),
        iptc=iptc_block(image.info),
        texts=image_texts(image.info, getattr(image, "text", {})),
        dpi=resolution(image.info.get("dpi")),
        format=kind,
        lossless=lossless if kind else image.format not in ("JPEG", "MPO"),
    )


def _xmp_box(data: bytes) -> bytes | None:
    """The box of XMP in a JPEG XL file, which its plug-in does not give."""
    start = data.find(b"xml ")
    return data[start + 4 : start - 4 + int.from_bytes(data[start - 4 : start])] if start >= 4 else None


def _exif_of(image: Image.Image, kind: str | None, label: str) -> Image.Exif:
    try:
        exif = image.getexif()
        if image.info.get("exif") and not exif:
            raise ValueError("no tags can be read")
    except Exception as error:  # noqa: BLE001  (whatever is wrong with it, the image is worth more)
        logger.warning("%s: EXIF data is damaged and left out (%s)", label, first_line(error))
        return Image.Exif()
    if kind in _UPRIGHT_BY_DECODER and ExifTags.Base.Orientation in exif:
        exif[ExifTags.Base.Orientation] = 1
    return exif


def _finished(loaded: LoadedImage, data: bytes, label: str, exif: Image.Exif, **metadata: Any) -> LoadedImage:
    """``loaded`` turned upright by its EXIF orientation, with the metadata that travels."""
    gain_map = metadata.get("format") in ("jpeg", "avif", "heif") and any(name in data for name in _GAIN_MAPS)
    if gain_map:
        logger.warning("%s: its HDR gain map is left out, the result is the standard image", label)
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    return replace(
        loaded,
        pixels=upright(loaded.pixels, orientation),
        alpha=None if loaded.alpha is None else upright(loaded.alpha, orientation),
        exif=exif_block(exif, label, keep_maker_note=not gain_map),
        **metadata,
    )


def _with_stated_colours(
    loaded: LoadedImage, image: Image.Image, data: bytes, exif: Image.Exif, label: str
) -> LoadedImage:
    """``loaded`` with a profile of the colours that the file states in another way, unless it has one."""
    cicp = _stated_cicp(data)
    # In a PNG code points come before a profile (PNG, third edition, section 4.3), in AVIF and HEIF behind it.
    if cicp is not None and (loaded.icc is None or image.format == "PNG"):
        if is_hdr(cicp):  # what stands in for them in a profile would clip them
            logger.warning("%s: HDR samples (PQ or HLG) are enlarged as they are, in their own coding", label)
            return replace(loaded, icc=loaded.icc if is_hdr_profile(loaded.icc) else None, cicp=cicp)
        return replace(loaded, icc=None if loaded.gray else cicp_profile(cicp) or loaded.icc, cicp=cicp)
    if loaded.icc is not None:
        return loaded
    if image.format == "PNG" and "srgb" not in image.info and "gamma" in image.info:
        return replace(loaded, icc=gamma_profile(image.info["gamma"], image.info.get("chromaticity"), loaded.gray))
    if not loaded.gray and is_adobe_rgb(exif):
        return replace(loaded, icc=adobe_rgb_profile())
    return loaded


def _stated_cicp(data: bytes) -> Cicp | None:
    """Code points of a PNG's cICP chunk, or of the colr box (nclx) of AVIF and HEIF; None for those of sRGB."""
    points: Cicp | None = None
    if data.startswith(PNG_MAGIC):
        found = next((chunk for kind, chunk in png_chunks(data) if kind == b"cICP" and len(chunk) == 16), None)
        points = None if found is None else (found[8], found[9], found[10], found[11])
    elif data[4:8] == b"ftyp":
        box = re.search(rb"colrnclx(.{7})", data, re.DOTALL)
        if box is not None:
            primaries, transfer, _, full = struct.unpack(">HHHB", box[1])
            points = (primaries, transfer, 0, full >> 7)
    return None if points is None or points[0] == 2 or points[:2] in ((1, 13), (1, 1), (1, 6), (1, 2)) else points


def _is_lossless_webp(data: bytes) -> bool:
    """True if the first image chunk of a RIFF container is one of lossless WebP; a profile may stand before it."""
    return next((kind == b"VP8L" for kind, _ in _webp_chunks(data, frames=True) if kind in (b"VP8L", b"VP8 ")), False)


def _webp_chunks(data: bytes, frames: bool = False) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a WebP, also those within ``frames``: type, and all bytes; the last may be incomplete."""
    offset = 12
    while offset + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, offset)
        end = offset + 8 + size + size % 2
        yield kind, data[offset:end]
        offset = offset + 24 if frames and kind == b"ANMF" else end  # a frame holds its image behind 16 bytes


def _decode_samples(image: Image.Image, data: bytes, kind: str | None, label: str) -> LoadedImage:
    icc, mode = image.info.get("icc_profile") or None, image.mode
    transparent = image.info.get("transparency")
    if kind == "png" and (data[24] == 16 or (transparent is not None and mode in ("1", "L", "RGB"))):
        import imagecodecs  # Pillow reads 16 bits as 8, and takes a transparent colour of fewer bits for one of 8

        return split_alpha(imagecodecs.png_decode(data), icc)
    if kind == "avif":
        depth = re.search(rb"av1C.{2}(.)", data, re.DOTALL)
        if depth is not None and depth[1][0] & 0x40:
            import imagecodecs

            return split_alpha(_sixteen_bits(imagecodecs.avif_decode(data), 12 if depth[1][0] & 0x20 else 10), icc)
    if kind == "jxl":
        import imagecodecs

        samples = imagecodecs.jpegxl_decode(data)
        if samples.dtype == np.uint16:
            return split_alpha(_sixteen_bits(samples, jxl_header(data)[2] or 16), icc)
    if mode.startswith("I"):  # images from memory only: I;16 or 32 bits
        return split_alpha(_sixteen_bits(np.array(image)), icc)
    if mode in ("CMYK", "LAB"):
        return LoadedImage(pixels=np.array(cmyk_or_lab_to_rgb(image, icc, label)))
    if mode == "F":
        raise UserError(f"floating-point samples are not supported; {ACCEPTED_SAMPLES}")
    if mode in ("1", "L", "La"):
        wanted = "L" if transparent is None and mode != "La" else "LA"
    else:
        wanted = {"LA": "LA"}.get(mode, "RGBA" if image.has_transparency_data else "RGB")
    return split_alpha(np.array(image if mode == wanted else image.convert(wanted)), icc)


# ---- Damaged files with all their samples ----


def _mended_png(data: bytes, chunks: list[tuple[bytes, bytes]]) -> tuple[bytes, str | None]:
    """``data`` without ancillary chunks that are damaged, and with an end; and what was amiss, if anything was."""
    intact = [
        (kind, chunk)
        for kind, chunk in chunks
        if not kind[0] & 0x20 or zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
    ]
    dropped, ended = len(chunks) - len(intact), any(kind == b"IEND" for kind, _ in intact)
    if dropped == 0 and ended:
        return data, None
    end = b"" if ended else struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
    amiss = [f"{dropped} chunks of metadata"] if dropped else []
    note = " and ".join([*amiss, *([] if ended else ["no end"])])
    return PNG_MAGIC + b"".join(chunk for _, chunk in intact) + end, note


def _mended_webp(data: bytes) -> tuple[bytes, str | None]:
    """``data`` without metadata that is cut off behind the samples; and what was amiss, if anything was."""
    chunks = list(_webp_chunks(data))
    kind, last = chunks[-1] if chunks else (b"", b"")
    if len(data) >= 8 + int.from_bytes(data[4:8], "little") or kind in (b"VP8 ", b"VP8L", b"ANMF", b"ALPH"):
        return data, None
    if len(last) < 8 + int.from_bytes(last[4:8], "little"):
        chunks.pop()
    present = {kind for kind, _ in chunks}
    gone = sum(flag for kind, flag in ((b"EXIF", 8), (b"XMP ", 4)) if kind not in present)
    body = b"".join(
        chunk[:8] + bytes([chunk[8] & ~gone]) + chunk[9:] if kind == b"VP8X" else chunk + b"\0" * (len(chunk) % 2)
        for kind, chunk in chunks
    )
    return struct.pack("<4sI4s", b"RIFF", 4 + len(body), b"WEBP") + body, "metadata cut off"


def _read_jpeg_without_end(data: bytes, label: str, max_pixels: int) -> LoadedImage:
    """Decode a JPEG that lacks its end marker; OSError where samples are missing too."""
    # What follows the last sample does not matter: if two continuations give the same samples, all are there.
    results = []
    for continuation in (b"", b"\xa5\x5a\x33\xcc" * 64):
        ended = data + continuation + b"\xff\xd9"
        with _opened(ended, "jpeg", label, max_pixels) as image:
            results.append(_decode(image, ended, "jpeg", label))
    if not np.array_equal(results[0].pixels, results[1].pixels):
        raise OSError("samples are missing")
    return results[0]


# ---- HEIF ----


def _read_heif(data: bytes, kind: str, label: str, max_pixels: int) -> LoadedImage:
    load_plugin(kind)
    import pillow_heif

    file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    width, height = file.size
    check_pixels(width, height, max_pixels)
    _warn_of_frames(len(file), label)
    info = file.info
    with Image.open(io.BytesIO(data), formats=FORMATS[kind].pillow) as image:
        exif = _exif_of(image, kind, label)
        samples = np.asarray(file[file.primary_index])
        loaded = split_alpha(samples, info.get("icc_profile") or None)
        loaded = _with_stated_colours(loaded, image, data, exif, label)
    return _finished(loaded, data, label, exif, xmp=xmp_packet(info.get("xmp"), label), format=kind, lossless=False)


# ---- TIFF ----


def _read_tiff(data: bytes, kind: str, label: str, max_pixels: int) -> LoadedImage:
    """Decode gray and RGB of 8 to 16 bits with tifffile, all else with Pillow; metadata is tifffile's for both."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        check_tiff(file, max_pixels)
        if _has_second_page(file):
            logger.warning("%s: has several pages, only the first is used", label)
        bits = np.ravel(page.tags.valueof(258, 1)).tolist()
        exif, plain = _exif_of_tiff(data, file, label), _is_plain(page, bits)
        if plain:
            loaded = _plain_samples(page, max(bits), label)
        else:
            try:
                with _opened(data, kind, label, max_pixels) as image:
                    loaded = _decode_samples(image, data, kind, label)
            except UnidentifiedImageError as error:
                raise UserError(f"{_layout(page, bits)} is not supported; {ACCEPTED_LAYOUTS}") from error
            exif[ExifTags.Base.Orientation] = 1  # Pillow has turned it
        if loaded.icc is None and page.photometric in (1, 2) and is_adobe_rgb(exif) and not loaded.gray:
            loaded = replace(loaded, icc=adobe_rgb_profile())
        iptc = page.tags.get(33723)
        return _finished(
            loaded,
            data,
            label,
            exif,
            xmp=xmp_packet(page.tags.valueof(700), label),
            iptc=None if iptc is None else bytes(iptc.astuple()[3]),
            dpi=resolution(page.get_resolution("inch") if page.tags.valueof(296, 2) in (2, 3) else None),
            format=kind,
        )


def _exif_of_tiff(data: bytes, file: tifffile.TiffFile, label: str) -> Image.Exif:
    page = file.pages.first
    try:
        return tiff_exif(data, file.byteorder, page.offset if file.is_bigtiff else None)
    except Exception as error:  # noqa: BLE001  (whatever is wrong with the tags, the image is worth more)
        logger.warning("%s: EXIF data cannot be read and is left out (%s)", label, first_line(error))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = page.tags.valueof(274, 1)
        return exif


def _has_second_page(file: tifffile.TiffFile) -> bool:
    try:
        return file.pages[1] is not None
    except Exception:  # noqa: BLE001  (a damaged second page is none)
        return False


def _is_plain(page: tifffile.TiffPage, bits: list[int]) -> bool:
    """True if tifffile is to decode the samples; UserError for those that neither it nor Pillow decodes exactly."""
    kind = _SAMPLE_FORMATS.get(np.ravel(page.tags.valueof(339, 1))[0], " of an unknown kind")
    photometric, depth, one_depth = page.tags.valueof(262, 1), max(bits), len(set(bits)) == 1
    if photometric == _SEPARATED and page.tags.valueof(332, 1) != 1:
        raise UserError(f"{_layout(page, bits)}, of other inks than CMYK, is not supported; {ACCEPTED_LAYOUTS}")
    exact = 8 <= depth <= 16 if photometric != _SEPARATED else depth in (8, 16)
    if not kind and one_depth and exact and photometric in _COLOURS and page.compression not in _FAX_AND_JPEG:
        return True
    if bits == [32] and photometric in (0, 1) and page.dtype is not None and page.dtype.kind in "iu":
        return True
    if kind or not set(bits) <= {1, 2, 4, 8, 16} or depth > (8 if photometric in (0, 1, 2) else 16):
        named = "/".join(str(each) for each in bits[:4])
        raise UserError(f"TIFF samples of {named} bits{kind} are not supported; {ACCEPTED_SAMPLES}")
    return False


def _layout(page: tifffile.TiffPage, bits: list[int]) -> str:
    """The layout of a TIFF in words."""
    photometric = str(getattr(page.photometric, "name", page.photometric)).lower()
    planes = " in separate planes" if page.planarconfig == 2 and page.samplesperpixel > 1 else ""
    compression = str(getattr(page.compression, "name", page.compression)).lower()
    return (
        f"TIFF of {photometric}, {page.samplesperpixel} channels of {max(bits)} bits{planes}, compression {compression}"
    )


def _plain_samples(page: tifffile.TiffPage, bits: int, label: str) -> LoadedImage:
    """Decode a page; of its extra channels the first is alpha or none, the others are dropped with a warning."""
    separate, _, height, width, together = page.shaped
    planes = np.moveaxis(page.asarray().reshape(separate, height, width, together), 0, 2)
    samples = planes.reshape(height, width, -1) if bits == 8 else _sixteen_bits(planes.reshape(height, width, -1), bits)
    photometric, icc = page.tags.valueof(262, 1), page.tags.valueof(34675)
    channels, colours = samples.shape[2], _COLOURS[photometric]
    if channels < colours:
        raise UserError(f"{_layout(page, [bits])} is not supported; {ACCEPTED_LAYOUTS}")
    if photometric == 0:  # white is zero
        samples = ~samples
    extra = np.ravel(page.tags.valueof(338, _UNASSOCIATED))[0]  # a further channel that nothing is said of is alpha
    has_alpha = channels > colours and extra in (_ASSOCIATED, _UNASSOCIATED)
    if channels > colours + has_alpha:
        logger.warning("%s: %d of %d channels are dropped", label, channels - colours - has_alpha, channels)
    pixels = np.ascontiguousarray(samples[..., :colours])
    alpha = np.ascontiguousarray(samples[..., colours]) if has_alpha else None
    if alpha is not None and extra == _ASSOCIATED:
        peak, share = np.uint64(np.iinfo(samples.dtype).max), np.maximum(alpha, 1).astype(np.uint64)[..., None]
        pixels = np.minimum((pixels * peak + share // 2) // share, peak).astype(samples.dtype)
    if photometric != _SEPARATED:
        return LoadedImage(pixels=pixels, alpha=alpha, icc=icc)
    if bits == 16:
        logger.info("%s: 16 bits of CMYK are converted with 8", label)
    cmyk = Image.fromarray(pixels if bits == 8 else narrowed(pixels), "CMYK")
    rgb = np.array(cmyk_or_lab_to_rgb(cmyk, icc, label))
    return LoadedImage(pixels=rgb, alpha=narrowed(alpha) if alpha is not None and bits == 16 else alpha)


def _sixteen_bits(samples: NDArray[Any], bits: int = 16) -> NDArray[np.uint16]:
    """Samples of 9 to 16 bits spread over 0..65535, rounded to nearest; wider ones must lie there."""
    if samples.dtype.itemsize > 2 and not 0 <= samples.min() <= samples.max() <= 65535:
        seen = f"32-bit samples from {samples.min()} to {samples.max()}, beyond 0 to 65535"
        raise UserError(f"{seen}; {ACCEPTED_SAMPLES}")
    if bits >= 16:
        return samples.astype(np.uint16)
    peak = np.uint32(2**bits - 1)
    return ((samples * np.uint32(65535) + peak // 2) // peak).astype(np.uint16)


_READERS: dict[str, Callable[[bytes, str, str, int], LoadedImage]] = {"tiff": _read_tiff, "heif": _read_heif}

"""Images in memory and how they are read: every mode of JPEG, PNG, WebP, TIFF and BMP becomes one plain shape.

A :class:`LoadedImage` holds gray or RGB samples of 8 or 16 bits in the image's own colour space, upright, with alpha
apart from colour and the metadata beside it. Pillow decodes 8 bits, libpng and tifffile what has more of them. Writing
is in :mod:`onestepsr.imaging.write`, colour profiles in :mod:`onestepsr.imaging.icc`.
"""

from __future__ import annotations

import io
import logging
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from onestepsr.core.errors import UserError, first_line
from onestepsr.imaging.icc import cmyk_or_lab_to_rgb
from onestepsr.imaging.metadata import exif_block, resolution, tiff_exif, upright, xmp_packet

if TYPE_CHECKING:
    import tifffile

logger = logging.getLogger(__name__)
for _library in ("imagecodecs", "tifffile"):  # their warnings name no file; what matters raises
    logging.getLogger(_library).setLevel(logging.CRITICAL)

MAX_PIXELS = 250_000_000
"""Headers that claim more pixels than this are refused before anything is decoded."""
MAX_BYTES = 2_000_000_000
"""Larger files are refused before they are read."""
EXTENSIONS = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".jpe": "jpeg",
    ".png": "png",
    ".webp": "webp",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".bmp": "bmp",
}
"""Accepted file name endings and the format each stands for."""
ACCEPTED = "accepted: JPEG, PNG, WebP, TIFF and BMP"

Samples = NDArray[Any]
"""Stored samples: uint8 or uint16, full range."""

_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
_FORMAT_NAMES = {
    "JPEG": "jpeg",
    "MPO": "jpeg",
    "PNG": "png",
    "WEBP": "webp",
    "TIFF": "tiff",
    "BMP": "bmp",
}
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SAMPLE_FORMATS = {1: "", 2: " with a sign", 3: " in floating point", 4: "", 5: " as complex numbers"}
_ASSOCIATED, _UNASSOCIATED = 1, 2
ACCEPTED_SAMPLES = "accepted: whole numbers of 8 or 16 bits per channel"
_open_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """One image in its own colour space, upright.

    Fixed shapes: ``pixels`` (H, W, 3) RGB or (H, W, 1) gray, ``alpha`` (H, W) or None (not premultiplied); both uint8
    or both uint16, full range.
    """

    pixels: Samples
    alpha: Samples | None = None
    icc: bytes | None = None
    """ICC profile of ``pixels``; None means sRGB."""
    exif: bytes | None = None
    """EXIF block whose orientation is 1, as Pillow's savers take it."""
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    format: str | None = None
    """The file format it came from: jpeg, png, webp, tiff, bmp; None when it came from memory."""
    lossless: bool = True
    """Whether that file held the samples without loss."""

    def __post_init__(self) -> None:
        shape, kind = self.pixels.shape, self.pixels.dtype
        if len(shape) != 3 or shape[2] not in (1, 3) or kind not in (np.uint8, np.uint16) or 0 in shape:
            raise ValueError(f"pixels must be (H, W, 1|3) uint8 or uint16 and not empty, got {shape} {kind}")
        if self.alpha is not None and (self.alpha.shape != shape[:2] or self.alpha.dtype != kind):
            raise ValueError(f"alpha must be {shape[:2]} {kind}, got {self.alpha.shape} {self.alpha.dtype}")

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.pixels.shape[0])

    @property
    def gray(self) -> bool:
        """Whether there is one channel only."""
        return int(self.pixels.shape[2]) == 1


def read_image(source: Path | bytes, name: str | None = None, max_pixels: int = MAX_PIXELS) -> LoadedImage:
    """Decode a file (or its bytes, called ``name`` in messages) into a :class:`LoadedImage`.

    CMYK and Lab become sRGB through their profile; of animations and multi-page files the first image is taken, with
    a warning. Raises UserError for anything that is no readable image of an accepted format or is beyond the limits.
    """
    label = name or (str(source) if isinstance(source, Path) else "<bytes>")
    data = source if isinstance(source, bytes) else _read_bytes(source, label)
    if not data:
        raise UserError(f"{label}: the file is empty (0 bytes); {ACCEPTED}")
    if data[:4] in _TIFF_MAGICS:
        deep = _read_deep_tiff(data, label, max_pixels)
        if deep is not None:
            return deep
    with _opened(data, label, max_pixels) as image:
        return _decode(image, data, label)


def from_pil(image: Image.Image) -> LoadedImage:
    """The :class:`LoadedImage` of a Pillow image, with the metadata Pillow attached; orientation is applied."""
    return _decode(image, b"", "<image>")


def from_array(array: NDArray[Any]) -> LoadedImage:
    """The :class:`LoadedImage` of (H, W), (H, W, 1|2|3|4) uint8 or uint16 samples: gray, gray+alpha, RGB, RGB+alpha."""
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3) or array.size == 0:
        raise UserError(f"array {array.shape} {array.dtype}: expected (H, W[, 1|2|3|4]) uint8 or uint16, not empty")
    samples = array[..., None] if array.ndim == 2 else array
    if samples.shape[2] > 4:
        raise UserError(f"array {array.shape}: expected 1 to 4 channels last")
    return _split_alpha(np.ascontiguousarray(samples))


def to_pil(image: LoadedImage) -> Image.Image:
    """An 8-bit Pillow image (L, LA, RGB or RGBA) with profile and EXIF in ``info``; 16-bit gray stays 16-bit (I;16)."""
    if image.pixels.dtype == np.uint16 and image.gray and image.alpha is None:
        result = Image.fromarray(image.pixels[..., 0])
    else:
        result = Image.fromarray(interleaved(to_eight_bits(image)))
    notes = {"icc_profile": image.icc, "exif": image.exif, "xmp": image.xmp, "dpi": image.dpi}
    result.info.update({key: value for key, value in notes.items() if value is not None})
    return result


def to_eight_bits(image: LoadedImage) -> LoadedImage:
    """The same image with uint8 samples, rounded to nearest (65535 / 255 = 257 exactly)."""
    if image.pixels.dtype == np.uint8:
        return image
    alpha = None if image.alpha is None else _narrow(image.alpha)
    return replace(image, pixels=_narrow(image.pixels), alpha=alpha)


def samples_to_tensor(samples: NDArray[Any]) -> Tensor:
    """(H, W, C) uint8 or uint16 -> (1, C, H, W) float32 in [0, 1]."""
    scaled = samples.astype(np.float32) / np.float32(np.iinfo(samples.dtype).max)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))[None]


def tensor_to_samples(values: Tensor, dtype: type[np.uint8] | type[np.uint16]) -> NDArray[Any]:
    """(1, C, H, W) or (C, H, W) in about [0, 1] -> (H, W, C), clamped and rounded half up."""
    peak = float(np.iinfo(dtype).max)
    planes = values.detach().reshape(values.shape[-3:]).to("cpu", torch.float32)
    scaled = planes.clamp(0.0, 1.0).mul_(peak).add_(0.5).floor_().clamp_(max=peak)
    return np.ascontiguousarray(scaled.permute(1, 2, 0).numpy().astype(dtype))


def _narrow(samples: Samples) -> NDArray[np.uint8]:
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def interleaved(image: LoadedImage) -> Samples:
    """Colour and alpha as one array: (H, W) gray, else (H, W, C)."""
    if image.alpha is not None:
        return np.concatenate([image.pixels, image.alpha[..., None]], axis=2)
    return image.pixels[..., 0] if image.gray else image.pixels


def _read_bytes(path: Path, label: str) -> bytes:
    try:
        if path.is_dir():
            raise UserError(f"{label}: is a folder, expected an image; {ACCEPTED}")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{label}: {size:,} bytes is more than the limit of {MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{label}: cannot be read ({error.strerror})") from error


# ---- Pillow's formats ----


@contextmanager
def _damage_reported(label: str, kind: str) -> Iterator[None]:
    """Inside, whatever a decoder raises becomes a UserError of one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of every kind on damaged files
        raise UserError(f"{label}: truncated or damaged {kind} file ({first_line(error, 120)}); {ACCEPTED}") from error


@contextmanager
def _opened(data: bytes, label: str, max_pixels: int) -> Iterator[Image.Image]:
    image = _open(data, label, max_pixels)
    with image, _damage_reported(label, str(image.format)):
        _check_pixels(*image.size, label, max_pixels)
        if image.format != "MPO":  # MPO's second image is a depth or gain map
            _warn_of_frames(getattr(image, "n_frames", 1), label)
        yield image


def _open(data: bytes, label: str, max_pixels: int) -> Image.Image:
    # Pillow's own limit is a process-wide variable: it is set for the moment of opening only, then put back.
    with _open_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
        except Image.DecompressionBombError as error:
            raise UserError(f"{label}: claims more than {max_pixels:,} pixels, the limit") from error
        except MemoryError:
            raise
        except Exception as error:
            message = "not an image that can be read, or its header is damaged"
            raise UserError(f"{label}: {message}; {ACCEPTED}") from error
        finally:
            Image.MAX_IMAGE_PIXELS = before
    return image


def _check_pixels(width: int, height: int, label: str, limit: int) -> None:
    if width * height > limit:
        raise UserError(f"{label}: claims {width} x {height} = {width * height:,} pixels, the limit is {limit:,}")


def _warn_of_frames(count: int, label: str) -> None:
    if count > 1:
        logger.warning("%s: has %d frames or pages, only the first is used", label, count)


def _decode(image: Image.Image, data: bytes, label: str) -> LoadedImage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata; what matters raises
        loaded = _decode_samples(image, data, label)  # before EXIF, which in a PNG may stand behind the samples
        exif = image.getexif()
    return _finished(
        loaded,
        exif,
        xmp=xmp_packet(image.info.get("xmp")),
        dpi=resolution(image.info.get("dpi")),
        format=_FORMAT_NAMES.get(image.format or ""),
        lossless=image.format not in ("JPEG", "MPO") and (image.format != "WEBP" or _is_lossless_webp(data)),
    )


def _finished(loaded: LoadedImage, exif: Image.Exif, **metadata: Any) -> LoadedImage:
    """``loaded`` turned upright by its EXIF orientation, with the metadata that travels."""
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    return replace(
        loaded,
        pixels=upright(loaded.pixels, orientation),
        alpha=None if loaded.alpha is None else upright(loaded.alpha, orientation),
        exif=exif_block(exif),
        **metadata,
    )


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the first image chunk of a RIFF container is one of lossless WebP; a profile may stand before it."""
    offset = 12
    while offset + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, offset)
        if kind in (b"VP8L", b"VP8 "):
            return bool(kind == b"VP8L")
        offset += 8 + (16 if kind == b"ANMF" else size + size % 2)  # a frame holds its image behind 16 bytes
    return False


def _decode_samples(image: Image.Image, data: bytes, label: str) -> LoadedImage:
    icc, mode = image.info.get("icc_profile") or None, image.mode
    transparent = image.info.get("transparency")
    if data.startswith(_PNG_MAGIC) and (data[24] == 16 or (transparent is not None and mode in ("1", "L", "RGB"))):
        import imagecodecs  # Pillow reads 16 bits as 8, and takes a transparent colour of fewer bits for one of 8

        return _split_alpha(imagecodecs.png_decode(data), icc)
    if mode.startswith("I"):  # images from memory only: I;16 or 32 bits
        return _split_alpha(_sixteen_bits(np.array(image), label), icc)
    if mode in ("CMYK", "LAB"):
        return LoadedImage(pixels=np.array(cmyk_or_lab_to_rgb(image, icc)))
    if mode == "F":
        raise UserError(f"{label}: floating-point samples are not supported; {ACCEPTED_SAMPLES}")
    if mode in ("1", "L", "La"):
        wanted = "L" if transparent is None and mode != "La" else "LA"
    else:
        wanted = {"LA": "LA"}.get(mode, "RGBA" if image.has_transparency_data else "RGB")
    return _split_alpha(np.array(image if mode == wanted else image.convert(wanted)), icc)


def _split_alpha(samples: NDArray[Any], icc: bytes | None = None) -> LoadedImage:
    """Separate colour from alpha in (H, W[, C]) samples."""
    samples = samples if samples.ndim == 3 else samples[..., None]
    if samples.shape[2] in (1, 3):
        return LoadedImage(pixels=samples, icc=icc)
    colour, alpha = (np.ascontiguousarray(part) for part in (samples[..., :-1], samples[..., -1]))
    return LoadedImage(pixels=colour, alpha=alpha, icc=icc)


# ---- TIFF of more than 8 bits ----


def _read_deep_tiff(data: bytes, label: str, max_pixels: int) -> LoadedImage | None:
    """Decode gray or RGB of 9 to 16 bits; None for what Pillow reads as well, UserError for other kinds of samples."""
    import tifffile

    with _damage_reported(label, "TIFF"), tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        bits = np.ravel(page.tags.valueof(258, 1)).tolist()
        kind = _SAMPLE_FORMATS.get(np.ravel(page.tags.valueof(339, 1))[0], " of an unknown kind")
        photometric, depth = page.tags.valueof(262, 1), max(bits)
        if (
            not kind
            and (depth <= 8 or (photometric not in (0, 1, 2) and depth <= 16))
            and set(bits) <= {1, 2, 4, 8, 16}
        ):
            return None
        gray_of_32_bits = bits == [32] and page.dtype is not None and page.dtype.kind in "iu"
        if not gray_of_32_bits and (kind or len(set(bits)) > 1 or not 9 <= depth <= 16):
            named = "/".join(str(each) for each in bits[:4])
            raise UserError(f"{label}: TIFF samples of {named} bits{kind} are not supported; {ACCEPTED_SAMPLES}")
        _check_pixels(page.imagewidth, page.imagelength, label, max_pixels)
        _warn_of_frames(len(file.pages), label)
        loaded = _deep_samples(page, depth, label)
        return _finished(
            replace(loaded, icc=page.tags.valueof(34675)),
            tiff_exif(data, file.byteorder, page.offset if file.is_bigtiff else None, page.tags.valueof(274, 1)),
            xmp=xmp_packet(page.tags.valueof(700)),
            dpi=resolution(page.get_resolution("inch") if page.tags.valueof(296, 2) in (2, 3) else None),
            format="tiff",
        )


def _deep_samples(page: tifffile.TiffPage, bits: int, label: str) -> LoadedImage:
    """Decode a page; of its extra channels the first is alpha or none, the others are dropped with a warning."""
    separate, _, height, width, together = page.shaped
    planes = np.moveaxis(page.asarray().reshape(separate, height, width, together), 0, 2)
    samples = _sixteen_bits(planes.reshape(height, width, -1), label, bits)
    channels, colours = samples.shape[2], 3 if page.photometric == 2 else 1
    if page.photometric == 0:  # white is zero
        samples = ~samples
    extra = page.extrasamples[0] if page.extrasamples else 0
    kept = colours + (extra in (_ASSOCIATED, _UNASSOCIATED))
    if channels > kept:
        logger.warning("%s: %d of %d channels are dropped", label, channels - kept, channels)
    loaded = _split_alpha(np.ascontiguousarray(samples[..., :kept]))
    if loaded.alpha is None or extra == _UNASSOCIATED:
        return loaded
    share = np.maximum(loaded.alpha, 1).astype(np.uint64)[..., None]
    colour = np.minimum((loaded.pixels * np.uint64(65535) + share // 2) // share, 65535)
    return replace(loaded, pixels=colour.astype(np.uint16))


def _sixteen_bits(samples: NDArray[Any], label: str, bits: int = 16) -> NDArray[np.uint16]:
    """Samples of 9 to 16 bits spread over 0..65535, rounded to nearest; wider ones must lie there."""
    if samples.dtype.itemsize > 2 and not 0 <= samples.min() <= samples.max() <= 65535:
        seen = f"32-bit samples from {samples.min()} to {samples.max()}, beyond 0 to 65535"
        raise UserError(f"{label}: {seen}; {ACCEPTED_SAMPLES}")
    if bits >= 16:
        return samples.astype(np.uint16)
    peak = np.uint32(2**bits - 1)
    return ((samples * np.uint32(65535) + peak // 2) // peak).astype(np.uint16)

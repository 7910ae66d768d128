"""Images in memory and how they are read: every mode of JPEG, PNG, WebP, TIFF and BMP becomes one plain shape.

A :class:`Image` holds gray or RGB samples of 8 or 16 bits in the image's own colour space, upright, with alpha
apart from colour and the metadata beside it. Writing is in :mod:`onestepsr.imaging.write`, colour profiles in
:mod:`onestepsr.imaging.icc`.
"""

from __future__ import annotations

import io
import logging
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from onestepsr.core.errors import UserError, error_context, first_line
from onestepsr.imaging.deep import ACCEPTED_SAMPLES, read_deep, sample_bits, strange_samples
from onestepsr.imaging.icc import to_rgb
from onestepsr.imaging.metadata import exif_block, resolution, upright, xmp_packet

logger = logging.getLogger(__name__)

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
# What Pillow's decoders raise on damaged files; anything else is a defect and must surface.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
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
    """Decode a file (or its bytes, called ``name`` in messages) into a :class:`Image`.

    CMYK and Lab become sRGB through their profile; of animations and multi-page files the first image is taken, with
    a warning. Raises UserError for anything that is no readable image of an accepted format or is beyond the limits.
    """
    label = name or (str(source) if isinstance(source, Path) else "<bytes>")
    data = source if isinstance(source, bytes) else _read_bytes(source, label)
    if not data:
        raise UserError(f"{label}: the file is empty (0 bytes); {ACCEPTED}")
    with _opened(data, label, max_pixels) as image:
        return _decode(image, data, label)


def from_pil(image: Image.Image) -> LoadedImage:
    """The :class:`Image` of a Pillow image, with whatever metadata Pillow attached; orientation is applied."""
    return _decode(image, b"", "<image>")


def from_array(array: NDArray[Any]) -> LoadedImage:
    """The :class:`Image` of (H, W), (H, W, 1|2|3|4) uint8 or uint16 samples: gray, gray+alpha, RGB, RGB+alpha."""
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3) or array.size == 0:
        raise UserError(f"array {array.shape} {array.dtype}: expected (H, W[, 1|2|3|4]) uint8 or uint16, not empty")
    samples = array[..., None] if array.ndim == 2 else array
    if samples.shape[2] > 4:
        raise UserError(f"array {array.shape}: expected 1 to 4 channels last")
    return _split_alpha(np.ascontiguousarray(samples))


def to_pil(picture: LoadedImage) -> Image.Image:
    """An 8-bit Pillow image (L, LA, RGB or RGBA) with profile and EXIF in ``info``; 16-bit gray stays 16-bit (I;16)."""
    if picture.pixels.dtype == np.uint16 and picture.gray and picture.alpha is None:
        image = Image.fromarray(picture.pixels[..., 0])
    else:
        image = Image.fromarray(_interleave(to_eight_bits(picture)))
    notes = {"icc_profile": picture.icc, "exif": picture.exif, "xmp": picture.xmp, "dpi": picture.dpi}
    image.info.update({key: value for key, value in notes.items() if value is not None})
    return image


def to_eight_bits(picture: LoadedImage) -> LoadedImage:
    """The same image with uint8 samples, rounded to nearest (65535 / 255 = 257 exactly)."""
    if picture.pixels.dtype == np.uint8:
        return picture
    alpha = None if picture.alpha is None else _narrow(picture.alpha)
    return replace(picture, pixels=_narrow(picture.pixels), alpha=alpha)


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


def _interleave(picture: LoadedImage) -> NDArray[Any]:
    if picture.alpha is not None:
        return np.concatenate([picture.pixels, picture.alpha[..., None]], axis=2)
    return picture.pixels[..., 0] if picture.gray else picture.pixels


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


@contextmanager
def _opened(data: bytes, label: str, max_pixels: int) -> Iterator[Image.Image]:
    image = _open(data, label, max_pixels)
    try:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # MPO's second image is a depth or gain map
            logger.warning("%s: has %d frames or pages, only the first is used", label, frames)
        yield image
    except DECODE_ERRORS as error:
        raise UserError(
            f"{label}: truncated or damaged {image.format} file ({first_line(error, 120)}); {ACCEPTED}"
        ) from error
    finally:
        image.close()


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
        except DECODE_ERRORS as error:
            raise UserError(f"{label}: {_why_not_opened(data)}") from error
        finally:
            Image.MAX_IMAGE_PIXELS = before
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise UserError(f"{label}: claims {width} x {height} = {width * height:,} pixels, the limit is {max_pixels:,}")
    return image


def _why_not_opened(data: bytes) -> str:
    with suppress(*DECODE_ERRORS):
        samples = strange_samples(data)
        if samples is not None:
            return f"{samples} are not supported; {ACCEPTED_SAMPLES}"
    return f"not an image that can be read, or its header is damaged; {ACCEPTED}"


def _decode(image: Image.Image, data: bytes, label: str) -> LoadedImage:
    icc = image.info.get("icc_profile") or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata; what matters raises
        picture = _decode_samples(image, data, label, icc)  # before EXIF, which in a PNG may stand behind the samples
        exif = image.getexif()
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    return replace(
        picture,
        pixels=upright(picture.pixels, orientation),
        alpha=None if picture.alpha is None else upright(picture.alpha, orientation),
        exif=exif_block(exif),
        xmp=xmp_packet(image),
        dpi=resolution(image),
        format=_FORMAT_NAMES.get(image.format or ""),
        lossless=image.format not in ("JPEG", "MPO") and (image.format != "WEBP" or _is_lossless_webp(data)),
    )


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the first image chunk of a RIFF container is one of lossless WebP; a profile may stand before it."""
    place = 12
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, place)
        if kind in (b"VP8L", b"VP8 "):
            return bool(kind == b"VP8L")
        place += 8 + (16 if kind == b"ANMF" else size + size % 2)  # a frame holds its image behind 16 bytes
    return False


def _decode_samples(image: Image.Image, data: bytes, label: str, icc: bytes | None) -> LoadedImage:
    transparent = image.info.get("transparency")
    with error_context(label):
        deep = read_deep(image, partial(_open, data, label, image.width * image.height) if data else None)
    if deep is not None:
        return replace(_split_alpha(deep, transparent), icc=icc)
    mode = image.mode
    if mode in ("CMYK", "LAB"):
        return LoadedImage(pixels=np.array(to_rgb(image, icc)))
    if mode == "P":
        image = image.convert("RGBA" if transparent is not None else "RGB")
    elif mode in ("1", "L", "RGB"):
        key = None if transparent is None else _key_of_eight_bits(image, transparent)
        samples = np.array(image.convert("RGB" if mode == "RGB" else "L"))
        return replace(_split_alpha(samples if samples.ndim == 3 else samples[..., None], key), icc=icc)
    elif mode in ("PA", "RGBa", "La"):
        image = image.convert("LA" if mode == "La" else "RGBA")
    elif mode in ("RGBX", "YCbCr", "HSV"):
        image = image.convert("RGB")
    elif mode not in ("LA", "RGBA"):
        kind = "floating-point samples" if mode == "F" else f"samples of kind '{mode}'"
        raise UserError(f"{label}: {kind} are not supported; {ACCEPTED_SAMPLES}")
    samples = np.array(image)
    return replace(_split_alpha(samples if samples.ndim == 3 else samples[..., None]), icc=icc)


def _key_of_eight_bits(image: Image.Image, key: Any) -> NDArray[np.uint8]:
    """The colour ``key`` of a tRNS chunk, which is in the file's own depth, as ``image`` has it once it is decoded.

    Pillow itself spreads gray samples of 1, 2 and 4 bits over 0..255, but not the key.
    """
    peak = 2 ** sample_bits(image) - 1
    meant = np.asarray(key, np.int64) & peak  # the other bits mean nothing (PNG, 11.3.2)
    return np.asarray(meant * (255 // peak), np.uint8)


def _split_alpha(samples: NDArray[Any], transparent: Any = None) -> LoadedImage:
    """Separate colour from alpha; ``transparent`` is the one colour that a PNG's tRNS chunk makes transparent."""
    channels = samples.shape[2]
    if channels in (2, 4):
        colour = np.ascontiguousarray(samples[..., : channels - 1])
        return LoadedImage(pixels=colour, alpha=np.ascontiguousarray(samples[..., -1]))
    if transparent is None:
        return LoadedImage(pixels=samples)
    visible = (samples != np.asarray(transparent, samples.dtype)).any(axis=2)
    return LoadedImage(pixels=samples, alpha=(visible * np.iinfo(samples.dtype).max).astype(samples.dtype))

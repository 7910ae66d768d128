"""An image in memory: the one shape that every reader gives and every writer takes, and its other forms.

A :class:`LoadedImage` holds gray or RGB samples of 8 or 16 bits in the image's own colour space, upright, with alpha
apart from colour and the metadata beside it. It comes from arrays and becomes tensors and Pillow images here; files are
read in :mod:`onestepsr.imaging.read` and written in :mod:`onestepsr.imaging.write`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onestepsr.core.errors import UserError
from onestepsr.imaging.icc import Cicp
from onestepsr.imaging.metadata import Texts, resized_exif

if TYPE_CHECKING:  # PyTorch is loaded with the first tensor: a child that only decodes starts without it
    from torch import Tensor

Samples = NDArray[Any]
"""Stored samples: uint8 or uint16, full range."""


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """One image in its own colour space, upright.

    Fixed shapes: ``pixels`` (H, W, 3) RGB or (H, W, 1) gray, ``alpha`` (H, W) or None (not premultiplied); both uint8
    or both uint16, full range.
    """

    pixels: Samples
    alpha: Samples | None = None
    icc: bytes | None = None
    """ICC profile of ``pixels``; None means sRGB, or what ``cicp`` says."""
    exif: bytes | None = None
    """EXIF block whose orientation is 1, as Pillow's savers take it."""
    xmp: bytes | None = None
    iptc: bytes | None = None
    """IPTC record: caption, keywords, credits."""
    texts: Texts = ()
    cicp: Cicp | None = None
    """Code points (ITU-T H.273) that the file states for its colours and no profile could say, or says as well."""
    dpi: tuple[float, float] | None = None
    format: str | None = None
    """The file format it came from, by its name in :mod:`onestepsr.imaging.formats`; None when from memory."""
    lossless: bool = True
    """True if that file held the samples without loss."""

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
        """True if there is one channel only."""
        return int(self.pixels.shape[2]) == 1

    def gray_as_rgb(self) -> LoadedImage:
        """The same image with three equal channels, without its profile, which is one of gray."""
        return replace(self, pixels=self.pixels.repeat(3, axis=2), icc=None)

    def without_metadata(self) -> LoadedImage:
        """The same image without EXIF, XMP, IPTC, texts and resolution; what states its colours stays."""
        return replace(self, exif=None, xmp=None, iptc=None, texts=(), dpi=None)


def from_array(array: NDArray[Any]) -> LoadedImage:
    """The :class:`LoadedImage` of (H, W), (H, W, 1|2|3|4) uint8 or uint16 samples: gray, gray+alpha, RGB, RGB+alpha."""
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3) or array.size == 0:
        raise UserError(f"array {array.shape} {array.dtype}: expected (H, W[, 1|2|3|4]) uint8 or uint16, not empty")
    samples = array[..., None] if array.ndim == 2 else array
    if samples.shape[2] > 4:
        raise UserError(f"array {array.shape}: expected 1 to 4 channels last")
    return split_alpha(np.ascontiguousarray(samples))


class PillowImage(Image.Image):
    """A Pillow image whose profile, EXIF, XMP and resolution are saved with it, where the format can hold them."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002  (Pillow's name)
        """As Pillow's, with what ``info`` holds for each parameter that is not given."""
        held: dict[str, Any] = {
            name: self.info[name] for name in ("icc_profile", "exif", "xmp", "dpi") if name in self.info
        }
        super().save(fp, format, **{**held, **params})


def to_pil(image: LoadedImage) -> Image.Image:
    """An 8-bit Pillow image (L, LA, RGB or RGBA) with its metadata in ``info``; 16-bit gray stays 16-bit (I;16)."""
    if image.pixels.dtype == np.uint16 and image.gray and image.alpha is None:
        result = Image.fromarray(image.pixels[..., 0])
    else:
        result = Image.fromarray(interleaved(to_eight_bits(image)))
    result.__class__ = PillowImage
    exif = None if image.exif is None else resized_exif(image.exif, image.width, image.height).tobytes()
    notes = {"icc_profile": image.icc, "exif": exif, "xmp": image.xmp, "dpi": image.dpi}
    result.info.update({key: value for key, value in notes.items() if value is not None})
    return result


def to_eight_bits(image: LoadedImage) -> LoadedImage:
    """The same image with uint8 samples, rounded to nearest (65535 / 255 = 257 exactly)."""
    if image.pixels.dtype == np.uint8:
        return image
    alpha = None if image.alpha is None else narrowed(image.alpha)
    return replace(image, pixels=narrowed(image.pixels), alpha=alpha)


def samples_to_tensor(samples: NDArray[Any]) -> Tensor:
    """(H, W, C) uint8 or uint16 -> (1, C, H, W) float32 in [0, 1]."""
    import torch

    scaled = samples.astype(np.float32) / np.float32(np.iinfo(samples.dtype).max)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))[None]


def tensor_to_samples(values: Tensor, dtype: type[np.uint8] | type[np.uint16]) -> NDArray[Any]:
    """(1, C, H, W) or (C, H, W) in about [0, 1] -> (H, W, C), clamped and rounded half up."""
    import torch

    peak = float(np.iinfo(dtype).max)
    planes = values.detach().reshape(values.shape[-3:]).to("cpu", torch.float32)
    scaled = planes.clamp(0.0, 1.0).mul_(peak).add_(0.5).floor_().clamp_(max=peak)
    return np.ascontiguousarray(scaled.permute(1, 2, 0).numpy().astype(dtype))


def narrowed(samples: Samples) -> NDArray[np.uint8]:
    """16-bit samples with 8 bits, rounded to nearest."""
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def interleaved(image: LoadedImage) -> Samples:
    """Colour and alpha as one array: (H, W) gray, else (H, W, C)."""
    if image.alpha is not None:
        return np.concatenate([image.pixels, image.alpha[..., None]], axis=2)
    return image.pixels[..., 0] if image.gray else image.pixels


def split_alpha(samples: NDArray[Any], icc: bytes | None = None) -> LoadedImage:
    """Separate colour from alpha in (H, W[, C]) samples."""
    samples = samples if samples.ndim == 3 else samples[..., None]
    if samples.shape[2] in (1, 3):
        return LoadedImage(pixels=samples, icc=icc)
    colour, alpha = (np.ascontiguousarray(part) for part in (samples[..., :-1], samples[..., -1]))
    return LoadedImage(pixels=colour, alpha=alpha, icc=icc)

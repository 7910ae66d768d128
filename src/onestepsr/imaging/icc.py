"""Colour profiles: RGB spaces to sRGB and back in floating point, CMYK and Lab to sRGB, all through Little CMS.

Profiles of a matrix and curves (Display P3, Adobe RGB, ProPhoto, Rec. 2020) and those of tables are treated alike. Gray
profiles, and RGB ones that work in one direction only, are left alone: such images stay in their own space all the way,
with the profile attached.
"""

from __future__ import annotations

import io
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from torch import Tensor

from onestepsr.core.errors import first_line

logger = logging.getLogger(__name__)

_RELATIVE_COLORIMETRIC = 1
_ROUND_TRIP_LIMIT = 0.05
_BAND_ROWS = 64


@dataclass(frozen=True)
class ColorProfile:
    """An RGB colour space that differs from sRGB, with conversions in both directions."""

    icc: bytes

    def to_srgb(self, values: Tensor) -> Tensor:
        """(N, 3, H, W) in this space -> sRGB, both in [0, 1]; colours outside sRGB are clipped."""
        return _converted(values, self.icc, _srgb())

    def from_srgb(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`to_srgb` for colours within both gamuts; clipped to [0, 1]."""
        return _converted(values, _srgb(), self.icc)


def color_profile(icc: bytes | None) -> ColorProfile | None:
    """The profile when converting is needed and possible, else None (sRGB itself, gray, one direction, damaged)."""
    if icc is None:
        return None
    profile = ColorProfile(icc)
    ramp = torch.linspace(0.0, 1.0, 17)
    corners = torch.stack(torch.meshgrid(ramp, ramp, ramp, indexing="ij")).reshape(1, 3, 17, -1)
    # Little saturated colours, which lie in every gamut: a profile that does not give them back cannot be inverted.
    muted = 0.25 + 0.5 * corners.mean(dim=1, keepdim=True) + 0.1 * corners
    try:
        if (profile.to_srgb(corners) - corners).abs().max() < 1.0 / 255:
            return None  # sRGB under one of its many names
        error = float((profile.from_srgb(profile.to_srgb(muted)) - muted).abs().max())
    except RuntimeError as refusal:  # what imagecodecs raises
        logger.info("colour profile is kept but not applied (%s)", first_line(refusal))
        return None
    if error < _ROUND_TRIP_LIMIT:
        return profile
    logger.info("colour profile is kept but not applied (colours do not come back: off by %.2f)", error)
    return None


def cmyk_or_lab_to_rgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """CMYK or Lab -> 8-bit sRGB, through the embedded profile where there is a usable one."""
    target = ImageCms.createProfile("sRGB")
    try:
        if image.mode == "LAB":
            return _with_pillow(image, ImageCms.createProfile("LAB"), target)
        if icc is not None:
            return _with_pillow(image, ImageCms.ImageCmsProfile(io.BytesIO(icc)), target)
    except (ImageCms.PyCMSError, OSError) as error:
        logger.warning("colour profile cannot be used (%s): converting without it", error)
    return image.convert("RGB")


def _with_pillow(image: Image.Image, source: object, target: object) -> Image.Image:
    result = ImageCms.profileToProfile(image, source, target, outputMode="RGB")  # type: ignore[arg-type]
    assert result is not None
    return result


def _converted(values: Tensor, source: bytes, target: bytes) -> Tensor:
    """(N, 3, H, W) from one RGB space to another, in bands of rows on as many threads as PyTorch uses."""
    rows = values.detach().clamp(0.0, 1.0).permute(0, 2, 3, 1).reshape(-1, values.shape[3], 3)
    bands = [band.to("cpu", torch.float32).contiguous().numpy() for band in torch.split(rows, _BAND_ROWS)]
    with ThreadPoolExecutor(min(torch.get_num_threads(), len(bands))) as threads:
        results = list(threads.map(lambda band: _transformed(band, source, target), bands))
    result = torch.from_numpy(np.concatenate(results)).nan_to_num_().clamp_(0.0, 1.0)
    shape = (values.shape[0], *values.shape[2:], 3)
    return result.reshape(shape).permute(0, 3, 1, 2).to(values.device).contiguous()


def _transformed(samples: NDArray[np.float32], source: bytes, target: bytes) -> NDArray[np.float32]:
    import imagecodecs

    result: NDArray[np.float32] = imagecodecs.cms_transform(
        samples,
        source,
        target,
        colorspace="rgb",
        outcolorspace="rgb",
        outdtype="f4",
        intent=_RELATIVE_COLORIMETRIC,
    )
    return result


def _srgb() -> bytes:
    import imagecodecs

    return imagecodecs.cms_profile("srgb")

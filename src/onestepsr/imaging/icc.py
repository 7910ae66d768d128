"""Colour spaces: RGB profiles to sRGB and back in floating point, CMYK and Lab to sRGB, and profiles for spaces that a
file states otherwise (cICP, gAMA and cHRM, Adobe RGB in EXIF). Little CMS does the arithmetic.

Profiles of a matrix and curves (Display P3, Adobe RGB, ProPhoto, Rec. 2020) and those of tables are treated alike. Gray
profiles, and RGB ones that work in one direction only, are left alone: such images stay in their own space all the way,
with the profile attached.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from onestepsr.core.errors import first_line

if TYPE_CHECKING:
    from torch import Tensor

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
    """The profile when converting is needed and possible; else None: sRGB itself, gray, HDR, one direction, damaged."""
    if icc is None or is_hdr_profile(icc):
        return None
    import torch

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


# ---- Colour spaces that are stated without a profile ----

_D65, _DCI_WHITE, _C = (0.3127, 0.3290), (0.314, 0.351), (0.310, 0.316)
_P3 = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
_SRGB = (0.640, 0.330, 0.300, 0.600, 0.150, 0.060)
# Colour primaries of ITU-T H.273: white point, and (x, y) of red, green and blue.
_PRIMARIES = {
    1: (_D65, _SRGB),
    4: (_C, (0.67, 0.33, 0.21, 0.71, 0.14, 0.08)),
    5: (_D65, (0.64, 0.33, 0.29, 0.60, 0.15, 0.06)),
    6: (_D65, (0.630, 0.340, 0.310, 0.595, 0.155, 0.070)),
    7: (_D65, (0.630, 0.340, 0.310, 0.595, 0.155, 0.070)),
    9: (_D65, (0.708, 0.292, 0.170, 0.797, 0.131, 0.046)),
    11: (_DCI_WHITE, _P3),
    12: (_D65, _P3),
}
_SRGB_TRANSFER, _PQ, _HLG = 13, 16, 18
_GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}
_BT709_TRANSFERS = (1, 6, 14, 15)
_CREATED = struct.pack(">6H", 2026, 1, 1, 0, 0, 0)  # fixed: the same input gives the same bytes

Cicp = tuple[int, int, int, int]
"""Coding-independent code points (ITU-T H.273): primaries, transfer, matrix, full range."""


def is_hdr(cicp: Cicp) -> bool:
    """True if samples are coded for HDR (PQ or HLG), for which no profile says the same."""
    return cicp[1] in (_PQ, _HLG)


def is_hdr_profile(icc: bytes | None) -> bool:
    """True if a profile says by its tag ``cicp`` (ICC.1:2022, 9.2.17) that samples are coded for HDR."""
    if icc is None or len(icc) < 132:
        return False
    for index in range(min(int.from_bytes(icc[128:132]), 100)):
        name, offset = struct.unpack_from(">4sI", icc.ljust(132 + 12 * 100, b"\0"), 132 + 12 * index)
        if name == b"cicp":
            return icc[offset + 9 : offset + 10] in (bytes([_PQ]), bytes([_HLG]))
    return False


def cicp_profile(cicp: Cicp) -> bytes | None:
    """An ICC profile of the same colours as ``cicp``; None for sRGB, and where there is no exact one."""
    if cicp[:2] == (1, _SRGB_TRANSFER) or cicp[0] not in _PRIMARIES:
        return None
    white, primaries = _PRIMARIES[cicp[0]]
    if cicp[1] in _GAMMAS:
        return _rgb_profile(white, primaries, gamma=_GAMMAS[cicp[1]])
    x = np.linspace(0.0, 1.0, 1024)
    if cicp[1] == _SRGB_TRANSFER:  # IEC 61966-2-1
        curve = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    elif cicp[1] in _BT709_TRANSFERS:  # ITU-R BT.709, inverted
        curve = np.where(x < 0.081, x / 4.5, ((x + 0.099) / 1.099) ** (1 / 0.45))
    else:
        return None
    return _rgb_profile(white, primaries, transferfunction=(curve * 65535 + 0.5).astype(np.uint16))


def gamma_profile(gamma: float, chromaticities: Sequence[float] | None, gray: bool) -> bytes | None:
    """An ICC profile for a PNG's gAMA and cHRM (white, red, green, blue); None where they are those of sRGB."""
    stated = tuple(chromaticities) if chromaticities and len(chromaticities) == 8 else (*_D65, *_SRGB)
    usual = np.abs(np.subtract(stated, (*_D65, *_SRGB))).max() < 0.005
    if not 0.1 <= gamma <= 2.0 or (abs(gamma - 1 / 2.2) < 0.01 and (usual or gray)):
        return None
    if gray:
        import imagecodecs

        return _dated(imagecodecs.cms_profile("gray", gamma=1 / gamma))
    return _rgb_profile(stated[:2], stated[2:], gamma=1 / gamma)


def adobe_rgb_profile() -> bytes:
    """An ICC profile of Adobe RGB (1998), which cameras state in EXIF only."""
    return _rgb_profile(_D65, (0.64, 0.33, 0.21, 0.71, 0.15, 0.06), gamma=563 / 256)


def _rgb_profile(white: Sequence[float], primaries: Sequence[float], **curve: Any) -> bytes:
    import imagecodecs

    return _dated(imagecodecs.cms_profile("rgb", whitepoint=white, primaries=primaries, **curve))


def _dated(profile: bytes) -> bytes:
    return profile[:24] + _CREATED + profile[36:]


# ---- Little CMS ----


def cmyk_or_lab_to_rgb(image: Image.Image, icc: bytes | None, label: str) -> Image.Image:
    """CMYK or Lab -> 8-bit sRGB, through the embedded profile where there is a usable one."""
    target = ImageCms.createProfile("sRGB")
    try:
        if image.mode == "LAB":
            return _with_pillow(image, ImageCms.createProfile("LAB"), target)
        if icc is not None:
            return _with_pillow(image, ImageCms.ImageCmsProfile(io.BytesIO(icc)), target)
    except (ImageCms.PyCMSError, OSError) as error:
        logger.warning("%s: colour profile cannot be used (%s), converting without it", label, error)
    return image.convert("RGB")


def _with_pillow(image: Image.Image, source: object, target: object) -> Image.Image:
    result = ImageCms.profileToProfile(image, source, target, outputMode="RGB")  # type: ignore[arg-type]
    assert result is not None
    return result


def _converted(values: Tensor, source: bytes, target: bytes) -> Tensor:
    """(N, 3, H, W) from one RGB space to another, in bands of rows on as many threads as PyTorch uses."""
    import torch

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

"""Colour profiles: wide-gamut RGB to sRGB and back in floating point, CMYK and Lab to sRGB.

Nearly every RGB profile in photographs (Display P3, Adobe RGB, ProPhoto, Rec. 2020) is three tone curves and a 3 x 3
matrix. Those are evaluated here in float32, because Pillow's colour management knows 8 bits only. RGB profiles made of
multi-dimensional tables, and gray profiles, are left alone: such images stay in their own space all the way, with the
profile attached.
"""

from __future__ import annotations

import io
import logging
import struct
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from torch import Tensor

logger = logging.getLogger(__name__)

_TABLE_SIZE = 4096
_MAX_TAGS = 200
# sRGB primaries adapted to the D50 white of ICC profiles (columns R, G, B), as in the ICC's own sRGB profiles.
_SRGB_TO_D50 = ((0.4360657, 0.3851471, 0.1430664), (0.2224884, 0.7168732, 0.0606079), (0.0139160, 0.0970764, 0.7140961))


@dataclass(frozen=True)
class MatrixProfile:
    """Three tone curves (3, 4096), sampled evenly over [0, 1], and the matrix (3, 3) from linear RGB to XYZ (D50)."""

    curves: Tensor
    matrix: Tensor

    def to_srgb(self, values: Tensor) -> Tensor:
        """(N, 3, H, W) in this space -> sRGB, both in [0, 1]; colours outside sRGB are clipped."""
        xyz = _mix(self.matrix, self._linear(values))
        return _srgb_encode(_mix(torch.linalg.inv(_srgb_matrix()), xyz).clamp(0.0, 1.0))

    def from_srgb(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`to_srgb` for colours within both gamuts; clipped to [0, 1]."""
        xyz = _mix(_srgb_matrix(), _srgb_decode(values.clamp(0.0, 1.0)))
        return self._encode(_mix(torch.linalg.inv(self.matrix), xyz).clamp(0.0, 1.0))

    def _linear(self, values: Tensor) -> Tensor:
        position = values.clamp(0.0, 1.0) * (_TABLE_SIZE - 1)
        below = position.floor().long().clamp(max=_TABLE_SIZE - 2)
        curves = self.curves.to(values.device)
        planes = [
            torch.lerp(curve[below[:, c]], curve[below[:, c] + 1], position[:, c] - below[:, c])
            for c, curve in enumerate(curves)
        ]
        return torch.stack(planes, dim=1)

    def _encode(self, linear: Tensor) -> Tensor:
        curves = self.curves.to(linear.device)
        planes = [_invert(curve, linear[:, c].contiguous()) for c, curve in enumerate(curves)]
        return torch.stack(planes, dim=1)


def matrix_profile(icc: bytes | None) -> MatrixProfile | None:
    """The parsed profile when converting is needed and possible, else None (sRGB itself, gray, tables, damaged)."""
    if icc is None:
        return None
    try:
        profile = _parse(icc)
    except (struct.error, ValueError, IndexError, KeyError) as error:
        logger.info("colour profile is kept but not applied (%s)", error)
        return None
    ramp = torch.linspace(0.0, 1.0, 17)
    corners = torch.stack(torch.meshgrid(ramp, ramp, ramp, indexing="ij")).reshape(1, 3, 17, -1)
    if (profile.to_srgb(corners) - corners).abs().max() < 1.0 / 255:
        return None  # sRGB under one of its many names
    return profile


def to_rgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """CMYK or Lab -> 8-bit sRGB, through the embedded profile where there is a usable one."""
    target = ImageCms.createProfile("sRGB")
    try:
        if image.mode == "LAB":
            return _converted(image, ImageCms.createProfile("LAB"), target)
        if icc is not None:
            return _converted(image, ImageCms.ImageCmsProfile(io.BytesIO(icc)), target)
    except (ImageCms.PyCMSError, OSError) as error:
        logger.warning("colour profile cannot be used (%s): converting without it", error)
    return image.convert("RGB")


def _converted(image: Image.Image, source: object, target: object) -> Image.Image:
    result = ImageCms.profileToProfile(image, source, target, outputMode="RGB")  # type: ignore[arg-type]
    assert result is not None
    return result


def _parse(icc: bytes) -> MatrixProfile:
    """Read a matrix/TRC profile (ICC.1:2022, 8.3.3); anything else raises."""
    if icc[36:40] != b"acsp" or icc[16:24] != b"RGB XYZ ":
        raise ValueError("not a matrix RGB profile")
    count = struct.unpack_from(">I", icc, 128)[0]
    if count > _MAX_TAGS:
        raise ValueError(f"{count} tags")
    entries = [struct.unpack_from(">4sII", icc, 132 + 12 * index) for index in range(count)]
    tags = {name: icc[offset : offset + size] for name, offset, size in entries}
    if b"A2B0" in tags or b"A2B1" in tags:
        raise ValueError("made of tables")
    columns = [[v / 65536 for v in struct.unpack_from(">3i", tags[name], 8)] for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
    matrix = torch.tensor(columns, dtype=torch.float32).T.contiguous()
    if matrix.det().abs() < 1e-6:
        raise ValueError("its matrix has no inverse")
    curves = np.stack([_parse_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")])
    return MatrixProfile(torch.from_numpy(curves.astype(np.float32)), matrix)


def _parse_curve(tag: bytes) -> NDArray[np.float64]:
    """Sample a tone curve, made monotone so that it can be inverted (ICC.1:2022, 10.6 and 10.18)."""
    x = np.linspace(0.0, 1.0, _TABLE_SIZE)
    if tag[:4] == b"curv":
        count = struct.unpack_from(">I", tag, 8)[0]
        if count == 0:
            values = x
        elif count == 1:
            values = x ** (struct.unpack_from(">H", tag, 12)[0] / 256)
        else:
            table = np.frombuffer(tag, ">u2", count, 12) / 65535
            values = np.interp(x, np.linspace(0.0, 1.0, count), table)
    elif tag[:4] == b"para":
        values = _parametric(x, struct.unpack_from(">H", tag, 8)[0], tag)
    else:
        raise ValueError(f"tone curve of kind {tag[:4]!r}")
    if not np.isfinite(values).all() or values[-1] - values[0] < 0.1:
        raise ValueError("tone curve does not rise")
    return np.maximum.accumulate(values.clip(0.0, 1.0))


def _parametric(x: NDArray[np.float64], kind: int, tag: bytes) -> NDArray[np.float64]:
    names = ("g", "gab", "gabc", "gabcd", "gabcdef")[kind]
    fixed = dict(zip(names, (v / 65536 for v in struct.unpack_from(f">{len(names)}i", tag, 12)), strict=True))
    g, a, b = fixed["g"], fixed.get("a", 1.0), fixed.get("b", 0.0)
    with np.errstate(all="ignore"):  # a damaged exponent: the caller looks for finite values
        power: NDArray[np.float64] = np.maximum(a * x + b, 0.0) ** g
    if kind == 0:
        return power
    if kind in (1, 2):  # below -b/a the curve is the constant c
        c = fixed.get("c", 0.0)
        return np.asarray(np.where(a * x + b >= 0.0, power + c, c))
    e, f = fixed.get("e", 0.0), fixed.get("f", 0.0)
    return np.asarray(np.where(x >= fixed["d"], power + e, fixed["c"] * x + f))


def _invert(curve: Tensor, values: Tensor) -> Tensor:
    above = torch.searchsorted(curve, values).clamp(1, _TABLE_SIZE - 1)
    low, high = curve[above - 1], curve[above]
    share = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0.0, 1.0)
    return (above - 1 + share) / (_TABLE_SIZE - 1)


def _mix(matrix: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("oc,nchw->nohw", matrix.to(values.device), values)


def _srgb_matrix() -> Tensor:
    return torch.tensor(_SRGB_TO_D50)


def _srgb_encode(linear: Tensor) -> Tensor:
    """Linear light -> sRGB (IEC 61966-2-1)."""
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)


def _srgb_decode(encoded: Tensor) -> Tensor:
    """Encoded sRGB -> linear light (IEC 61966-2-1)."""
    return torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)

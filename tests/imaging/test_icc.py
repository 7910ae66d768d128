"""Colour profiles: against Little CMS, there and back, and the ones that are left alone."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from onestepsr.imaging.icc import matrix_profile
from onestepsr.imaging.read import read_image

# Columns (R, G, B) in XYZ relative to D50, from the published primaries of each space.
DISPLAY_P3 = ((0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407))
ADOBE_RGB = ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457))
SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + struct.pack(
    ">5i", *(round(v * 65536) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
)
GAMMA_22 = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.19921875 * 256)) + b"\0\0"
TABLE = b"curv\0\0\0\0" + struct.pack(">I", 1024) + (np.linspace(0, 1, 1024) ** 1.8 * 65535).astype(">u2").tobytes()


def matrix_icc(columns: tuple, curve: bytes) -> bytes:
    """A version 4 display profile of three curves and a matrix."""
    triple = np.array(columns).T
    xyz = [b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in column)) for column in triple]
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    text = b"mluc\0\0\0\0" + struct.pack(">IIHHII", 1, 12, 0x656E, 0x5553, 2, 28) + "x".encode("utf-16-be") + b"\0\0"
    tags = [(b"desc", text), (b"cprt", text), (b"wtpt", white), (b"rXYZ", xyz[0]), (b"gXYZ", xyz[1]), (b"bXYZ", xyz[2])]
    tags += [(b"rTRC", curve), (b"gTRC", curve), (b"bTRC", curve)]
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags:
        table += struct.pack(">4sII", name, offset + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"\0\0\0\0", 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


@pytest.mark.parametrize(("columns", "curve"), [(DISPLAY_P3, SRGB_CURVE), (ADOBE_RGB, GAMMA_22), (ADOBE_RGB, TABLE)])
def test_to_srgb_equals_little_cms(columns: tuple, curve: bytes) -> None:
    icc = matrix_icc(columns, curve)
    profile = matrix_profile(icc)
    assert profile is not None
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    samples = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    source, target = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
    expected = np.asarray(
        ImageCms.profileToProfile(
            Image.fromarray(samples), source, target, renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC
        )
    )
    values = torch.from_numpy(samples.astype(np.float32) / 255).permute(2, 0, 1)[None]
    ours = profile.to_srgb(values)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(ours - expected).max() < 2.5
    assert np.abs(ours - expected).mean() < 0.4


@pytest.mark.parametrize("columns", [DISPLAY_P3, ADOBE_RGB])
def test_colours_within_srgb_come_back(columns: tuple) -> None:
    profile = matrix_profile(matrix_icc(columns, GAMMA_22))
    assert profile is not None
    srgb = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert (profile.to_srgb(profile.from_srgb(srgb)) - srgb).abs().max() < 2e-4


def test_profiles_that_are_left_alone() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    good = matrix_icc(ADOBE_RGB, GAMMA_22)
    for icc in (
        None,
        srgb,
        b"",
        b"junk" * 100,
        good[:300],
        good.replace(b"curv", b"cxrv"),
        good.replace(b"acsp", b"acsq"),
    ):
        assert matrix_profile(icc) is None


def test_damaged_profiles_never_raise() -> None:
    good = bytearray(matrix_icc(DISPLAY_P3, SRGB_CURVE))
    rng = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        bad[int(rng.integers(len(bad)))] = int(rng.integers(256))
        matrix_profile(bytes(bad))


def test_cmyk_profile_that_cannot_be_used_is_no_obstacle(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.BytesIO()
    Image.new("CMYK", (3, 3), (255, 0, 0, 0)).save(stream, "TIFF", icc_profile=matrix_icc(ADOBE_RGB, GAMMA_22))
    image = read_image(stream.getvalue())
    assert image.icc is None
    assert image.pixels[0, 0].tolist() == [0, 255, 255]
    assert "converting without it" in caplog.text

"""Colour profiles: against Little CMS, there and back, and the ones that are left alone."""

from __future__ import annotations

import io
import struct

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from onestepsr.imaging.icc import color_profile
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
    profile = color_profile(icc)
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
    profile = color_profile(matrix_icc(columns, GAMMA_22))
    assert profile is not None
    srgb = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert (profile.to_srgb(profile.from_srgb(srgb)) - srgb).abs().max() < 2e-4


def table_icc(columns: tuple, tags: tuple[bytes, ...] = (b"A2B0", b"B2A0")) -> bytes:
    """A version 2 display profile of tables (lut16Type) between RGB and Lab, sampled from one of a matrix."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    rgb = matrix_icc(columns, GAMMA_22)
    ramp = np.linspace(0, 1, 33, dtype=np.float32)
    grid = np.stack(np.meshgrid(ramp, ramp, ramp, indexing="ij"), axis=-1).reshape(33, -1, 3)
    spaces = {"colorspace": "rgb", "outcolorspace": "lab", "outdtype": "f4", "intent": 1}
    colours = imagecodecs.cms_transform(grid, rgb, lab, **spaces)
    to_lab = (colours * (655.36 * 255 / 257 * 257 / 256, 256, 256) + (0, 32768, 32768)).clip(0, 65535)
    from_lab = imagecodecs.cms_transform(
        (grid * 65535 / 256 * (100 / 255, 1, 1) - (0, 128, 128)).astype(np.float32),
        lab,
        rgb,
        **{**spaces, "colorspace": "lab", "outcolorspace": "rgb"},
    )
    body = b"".join(struct.pack(">2H", 0, 65535) for _ in range(3))
    head = b"mft2\0\0\0\0" + bytes([3, 3, 33, 0]) + struct.pack(">9i", *(np.eye(3, dtype=int).ravel() * 65536).tolist())
    tables = {b"A2B0": to_lab, b"B2A0": from_lab.clip(0, 1) * 65535}
    entries, data = b"", b""
    for name in tags:
        lut = head + struct.pack(">2H", 2, 2) + body + tables[name].round().astype(">u2").tobytes() + body
        entries += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(data), len(lut))
        data += lut
    front = struct.pack(">I4sI4s4s4s", 132 + len(entries) + len(data), b"\0" * 4, 0x02400000, b"mntr", b"RGB ", b"Lab ")
    front += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061)
    return front.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + data


def test_profiles_of_tables_are_applied_in_both_directions() -> None:
    profile, expected = color_profile(table_icc(ADOBE_RGB)), color_profile(matrix_icc(ADOBE_RGB, GAMMA_22))
    assert profile is not None
    assert expected is not None
    values = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    assert (profile.to_srgb(values) - expected.to_srgb(values)).abs().mean() < 0.005
    srgb = 0.5 + (values - 0.5) * 0.5
    assert (profile.from_srgb(srgb) - expected.from_srgb(srgb)).abs().mean() < 0.005


def test_a_profile_of_one_direction_is_left_alone() -> None:
    assert color_profile(table_icc(ADOBE_RGB, tags=(b"A2B0",))) is None


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
        assert color_profile(icc) is None


def test_damaged_profiles_never_raise() -> None:
    good = bytearray(matrix_icc(DISPLAY_P3, SRGB_CURVE))
    rng = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        bad[int(rng.integers(len(bad)))] = int(rng.integers(256))
        color_profile(bytes(bad))


def test_cmyk_profile_that_cannot_be_used_is_no_obstacle(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.BytesIO()
    Image.new("CMYK", (3, 3), (255, 0, 0, 0)).save(stream, "TIFF", icc_profile=matrix_icc(ADOBE_RGB, GAMMA_22))
    image = read_image(stream.getvalue())
    assert image.icc is None
    assert image.pixels[0, 0].tolist() == [0, 255, 255]
    assert "converting without it" in caplog.text

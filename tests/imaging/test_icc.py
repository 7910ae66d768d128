"""Colour profiles: against Little CMS, there and back, and the ones that are left alone."""

from __future__ import annotations

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from onestepsr.imaging.icc import cicp_profile, color_profile
from onestepsr.imaging.read import LoadedImage, read_image, samples_to_tensor
from onestepsr.imaging.write import encode_image

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
    for _ in range(60):
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


# ---- Colours that a file states without a profile ----


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(chunks: bytes, samples: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(samples).save(stream, "PNG")
    data = stream.getvalue()
    return data[:33] + chunks + data[33:]


COLOURS = np.random.default_rng(1).integers(20, 236, (8, 9, 3), dtype=np.uint8)


def in_srgb(image: LoadedImage) -> np.ndarray:
    """The colours of an image, whatever its profile, in sRGB from 0 to 1."""
    values = samples_to_tensor(image.pixels)
    profile = color_profile(image.icc)
    return (values if profile is None else profile.to_srgb(values)).numpy()


def test_display_p3_of_a_cicp_chunk_is_the_profile_of_display_p3() -> None:
    image = read_image(png_with(chunk(b"cICP", bytes([12, 13, 0, 1])), COLOURS))
    expected = color_profile(matrix_icc(DISPLAY_P3, SRGB_CURVE))
    assert expected is not None
    assert np.abs(in_srgb(image) - expected.to_srgb(samples_to_tensor(COLOURS)).numpy()).max() < 2e-3
    written = encode_image(image, "png")
    assert chunk(b"cICP", bytes([12, 13, 0, 1])) in written
    for kind in ("png", "jpeg", "webp", "tiff", "avif"):
        assert read_image(encode_image(image, kind)).icc == image.icc


def test_srgb_in_other_words_needs_no_profile() -> None:
    gamma, primaries = chunk(b"gAMA", struct.pack(">I", 45455)), (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    for stated in (
        gamma,
        gamma + chunk(b"cHRM", struct.pack(">8I", *primaries)),
        chunk(b"cICP", bytes([1, 13, 0, 1])),
        chunk(b"sRGB", b"\0") + chunk(b"gAMA", struct.pack(">I", 100_000)),
    ):
        image = read_image(png_with(stated, COLOURS))
        assert (image.icc, image.cicp) == (None, None)


def test_gamma_and_chromaticities_become_a_profile() -> None:
    linear = read_image(png_with(chunk(b"gAMA", struct.pack(">I", 100_000)), COLOURS))
    x = COLOURS / 255
    expected = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    assert np.abs(in_srgb(linear)[0].transpose(1, 2, 0) - expected).max() < 2e-3
    adobe = chunk(b"gAMA", struct.pack(">I", 45470)) + chunk(
        b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
    )
    image = read_image(png_with(adobe, COLOURS))
    profile = color_profile(matrix_icc(ADOBE_RGB, GAMMA_22))
    assert profile is not None
    assert np.abs(in_srgb(image) - profile.to_srgb(samples_to_tensor(COLOURS)).numpy()).max() < 5e-3
    gray = read_image(png_with(chunk(b"gAMA", struct.pack(">I", 100_000)), COLOURS[..., 0]))
    assert gray.gray
    assert gray.icc is not None
    assert read_image(encode_image(gray, "png")).icc == gray.icc


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_samples_stay_and_keep_their_tag(transfer: int, caplog: pytest.LogCaptureFixture) -> None:
    tag = chunk(b"cICP", bytes([9, transfer, 0, 1]))
    deep = encode_image(LoadedImage(pixels=COLOURS.astype(np.uint16) * 257), "png")
    image = read_image(deep[:33] + tag + deep[33:], "hdr.png")
    assert "hdr.png: HDR samples (PQ or HLG)" in caplog.text
    written = encode_image(image, "png")
    assert tag in written
    assert np.array_equal(read_image(written).pixels, image.pixels)
    assert image.icc is None
    encode_image(image, "jpeg")
    assert "JPEG is not told of the HDR coding" in caplog.text


def test_a_profile_wins_over_other_statements() -> None:
    stream, icc = io.BytesIO(), matrix_icc(ADOBE_RGB, GAMMA_22)
    Image.fromarray(COLOURS).save(stream, "PNG", icc_profile=icc)
    data = stream.getvalue()
    assert read_image(data[:33] + chunk(b"gAMA", struct.pack(">I", 100_000)) + data[33:]).icc == icc


def test_code_points_of_a_png_come_before_its_profile() -> None:
    stream = io.BytesIO()
    Image.fromarray(COLOURS).save(stream, "PNG", icc_profile=matrix_icc(ADOBE_RGB, GAMMA_22))
    data = stream.getvalue()
    p3, pq = (read_image(data[:33] + chunk(b"cICP", bytes([9 + 3 * (t == 13), t, 0, 1])) + data[33:]) for t in (13, 16))
    assert p3.icc == cicp_profile((12, 13, 0, 1))
    assert (pq.icc, pq.cicp) == (None, (9, 16, 0, 1))


def test_a_profile_that_codes_for_hdr_is_kept_and_not_applied() -> None:
    plain = matrix_icc(ADOBE_RGB, GAMMA_22)
    assert color_profile(plain) is not None
    tag = b"cicp\0\0\0\0" + bytes([9, 16, 0, 1])
    place = plain.index(b"cprt")  # its text is not needed
    hdr = plain[:place] + b"cicp" + struct.pack(">II", len(plain), len(tag)) + plain[place + 12 :] + tag
    assert color_profile(hdr) is None
    assert color_profile(b"\0" * 128 + b"\xff" * 40) is None


def test_adobe_rgb_that_only_exif_states() -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: "R03"}
    stream = io.BytesIO()
    Image.fromarray(COLOURS).save(stream, "JPEG", exif=exif.tobytes())
    profile, expected = color_profile(read_image(stream.getvalue()).icc), color_profile(matrix_icc(ADOBE_RGB, GAMMA_22))
    assert profile is not None
    assert expected is not None
    values = samples_to_tensor(COLOURS)
    assert (profile.to_srgb(values) - expected.to_srgb(values)).abs().max() < 5e-3


def test_profiles_made_here_are_the_same_at_any_time() -> None:
    first = cicp_profile((9, 1, 0, 1))
    assert first == cicp_profile((9, 1, 0, 1))
    assert first is not None
    assert first[24:36] == struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    for unknown in ((2, 13, 0, 1), (9, 16, 0, 1), (1, 13, 0, 1), (250, 13, 0, 1)):
        assert cicp_profile(unknown) is None

"""Reading: every mode, orientation, metadata, limits and damage."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps

from onestepsr.core.errors import UserError
from onestepsr.imaging.metadata import exif_block
from onestepsr.imaging.read import (
    LoadedImage,
    from_array,
    from_pil,
    read_image,
    samples_to_tensor,
    tensor_to_samples,
    to_eight_bits,
    to_pil,
)

RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(more)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_rgb_of_lossless_formats_is_read_exactly(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = read_image(encoded(Image.fromarray(RGB), kind, **options))
    assert np.array_equal(image.pixels, RGB)
    assert image.alpha is None
    assert image.lossless
    assert image.format == kind.lower()


def test_jpeg_is_near_and_marked_lossy() -> None:
    smooth = np.linspace(0, 255, 32 * 48 * 3).reshape(32, 48, 3).astype(np.uint8)
    image = read_image(encoded(Image.fromarray(smooth), "JPEG", quality=95))
    assert np.abs(image.pixels.astype(int) - smooth).max() < 12
    assert (image.format, image.lossless) == ("jpeg", False)


def test_one_bit_and_gray_stay_one_channel() -> None:
    bits = RNG.integers(0, 2, (5, 11)).astype(bool)
    image = read_image(encoded(Image.fromarray(bits)))
    assert np.array_equal(image.pixels[..., 0], bits * np.uint8(255))
    assert read_image(encoded(Image.fromarray(RGB[..., 0]))).gray


def test_palette_with_transparent_entry() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    plain = read_image(encoded(image))
    assert plain.pixels.tolist() == [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]
    assert plain.alpha is None
    keyed = read_image(encoded(image, transparency=1))
    assert keyed.alpha is not None
    assert keyed.alpha.tolist() == [[255, 0], [255, 0]]


def test_alpha_of_rgba_la_and_colour_key() -> None:
    alpha = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    rgba = read_image(encoded(Image.fromarray(np.dstack([RGB, alpha]))))
    assert np.array_equal(rgba.pixels, RGB)
    assert np.array_equal(rgba.alpha, alpha)
    la = read_image(encoded(Image.fromarray(np.dstack([RGB[..., 0], alpha]))))
    assert la.gray
    assert np.array_equal(la.alpha, alpha)
    keyed = read_image(encoded(Image.fromarray(RGB), transparency=tuple(int(v) for v in RGB[2, 3])))
    assert keyed.alpha is not None
    assert keyed.alpha[2, 3] == 0
    assert keyed.alpha.sum() == 255 * (6 * 9 - 1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_gray_is_one_of_the_files_own_depth(bits: int) -> None:
    values = list(range(min(2**bits, 16)))
    line = "".join(f"{value:0{bits}b}" for value in values)
    packed = int(line.ljust(-(-len(line) // 8) * 8, "0"), 2).to_bytes(-(-len(line) // 8), "big")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(b"\0" + packed)) + chunk(b"IEND", b"")
    for key in values:
        high = 0xFF00 if bits > 1 and key % 2 else 0  # bits beyond the depth mean nothing; of one bit Pillow reads all
        image = read_image(b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", struct.pack(">H", key | high)) + end)
        assert image.pixels[0, :, 0].tolist() == [value * (255 // (2**bits - 1)) for value in values]
        assert image.alpha is not None
        assert image.alpha.tolist() == [[255 * (value != key) for value in values]]


def test_cmyk_becomes_rgb() -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        red = read_image(encoded(cmyk, kind)).pixels.reshape(-1, 3).mean(axis=0)
        assert red[0] > 230
        assert red[1:].max() < 25


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "quarters"), [(1, 0), (3, 2), (6, -1)])
def test_transparency_is_turned_with_the_colours(orientation: int, quarters: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    samples = np.random.default_rng(0).integers(0, 256, (3, 5, 4), dtype=np.uint8)
    samples[..., 3] |= 1  # WebP may change colours that are not seen
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = read_image(encoded(Image.fromarray(samples), file_format, exif=exif, **options))
    assert image.alpha is not None
    assert np.array_equal(np.dstack([image.pixels, image.alpha]), np.rot90(samples, quarters))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_reset_with_the_rest_kept(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Maker"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.LensModel] = "Lens"
    data = encoded(Image.fromarray(RGB), exif=exif.tobytes())
    image = read_image(data)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(image.pixels, np.asarray(expected))
    kept = Image.Exif()
    assert image.exif is not None
    kept.load(image.exif)
    assert (kept[ExifTags.Base.Orientation], kept[ExifTags.Base.Make]) == (1, "Maker")
    assert kept.get_ifd(ExifTags.IFD.GPSInfo)[1] == "N"
    assert kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.LensModel] == "Lens"


def test_xmp_profile_and_resolution_are_kept() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    image = read_image(encoded(Image.fromarray(RGB), "JPEG", xmp=xmp, icc_profile=b"profile", dpi=(300, 150)))
    assert image.xmp == xmp.replace(b'"6"', b'"1"')
    assert image.icc == b"profile"
    assert image.dpi == (300, 150)


def test_first_frame_of_an_animation_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    with caplog.at_level(logging.WARNING):
        image = read_image(encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), "moving.png")
    assert image.pixels[0, 0].tolist() == [255, 0, 0]
    assert "moving.png: has 2 frames" in caplog.text


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (png_header(20_000, 20_000), "400,000,000 pixels"),
        (b"", "empty (0 bytes)"),
        (b"hello, I am text", "a text file is not supported"),
        (b"\x89PNG\r\n\x1a\n", "truncated or damaged PNG file"),
        (png_header(40_000, 40_000), "1,600,000,000 pixels, the limit is 250,000,000"),
        (
            encoded(Image.new("F", (3, 3)), "TIFF"),
            "TIFF samples of 32 bits in floating point are not supported; accepted: whole numbers",
        ),
        (encoded(Image.new("I", (3, 3), -5), "TIFF"), "32-bit samples from -5 to -5, beyond 0 to 65535; accepted: "),
        (encoded(Image.new("I", (3, 3), 70_000), "TIFF"), "32-bit samples from 70000 to 70000, beyond"),
    ],
    ids=["large", "empty", "text", "signature", "huge", "float", "negative", "large numbers"],
)
def test_bad_inputs_are_one_line_that_names_the_file(data: bytes, part: str) -> None:
    with pytest.raises(UserError) as caught:
        read_image(data, "bad.bin")
    assert str(caught.value).startswith("bad.bin: ")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
def test_every_truncation_is_a_user_error(kind: str) -> None:
    noise = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(UserError, match=r"cut\.x: "):
            read_image(whole[: int(len(whole) * share)], "cut.x")


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP"]), st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_byte_gives_a_image_or_a_user_error(kind: str, position: int, change: int) -> None:
    data = bytearray(encoded(Image.fromarray(RGB), kind))
    data[position % len(data)] ^= change
    try:
        image = read_image(bytes(data), max_pixels=10_000)
    except UserError:
        return
    assert image.width * image.height <= 10_000


def test_compressed_text_bomb_is_refused_or_ignored() -> None:
    bomb = b"Comment\0\0" + zlib.compress(b"\0" * 80_000_000)
    data = png_header(4, 4, chunk(b"zTXt", bomb), chunk(b"iCCP", b"icc\0\0" + bomb[9:]))
    try:
        image = read_image(data)
    except UserError:
        return
    assert image.icc is None


def test_missing_folder_and_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"none\.png: cannot be read"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path)
    monkeypatch.setattr("onestepsr.imaging.read.MAX_BYTES", 10)
    (tmp_path / "big.png").write_bytes(encoded(Image.fromarray(RGB)))
    with pytest.raises(UserError, match="more than the limit of 10"):
        read_image(tmp_path / "big.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_samples_survive_the_tensor_exactly(dtype: type) -> None:
    values = np.arange(np.iinfo(dtype).max + 1, dtype=dtype).reshape(-1, 256, 1)
    tensor = samples_to_tensor(values)
    assert (float(tensor.min()), float(tensor.max())) == (0.0, 1.0)
    assert np.array_equal(tensor_to_samples(tensor, dtype), values)


def test_tensor_rounds_to_nearest_and_clamps() -> None:
    values = torch.tensor([-1.0, 0.49 / 255, 0.51 / 255, 1.5]).reshape(1, 1, 1, 4)
    assert tensor_to_samples(values, np.uint8).ravel().tolist() == [0, 0, 1, 255]


def test_sixteen_to_eight_bits_rounds_to_nearest() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    narrow = to_eight_bits(LoadedImage(pixels=values)).pixels
    assert np.array_equal(narrow, np.floor(values / 257 + 0.5))


def test_pil_and_arrays_in_and_out() -> None:
    alpha = RGB[..., :1]
    for samples in (
        RGB,
        RGB[..., 0],
        np.concatenate([RGB, alpha], axis=2),
        np.concatenate([RGB[..., :1], alpha], axis=2),
    ):
        assert np.array_equal(np.asarray(to_pil(from_array(samples))), samples)
        assert np.array_equal(from_pil(Image.fromarray(samples)).pixels, from_array(samples).pixels)
    with pytest.raises(UserError, match="float64"):
        from_array(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="alpha"):
        LoadedImage(pixels=RGB, alpha=RGB[:2, :, 0])


def test_a_pillow_image_keeps_its_own_exif() -> None:
    image = Image.new("RGB", (6, 4), (10, 20, 30))
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6
    sizes = [from_pil(image).pixels.shape[:2] for _ in range(2)]
    assert sizes == [(6, 4), (6, 4)]
    assert image.getexif()[ExifTags.Base.Orientation] == 6


@pytest.mark.parametrize("lossless", [True, False])
def test_a_large_profile_does_not_hide_how_a_webp_was_written(lossless: bool) -> None:
    stream = io.BytesIO()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(9_000)
    Image.new("RGB", (6, 4), (10, 20, 30)).save(stream, "WEBP", lossless=lossless, icc_profile=profile)
    assert read_image(stream.getvalue(), "a.webp").lossless == lossless


def test_layers_and_georeference_of_the_old_size_stay_behind() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist], exif[37724], exif[33550] = "me", b"layers", (10.0, 10.0, 0.0)
    block = exif_block(exif, "a")
    assert block is not None
    again = Image.Exif()
    again.load(block)
    assert again[ExifTags.Base.Artist] == "me"
    assert {37724, 33550}.isdisjoint(again)
    assert 37724 in exif

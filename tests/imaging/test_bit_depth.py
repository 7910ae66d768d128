"""Sixteen bits per channel: exact reading and writing."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, TiffImagePlugin

from onestepsr.core.errors import UserError
from onestepsr.imaging.read import LoadedImage, read_image
from onestepsr.imaging.write import write_image

RNG = np.random.default_rng(3)


def deep(channels: int, height: int = 70, width: int = 33) -> np.ndarray:
    smooth = np.linspace(0, 60_000, height * width * channels).reshape(height, width, channels)
    return (smooth + RNG.integers(0, 5_000, smooth.shape)).astype(np.uint16)


def deep_image(channels: int) -> LoadedImage:
    samples = deep(channels)
    if channels in (2, 4):
        return LoadedImage(pixels=samples[..., :-1].copy(), alpha=samples[..., -1].copy())
    return LoadedImage(pixels=samples)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_written_samples_are_read_back_exactly(tmp_path: Path, channels: int, ending: str) -> None:
    image = deep_image(channels)
    write_image(image, tmp_path / f"deep{ending}")
    again = read_image(tmp_path / f"deep{ending}")
    assert again.pixels.dtype == np.uint16
    expected = image.pixels if again.gray or not image.gray else image.pixels.repeat(3, axis=2)
    assert np.array_equal(again.pixels, expected)
    assert (again.alpha is None) == (image.alpha is None)
    if image.alpha is not None:
        assert np.array_equal(again.alpha, image.alpha)


def test_written_png_is_what_pillow_sees_in_eight_bits_and_compresses(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    image = LoadedImage(pixels=np.linspace(0, 65535, 100 * 90 * 3).astype(np.uint16).reshape(100, 90, 3))
    write_image(image, path)
    with Image.open(path) as opened:
        opened.verify()
    assert np.array_equal(np.asarray(Image.open(path)), image.pixels >> 8)
    assert path.stat().st_size < image.pixels.nbytes / 4


def tiff_bytes(samples: np.ndarray, order: str, photometric: int, compression: int = 1) -> bytes:
    """A minimal one-strip TIFF in either byte order."""
    height, width, channels = samples.shape
    data = samples.astype(order + "u2").tobytes()
    data = zlib.compress(data) if compression == 8 else data
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, None), (259, 3, 1, compression)]
    entries += [(262, 3, 1, photometric), (273, 4, 1, 0), (277, 3, 1, channels), (278, 3, 1, height)]
    entries += [(279, 4, 1, len(data)), (284, 3, 1, 1)] + ([(338, 3, 1, 2)] if channels == 4 else [])
    bits_at = 8 + 2 + 12 * len(entries) + 4
    out = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(entries))
    for tag, kind, count, value in entries:
        if tag == 258:
            out += struct.pack(order + "HHI", tag, kind, count) + (
                struct.pack(order + "HH", 16, 0) if channels == 1 else struct.pack(order + "I", bits_at)
            )
            continue
        number = bits_at + 2 * channels if tag == 273 else value
        packed = struct.pack(order + "HH", number, 0) if kind == 3 else struct.pack(order + "I", number)
        out += struct.pack(order + "HHI", tag, kind, count) + packed
    return out + b"\0\0\0\0" + struct.pack(f"{order}{channels}H", *[16] * channels) + data


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_foreign_tiffs_of_both_byte_orders(order: str, compression: int, channels: int) -> None:
    samples = deep(channels, 9, 7)
    image = read_image(tiff_bytes(samples, order, 1 if channels == 1 else 2, compression))
    assert np.array_equal(image.pixels, samples[..., :3])
    if channels == 4:
        assert np.array_equal(image.alpha, samples[..., 3])


def test_white_is_zero_is_turned_around() -> None:
    samples = deep(1, 5, 4)
    assert np.array_equal(read_image(tiff_bytes(samples, "<", 0)).pixels, 65535 - samples)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_interlaced_deep_png() -> None:
    samples = deep(3, 9, 13)
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))  # Adam7
    rows = [row for top, left, down, across in starts for row in samples[top::down, left::across]]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 13, 9, 16, 2, 0, 0, 1))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)))
    assert np.array_equal(read_image(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")).pixels, samples)


def test_colour_key_of_a_deep_png() -> None:
    samples = deep(3, 1, 6)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 1, 16, 2, 0, 0, 0))
    key = chunk(b"tRNS", samples[0, 2].astype(">u2").tobytes())
    body = chunk(b"IDAT", zlib.compress(b"\0" + samples.astype(">u2").tobytes()))
    image = read_image(b"\x89PNG\r\n\x1a\n" + header + key + body + chunk(b"IEND", b""))
    assert np.array_equal(image.pixels, samples)
    assert image.alpha is not None
    assert image.alpha.tolist() == [[65535, 65535, 0, 65535, 65535, 65535]]


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_metadata_of_deep_files(tmp_path: Path, ending: str, channels: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] = 1
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    image = LoadedImage(
        pixels=deep(channels), icc=b"profile!", exif=exif.tobytes(), xmp=b"<x:xmpmeta/>", dpi=(300.0, 300.0)
    )
    write_image(image, tmp_path / f"a{ending}")
    again = read_image(tmp_path / f"a{ending}")
    assert np.array_equal(again.pixels, image.pixels)
    assert (again.icc, again.xmp) == (image.icc, image.xmp)
    assert again.dpi == pytest.approx((300, 300), abs=0.1)
    kept = Image.open(io.BytesIO((tmp_path / f"a{ending}").read_bytes())).getexif()
    assert kept[ExifTags.Base.Make] == "Maker"
    assert kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] == image.width
    assert kept.get_ifd(ExifTags.IFD.GPSInfo)[1] == "N"


@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_sixteen_bits_in_tiles_and_separate_planes(tile: tuple[int, int] | None, planar: str) -> None:
    samples, stream = deep(3, 20, 30), io.BytesIO()
    stored = samples if planar == "contig" else np.moveaxis(samples, 2, 0)
    tifffile.imwrite(stream, stored, photometric="rgb", planarconfig=planar, tile=tile, compression="zlib")
    assert np.array_equal(read_image(stream.getvalue()).pixels, samples)


def test_associated_alpha_is_divided_out() -> None:
    alpha = np.array([[65535, 32768, 1, 0]], np.uint16)
    stored = np.dstack([np.minimum(np.full((1, 4), 16384, np.uint16), alpha)] * 3 + [alpha])
    stream = io.BytesIO()
    tifffile.imwrite(stream, stored, photometric="rgb", extrasamples=["assocalpha"])
    image = read_image(stream.getvalue())
    assert np.array_equal(image.alpha, alpha)
    assert image.pixels[0, :, 0].tolist() == [16384, 32768, 65535, 0]


def test_channels_that_are_no_alpha_are_dropped_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    samples, stream = deep(4, 5, 6), io.BytesIO()
    tifffile.imwrite(stream, samples, photometric="rgb", extrasamples=["unspecified"])
    image = read_image(stream.getvalue(), "infrared.tif")
    assert np.array_equal(image.pixels, samples[..., :3])
    assert image.alpha is None
    assert "infrared.tif: 1 of 4 channels are dropped" in caplog.text


@pytest.mark.parametrize("order", ["<", ">"])
def test_metadata_of_big_tiffs(tmp_path: Path, order: str) -> None:
    stream = io.BytesIO()
    options = {"iccprofile": b"profile!", "resolution": (300, 300), "resolutionunit": "inch"}
    tifffile.imwrite(
        stream, deep(3, 5, 6), byteorder=order, bigtiff=True, **options, extratags=[(271, "s", 6, "Maker", True)]
    )
    write_image(read_image(stream.getvalue()), tmp_path / "a.jpg")
    again = read_image(tmp_path / "a.jpg")
    assert (again.icc, again.dpi) == (b"profile!", (300, 300))
    make = Image.open(tmp_path / "a.jpg").getexif().get(ExifTags.Base.Make)
    assert make == ("Maker" if order == "<" else None)  # Pillow does not read a BigTIFF of the other byte order


def test_a_png_of_sixteen_bits_is_no_wider_than_its_library_writes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.png: 1000001 x 1 pixels, but a PNG of 16 bits holds at most 1,000,000"):
        write_image(LoadedImage(pixels=np.zeros((1, 1_000_001, 1), np.uint16)), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_deep_images_are_as_large_as_the_limit_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(deep_image(3), tmp_path / "deep.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert read_image(tmp_path / "deep.png").pixels.dtype == np.uint16


def twelve_bit_tiff(samples: np.ndarray, *, bits: int = 12, kind: int = 1, compression: int = 1) -> bytes:
    """A TIFF of (H, W, C) samples packed without gaps, each row in whole bytes."""
    height, width, channels = samples.shape
    rows = ["".join(f"{int(value) & (1 << bits) - 1:0{bits}b}" for value in row.ravel()) for row in samples]
    data = b"".join(int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)
    data = zlib.compress(data) if compression == 8 else data
    directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\0\0\0\0")
    entries = {256: width, 257: height, 258: (bits,) * channels, 259: compression, 262: 1 if channels == 1 else 2}
    for tag, value in {**entries, 273: 0, 277: channels, 278: height, 279: len(data), 339: (kind,) * channels}.items():
        directory[tag] = value
    directory.tagtype[273] = 4
    return struct.pack("<2sHI", b"II", 42, 8) + directory.tobytes(8) + data


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("compression", [1, 8])
def test_twelve_bits_fill_the_range(compression: int, channels: int) -> None:
    samples = np.arange(4096)[RNG.permutation(4096)][:4095].reshape(-1, 13, channels)  # odd: half a byte is left
    image = read_image(twelve_bit_tiff(samples, compression=compression))
    assert image.pixels.dtype == np.uint16
    assert np.array_equal(image.pixels, np.floor(samples * (65535 / 4095) + 0.5))


@pytest.mark.parametrize(
    ("channels", "bits", "kind", "message"),
    [
        (3, 32, 1, r"TIFF samples of 32/32/32 bits are not supported"),
        (1, 24, 1, r"TIFF samples of 24 bits are not supported"),
        (1, 64, 3, r"TIFF samples of 64 bits in floating point are not supported"),
        (3, 32, 3, r"TIFF samples of 32/32/32 bits in floating point are not supported"),
        (1, 16, 2, r"TIFF samples of 16 bits with a sign are not supported"),
    ],
)
def test_other_depths_are_refused_not_misread(channels: int, bits: int, kind: int, message: str) -> None:
    data = twelve_bit_tiff(np.zeros((2, 3, channels)), bits=bits, kind=kind)
    with pytest.raises(UserError, match=rf"odd\.tif: {message}; accepted: whole numbers of 8 or 16 bits per channel"):
        read_image(data, "odd.tif")


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_cmyk_in_any_layout_with_alpha_and_spot_colours(
    dtype: type, planar: str, caplog: pytest.LogCaptureFixture
) -> None:
    samples = np.random.default_rng(0).integers(0, 256, (9, 11, 6)).astype(dtype) * dtype(
        257 if dtype != np.uint8 else 1
    )
    stored, stream = samples if planar == "contig" else np.moveaxis(samples, 2, 0), io.BytesIO()
    options = {"photometric": "separated", "planarconfig": planar, "extrasamples": ["unassalpha", "unspecified"]}
    tifffile.imwrite(stream, stored, metadata=None, **options)
    image = read_image(stream.getvalue(), "spot.tif")
    eight = (samples // dtype(257 if dtype != np.uint8 else 1)).astype(np.uint8)
    expected = Image.fromarray(np.ascontiguousarray(eight[..., :4]), "CMYK").convert("RGB")
    assert np.array_equal(image.pixels, np.asarray(expected))
    assert np.array_equal(image.alpha, eight[..., 4])
    assert "spot.tif: 1 of 6 channels are dropped" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"photometric": "separated", "extratags": [(332, "H", 1, 2, True)]},
            "TIFF of separated, 4 channels of 8 bits",
        ),
        (
            {"photometric": "cielab", "planarconfig": "separate"},
            "TIFF of cielab, 4 channels of 8 bits in separate planes",
        ),
    ],
)
def test_a_layout_that_is_not_read_is_named(options: dict, words: str) -> None:
    samples, stream = np.zeros((4, 32, 48), np.uint8), io.BytesIO()
    stored = samples if "planarconfig" in options else np.moveaxis(samples, 0, 2)
    tifffile.imwrite(stream, stored, metadata=None, **options)
    with pytest.raises(UserError, match=rf"^odd\.tif: {words}.*not supported; accepted: gray, RGB"):
        read_image(stream.getvalue(), "odd.tif")

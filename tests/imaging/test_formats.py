"""Formats by their content: what is read and written, refused by name, and limits checked before decoding."""

from __future__ import annotations

import io
import logging
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image

from onestepsr.core.errors import UserError
from onestepsr.imaging.formats import EXTENSIONS, FORMATS, READABLE, format_named, identify, jxl_header
from onestepsr.imaging.icc import adobe_rgb_profile
from onestepsr.imaging.read import LoadedImage, read_image
from onestepsr.imaging.write import check_size, encode_image, format_of

Y, X = np.mgrid[0:24, 0:40]
SMOOTH = np.stack([X * 6, Y * 10, 255 - X * 6], axis=-1).astype(np.uint8)
WRITTEN = [key for key, entry in FORMATS.items() if entry.write_bits]


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# ---- Reading and writing ----


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("alpha", [False, True])
def test_written_images_are_recognised_and_near(kind: str, alpha: bool) -> None:
    image = LoadedImage(pixels=SMOOTH, alpha=np.full(SMOOTH.shape[:2], 255, np.uint8) if alpha else None)
    data = encode_image(image, kind)
    assert identify(data) == kind
    again = read_image(data)
    assert again.format == kind
    assert np.abs(again.pixels.astype(int) - SMOOTH).mean() < 3
    if alpha and FORMATS[kind].alpha and kind not in ("webp", "avif"):  # which leave out an alpha that is opaque
        assert again.alpha is not None
        assert (again.alpha == 255).all()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif", "heif"])
def test_profile_and_metadata_survive(kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.Orientation] = 1
    image = LoadedImage(pixels=SMOOTH, icc=adobe_rgb_profile(), exif=exif.tobytes(), xmp=b"<x:xmpmeta/>")
    again = read_image(encode_image(image, kind))
    assert (again.icc, again.xmp) == (image.icc, image.xmp)
    kept = Image.Exif()
    kept.load(again.exif or b"")
    assert kept[ExifTags.Base.Make] == "Maker"


def test_jpeg_xl_is_written_in_srgb_since_it_takes_no_profile(caplog: pytest.LogCaptureFixture) -> None:
    pure = np.full((16, 16, 3), (0, 200, 0), np.uint8)
    again = read_image(encode_image(LoadedImage(pixels=pure, icc=adobe_rgb_profile(), xmp=b"<x/>"), "jxl"))
    assert again.pixels[8, 8, 0] < 20
    assert again.pixels[8, 8, 1] > 195
    assert again.xmp == b"<x/>"
    assert "converted to sRGB" in caplog.text


@pytest.mark.parametrize("kind", ["heif", "avif"])
@pytest.mark.parametrize(("orientation", "quarters"), [(3, 2), (6, -1), (8, 1)])
def test_orientation_of_new_formats(kind: str, orientation: int, quarters: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    check_size(kind, 1, 1, "plug-in")
    data = saved(Image.fromarray(SMOOTH), FORMATS[kind].pillow[0], exif=exif.tobytes(), quality=95)
    turned = np.rot90(SMOOTH, quarters)
    image = read_image(data)
    assert image.pixels.shape == turned.shape
    assert np.abs(image.pixels.astype(int) - turned).mean() < 4
    kept = Image.Exif()
    kept.load(image.exif or b"")
    assert kept.get(ExifTags.Base.Orientation, 1) == 1


@pytest.mark.parametrize("bits", [10, 12])
def test_deep_avif(bits: int) -> None:
    samples = (SMOOTH.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)
    image = read_image(imagecodecs.avif_encode(samples, level=98, bitspersample=bits, pixelformat="yuv444"))
    assert image.pixels.dtype == np.uint16
    assert np.abs(image.pixels / 257 - SMOOTH).mean() < 2


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_deep_jpeg_xl(bits: int) -> None:
    samples = (SMOOTH.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)
    data = imagecodecs.jpegxl_encode(samples, lossless=True, bitspersample=bits)
    assert jxl_header(data) == (40, 24, bits)
    expected = np.floor(samples * (65535 / (2**bits - 1)) + 0.5)
    assert np.array_equal(read_image(data).pixels, expected)


def test_deep_heif() -> None:
    image = read_image(encode_image(LoadedImage(pixels=SMOOTH.astype(np.uint16) * 257), "heif"))
    assert image.pixels.dtype == np.uint16
    assert np.abs(image.pixels / 257 - SMOOTH).mean() < 2


def test_first_frame_of_a_gif_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    image = read_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), "a.gif")
    assert image.pixels[0, 0].tolist() == [255, 0, 0]
    assert "a.gif: has 2 frames" in caplog.text


def test_endings() -> None:
    for ending in (".jfif", ".JIF", ".pjpeg"):
        assert format_of(Path("a" + ending)) == "jpeg"
    assert set(EXTENSIONS) == set(READABLE) - {".gif"}


def test_names_of_formats_in_options() -> None:
    for name, kind in (("jpeg", "jpeg"), ("JPG", "jpeg"), (".tif", "tiff"), ("HEIC", "heif"), ("webp", "webp")):
        assert format_named(name) == kind
    for name in ("gif", "psd", ""):
        with pytest.raises(UserError, match=f"^'{name}' is no image format that can be written; accepted: jpg, png"):
            format_named(name)


@pytest.mark.parametrize(("kind", "module"), [("heif", "pillow_heif"), ("jxl", "pillow_jxl")])
def test_a_missing_plug_in_is_named(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_image(LoadedImage(pixels=SMOOTH), kind)
    monkeypatch.setitem(sys.modules, module, None)
    for attempt in (lambda: read_image(data, "a"), lambda: check_size(kind, 5, 5, "a")):
        with pytest.raises(UserError, match=r"a: .* needs an optional dependency: pip install 'onestepsr\[formats\]'"):
            attempt()


def test_documentation_has_the_table() -> None:
    rows = [
        "| format | endings | bits read | bits written | alpha | profile | metadata written |",
        "|---|" + "---|" * 6,
    ]
    for entry in FORMATS.values():
        name = entry.name + (" (extra `formats`)" if entry.package else "")
        holds = ["yes" if each else "no" for each in (entry.alpha, entry.profile)] if entry.write_bits else ["", ""]
        written = [entry.write_bits or "not written", *holds, entry.metadata if entry.write_bits else ""]
        rows.append(f"| {' | '.join([name, ' '.join(entry.endings), entry.read_bits, *written])} |")
    page = (Path(__file__).parents[2] / "docs" / "images.md").read_text()
    assert "\n".join(rows) + "\n" in page


# ---- Other files are refused by name ----


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"8BPS\0\1" + bytes(40), r"PSD \(Photoshop\)"),
        (b"P6\n4 4\n255\n" + bytes(48), "PPM"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000"),
        (b"\x76\x2f\x31\x01" + bytes(40), "OpenEXR"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"  <?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%PDF-1.7\n" + bytes(40), "PDF"),
        (struct.pack(">I", 24) + b"ftypisom" + bytes(40), "video"),
        (struct.pack(">I", 24) + b"ftypcrx " + bytes(40), r"camera raw \(CR3\)"),
        (b"FUJIFILMCCD-RAW 0201" + bytes(100), r"camera raw \(RAF\)"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(40), r"camera raw \(CR2\)"),
        (b"IIRO\x08\0\0\0" + bytes(40), r"camera raw \(ORF\)"),
        (b"IIU\0\x18\0\0\0" + bytes(40), r"camera raw \(RW2\)"),
        (b"IIIITwaR" + bytes(40), r"camera raw \(IIQ\)"),
        (bytes([0, 0, 2] + [0] * 9 + [8, 0, 8, 0, 24, 0]) + bytes(192), "TGA"),
        (b"\0\0\2\0\1\0" + bytes(40), "ICO"),
        (b"\x0a\5\1\x08" + bytes(124), "PCX"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "a pointer of Git LFS"),
        (b'{"error": "not found"}', "a text file"),
        (b"hello, this is text\n" * 20, "a text file"),
        (bytes(257) + b"ustar" + bytes(300), "an archive"),
        (b"\xff\xd8\xff\xdb\0\5\0\1\2\xff\xc1\0\x11\x0c\0\x10\0\x10\3" + bytes(40), "JPEG of 12 bits"),
    ],
)
def test_what_is_not_read_is_named(data: bytes, name: str) -> None:
    with pytest.raises(UserError, match=rf"^photo\.jpg: {name}.* is not supported.*; accepted: JPEG, PNG"):
        read_image(data, "photo.jpg")


def test_a_tiff_without_its_directory_is_said_in_words() -> None:
    data = b"II*\0\xff\xff\xff\xff" + bytes(100)
    with pytest.raises(UserError, match=r"truncated or damaged TIFF file \(\D+\)"):
        read_image(data, "photo.tif")


def raw_tiff(*, thumbnail: bool = True, **tags: object) -> bytes:
    """A TIFF as cameras write it: a small first image, and the colour filter array below it."""
    stream = io.BytesIO()
    extra = [(271, "s", 5, "NIKON", True), *tags.get("extra", [])]
    with tifffile.TiffWriter(stream) as writer:
        writer.write(SMOOTH, photometric="rgb", subfiletype=int(thumbnail), subifds=1, extratags=extra, metadata=None)
        writer.write(np.zeros((300, 400), np.uint16), photometric="cfa", subfiletype=0, metadata=None)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (raw_tiff(), r"camera raw \(NIKON\) is not supported: develop it"),
        (raw_tiff(thumbnail=False), r"camera raw \(NIKON\) is not supported"),
        (raw_tiff(extra=[(50706, "B", 4, (1, 4, 0, 0), True)]), r"camera raw \(DNG\) is not supported"),
    ],
)
def test_camera_raw_is_refused_by_what_it_is(data: bytes, words: str) -> None:
    with pytest.raises(UserError, match=rf"^photo\.tif: {words}"):
        read_image(data, "photo.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_first_image_that_is_a_reduced_copy_is_refused(dtype: type) -> None:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        writer.write(SMOOTH.astype(dtype), photometric="rgb", subfiletype=1)
        writer.write(SMOOTH.repeat(2, axis=0).astype(dtype), photometric="rgb", subfiletype=0)
    with pytest.raises(UserError, match="first image of this TIFF is a reduced copy"):
        read_image(stream.getvalue())


def test_pyramids_and_pages_behind_the_image_are_no_camera_raw(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        writer.write(SMOOTH, photometric="rgb", subfiletype=0)
        writer.write(SMOOTH[::2, ::2], photometric="rgb", subfiletype=1)
    assert np.array_equal(read_image(stream.getvalue(), "a.tif").pixels, SMOOTH)
    assert "a.tif: has several pages" in caplog.text


# ---- Limits before decoding ----


def rle_bitmap(width: int, height: int) -> bytes:
    body = b"\0\2\xff\xff" * 50 + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + 1024 + len(body), 0, 0, 1078) + head + bytes(1024) + body


def lossless_webp(width: int, height: int) -> bytes:
    whole = bytearray(saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    bits = int.from_bytes(whole[21:25], "little") >> 28 << 28 | (height - 1) << 14 | (width - 1)
    whole[21:25] = bits.to_bytes(4, "little")
    return bytes(whole)


def progressive_with_scans(count: int) -> bytes:
    whole = saved(Image.fromarray(SMOOTH), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + scan * count + whole[-2:]


def chained_directories(count: int) -> bytes:
    entries = struct.pack("<H", 1) + struct.pack("<HHII", 256, 4, 1, 8)
    size = len(entries) + 4
    return (
        b"II*\0"
        + struct.pack("<I", 8)
        + b"".join(entries + struct.pack("<I", 8 + (index + 1) * size) for index in range(count))
    )


def many_strips(count: int) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.zeros((count, 1), np.uint16), photometric="minisblack", rowsperstrip=1, metadata=None)
    return stream.getvalue()


def tall_png(height: int) -> bytes:
    packed = zlib.compress(bytes(2 * height), 9)
    header = struct.pack(">IIBBBBB", 1, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def empty_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (rle_bitmap(15_780, 15_780), "claims 15780 x 15780 pixels, more than 1,280 bytes can hold"),
        (lossless_webp(16_383, 15_001), "claims 16383 x 15001 pixels in"),
        (lossless_webp(16_383, 16_383), "claims 16383 x 16383 = 268,402,689 pixels, the limit is"),
        (progressive_with_scans(2000), "scans; accepted: at most 200"),
        (tall_png(2_000_000), "claims 1 x 2000000 pixels, the limit is 1,000,000 a side"),
        (empty_png(15_000, 15_000), "claims 15000 x 15000 pixels, too many for"),
        (many_strips(400_000), "400,000 strips or tiles"),
        (chained_directories(60_000), "TIFF of .* is not supported"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", b"a\0b") * 200_000, "200,000 chunks; accepted: at most 100,000"),
    ],
    ids=["rle", "webp", "webp size", "scans", "tall", "empty", "strips", "directories", "chunks"],
)
def test_what_would_take_long_is_refused_before_it_is_decoded(data: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_image(data, "bomb")


def test_a_strip_unfolds_to_no_more_than_the_header_says() -> None:
    samples = zlib.compress(bytes(200_000_000), 1)
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.zeros((16, 16), np.uint16), compression="zlib", metadata=None)
    data = bytearray(stream.getvalue())
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = file.pages.first.tags
        data[tags[273].valueoffset : tags[273].valueoffset + 4] = struct.pack("<I", len(data))
        data[tags[279].valueoffset : tags[279].valueoffset + 4] = struct.pack("<I", len(samples))
    try:
        image = read_image(bytes(data) + samples)
    except UserError:
        return
    assert image.pixels.shape == (16, 16, 1)


# ---- Pipes and streams ----


def test_pipes_and_streams_are_one_image(tmp_path: Path) -> None:
    data = saved(Image.fromarray(SMOOTH), "PNG")
    assert np.array_equal(read_image(io.BytesIO(data), "stream").pixels, SMOOTH)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    assert np.array_equal(read_image(pipe).pixels, SMOOTH)
    writer.join()
    with pytest.raises(UserError, match="text: not a binary stream"):
        read_image(io.StringIO("abc"), "text")  # type: ignore[arg-type]


# ---- Damaged, but all there ----


NOISE = np.random.default_rng(2).integers(0, 256, (64, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker(progressive: bool, caplog: pytest.LogCaptureFixture) -> None:
    whole = saved(Image.fromarray(NOISE), "JPEG", progressive=progressive)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_image(whole[:-2], "cut.jpg").pixels, read_image(whole).pixels)
    assert "cut.jpg: is damaged (no end marker), but has all its samples" in caplog.text
    for missing in (20, 200, len(whole) // 2):
        with pytest.raises(UserError, match=r"^cut\.jpg: truncated or damaged JPEG"):
            read_image(whole[:-missing], "cut.jpg")


def test_a_png_with_a_bad_checksum_in_its_metadata_or_without_end(caplog: pytest.LogCaptureFixture) -> None:
    whole = saved(Image.fromarray(NOISE), "PNG", dpi=(300, 300))
    place = whole.index(b"pHYs") + 4
    bad = bytearray(whole)
    bad[place] ^= 1
    for data, words in ((bytes(bad), "1 chunks of metadata"), (whole[:-12], "no end")):
        caplog.clear()
        assert np.array_equal(read_image(data, "bad.png").pixels, NOISE)
        assert f"bad.png: is damaged ({words}), but has all its samples" in caplog.text
    for missing in (20, 1000):
        with pytest.raises(UserError, match=r"^bad\.png: truncated or damaged PNG"):
            read_image(whole[:-missing], "bad.png")


@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_cut_off_in_its_metadata(lossless: bool, caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker" * 20
    whole = saved(Image.fromarray(NOISE), "WEBP", lossless=lossless, exif=exif.tobytes())
    image = read_image(whole[:-30], "cut.webp")
    assert np.array_equal(image.pixels, read_image(whole).pixels)
    assert image.exif is None
    assert "cut.webp: is damaged (metadata cut off)" in caplog.text
    with pytest.raises(UserError, match=r"^cut\.webp: truncated or damaged WebP"):
        read_image(whole[:-400], "cut.webp")


def test_damaged_exif_costs_no_image(caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    data = saved(Image.fromarray(SMOOTH), "JPEG", exif=exif.tobytes())
    place = data.index(b"Exif\0\0") + 6
    broken = data[:place] + b"II+\0" + data[place + 4 :]
    assert read_image(broken, "odd.jpg").pixels.shape == SMOOTH.shape
    assert "odd.jpg: EXIF data is damaged and left out" in caplog.text


# ---- Anything at all ----


def test_damaged_images_of_every_kind_end_in_an_image_or_one_line(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "fuzz_images.py"
    command = [sys.executable, str(script), "--count", "300", "--keep", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "read" in result.stdout
    assert "refused" in result.stdout

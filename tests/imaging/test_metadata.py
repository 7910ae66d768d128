"""Metadata: texts, comments and IPTC travel, and nothing is claimed that the new file does not have."""

from __future__ import annotations

import io
import logging
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from onestepsr.imaging.icc import adobe_rgb_profile
from onestepsr.imaging.metadata import resized_xmp, xmp_packet
from onestepsr.imaging.read import LoadedImage, from_pil, read_image, to_pil
from onestepsr.imaging.write import encode_image, write_image

PIXELS = np.random.default_rng(4).integers(0, 256, (9, 12, 3), dtype=np.uint8)
IPTC = b"\x1c\x02\x78\0\5A cat\x1c\x02\x19\0\3pet"
Ifd = ExifTags.IFD


def saved(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    stream = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(stream, kind, **options)
    return stream.getvalue()


def enlarged(image: LoadedImage) -> LoadedImage:
    return replace(image, pixels=image.pixels.repeat(4, axis=0).repeat(4, axis=1))


def exif_of(image: LoadedImage) -> Image.Exif:
    exif = Image.Exif()
    exif.load(image.exif or b"")
    return exif


# ---- Texts, comments, IPTC ----


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_texts_of_a_png_travel(dtype: type) -> None:
    info = PngInfo()
    info.add_text("parameters", "a cat, Steps: 20")
    info.add_itxt("Author", "Zoë 日本")
    info.add_text("Title", "long " * 100, zip=True)
    info.add_text("Thumb::Image::Width", "12")
    image = read_image(saved("PNG", pnginfo=info))
    again = read_image(encode_image(replace(image, pixels=image.pixels.astype(dtype)), "png"))
    assert dict(again.texts) == {"parameters": "a cat, Steps: 20", "Author": "Zoë 日本", "Title": "long " * 100}


def test_what_a_format_cannot_hold_is_said(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    image = LoadedImage(pixels=PIXELS, texts=(("Title", "t"), ("Comment", "c")), iptc=IPTC)
    for ending, words in (
        (".jpg", "JPEG cannot hold text 'Title', left out"),
        (".png", "PNG cannot hold IPTC, left out"),
        (".webp", "WebP cannot hold IPTC, text 'Title', text 'Comment', left out"),
    ):
        caplog.clear()
        write_image(image, tmp_path / f"a{ending}")
        assert f"a{ending}: {words}" in caplog.text


@pytest.mark.parametrize("comment", ["hello", "Zoë", b"\xff\xfe odd".decode("utf-8", "surrogateescape")])
def test_comment_of_a_jpeg_travels(comment: str) -> None:
    encoded = comment.encode("utf-8", "surrogateescape")
    image = read_image(saved("JPEG", comment=encoded))
    assert image.texts == (("Comment", comment),)
    with Image.open(io.BytesIO(encode_image(image, "jpeg"))) as again:
        assert again.info["comment"] == encoded
    assert dict(read_image(encode_image(image, "png")).texts).keys() == {"Comment"}


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_iptc_travels(kind: str) -> None:
    first = read_image(encode_image(LoadedImage(pixels=PIXELS, iptc=IPTC), "jpeg"))
    assert first.iptc == IPTC
    assert read_image(encode_image(first, kind)).iptc == IPTC
    assert IPTC in encode_image(first, kind)


def test_nothing_travels_when_it_is_stripped() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    full = LoadedImage(
        pixels=PIXELS,
        icc=adobe_rgb_profile(),
        exif=exif.tobytes(),
        xmp=b"<x/>",
        iptc=IPTC,
        texts=(("Comment", "c"),),
        dpi=(300.0, 300.0),
    )
    again = read_image(encode_image(full.without_metadata(), "jpeg"))
    assert again.icc == full.icc
    assert (again.exif, again.xmp, again.iptc, again.texts) == (None, None, None, ())


# ---- Claims about the old file ----

GAIN_MAP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" '
    b'xmlns:Container="http://ns.google.com/photos/1.0/container/" tiff:Orientation="6" hdrgm:Version="1.0" '
    b"tiff:ImageWidth='12' GCamera:MicroVideo=\"1\" xmpNote:HasExtendedXMP='AB'><Container:Directory><rdf:Seq><rdf:li>"
    b'<Container:Item Item:Semantic="GainMap"/></rdf:li></rdf:Seq></Container:Directory><exif:PixelYDimension>9'
    b"</exif:PixelYDimension><dc:subject>cat</dc:subject></rdf:Description></x:xmpmeta>"
)


def test_xmp_claims_no_gain_map_and_no_old_size(caplog: pytest.LogCaptureFixture) -> None:
    note = b"Apple iOS\0\0\1MM\0\1"
    exif = Image.Exif()
    exif.get_ifd(Ifd.Exif)[ExifTags.Base.MakerNote] = note
    data = saved("JPEG", xmp=GAIN_MAP, exif=exif.tobytes())
    image = enlarged(read_image(data, "phone.jpg"))
    assert "phone.jpg: its HDR gain map is left out" in caplog.text
    written = encode_image(image, "jpeg")
    for gone in (b"hdrgm", b"GainMap", b"Container", b"MicroVideo", b"HasExtendedXMP", b"Apple iOS"):
        assert gone not in written
    # Turned by the orientation that XMP alone states.
    for kept in (b"tiff:ImageWidth='36'", b"<exif:PixelYDimension>48</", b"<dc:subject>cat</dc:subject>"):
        assert kept in written


def test_images_beside_the_first_one_are_no_frames(caplog: pytest.LogCaptureFixture) -> None:
    second = Image.fromarray(PIXELS[::2, ::2])
    data = saved("MPO", save_all=True, append_images=[second])
    with caplog.at_level(logging.INFO):
        assert read_image(data, "two.jpg").format == "jpeg"
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "two.jpg: holds 2 images" in caplog.text


def test_xmp_of_any_content_takes_no_time() -> None:
    started = time.perf_counter()
    assert xmp_packet(b"<x>" + b"<Item:a>" * 100_000, "a") is None
    assert xmp_packet(b'\t hdrgm:a="' * 80_000, "a") is not None
    assert xmp_packet(b"<" * 900_000, "a") is not None
    assert xmp_packet(bytes(2_000_000), "a") is None
    resized_xmp(b"tiff:ImageWidth" * 60_000, 3, 4)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    ("maker", "note", "kept"),
    [
        ("NIKON", b"Nikon\0\2\x10\0\0MM\0*", True),
        ("Any", b"MAKERMAKER", True),
        ("SONY", b"SONY DSC \0\0\0", False),
        ("Canon", struct.pack("<HHHII", 1, 1, 3, 4, 900), False),
    ],
)
@pytest.mark.parametrize("kind", ["jpeg", "tiff", "png"])
def test_maker_notes_that_point_into_the_old_file_are_dropped(maker: str, note: bytes, kept: bool, kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = maker
    exif.get_ifd(Ifd.Exif)[ExifTags.Base.MakerNote] = note
    exif.get_ifd(Ifd.Exif)[ExifTags.Base.LensModel] = "Lens"
    again = exif_of(read_image(encode_image(read_image(saved("JPEG", exif=exif.tobytes())), kind)))
    inner = again.get_ifd(Ifd.Exif)
    assert inner[ExifTags.Base.LensModel] == "Lens"
    assert inner.get(ExifTags.Base.MakerNote) == (note if kept else None)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_directories_of_exif_are_written_where_their_pointers_lead(kind: str) -> None:
    exif = Image.Exif()
    exif[330] = 4000
    inner = exif.get_ifd(Ifd.Exif)
    inner[Ifd.Interop] = {1: "R98", 0x1001: 12}
    inner[0x9214] = (1, 2)
    exif.get_ifd(Ifd.GPSInfo)[1] = "N"
    again = exif_of(read_image(encode_image(read_image(saved("JPEG", exif=exif.tobytes())), kind)))
    assert dict(again.get_ifd(Ifd.Interop)) == {1: "R98"}
    assert again.get_ifd(Ifd.GPSInfo)[1] == "N"
    assert 330 not in again
    assert 0x9214 not in again.get_ifd(Ifd.Exif)


def test_damaged_tags_of_a_tiff_cost_no_image(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.BytesIO()
    tifffile.imwrite(stream, PIXELS, photometric="rgb", metadata=None, extratags=[(34853, "I", 1, 10**9, True)])
    image = read_image(stream.getvalue(), "odd.tif")
    assert np.array_equal(image.pixels, PIXELS)
    assert all("odd.tif" in record.message for record in caplog.records)


# ---- Pillow images ----


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pillow_images_save_what_they_carry(kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif.get_ifd(Ifd.Exif)[ExifTags.Base.ExifImageWidth] = 3
    image = LoadedImage(pixels=PIXELS, icc=adobe_rgb_profile(), exif=exif.tobytes(), dpi=(300.0, 300.0))
    again = read_image(saved(kind, to_pil(image)))
    assert again.icc == image.icc
    assert exif_of(again)[ExifTags.Base.Make] == "Maker"
    assert exif_of(again).get_ifd(Ifd.Exif)[ExifTags.Base.ExifImageWidth] == 12
    if kind != "WEBP":
        assert again.dpi == pytest.approx((300, 300), abs=0.1)
    assert read_image(saved(kind, to_pil(image), icc_profile=None)).icc is None
    assert np.array_equal(from_pil(to_pil(image).copy()).pixels, PIXELS)

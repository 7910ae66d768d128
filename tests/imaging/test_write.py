"""Writing: formats, transparency, metadata, limits, and never a half file."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from onestepsr.core.errors import UserError
from onestepsr.core.files import PARTIAL_PREFIX, remove_leftovers
from onestepsr.imaging.read import LoadedImage, read_image
from onestepsr.imaging.write import check_size, check_writable, encode_image, format_of, write_image

RNG = np.random.default_rng(11)
SMOOTH = np.linspace(0, 255, 24 * 40 * 3).reshape(24, 40, 3).astype(np.uint8)


def full_image(**changes: object) -> LoadedImage:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.Orientation] = 1
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageHeight] = 3
    values = {"icc": b"profile!", "exif": exif.tobytes(), "xmp": b"<x:xmpmeta/>", "dpi": (300.0, 300.0)}
    return LoadedImage(**{"pixels": SMOOTH, **values, **changes})


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp", ".jpg", ".webp"])
@pytest.mark.parametrize("gray", [False, True])
def test_colour_is_kept(tmp_path: Path, ending: str, gray: bool) -> None:
    image = LoadedImage(pixels=SMOOTH[..., :1].copy() if gray else SMOOTH)
    write_image(image, tmp_path / f"a{ending}")
    again = read_image(tmp_path / f"a{ending}")
    assert again.format == format_of(Path("a" + ending))
    assert again.gray == (gray and ending != ".webp")  # WebP knows no gray
    tolerance = 0 if ending in (".png", ".tif", ".bmp") else 12
    assert np.abs(again.pixels.astype(int) - image.pixels).max() <= tolerance


@pytest.mark.parametrize("ending", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("gray", [False, True])
def test_alpha_is_kept_exactly(tmp_path: Path, ending: str, gray: bool) -> None:
    alpha = RNG.integers(0, 256, SMOOTH.shape[:2], dtype=np.uint8)
    write_image(LoadedImage(pixels=SMOOTH[..., :1] if gray else SMOOTH, alpha=alpha), tmp_path / f"a{ending}")
    assert np.array_equal(read_image(tmp_path / f"a{ending}").alpha, alpha)


@pytest.mark.parametrize("ending", [".jpg", ".bmp"])
def test_formats_without_alpha_show_white_and_warn(
    tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    alpha = np.zeros(SMOOTH.shape[:2], np.uint8)
    alpha[:, 20:] = 255
    write_image(LoadedImage(pixels=SMOOTH, alpha=alpha), tmp_path / f"a{ending}")
    again = read_image(tmp_path / f"a{ending}").pixels.astype(int)
    assert again[:, :16].min() > 245
    assert np.abs(again[:, 24:] - SMOOTH[:, 24:]).max() < 12
    assert "laid over white" in caplog.text


@pytest.mark.parametrize("ending", [".png", ".tif", ".jpg", ".webp"])
def test_metadata_is_kept_with_the_new_size(tmp_path: Path, ending: str) -> None:
    write_image(full_image(), tmp_path / f"a{ending}")
    again = read_image(tmp_path / f"a{ending}")
    assert again.icc == b"profile!"
    assert again.xmp == b"<x:xmpmeta/>"
    if ending != ".webp":
        assert again.dpi == pytest.approx((300, 300), abs=0.1)
    exif = Image.open(tmp_path / f"a{ending}").getexif()
    assert exif[ExifTags.Base.Make] == "Maker"
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageHeight] == SMOOTH.shape[0]


def test_metadata_too_large_for_a_jpeg_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    image = read_image(encode_image(full_image(xmp=b"<x>" + b" " * 70_000), "jpeg"))
    assert image.xmp is None
    assert "output: XMP of 70003 bytes" in caplog.text


def test_lossless_webp_stays_lossless_and_lossy_stays_lossy() -> None:
    noise = RNG.integers(0, 256, (20, 20, 3), dtype=np.uint8)
    exact = read_image(encode_image(LoadedImage(pixels=noise, format="webp", lossless=True), "webp"))
    assert np.array_equal(exact.pixels, noise)
    assert exact.lossless
    near = read_image(encode_image(LoadedImage(pixels=noise, format="png"), "webp"))
    assert not near.lossless


def test_jpeg_has_full_chroma_resolution() -> None:
    with Image.open(io.BytesIO(encode_image(LoadedImage(pixels=SMOOTH), "jpeg"))) as image:
        assert {component[1:3] for component in image.layer} == {(1, 1)}


@pytest.mark.parametrize(("kind", "side"), [("jpeg", 65_536), ("webp", 16_384)])
def test_sizes_that_a_format_cannot_hold(kind: str, side: int) -> None:
    check_size(kind, side - 1, 5, "a")
    with pytest.raises(UserError, match=rf"a: 5 x {side} pixels, but (JPEG|WebP) holds at most {side - 1}"):
        check_size(kind, 5, side, "a")


def test_unknown_ending() -> None:
    with pytest.raises(UserError, match=r"'\.xyz' is no image format"):
        format_of(Path("a.xyz"))


def test_a_failure_leaves_neither_half_nor_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"before")
    with pytest.raises(UserError, match="holds at most"):
        write_image(LoadedImage(pixels=np.zeros((1, 16_384, 3), np.uint8)), target, "webp")
    broken = full_image(icc="not bytes")
    with pytest.raises(UserError, match=r"a\.png: cannot be written as PNG"):
        write_image(broken, target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert target.read_bytes() == b"before"


def test_unwritable_targets(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for target in (tmp_path / "file" / "a.png", tmp_path):
        with pytest.raises(UserError, match=r"cannot be written|is a folder"):
            check_writable(target)
    with pytest.raises(UserError, match="cannot be written"):
        write_image(LoadedImage(pixels=SMOOTH), tmp_path / "file" / "a.png")
    check_writable(tmp_path / "new" / "a.png")
    assert list((tmp_path / "new").iterdir()) == []


def test_leftovers_of_a_killed_run_are_removed_for_the_same_target_only(tmp_path: Path) -> None:
    target, long = tmp_path / "a.png", tmp_path / ("b" * 250 + ".png")
    write_image(LoadedImage(pixels=SMOOTH), long)
    seen: list[str] = []
    real = os.replace
    os.replace = lambda source, goal: (seen.append(Path(source).name), real(source, goal))
    try:
        write_image(LoadedImage(pixels=SMOOTH), target)
    finally:
        os.replace = real
    mine = tmp_path / (seen[0].rpartition("-")[0] + "-99999")
    other = tmp_path / f"{PARTIAL_PREFIX}{'0' * 16}-1"
    mine.write_bytes(b"half")
    other.write_bytes(b"half")
    remove_leftovers(target)
    assert not mine.exists()
    assert other.exists()

"""Damage images of every format and report what the reader and the writer do not answer with an image or one line.

    python scripts/fuzz_images.py --count 5000 --seed 0 --keep failures/

Each case takes a small image of one format, with profile, EXIF, XMP and texts, and changes it: bytes flipped, numbers
set to extremes, parts cut out, doubled or exchanged with another format's. It is read, and what can be read is
enlarged and written as PNG, JPEG, WebP and TIFF. A failure is an exception other than UserError, a message of several
lines or without the file's name, or a case that takes longer than the limit. The same seed gives the same cases.
"""

from __future__ import annotations

import argparse
import io
import logging
import struct
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tifffile
from PIL import ExifTags, Image

from onestepsr.core.errors import UserError
from onestepsr.imaging.formats import FORMATS
from onestepsr.imaging.icc import adobe_rgb_profile, color_profile
from onestepsr.imaging.read import LoadedImage, read_image, samples_to_tensor, to_pil
from onestepsr.imaging.write import encode_image

SLOW = 20.0
"""Seconds from which a case counts as a failure."""
MOST_PIXELS = 4_000_000
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
TARGETS = ("png", "jpeg", "webp", "tiff")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A case that ended in another way than with an image or one line."""

    name: str
    data: bytes
    reason: str


def main() -> None:
    """Read the arguments, run the cases, exit with 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of failed cases")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    outcomes: Counter[str] = Counter()
    failures = []
    for name, data in cases(arguments.count, arguments.seed):
        outcome = run_case(name, data)
        outcomes[outcome if isinstance(outcome, str) else "failed"] += 1
        if isinstance(outcome, Failure):
            failures.append(outcome)
            sys.stdout.write(f"{name}: {outcome.reason}\n")
            if arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                (arguments.keep / name).write_bytes(data)
    sys.stdout.write(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) + "\n")
    sys.exit(1 if failures else 0)


def run_case(name: str, data: bytes) -> str | Failure:
    """Read, enlarge and write one damaged image: "read", "refused", or the failure."""
    started = time.perf_counter()
    outcome = "read"
    try:
        image = read_image(data, name, MOST_PIXELS)
        profile = None if image.gray else color_profile(image.icc)
        if profile is not None:
            profile.from_srgb(profile.to_srgb(samples_to_tensor(image.pixels[:8, :8])))
        image = replace(
            image, pixels=image.pixels[:64, :64], alpha=None if image.alpha is None else image.alpha[:64, :64]
        )
        to_pil(image).save(io.BytesIO(), "PNG")
        for target in TARGETS:
            encode_image(image, target)
    except UserError as error:
        outcome = "refused"
        if not str(error).startswith((f"{name}: ", "output: ")) or "\n" in str(error):
            return Failure(name=name, data=data, reason=f"message without name, or of several lines: {error!r}")
    except Exception as error:  # noqa: BLE001  (what this looks for)
        return Failure(name=name, data=data, reason=f"{type(error).__name__}: {error}")
    if time.perf_counter() - started > SLOW:
        return Failure(name=name, data=data, reason=f"{time.perf_counter() - started:.0f} s")
    return outcome


def cases(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """``count`` damaged images and their names, the same for the same ``seed``."""
    originals = list(samples())
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        name, data = originals[number % len(originals)]
        for _ in range(int(rng.integers(1, 3))):
            data = damaged(data, originals[int(rng.integers(len(originals)))][1], rng)
        yield f"{number:06d}-{name}", data


def damaged(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """``data`` with one change."""
    if len(data) < 16:
        return data + other
    # Half of the changes hit the first bytes, where the structure is.
    place = int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 400)))
    length = int(rng.integers(1, 64))
    match int(rng.integers(6)):
        case 0:
            return data[:place] + bytes([data[place] ^ int(rng.integers(1, 256))]) + data[place + 1 :]
        case 1:
            form = str(rng.choice(["<B", "<H", ">H", "<I", ">I"]))
            number = struct.pack(form, EXTREMES[int(rng.integers(len(EXTREMES)))] & (256 ** struct.calcsize(form) - 1))
            return data[:place] + number + data[place + len(number) :]
        case 2:
            return data[:place] + data[place + length :]
        case 3:
            return data[:place] + data[place : place + length] * 2 + data[place + length :]
        case 4:
            start = int(rng.integers(len(other)))
            return data[:place] + other[start : start + length] + data[place + length :]
        case _:
            return data[:place]


def samples() -> Iterator[tuple[str, bytes]]:
    """A small image of each format, depth and layout that is read, with metadata."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] = 30
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = b"MAKER"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: "R98"}
    exif.get_ifd(ExifTags.IFD.GPSInfo)[2] = (51.0, 30.0, 0.0)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    full = LoadedImage(
        pixels=pixels,
        icc=adobe_rgb_profile(),
        exif=exif.tobytes(),
        xmp=b'<x:xmpmeta tiff:ImageWidth="30" hdrgm:Version="1.0"><Item:a>1</Item:a></x:xmpmeta>',
        iptc=b"\x1c\x02\x78\0\5A cat",
        texts=(("Title", "cat"), ("Comment", "c")),
        dpi=(300.0, 300.0),
        cicp=(12, 13, 0, 1),
    )
    deep = replace(full, pixels=pixels.astype(np.uint16) * 257)
    alpha = replace(full, alpha=pixels[..., 0])
    for kind, entry in FORMATS.items():
        if entry.write_bits:
            yield f"rgb.{kind}", encode_image(full, kind)
            yield f"alpha.{kind}", encode_image(alpha, kind)
            if "," in entry.write_bits:
                yield f"deep.{kind}", encode_image(deep, kind)
    plain = Image.fromarray(pixels)
    for kind, image, options in (
        ("JPEG", plain, {"progressive": True}),
        ("JPEG", plain.convert("CMYK"), {}),
        ("PNG", plain.quantize(8), {"transparency": 1}),
        ("PNG", plain.convert("L"), {"transparency": 3}),
        ("PNG", plain, {"save_all": True, "append_images": [plain]}),
        ("GIF", plain, {"save_all": True, "append_images": [plain.rotate(90, expand=False)]}),
        ("BMP", plain.convert("1"), {}),
        ("TIFF", plain.convert("LAB"), {}),
        ("TIFF", plain.quantize(8), {"compression": "tiff_lzw"}),
        ("TIFF", plain, {"compression": "jpeg"}),
        ("TIFF", plain.convert("1"), {"compression": "group4"}),
        ("MPO", plain, {"save_all": True, "append_images": [plain]}),
    ):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        yield f"{image.mode}.{kind.lower()}", stream.getvalue()
    for options in ({"tile": (16, 16)}, {"planarconfig": "separate"}, {"bigtiff": True}, {"byteorder": ">"}):
        stream = io.BytesIO()
        stored = np.moveaxis(deep.pixels, 2, 0) if "planarconfig" in options else deep.pixels
        tifffile.imwrite(stream, stored, photometric="rgb", compression="zlib", metadata=None, **options)
        yield "layout.tiff", stream.getvalue()


if __name__ == "__main__":
    main()

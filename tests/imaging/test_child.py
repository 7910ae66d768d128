"""Decoding in a child process: the same image, the same words, and an end for whatever does not end by itself."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from onestepsr.core.errors import UserError
from onestepsr.imaging import child
from onestepsr.imaging.child import DecodingLimits, read_image_in_child
from onestepsr.imaging.read import read_image

SMALL = np.random.default_rng(1).integers(0, 256, (6, 9, 4), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def large() -> bytes:
    return encoded(Image.new("RGB", (4000, 3000)), compress_level=1)


def test_every_field_comes_back_as_it_is_read_in_this_process() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    exif, texts = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x010F] = "Maker"
    texts.add_itxt("Title", "kočka", "cs", "Titul")
    data = encoded(Image.fromarray(SMALL), icc_profile=profile, exif=exif.tobytes(), dpi=(300, 300), pnginfo=texts)
    here, there = read_image(data), read_image_in_child(data)
    for field in fields(here):
        ours, theirs = getattr(here, field.name), getattr(there, field.name)
        same = np.array_equal(ours, theirs) if isinstance(ours, np.ndarray) else ours == theirs
        assert same, field.name
    assert there.alpha is not None
    assert there.texts
    sixteen = encoded(Image.fromarray(np.arange(54, dtype=np.uint16).reshape(6, 9) * 1200))
    assert np.array_equal(read_image_in_child(sixteen).pixels, read_image(sixteen).pixels)


def test_refusals_and_warnings_are_those_of_reading_here(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"^photo\.gif: the file is empty"):
        read_image_in_child(b"", "photo.gif")
    with pytest.raises(UserError, match=r"claims 9 x 6 = 54 pixels, the limit is 50"):
        read_image_in_child(encoded(Image.fromarray(SMALL)), limits=DecodingLimits(pixels=50))
    with caplog.at_level(logging.WARNING):
        read_image_in_child(encoded(Image.fromarray(SMALL))[:-12], "cut.png")
    assert [record.getMessage() for record in caplog.records] == [
        "cut.png: is damaged (no end), but has all its samples"
    ]


def test_what_takes_too_long_is_given_up_and_the_next_image_is_read() -> None:
    read_image_in_child(encoded(Image.fromarray(SMALL)))  # a child that has started
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"^slow\.png: not decoded within 0\.01 seconds"):
        read_image_in_child(large(), "slow.png", DecodingLimits(seconds=0.01))
    assert time.monotonic() - begun < 5
    assert read_image_in_child(encoded(Image.fromarray(SMALL))).width == 9


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="limits of memory are those of Linux")
def test_what_takes_too_much_memory_is_given_up_and_the_next_image_is_read() -> None:
    with pytest.raises(UserError, match=r"^big\.png: .*(more than 20 MB of memory|damaged)"):
        read_image_in_child(large(), "big.png", DecodingLimits(memory=20_000_000))
    assert read_image_in_child(large()).height == 3000


def test_a_crash_costs_one_image() -> None:
    worker = child._Child()
    assert worker.read(encoded(Image.fromarray(SMALL)), "a.png", DecodingLimits()).width == 9
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(UserError, match=r"^a\.png: its decoder crashed"):
        worker.read(encoded(Image.fromarray(SMALL)), "a.png", DecodingLimits())
    assert not worker.is_good
    idle = child._children.take()
    child._children.give_back(idle)
    idle._process.kill()  # while it waits
    idle._process.wait()
    assert read_image_in_child(encoded(Image.fromarray(SMALL))).width == 9


def test_threads_read_at_once_and_nothing_is_left_when_a_program_ends() -> None:
    data = encoded(Image.fromarray(SMALL))
    with ThreadPoolExecutor(2) as threads:
        images = list(threads.map(lambda _: read_image_in_child(data), range(6)))
    assert all(np.array_equal(image.pixels, SMALL[..., :3]) for image in images)
    code = (
        "import sys\nfrom onestepsr.imaging.child import read_image_in_child, _children\n"
        "assert read_image_in_child(sys.stdin.buffer.read()).width == 9\n"
        "assert 'torch' not in sys.modules\nprint(_children._idle[0]._process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)

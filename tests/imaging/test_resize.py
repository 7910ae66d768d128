"""Exact sizes, bands without seams, colours under transparency."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from onestepsr.imaging import resize as resize_module
from onestepsr.imaging.resize import bicubic, fill_transparent, resize

RNG = np.random.default_rng(5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60), st.integers(200, 3000))
def test_bands_equal_one_pass(height: int, width: int, new_height: int, new_width: int, budget: int) -> None:
    samples = RNG.integers(0, 65536, (height, width, 3), dtype=np.uint16)
    whole = resize(samples, new_height, new_width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resize_module, "_BAND_SAMPLES", budget)
        banded = resize(samples, new_height, new_width)
    assert whole.shape == (new_height, new_width, 3)
    assert np.abs(whole.astype(int) - banded).max() <= 1


def test_equals_pillow_in_eight_bits() -> None:
    samples = RNG.integers(80, 176, (64, 80, 3), dtype=np.uint8)  # far from black and white, where Pillow clips twice
    for size, kernel in (((33, 50), Image.Resampling.LANCZOS), ((100, 120), Image.Resampling.BICUBIC)):
        expected = np.asarray(Image.fromarray(samples).resize((size[1], size[0]), kernel))
        assert np.abs(resize(samples, *size).astype(int) - expected).max() <= 2  # Pillow rounds between its two passes


def test_flat_stays_flat_and_same_size_is_the_same() -> None:
    flat = np.full((7, 9, 1), 255, np.uint8)
    assert (resize(flat, 21, 5) == 255).all()
    assert resize(flat, 7, 9) is flat


def test_hidden_pixels_take_visible_colours_and_visible_ones_stay() -> None:
    pixels = np.zeros((33, 50, 3), np.uint8)
    alpha = np.zeros((33, 50), np.uint8)
    pixels[10:20, 10:20] = (200, 30, 60)
    alpha[10:20, 10:20] = 1
    filled = fill_transparent(pixels, alpha)
    assert (filled == (200, 30, 60)).all()
    noise = RNG.integers(0, 256, pixels.shape, dtype=np.uint8)
    kept = fill_transparent(noise, alpha)
    assert np.array_equal(kept[alpha > 0], noise[alpha > 0])
    assert fill_transparent(noise, alpha * 0) is noise


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_nearly_invisible_pixels_leave_no_dark_ring(dtype: type) -> None:
    peak = np.iinfo(dtype).max
    y, x = np.mgrid[0:48, 0:48]
    disc = (y - 24) ** 2 + (x - 24) ** 2 < 17**2
    pixels = np.where(disc[..., None], peak, 0).astype(dtype).repeat(3, axis=2)
    alpha = np.where(disc, peak, peak * 3 // 255).astype(dtype)
    filled = fill_transparent(pixels, alpha)
    near = (y - 24) ** 2 + (x - 24) ** 2 < 20**2
    assert filled[near].min() > 0.9 * peak


def test_what_is_visible_beside_its_surroundings_keeps_its_colour() -> None:
    pixels = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    faint = np.full((40, 40), 3, np.uint8)  # all of it: a watermark
    assert fill_transparent(pixels, faint) is pixels
    shadow = np.full((40, 40), 255, np.uint8)
    shadow[:, 20:] = 60
    assert fill_transparent(pixels, shadow) is pixels


def test_bicubic_after_a_graph_was_traced_with_it() -> None:
    resize_module._bicubic_values.cache_clear()
    with FakeTensorMode():
        assert bicubic(torch.ones(1, 3, 4, 5), 4).shape == (1, 3, 16, 20)
    image = torch.linspace(0, 1, 60).reshape(1, 3, 4, 5)
    expected = torch.nn.functional.interpolate(image, scale_factor=4, mode="bicubic")
    torch.testing.assert_close(bicubic(image, 4), expected)

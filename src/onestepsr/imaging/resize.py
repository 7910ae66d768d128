"""Resizing stored samples to an exact size, and colours for invisible pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BAND_SAMPLES = 8_000_000
_SUPPORT = 3  # source pixels that Lanczos reaches to each side, at scale 1


def resize(samples: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Resample (H, W, C) uint8 or uint16 to (``height``, ``width``, C), rounded half up.

    Bicubic when enlarging (it overshoots less than Lanczos, which matters at the hard edges of an alpha channel),
    antialiased Lanczos when shrinking. Works in float32 over bands of rows, so the extra memory stays at some tens of
    megabytes; bands give the same samples as one pass would.
    """
    rows, columns, channels = samples.shape
    if (rows, columns) == (height, width):
        return samples
    result = np.empty((height, width, channels), samples.dtype)
    peak = float(np.iinfo(samples.dtype).max)
    step = rows / height
    band = max(1, int(_BAND_SAMPLES / (max(columns * max(step, 1.0), width) * channels)))
    for top in range(0, height, band):
        bottom = min(top + band, height)
        reach = math.ceil(_SUPPORT * max(step, 1.0)) + 1
        first, last = max(0, math.floor(top * step) - reach), min(rows, math.ceil(bottom * step) + reach)
        box = (0.0, top * step - first, float(columns), min(bottom * step - first, float(last - first)))
        for channel in range(channels):
            plane = Image.fromarray(samples[first:last, :, channel].astype(np.float32))
            kernel = Image.Resampling.BICUBIC if height * width >= rows * columns else Image.Resampling.LANCZOS
            values = np.asarray(plane.resize((width, bottom - top), kernel, box=box))
            result[top:bottom, :, channel] = np.floor(values + 0.5).clip(0.0, peak)
    return result


def fill_transparent(pixels: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """``pixels`` (H, W, C) with every fully transparent pixel given the colour of its visible surroundings.

    What a file stores under alpha 0 is arbitrary, often black; left there, the network and the resampling would mix it
    into the visible edge as a fringe. Colours come from a pyramid of alpha-weighted averages: the finest level that
    sees any visible pixel decides.
    """
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return pixels
    weights = (~hidden).astype(np.float32)[..., None]
    filled = _pull_push(pixels.astype(np.float32) * weights, weights)
    return np.where(hidden[..., None], np.floor(filled + 0.5).astype(pixels.dtype), pixels)


def _pull_push(weighted: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Averages (H, W, C): of the pixel itself where its weight is positive, else of the next coarser level."""
    height, width = weights.shape[:2]
    own = (weighted / np.maximum(weights, 1e-6)).astype(np.float32, copy=False)
    if height == 1 and width == 1:
        return own
    coarse = _pull_push(_halve(weighted), _halve(weights))
    spread = coarse.repeat(2, axis=0)[:height].repeat(2, axis=1)[:, :width]
    return np.where(weights > 0, own, spread).astype(np.float32, copy=False)


def _halve(values: NDArray[np.float32]) -> NDArray[np.float32]:
    height, width = values.shape[:2]
    padded = np.pad(values, ((0, height % 2), (0, width % 2), (0, 0)))
    rows = padded[0::2] + padded[1::2]
    return ((rows[:, 0::2] + rows[:, 1::2]) / 4).astype(np.float32, copy=False)

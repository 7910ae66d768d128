"""Resizing: stored samples to an exact size, tensors by a whole factor, and colours for invisible pixels."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

_BAND_SAMPLES = 8_000_000
_SUPPORT = 3  # source pixels that Lanczos reaches to each side, at scale 1
_NEIGHBOURHOOD = 8
_VISIBLE = 1 / 8


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
    """``pixels`` (H, W, C) with (nearly) invisible pixels given the colour of their visible surroundings.

    What a file stores under an alpha of 0 or near it is arbitrary, often black; left there, the network and the
    resampling would mix it into the visible edge as a fringe. A pixel counts as visible by its alpha relative to the
    largest alpha within :data:`_NEIGHBOURHOOD` pixels: from :data:`_VISIBLE` of that on it keeps its colour, below, its
    share falls with the square. The rest comes from a pyramid of averages that are weighted by alpha.
    """
    if not alpha.any():
        return pixels
    values = torch.from_numpy(alpha.astype(np.float32))[None, None]
    side = 2 * _NEIGHBOURHOOD + 1
    largest = functional.max_pool2d(values, (1, side), stride=1, padding=(0, _NEIGHBOURHOOD))
    largest = functional.max_pool2d(largest, (side, 1), stride=1, padding=(_NEIGHBOURHOOD, 0))
    share = (values / (largest * _VISIBLE).clamp(min=1e-6)).clamp(max=1.0).square()[0, 0].numpy()[..., None]
    if share.min() == 1.0:
        return pixels
    weights = (values / values.max())[0, 0].numpy()[..., None]
    colours = pixels.astype(np.float32)
    filled = share * colours + (1.0 - share) * _pull_push(colours * weights, weights)
    return np.where(share < 1.0, np.floor(filled + 0.5).astype(pixels.dtype), pixels)


def _pull_push(weighted: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Averages (H, W, C): of the pixel itself by its weight, for the rest of the next coarser level."""
    height, width = weights.shape[:2]
    if height == 1 and width == 1:
        return (weighted / np.maximum(weights, 1e-6)).astype(np.float32, copy=False)
    coarse = _pull_push(_halve(weighted), _halve(weights))
    spread = coarse.repeat(2, axis=0)[:height].repeat(2, axis=1)[:, :width]
    return (weighted + (1.0 - weights) * spread).astype(np.float32, copy=False)


def _halve(values: NDArray[np.float32]) -> NDArray[np.float32]:
    height, width = values.shape[:2]
    padded = np.pad(values, ((0, height % 2), (0, width % 2), (0, 0)))
    rows = padded[0::2] + padded[1::2]
    return ((rows[:, 0::2] + rows[:, 1::2]) / 4).astype(np.float32, copy=False)


# ---- enlargement of tensors by whole factors ----

BICUBIC_REACH = 2
"""Input pixels that bicubic interpolation looks at to each side."""


def bicubic(x: Tensor, scale: int, *, a: float = -0.75) -> Tensor:
    """(N, C, h, w) to (N, C, ``scale`` h, ``scale`` w) by Keys' cubic of parameter ``a``, not clamped, in the dtype of
    ``x``.

    -0.75 is PyTorch's and OpenCV's, with border pixels repeated outwards; networks were trained on it. -0.5 is
    Pillow's, with the weights renormalised at borders. Results equal PyTorch's own but for rounding.
    """
    if a not in (-0.75, -0.5):
        raise ValueError(f"the cubic's parameter a must be -0.75 or -0.5, got {a}")
    if a == -0.5:
        size = [scale * side for side in x.shape[-2:]]
        return functional.interpolate(x, size, mode="bicubic", antialias=True)
    if x.device.type != "cpu":
        return functional.interpolate(x, scale_factor=float(scale), mode="bicubic", align_corners=False)
    # Output pixels at equal offsets within an input pixel have equal weights: the whole is one small convolution and a
    # pixel shuffle, several times as fast on a CPU as PyTorch's own kernel.
    count, channels, height, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    planes = x.to(dtype).reshape(count * channels, 1, height, width)
    padded = functional.pad(planes, (BICUBIC_REACH,) * 4, mode="replicate")
    enlarged = functional.pixel_shuffle(functional.conv2d(padded, bicubic_weights(scale).to(dtype)), scale)
    return enlarged.reshape(count, channels, scale * height, scale * width).to(x.dtype)


def bicubic_weights(scale: int) -> Tensor:
    """Weights (scale^2, 1, 5, 5) of the surrounding pixels, float64, for every offset within one, row by row."""
    return torch.tensor(_bicubic_values(scale), device="cpu")


@functools.cache
def _bicubic_values(scale: int) -> NDArray[np.float64]:
    # Numbers are kept and no tensor: one that is made in inference mode cannot be trained with, and one that is made
    # while a graph is traced belongs to that graph.
    offsets = (np.arange(scale) + 0.5) / scale - 0.5
    pixels = np.arange(-BICUBIC_REACH, BICUBIC_REACH + 1.0)
    line = _cubic(np.abs(offsets[:, None] - pixels), a=-0.75)  # (scale, 5)
    values: NDArray[np.float64] = np.einsum("pi,qj->pqij", line, line)
    return values.reshape(scale**2, 1, len(pixels), len(pixels))


def _cubic(distance: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """Keys' kernel at distances of 0 and more: two cubic polynomials, zero from 2 on."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

"""Colour transfer from the input to the output of a network, and BT.601 luma.

A network may shift colours slightly. Two corrections are in use with one-step diffusion (OSEDiff follows StableSR
here): AdaIN gives each channel the mean and deviation of the input, and the wavelet correction gives the image the
low frequencies of the input. These hold the blocks of a strong JPEG compression too: with a tolerance, small
differences are left to a network that removes them. All take tensors (N, C, H, W) in [0, 1] of equal shape:
``content``, the output of the network, and ``style``, the input enlarged to the same size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

ColorTransfer = Literal["wavelet", "drift", "adain", "none"]
"""Corrections by name."""
WAVELET_RADII = (1, 2, 4, 8, 16)
"""Dilations of the successive blurs of the wavelet correction."""
TOLERANCES: dict[str, float] = {"wavelet": 0.0, "drift": 8 / 255}
"""Differences of low frequencies that :func:`wavelet` leaves as they are, by correction: "drift" leaves most of the
blocks of a strong compression to the network, and corrects what drifts further, such as a network's pure colours."""

_VARIANCE_FLOOR = 1e-5
_LUMA_STUDIO = (65.481, 128.553, 24.966)
_LUMA_FULL = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation (floored) of each channel, both (N, C, 1, 1) float64."""

    mean: Tensor
    deviation: Tensor


def statistics(bands: Iterable[Tensor]) -> Statistics:
    """Statistics over bands (N, C, h_i, W) of one image, of which only one band need be in memory at a time.

    The variance is unbiased and has 1e-5 added before the root. Sums are float64 about the first band's mean, so that
    the result does not depend on the bands to any visible degree.
    """
    count, shift = 0, torch.zeros(())
    first = second = torch.zeros((), dtype=torch.float64)
    for band in bands:
        values = band.double()
        if count == 0:
            shift = values.mean(dim=(2, 3), keepdim=True)
        values = values - shift
        first = first + values.sum(dim=(2, 3), keepdim=True)
        second = second + values.square().sum(dim=(2, 3), keepdim=True)
        count += values.shape[2] * values.shape[3]
    variance = (second - first.square() / max(count, 1)).clamp(min=0.0) / max(count - 1, 1)
    return Statistics(shift + first / max(count, 1), (variance + _VARIANCE_FLOOR).sqrt())


def match_statistics(content: Tensor, own: Statistics, wanted: Statistics) -> Tensor:
    """``content`` (N, C, H, W) moved from its ``own`` statistics to the ``wanted`` ones, clamped to [0, 1]."""
    gain = (wanted.deviation / own.deviation).to(content)
    return ((content - own.mean.to(content)) * gain + wanted.mean.to(content)).clamp(0.0, 1.0)


def adain(content: Tensor, style: Tensor) -> Tensor:
    """Adaptive instance normalisation: each channel of ``content`` with the mean and deviation of ``style``."""
    return match_statistics(content, statistics([content]), statistics([style]))


def wavelet(content: Tensor, style: Tensor, tolerance: float = 0.0) -> Tensor:
    """High frequencies of ``content`` with the low frequencies of ``style``, clamped to [0, 1].

    Only what their low frequencies differ by beyond ``tolerance`` is taken over.

    ``high(content) + low(style)`` equals ``content + low(style - content)``, since the five blurs are linear: one set
    of blurs instead of two. What lies further from a pixel than the sum of :data:`WAVELET_RADII` has no influence.
    """
    # On a CPU channel by channel: what the blurs read and write then stays in its cache.
    width = 1 if content.device.type == "cpu" else content.shape[1]
    pairs = zip(torch.split(content, width, dim=1), torch.split(style, width, dim=1), strict=True)
    corrected = []
    for high, low in pairs:
        missing = low_frequencies(low - high)
        missing = functional.softshrink(missing, tolerance) if tolerance else missing
        corrected.append(missing.add_(high).clamp_(0.0, 1.0))
    return torch.cat(corrected, dim=1)


def low_frequencies(values: Tensor) -> Tensor:
    """Low frequencies of (N, C, H, W): what five blurs of growing dilation leave."""
    for radius in WAVELET_RADII:
        values = blur(values, radius)
    return values


def blur(values: Tensor, radius: int) -> Tensor:
    """Convolve every channel with [1 2 1; 2 4 2; 1 2 1] / 16, dilated by ``radius``, the border repeated."""
    padded = functional.pad(values, (radius,) * 4, mode="replicate")
    columns = (padded[..., : -2 * radius] + padded[..., 2 * radius :]).add_(padded[..., radius:-radius], alpha=2)
    rows = (columns[..., : -2 * radius, :] + columns[..., 2 * radius :, :]).add_(
        columns[..., radius:-radius, :], alpha=2
    )
    return rows.mul_(1 / 16)


def gray(rgb: Tensor) -> Tensor:
    """Full-range BT.601 luma: (N, 3, H, W) -> (N, 1, H, W), both in [0, 1]."""
    return _weighted(rgb, _LUMA_FULL)


def luma(rgb: Tensor) -> Tensor:
    """Studio-swing BT.601 luma, not rounded: (N, 3, H, W) in [0, 1] -> (N, 1, H, W) in [16/255, 235/255]."""
    return (_weighted(rgb, _LUMA_STUDIO) + 16.0) / 255.0


def _weighted(rgb: Tensor, weights: tuple[float, float, float]) -> Tensor:
    return (rgb * rgb.new_tensor(weights).reshape(1, 3, 1, 1)).sum(dim=1, keepdim=True)

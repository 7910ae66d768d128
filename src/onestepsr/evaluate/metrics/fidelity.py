"""Image metrics as pure functions of tensors: fidelity to a reference, and artefacts that fidelity hides.

Every function takes RGB (N, 3, H, W) in [0, 1] and returns one float64 value per image (N,). Papers differ in which
luma they measure and whether it is rounded, and the digits differ with it: the settings here are those of IQA-PyTorch,
which reproduce OSEDiff's published log, and BasicSR's beside them under names that say so. Inputs are taken as they
are: round to 8 bits first (:func:`as_eight_bit`) where the numbers have to be those of the saved images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.imaging.color import gray, luma

Metric = Callable[[Tensor, Tensor], Tensor]
"""A full-reference metric: (SR, HR) -> (N,)."""
Planes = Literal["studio", "yiq", "rgb"]
"""Planes that are compared. ``studio``: Y of ITU-R BT.601 in [16, 235]. ``yiq``: its full-range weights, Y in [0, 255].
``rgb``: the three channels, whose values are averaged."""

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, finest first (Wang, Simoncelli and Bovik 2003, section 3.2)."""
MS_SSIM_SIDE = (SSIM_WINDOW - 1) * 2 ** (len(MS_SSIM_WEIGHTS) - 1) + 1
"""Smallest side of which the coarsest scale still holds one window."""
MSE_FLOOR = 1e-8
"""Added to the mean squared error, so that equal images score 80 dB instead of infinity."""
LATTICE = 4
"""Side of the output block that a x4 network makes from one input pixel."""
EDGE_WINDOW = 7
STRONG_EDGE = 64 / 255


def studio_luma(image: Tensor) -> Tensor:
    """Y of ITU-R BT.601 in studio range: (N, 3, H, W) in [0, 1] -> (N, 1, H, W) in [16/255, 235/255], float64."""
    return luma(_float64(image))


def as_eight_bit(image: Tensor) -> Tensor:
    """The values an 8-bit file would hold: clamped to [0, 1] and rounded to multiples of 1/255."""
    return (image.clamp(0, 1) * 255).round() / 255


def psnr_rgb(sr: Tensor, hr: Tensor) -> Tensor:
    """Peak signal-to-noise ratio over the three channels, in dB, at most 80."""
    _check_pair(sr, hr)
    return _psnr(_float64(sr), _float64(hr))


def psnr_y(sr: Tensor, hr: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of the unrounded studio luma, in dB, at most 80."""
    _check_pair(sr, hr)
    return _psnr(studio_luma(sr), studio_luma(hr))


def ssim_y(sr: Tensor, hr: Tensor) -> Tensor:
    """Structural similarity of the studio luma rounded to 8 bits, at most 1; see :func:`ssim`."""
    return ssim(sr, hr, planes="studio")


def ssim_rgb(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean over the three channels of their structural similarity, at most 1; see :func:`ssim`."""
    return ssim(sr, hr, planes="rgb")


def ssim_basicsr(sr: Tensor, hr: Tensor) -> Tensor:
    """Structural similarity as BasicSR measures it: studio luma that is not rounded, negative terms counted."""
    return ssim(sr, hr, planes="studio", rounded=False, clamped=False)


def ssim(sr: Tensor, hr: Tensor, *, planes: Planes = "studio", rounded: bool = True, clamped: bool = True) -> Tensor:
    """Structural similarity (Wang et al. 2004, Eq. 13) with an 11 x 11 Gaussian window of deviation 1.5.

    Windows that leave the image are left out. As IQA-PyTorch has it, values are rounded to 8 bits after the change of
    colour space (``rounded``) and negative contrast-structure terms count as zero (``clamped``); together worth up to
    0.007 against implementations without. Needs at least 11 x 11 pixels.
    """
    _check_pair(sr, hr)
    if min(sr.shape[-2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {_size(sr)}")
    x, y = (_planes(image, planes, rounded) for image in (sr, hr))
    luminance, contrast_structure = _ssim_terms(x, y)
    if clamped:
        contrast_structure = contrast_structure.clamp(min=0)
    return _mean(luminance * contrast_structure)


def ms_ssim(sr: Tensor, hr: Tensor) -> Tensor:
    """Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003, Eq. 7) of the rounded studio luma, at most 1.

    Between the five scales, 2 x 2 pixels are averaged; an odd last row or column is repeated, as the authors' code
    mirrors it. Negative contrast-structure terms count as zero. Needs at least 161 x 161 pixels.
    """
    _check_pair(sr, hr)
    if min(sr.shape[-2:]) < MS_SSIM_SIDE:
        raise UserError(f"MS-SSIM needs at least {MS_SSIM_SIDE} x {MS_SSIM_SIDE} pixels, got {_size(sr)}")
    x, y = (_planes(image, "studio", rounded=True) for image in (sr, hr))
    result = torch.ones(len(x), dtype=x.dtype, device=x.device)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        x, y = (_halved(plane) for plane in (x, y)) if scale else (x, y)
        luminance, contrast_structure = _ssim_terms(x, y)
        contrast_structure = contrast_structure.clamp(min=0)
        coarsest = scale == len(MS_SSIM_WEIGHTS) - 1
        factor = luminance * contrast_structure if coarsest else contrast_structure
        result = result * _mean(factor) ** weight
    return result


def grid_artifact(image: Tensor) -> Tensor:
    """Dependence of fine detail on the position inside the 4 x 4 output block; 0 is best, no reference needed.

    |Y - 5x5 mean of Y| is averaged for each of the 16 positions of the lattice; the value is the standard deviation of
    the 16 averages over their mean. Photos score about 0.02, plain bicubic x4 enlargements 0.05 to 0.15 (they are
    smoother between the input's samples than at them); checkerboards of transposed convolutions and grids of sub-pixel
    layers score in that range and above. Needs at least 8 x 8 pixels.
    """
    check_image(image)
    if min(image.shape[-2:]) < 2 * LATTICE:
        raise UserError(f"the grid measure needs at least {2 * LATTICE} x {2 * LATTICE} pixels, got {_size(image)}")
    y = studio_luma(image)
    return lattice_variation((y[..., 2:-2, 2:-2] - F.avg_pool2d(y, 5, stride=1)).abs())


def lattice_variation(strength: Tensor) -> Tensor:
    """Variation (N,) of a plane (N, 1, H, W) over the lattice: of the averages at its 16 positions, the standard
    deviation over the mean."""
    averages = [
        _mean(strength[..., row::LATTICE, column::LATTICE]) for row in range(LATTICE) for column in range(LATTICE)
    ]
    phases = torch.stack(averages, dim=1)  # (N, 16)
    return phases.std(dim=1, correction=0) / phases.mean(dim=1).clamp(min=1e-12)


def overshoot(sr: Tensor, hr: Tensor) -> Tensor:
    """Ringing and halos beside strong edges, in gray levels of 255; 0 is best.

    The amount by which Y of the SR image leaves the range of Y of the HR image in the 7 x 7 neighbourhood, averaged
    over the pixels where that range is at least 64 gray levels; 0 if the HR image has no such edge. Unlike PSNR it
    forgives blur and shifted detail, which stay inside the range, and counts visible halos.
    """
    _check_pair(sr, hr)
    y, reference = studio_luma(sr), studio_luma(hr)
    high = F.max_pool2d(reference, EDGE_WINDOW, stride=1, padding=EDGE_WINDOW // 2)
    low = -F.max_pool2d(-reference, EDGE_WINDOW, stride=1, padding=EDGE_WINDOW // 2)
    near_edge = (high - low >= STRONG_EDGE).to(y.dtype)
    excess = ((y - high).clamp(min=0) + (low - y).clamp(min=0)) * near_edge
    share = _mean(near_edge)
    return 255 * _mean(excess) / torch.where(share > 0, share, 1.0)


def check_image(image: Tensor) -> None:
    """Raise UserError unless ``image`` is (N, 3, H, W) and every value is finite."""
    if image.ndim != 4 or image.shape[1] != 3:
        raise UserError(f"metrics expect RGB images of shape (N, 3, H, W), got {tuple(image.shape)}")
    if not image.isfinite().all():
        count = int((~image.isfinite()).sum())
        raise UserError(f"{count} of {image.numel()} values are not finite: metrics expect numbers in [0, 1]")


def _planes(image: Tensor, planes: Planes, rounded: bool) -> Tensor:
    """The planes (N, 1 or 3, H, W) in [0, 255] that SSIM compares, float64."""
    values = _float64(image)
    if planes != "rgb":
        values = luma(values) if planes == "studio" else gray(values)
    return (values * 255).round() if rounded else values * 255


def _ssim_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure term of every window of two planes (N, C, H, W) in [0, 255]."""
    mean_x, mean_y = _gaussian(x), _gaussian(y)
    variance_x = _gaussian(x * x) - mean_x**2
    variance_y = _gaussian(y * y) - mean_y**2
    covariance = _gaussian(x * y) - mean_x * mean_y
    contrast_structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1), contrast_structure


def _psnr(x: Tensor, y: Tensor) -> Tensor:
    return -10 * torch.log10(_mean((x - y).square()) + MSE_FLOOR)


def _mean(planes: Tensor) -> Tensor:
    """Mean (N,) of (N, C, H, W): of the means of rows, each the work of one thread.

    A sum that several threads share has other last digits for every number of them.
    """
    return planes.mean(dim=3).mean(dim=2).mean(dim=1)


def _gaussian(planes: Tensor) -> Tensor:
    """Gaussian window mean of (N, C, H, W), valid positions only: (N, C, H - 10, W - 10)."""
    offset = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    # The 2-D window of IQA-PyTorch is stored in float32; a separable one in float64 differs by about 1e-7 in SSIM.
    taps = (window / window.sum()).tolist()
    return _weighted_sum(_weighted_sum(planes, taps, dim=-1), taps, dim=-2)


def _weighted_sum(planes: Tensor, taps: list[float], dim: int) -> Tensor:
    """Valid correlation along one dimension. Sums of slices: PyTorch's float64 convolutions are ten times slower."""
    length = planes.shape[dim] - len(taps) + 1
    result = planes.narrow(dim, 0, length) * taps[0]
    for start, weight in enumerate(taps[1:], 1):
        result.add_(planes.narrow(dim, start, length), alpha=weight)
    return result


def _halved(planes: Tensor) -> Tensor:
    height, width = planes.shape[-2:]
    return F.avg_pool2d(F.pad(planes, (0, width % 2, 0, height % 2), mode="replicate"), 2)


def _float64(image: Tensor) -> Tensor:
    # Apple's GPU backend has no float64; metrics run on the CPU there.
    return image.detach().to("cpu" if image.device.type == "mps" else image.device, torch.float64)


def _check_pair(sr: Tensor, hr: Tensor) -> None:
    for image in (sr, hr):
        check_image(image)
    if sr.shape != hr.shape:
        raise UserError(f"SR is {_size(sr)} but HR is {_size(hr)}: metrics compare images of the same size")


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]}" + (f" (x {len(image)})" if len(image) > 1 else "")

"""Image metrics as pure functions of tensors: fidelity to a reference, and artefacts that fidelity hides.

Every function takes RGB (N, 3, H, W) in [0, 1] and returns one float64 value per image (N,). Papers differ in which
luma they measure and whether it is rounded, and the digits differ with it: the settings here are those of IQA-PyTorch,
which reproduce OSEDiff's published log. Inputs are taken as they are: round to 8 bits first (:func:`as_eight_bit`)
where the numbers have to be those of the saved pictures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onestepsr.color import luma
from onestepsr.errors import UserError

Metric = Callable[[Tensor, Tensor], Tensor]
"""A full-reference metric: (SR, HR) -> (N,)."""

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
MSE_FLOOR = 1e-8
"""Added to the mean squared error, so that equal images score 80 dB instead of infinity."""
LATTICE = 4
"""Side of the output cell that a x4 network makes from one input pixel."""
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
    """Structural similarity (Wang et al. 2004, Eq. 13) of the studio luma rounded to 8 bits, at most 1.

    Negative contrast-structure terms count as zero, and windows that leave the image are left out; both as IQA-PyTorch
    has it, and together worth up to 0.007 against other implementations. Needs at least 11 x 11 pixels.
    """
    _check_pair(sr, hr)
    if min(sr.shape[-2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {_size(sr)}")
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    x, y = (studio_luma(sr) * 255).round(), (studio_luma(hr) * 255).round()
    mean_x, mean_y = _gaussian(x), _gaussian(y)
    variance_x = _gaussian(x * x) - mean_x**2
    variance_y = _gaussian(y * y) - mean_y**2
    covariance = _gaussian(x * y) - mean_x * mean_y
    contrast_structure = ((2 * covariance + c2) / (variance_x + variance_y + c2)).clamp(min=0)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast_structure).flatten(1).mean(1)


def grid_artifact(image: Tensor) -> Tensor:
    """How strongly fine detail depends on the position inside the 4 x 4 output cell; 0 is best, no reference needed.

    |Y - 5x5 mean of Y| is averaged for each of the 16 positions of the lattice; the value is the standard deviation of
    the 16 averages over their mean. Photos score about 0.02, plain bicubic x4 enlargements 0.05 to 0.15 (they are
    smoother between the input's samples than at them); checkerboards of transposed convolutions and grids of sub-pixel
    layers score in that range and above. Needs at least 8 x 8 pixels.
    """
    _check_image(image)
    if min(image.shape[-2:]) < 2 * LATTICE:
        raise UserError(f"the grid measure needs at least {2 * LATTICE} x {2 * LATTICE} pixels, got {_size(image)}")
    luma = studio_luma(image)
    detail = (luma[..., 2:-2, 2:-2] - F.avg_pool2d(luma, 5, stride=1)).abs()
    averages = [
        detail[..., row::LATTICE, column::LATTICE].flatten(1).mean(1)
        for row in range(LATTICE)
        for column in range(LATTICE)
    ]
    phases = torch.stack(averages, dim=1)  # (N, 16)
    return phases.std(dim=1, correction=0) / phases.mean(dim=1).clamp(min=1e-12)


def overshoot(sr: Tensor, hr: Tensor) -> Tensor:
    """Ringing and halos beside strong edges, in grey levels of 255; 0 is best.

    By how much Y of the SR image leaves the range that Y of the HR image spans in the 7 x 7 neighbourhood, averaged
    over the pixels where that range is at least 64 grey levels. 0 where the HR image has no such edge. Unlike PSNR it
    forgives blur and shifted detail, which stay inside the range, and counts what an observer sees as a halo.
    """
    _check_pair(sr, hr)
    y, reference = studio_luma(sr), studio_luma(hr)
    high = F.max_pool2d(reference, EDGE_WINDOW, stride=1, padding=EDGE_WINDOW // 2)
    low = -F.max_pool2d(-reference, EDGE_WINDOW, stride=1, padding=EDGE_WINDOW // 2)
    near_edge = (high - low >= STRONG_EDGE).to(y.dtype)
    excess = ((y - high).clamp(min=0) + (low - y).clamp(min=0)) * near_edge
    return 255 * excess.flatten(1).sum(1) / near_edge.flatten(1).sum(1).clamp(min=1)


def _psnr(x: Tensor, y: Tensor) -> Tensor:
    mse = (x - y).square().flatten(1).mean(1)
    return -10 * torch.log10(mse + MSE_FLOOR)


def _gaussian(image: Tensor) -> Tensor:
    """Gaussian window mean of (N, 1, H, W), valid positions only: (N, 1, H - 10, W - 10)."""
    offset = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=image.device) - SSIM_WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    # The 2-D window of IQA-PyTorch is stored in float32; a separable one in float64 differs by about 1e-7 in SSIM.
    window = window / window.sum()
    return F.conv2d(F.conv2d(image, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))


def _float64(image: Tensor) -> Tensor:
    # Apple's GPU backend has no float64; there the measuring happens on the CPU.
    return image.detach().to("cpu" if image.device.type == "mps" else image.device, torch.float64)


def _check_image(image: Tensor) -> None:
    if image.ndim != 4 or image.shape[1] != 3:
        raise UserError(f"metrics expect RGB images of shape (N, 3, H, W), got {tuple(image.shape)}")


def _check_pair(sr: Tensor, hr: Tensor) -> None:
    _check_image(sr)
    if sr.shape != hr.shape:
        raise UserError(f"SR is {_size(sr)} but HR is {_size(hr)}: metrics compare images of the same size")


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]}" + (f" (x {len(image)})" if len(image) > 1 else "")

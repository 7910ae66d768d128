"""The steps of synthetic degradation: filter, resize, noise, sharpening. Images are (N, 3, H, W), RGB in [0, 1]."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ResizeMode = Literal["area", "bilinear", "bicubic"]
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
USM_SIZE = 51


def filter2d(images: Tensor, kernels: Tensor) -> Tensor:
    """Cross-correlate ``images`` (N, C, H, W) with ``kernels`` (k, k) or one each (N, k, k), k odd, borders reflected.

    Runs in the frequency domain at the image's precision: exact to float32 rounding, and about ten times faster on a
    CPU than a 21x21 convolution of three channels.
    """
    kernels = kernels.to(images).reshape(-1, 1, *kernels.shape[-2:])
    pad, (height, width) = kernels.shape[-1] // 2, images.shape[-2:]
    padded = reflect_pad(images, pad)
    size = (_fast_length(padded.shape[-2]), _fast_length(padded.shape[-1]))
    spectrum = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(kernels, s=size).conj()
    filtered: Tensor = torch.fft.irfft2(spectrum, s=size)
    return filtered[..., :height, :width]


def reflect_pad(images: Tensor, pad: int) -> Tensor:
    """Reflect every border ``pad`` pixels wide, repeatedly where the image is smaller than that."""
    if pad < min(images.shape[-2:]):
        return F.pad(images, (pad, pad, pad, pad), mode="reflect")
    rows = _reflected_indices(images.shape[-2], pad, images.device)
    columns = _reflected_indices(images.shape[-1], pad, images.device)
    return images[..., rows[:, None], columns]


def resize(images: Tensor, size: tuple[int, int], mode: ResizeMode, *, antialias: bool = False) -> Tensor:
    """Resize to ``size`` (height, width). ``antialias`` widens bilinear and bicubic filters when shrinking."""
    if tuple(images.shape[-2:]) == size:
        return images
    if mode == "area":
        return F.interpolate(images, size=size, mode=mode)
    return F.interpolate(images, size=size, mode=mode, antialias=antialias)


def rescale(images: Tensor, factor: float, mode: ResizeMode, *, antialias: bool = False) -> Tensor:
    """Resize by ``factor`` to the next smaller whole size (at least 1), sampling at the exact factor."""
    if factor == 1:
        return images
    if min(images.shape[-2:]) * factor < 1:
        return resize(images, _at_least_one(images, factor), mode, antialias=antialias)
    if mode == "area":
        return F.interpolate(images, scale_factor=factor, mode=mode)
    return F.interpolate(images, scale_factor=factor, mode=mode, antialias=antialias)


def add_gaussian_noise(images: Tensor, sigma: Tensor, gray: Tensor, rng: torch.Generator) -> Tensor:
    """Add N(0, (sigma / 255)^2) and clamp to [0, 1]; ``sigma`` and the boolean ``gray`` are (N,).

    Gray images share one (H, W) field over channels and over the batch, as in Real-ESRGAN.
    """
    scale = (sigma / 255).to(images).view(-1, 1, 1, 1)
    gray = gray.to(images.device).view(-1, 1, 1, 1)
    noise = torch.zeros((), device=images.device)
    if gray.any():
        noise = _normal(images.shape[-2:], images, rng).expand_as(images)
    if not gray.all():
        noise = torch.where(gray, noise, _normal(images.shape, images, rng))
    return (images + noise * scale).clamp(0, 1)


def add_poisson_noise(images: Tensor, scale: Tensor, gray: Tensor, rng: torch.Generator) -> Tensor:
    """Add ``scale`` times shot noise and clamp to [0, 1]; ``scale`` and the boolean ``gray`` are (N,).

    The photon count at white is the power of two not below the image's number of distinct 8-bit values, so flat
    images are noisier. Gray images get the shot noise of their luma in all channels.
    """
    gray = gray.to(images.device).view(-1, 1, 1, 1)
    noise = torch.zeros((), device=images.device)
    if gray.any():
        weights = images.new_tensor(GRAY_WEIGHTS).view(1, 3, 1, 1)
        noise = _shot_noise((images * weights).sum(1, keepdim=True), rng)
    if not gray.all():
        noise = torch.where(gray, noise, _shot_noise(images, rng))
    return (images + noise * scale.to(images).view(-1, 1, 1, 1)).clamp(0, 1)


def unsharp_mask(images: Tensor, weight: float = 0.5, threshold: float = 10) -> Tensor:
    """Sharpen where an image differs from its 51x51 blur by more than ``threshold`` 8-bit levels (USM)."""
    residual = images - _wide_blur(images)
    mask = _wide_blur((residual.abs() * 255 > threshold).to(images.dtype))
    sharp = (images + weight * residual).clamp(0, 1)
    return mask * sharp + (1 - mask) * images


def to_8bit(images: Tensor) -> Tensor:
    """Clamp to [0, 1] and round to the 256 levels that an 8-bit file can hold."""
    return (images * 255).round().clamp(0, 255) / 255


def gaussian_profile(size: int) -> Tensor:
    """Normalised one-dimensional Gaussian with the width that OpenCV takes for a kernel of ``size``, float64."""
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    profile = torch.exp(-0.5 * (axis / sigma) ** 2)
    return profile / profile.sum()


def _wide_blur(images: Tensor) -> Tensor:
    profile = gaussian_profile(USM_SIZE)
    return filter2d(images, torch.outer(profile, profile))


def _shot_noise(images: Tensor, rng: torch.Generator) -> Tensor:
    quantized = to_8bit(images)
    levels = (quantized * 255).round().long().flatten(1)
    counts = torch.zeros(len(images), 256, device=images.device).scatter_(1, levels, 1.0).sum(1)
    photons = torch.tensor([2.0 ** math.ceil(math.log2(count)) for count in counts.tolist()])
    photons = photons.to(images).view(-1, 1, 1, 1)
    return torch.poisson(quantized * photons, generator=rng) / photons - quantized


def _normal(shape: torch.Size, like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=like.dtype, device=like.device)


def _at_least_one(images: Tensor, factor: float) -> tuple[int, int]:
    height, width = (max(1, int(side * factor)) for side in images.shape[-2:])
    return height, width


def _reflected_indices(length: int, pad: int, device: torch.device) -> Tensor:
    if length == 1:
        return torch.zeros(1 + 2 * pad, dtype=torch.long, device=device)
    position = torch.arange(-pad, length + pad, device=device) % (2 * (length - 1))
    return torch.where(position < length, position, 2 * (length - 1) - position)


def _fast_length(length: int) -> int:
    """The next length that has no prime factor above 5."""
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1

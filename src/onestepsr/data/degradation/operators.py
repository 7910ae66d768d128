"""The steps of synthetic degradation: filter, resize, noise, sharpening. Images are (N, 3, H, W), RGB in [0, 1]."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
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
    size = (next_fast_len(padded.shape[-2], real=True), next_fast_len(padded.shape[-1], real=True))
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
        height, width = (max(1, int(side * factor)) for side in images.shape[-2:])
        return resize(images, (height, width), mode, antialias=antialias)
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


def _reflected_indices(length: int, pad: int, device: torch.device) -> Tensor:
    if length == 1:
        return torch.zeros(1 + 2 * pad, dtype=torch.long, device=device)
    position = torch.arange(-pad, length + pad, device=device) % (2 * (length - 1))
    return torch.where(position < length, position, 2 * (length - 1) - position)


# ---- JPEG ------------------------------------------------------------------------------------------------------------
# The arithmetic is that of DiffJPEG (Shin & Song, 2017) as Real-ESRGAN's training uses it. It differs from a real
# encoder: pixels are never rounded to 8 bit, sides are filled up to multiples of 16 with black, chroma is enlarged by
# repetition, the quality is a real number, quantisation may be finer than 1, and the luma table is applied transposed
# (the published code stores it so). The variant ``standard`` fills with the last row and column, rounds the pixels, and
# has whole tables of 1 to 255 in the right orientation, as an encoder does.

LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
"""Table K.1 of the JPEG standard (ITU-T T.81)."""
CHROMA_CORNER = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))
"""Table K.2 of the same; everything outside this corner is 99."""
RGB_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
YCBCR_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))
BLOCK = 8
Variant = Literal["published", "standard"]
FINEST_STEP = 1e-4
"""Quality 100 would divide by 0."""


def jpeg(images: Tensor, quality: Tensor | float, *, variant: Variant = "published") -> Tensor:
    """Compress ``images`` (N, 3, H, W) in [0, 1] at ``quality`` in (0, 100], one number or (N,), and decompress them.

    Take the variant ``standard`` for small images: filled with black, their last rows and columns ring and lose colour.
    Returns (N, 3, H, W) in [0, 1], not rounded to 8 bit.
    """
    count, _, height, width = images.shape
    quality = torch.as_tensor(quality, dtype=images.dtype, device=images.device).expand(count)
    is_standard = variant == "standard"
    fill = "replicate" if is_standard else "constant"
    padded = F.pad(images, (0, -width % 16, 0, -height % 16), mode=fill) * 255
    luma, chroma = _to_ycbcr_420(padded.round() if is_standard else padded)
    luma_table, chroma_table = images.new_tensor(LUMA_TABLE), images.new_full((BLOCK, BLOCK), 99)
    chroma_table[:4, :4] = images.new_tensor(CHROMA_CORNER)
    luma = _requantize(luma, _steps((luma_table if is_standard else luma_table.T).reshape(-1), quality, variant))
    chroma = _requantize(chroma, _steps(chroma_table.reshape(-1), quality, variant))
    result = _to_rgb(luma, chroma)[..., :height, :width]
    return result.clamp(0, 255) / 255


def _steps(table: Tensor, quality: Tensor, variant: Variant) -> Tensor:
    """Quantisation steps (N, 1, 64) of ``table`` (64,) for ``quality`` (N,)."""
    # Percentage of the tables: 5000 / q below quality 50, else 200 - 2 q.
    percentage = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, None, None]
    if variant == "published":
        return (table * (percentage / 100)).clamp(min=FINEST_STEP)
    return ((table * percentage.floor() + 50) / 100).floor().clamp(1, 255)


def _to_ycbcr_420(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Luma (N, 1, H, W) and half-size chroma (N, 2, H/2, W/2), both centred on 0 (128 subtracted)."""
    matrix = rgb.new_tensor(RGB_TO_YCBCR)
    ycbcr = torch.einsum("dc,nchw->ndhw", matrix, rgb)
    # JFIF adds 128 to chroma and the block transform takes 128 off every channel: only luma's offset is left.
    return ycbcr[:, :1] - 128, F.avg_pool2d(ycbcr[:, 1:], 2)


def _to_rgb(luma: Tensor, chroma: Tensor) -> Tensor:
    chroma = chroma.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    matrix = luma.new_tensor(YCBCR_TO_RGB)
    return torch.einsum("dc,nchw->ndhw", matrix, torch.cat([luma + 128, chroma], dim=1))


def _requantize(planes: Tensor, step: Tensor) -> Tensor:
    """Round the DCT coefficients of ``planes`` (N, C, H, W) to multiples of ``step`` (N, 1, 64)."""
    count, channels, height, width = planes.shape
    blocks = planes.reshape(count, channels, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    blocks = blocks.permute(0, 1, 2, 4, 3, 5).reshape(count, -1, BLOCK * BLOCK)
    transform = _block_transform(planes.dtype, planes.device)
    blocks = ((blocks @ transform.T / step).round() * step) @ transform
    blocks = blocks.reshape(count, channels, height // BLOCK, width // BLOCK, BLOCK, BLOCK)
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(count, channels, height, width)


@lru_cache(maxsize=8)
def _block_transform(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal 8x8 DCT-II of row-major blocks as one (64, 64) matrix; its transpose is the inverse."""
    frequency = torch.arange(BLOCK, dtype=torch.float64)[:, None]
    position = torch.arange(BLOCK, dtype=torch.float64)[None, :]
    basis = 0.5 * torch.cos((2 * position + 1) * frequency * math.pi / (2 * BLOCK))
    basis[0] /= math.sqrt(2)
    return torch.kron(basis, basis).to(device, dtype)

"""JPEG compression as a function of tensors: colour transform, 4:2:0, DCT and quantisation, without the entropy coding.

The arithmetic is that of DiffJPEG (Shin & Song, 2017) as Real-ESRGAN's training uses it. It differs from a real
encoder: pixels are never rounded to 8 bit, sides are filled up to multiples of 16 with black, chroma is enlarged by
repetition, the quality is a real number, quantisation may be finer than 1, and the luma table is applied transposed
(the published code stores it so). The variant ``standard`` fills with the last row and column, rounds the pixels, and
has whole tables of 1 to 255 in the right orientation, as an encoder does.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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
    luma = _requantize(luma, _steps(_luma_table(images, variant), quality, variant))
    chroma = _requantize(chroma, _steps(_chroma_table(images), quality, variant))
    result = _to_rgb(luma, chroma)[..., :height, :width]
    return result.clamp(0, 255) / 255


def quality_percentage(quality: Tensor) -> Tensor:
    """Percentage of the quantisation tables: ``5000 / q`` below quality 50, else ``200 - 2 q``."""
    return torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)


def _steps(table: Tensor, quality: Tensor, variant: Variant) -> Tensor:
    """Quantisation steps (N, 1, 64) of ``table`` (64,) for ``quality`` (N,)."""
    percentage = quality_percentage(quality)[:, None, None]
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


def _luma_table(like: Tensor, variant: Variant) -> Tensor:
    table = like.new_tensor(LUMA_TABLE)
    return (table if variant == "standard" else table.T).reshape(-1)


def _chroma_table(like: Tensor) -> Tensor:
    table = like.new_full((BLOCK, BLOCK), 99)
    table[:4, :4] = like.new_tensor(CHROMA_CORNER)
    return table.reshape(-1)

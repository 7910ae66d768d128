"""Penalties on patterns locked to the latent grid, the typical artefact of decoders that enlarge by pixel shuffling."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def lattice_loss(sr: Tensor, hr: Tensor, *, factor: int = 4, window: int = 4) -> Tensor:
    """Mean squared local error at each of the ``factor`` x ``factor`` positions, less the error that they share.

    Real texture does not know where the latent cells begin, so its error averages out over ``window`` x ``window``
    cells at every position alike; a grid does not. A loss of texture statistics is blind to that difference and may
    even ask for a grid. Images are (N, 3, H, W) with sides multiples of ``factor``, at least ``factor * window``.
    """
    n, channels = sr.shape[:2]
    error = F.pixel_unshuffle(sr - hr, factor)  # (N, 3 f^2, H/f, W/f)
    pooled = F.avg_pool2d(error, window, stride=max(1, window // 2))
    by_position = pooled.reshape(n, channels, factor**2, -1)
    return (by_position - by_position.mean(dim=2, keepdim=True)).square().mean()


def lattice_detail_loss(sr: Tensor, *, factor: int = 4, window: int = 5) -> Tensor:
    """How unevenly fine detail lies on the ``factor`` x ``factor`` positions: squared coefficient of variation.

    Detail is |x - its local mean|, averaged over all cells of a picture (N, 3, H, W) for each position. Dots of either
    sign, which :func:`lattice_loss` cannot see because their errors cancel, have their energy at some positions only;
    photos have it at all alike (about 0.0004). No reference is needed.
    """
    grey = sr.mean(dim=1, keepdim=True)
    margin = window // 2
    detail = (grey[..., margin:-margin, margin:-margin] - F.avg_pool2d(grey, window, stride=1)).abs()
    height, width = (side - side % factor for side in detail.shape[-2:])
    energy = F.pixel_unshuffle(detail[..., :height, :width], factor).mean(dim=(2, 3))  # (N, f^2)
    return (energy.var(dim=1, correction=0) / energy.mean(dim=1).square().clamp(min=1e-8)).mean()

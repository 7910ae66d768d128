"""A penalty on patterns locked to the latent grid, the typical artefact of decoders that enlarge by pixel shuffling."""

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

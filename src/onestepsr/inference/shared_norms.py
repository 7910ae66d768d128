"""Group norms with one set of statistics for all tiles of an image.

A group norm divides by the deviation of the tile at hand: sky becomes as lively as foliage, and neighbouring tiles
differ in tone and contrast. Inside :meth:`SharedNorms.calibrated_by`, norms take their statistics from a reduced copy
of the whole image instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.models.cpu_kernels import as_kind, replace_layers

BAND = 2**22
"""Numbers that statistics are taken of at once."""
CALIBRATION_SHARE = 1 / 8
"""Largest part of an image's pixels in its reduced copy, and so its cost beside the tiles."""


class SharedNorm(nn.GroupNorm):
    """A group norm that may be given mean and variance."""

    watching = False
    """True while the statistics of the input are being kept."""
    kept: tuple[Tensor, Tensor] | None = None
    """Mean and variance of every channel's group, each (C,) in float32; None: those of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised ``x`` (N, C, H, W)."""
        if self.watching:
            self.kept = self._statistics(x)
        elif self.kept is not None:
            weight, bias = (None if given is None else given.float() for given in (self.weight, self.bias))
            return F.batch_norm(x, *self.kept, weight, bias, training=False, eps=self.eps)
        return super().forward(x)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Over all samples, in bands, because all of ``x`` in float32 would be the largest tensor of all."""
        own = [axis for axis in range(x.ndim) if axis != 1]
        totals = torch.zeros(2, self.num_channels, device=x.device)
        for band in torch.split(x, max(1, BAND // x[:, :, :1].numel()), dim=2):
            values = band.float()
            totals += torch.stack([values.sum(own), values.square().sum(own)])
        width = self.num_channels // self.num_groups
        mean, square = totals.reshape(2, -1, width).sum(2) / (x.numel() // self.num_groups)
        return mean.repeat_interleave(width), (square - mean.square()).clamp_min(0.0).repeat_interleave(width)


class SharedNorms:
    """All group norms of a network, as :class:`SharedNorm`."""

    def __init__(self, network: nn.Module) -> None:
        """Replaces the plain ones below ``network``; parameters and their names stay."""
        replace_layers(network, lambda layer: as_kind(SharedNorm, layer) if type(layer) is nn.GroupNorm else None)
        self._norms = [layer for layer in network.modules() if isinstance(layer, SharedNorm)]

    def __len__(self) -> int:
        return len(self._norms)

    @contextmanager
    def calibrated_by(self, run: Callable[[], object]) -> Iterator[None]:
        """Inside, every norm has the statistics of its input in ``run``."""
        try:
            for norm in self._norms:
                norm.watching = True
            run()
            for norm in self._norms:
                norm.watching = False
            yield
        finally:
            for norm in self._norms:
                norm.watching, norm.kept = False, None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, norms take the statistics of their input again: exact ones, where that is the whole image."""
        kept = [norm.kept for norm in self._norms]
        for norm in self._norms:
            norm.kept = None
        yield
        for norm, statistics in zip(self._norms, kept, strict=True):
            norm.kept = statistics


def reduced(source: Tensor, most: float, multiple: int) -> Tensor:
    """Evenly spread pixels of ``source`` (1, C, H, W), at most ``most`` of them: sides are multiples of ``multiple``,
    and no shorter than it.

    Nothing is averaged: noise and grain, which are part of the statistics, would get lost.
    """

    def rounded(side: float) -> int:
        return max(1, int(side / multiple)) * multiple

    height, width = source.shape[-2:]
    factor = min(1.0, (most / (height * width)) ** 0.5)
    rows = rounded(height * factor)
    columns = rounded(min(width * factor, most / rows))
    rows = rounded(min(height * factor, most / columns))  # where the columns could not be as few as that
    return source[..., _spread(height, rows), :][..., _spread(width, columns)]


def _spread(length: int, count: int) -> Tensor:
    """``count`` of ``length`` indices."""
    return ((torch.arange(count) + 0.5) * (length / count)).long()

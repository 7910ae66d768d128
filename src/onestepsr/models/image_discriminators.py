"""Discriminators of images whose judgement does not start from nothing, or is asked for at every pixel.

The projected discriminator looks at an image through a frozen network that has seen the world, as D3SR's discriminator
does with latents; the U-Net gives a logit for every pixel. Both have spectral normalisation and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

SLOPE = 0.2


class ProjectedDiscriminator(nn.Module):
    """Logits from the maps of a frozen feature network, mixed at random (Sauer et al., "Projected GANs Converge
    Faster", 2021, section 3.2).

    The maps' channels, and then, from the coarsest map to the finest, neighbouring maps, are mixed by convolutions with
    fixed random weights, so that no head can lean on a few channels alone. Each map has a head of its own.
    """

    def __init__(self, channels: Sequence[int], *, width: int = 64, hidden: int = 64) -> None:
        """``channels`` are those of the maps, the finest first, each at half the resolution before or at its own."""
        super().__init__()
        self.channel_mixing = nn.ModuleList(nn.Conv2d(count, width, 1, bias=False) for count in channels)
        self.scale_mixing = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in channels)
        for mixing in (self.channel_mixing, self.scale_mixing):
            for convolution in mixing:
                assert isinstance(convolution, nn.Conv2d)
                nn.init.kaiming_normal_(convolution.weight, nonlinearity="linear")
                convolution.weight.requires_grad_(False)
        self.heads = nn.ModuleList(_head(width, hidden) for _ in channels)

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """One map of logits (N, 1, h_k, w_k) for each of ``maps`` (N, C_k, h_k, w_k), the finest first."""
        mixed: Tensor | None = None
        logits: list[Tensor] = []
        for number in reversed(range(len(maps))):
            own = self.channel_mixing[number](maps[number])
            if mixed is not None:
                own = own + F.interpolate(mixed, size=own.shape[-2:], mode="bilinear", align_corners=False)
                own = own * 0.5**0.5  # two parts of about equal variance
            mixed = self.scale_mixing[number](own)
            logits.append(self.heads[number](mixed))
        return tuple(reversed(logits))


def _head(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LeakyReLU(SLOPE),
        spectral_norm(nn.Conv2d(width, hidden, 3, padding=1)),
        nn.LeakyReLU(SLOPE),
        spectral_norm(nn.Conv2d(hidden, hidden, 3, padding=1)),
        nn.LeakyReLU(SLOPE),
        spectral_norm(nn.Conv2d(hidden, 1, 3, padding=1)),
    )


class UNetDiscriminator(nn.Module):
    """A logit for every pixel, by a U-Net with spectral normalisation (Wang et al., "Real-ESRGAN", 2021, section 3.3).

    It begins at half the image's resolution, every 2x2 pixels as one position, and ends with a pixel shuffle.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 96), condition_channels: int = 0) -> None:
        """``widths`` are the channels at a half, a quarter, ... of the image's resolution; ``condition_channels`` those
        of what it is shown beside the image."""
        super().__init__()
        self.first = nn.Conv2d(4 * (3 + condition_channels), widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            spectral_norm(nn.Conv2d(fine, coarse, 4, stride=2, padding=1, bias=False))
            for fine, coarse in pairwise(widths)
        )
        self.up = nn.ModuleList(
            spectral_norm(nn.Conv2d(coarse, fine, 3, padding=1, bias=False)) for fine, coarse in pairwise(widths)
        )
        self.refine = spectral_norm(nn.Conv2d(widths[0], widths[0], 3, padding=1, bias=False))
        self.last = nn.Conv2d(widths[0], 4, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Logits (N, 1, H, W) of images (N, 3, H, W) in [0, 1]; H and W are multiples of 2 per entry of ``widths``."""
        seen = x if condition is None else torch.cat([x, condition], dim=1)
        h = F.leaky_relu(self.first(F.pixel_unshuffle(seen * 2 - 1, 2)), SLOPE)
        skips = [h]
        for convolution in self.down:
            h = F.leaky_relu(convolution(h), SLOPE)
            skips.append(h)
        h = skips.pop()
        for convolution in reversed(self.up):
            h = F.interpolate(h, scale_factor=2.0, mode="bilinear", align_corners=False)
            h = F.leaky_relu(convolution(h), SLOPE) + skips.pop()
        h = F.leaky_relu(self.refine(h), SLOPE)
        return F.pixel_shuffle(self.last(h), 2)

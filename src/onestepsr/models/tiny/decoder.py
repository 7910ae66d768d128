"""The decoder of the tiny backbone, and the residual block that all of its networks are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FACTOR = 4
"""Pixels per latent position along each axis."""
DETAIL = ((1, 3), (3, 1), (5, 5))
"""Height and width of the local means whose differences from the image :class:`EvenContrast` evens, one after the
other: the finest detail across and down, then all that is fine."""
WINDOW = 9
"""Blocks along each side of the surroundings over which the strength of detail is measured."""
NO_DETAIL = 0.004
"""Half a gray level of 255, in [-1, 1]: surroundings with much less detail than that are left as they are."""
LARGEST_FACTOR = 1.3
"""Detail is scaled by at most this, and at least its inverse."""


class ResidualBlock(nn.Module):
    """x + conv(act(conv(x) + shift)): two 3x3 convolutions without normalisation; ``shift`` comes from the time
    embedding."""

    def __init__(self, channels: int, time_width: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(time_width, channels) if time_width else None
        with torch.no_grad():  # norm-free stacks train stably when each block starts close to the identity
            self.conv2.weight.mul_(0.2)
            nn.init.zeros_(self.conv2.bias if self.conv2.bias is not None else torch.empty(0))

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W) to the same shape; ``emb`` is the activated time embedding (N, time_width)."""
        h = self.conv1(x)
        if self.time is not None and emb is not None:
            h = h + self.time(emb)[:, :, None, None]
        return x + torch.as_tensor(self.conv2(F.silu(h)))


class TinyDecoder(nn.Module):
    """The decoder's residual branch: latent resolution, twice that, then pixels.

    Convolutions in front of a pixel shuffle carry no bias: biases there are constants per position of the 4x4 lattice,
    which shows as a grid. Pixels made by a shuffle do not depend on those of the next latent position, which shows as
    steps at the borders of 4x4 blocks; a few channels at full resolution mend that, and more would cost more than the
    rest of the network together.
    """

    def __init__(
        self, latent: int, width: int, refine: int = 0, *, blocks: int = 0, refine_blocks: int = 0, even: bool = False
    ) -> None:
        super().__init__()
        half = width // 2
        self.conv_in = nn.Conv2d(latent, width, 3, padding=1)
        self.block = ResidualBlock(width)
        self.up = nn.Conv2d(width, 4 * half, 1, bias=False)
        self.conv_half = nn.Conv2d(half, half, 3, padding=1)
        self.half_blocks = nn.Sequential(*(ResidualBlock(half) for _ in range(blocks)))
        self.conv_out = nn.Conv2d(half, 3 * 4, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv_out.weight)
        self.refine = Refinement(half, refine, refine_blocks) if refine else None
        self.even = EvenContrast() if even else None

    def forward(self, z: Tensor, linear: Tensor) -> Tensor:
        """Correct the image (N, 3, 4h, 4w) that the linear path makes of the latent ``z`` (N, C, h, w)."""
        h = self.block(F.silu(self.conv_in(z)))
        h = F.silu(F.pixel_shuffle(self.up(h), 2))
        h = self.half_blocks(h + F.silu(self.conv_half(h)))
        image = linear + F.pixel_shuffle(self.conv_out(h), 2)
        image = image if self.refine is None else torch.as_tensor(self.refine(image, h))
        return image if self.even is None else torch.as_tensor(self.even(image))


class Refinement(nn.Module):
    """Convolutions at the image's resolution over the image and features of half that resolution."""

    def __init__(self, channels: int, width: int, blocks: int = 0) -> None:
        super().__init__()
        self.up = nn.Conv2d(channels, 4 * width, 1, bias=False)
        self.conv1 = nn.Conv2d(width + 3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.conv2 = nn.Conv2d(width, 3, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, image: Tensor, half: Tensor) -> Tensor:
        """Image (N, 3, H, W), corrected; ``half`` is (N, C, H/2, W/2)."""
        features = F.pixel_shuffle(self.up(half), 2)
        features = self.blocks(F.silu(self.conv1(torch.cat([image, features], dim=1))))
        return image + torch.as_tensor(self.conv2(features))


class EvenContrast(nn.Module):
    """Fine contrast of brightness, made equally strong at the 4x4 pixels of a latent position.

    A decoder of shuffled pixels draws detail a little stronger at some pixels of its 4x4 blocks than at others, which
    shows as faint dots along edges and as a weave in texture. Which pixels those are differs with the degradation and
    the content of the image, so they are measured in the output itself: for every filter of :data:`DETAIL`, the mean
    absolute detail at each of the sixteen over the :data:`WINDOW` x :data:`WINDOW` blocks around is brought to that of
    all sixteen. Nothing is learnt, and no pixel's detail changes by more than :data:`LARGEST_FACTOR`.
    """

    def forward(self, image: Tensor) -> Tensor:
        """Image (N, 3, H, W) in about [-1, 1] of the same shape; H and W are multiples of 4."""
        before = image.float().mean(dim=1, keepdim=True)
        brightness = before
        for filtered in DETAIL:
            mean = local_mean(brightness, *filtered)
            detail = brightness - mean
            strength = local_mean(F.pixel_unshuffle(detail.abs(), FACTOR), WINDOW, WINDOW) + NO_DETAIL
            factor = (strength.mean(dim=1, keepdim=True) / strength).clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
            brightness = torch.addcmul(mean, detail, F.pixel_shuffle(factor, FACTOR))
        return image + (brightness - before).to(image.dtype)


def local_mean(planes: Tensor, height: int, width: int) -> Tensor:
    """Mean of (N, C, H, W) over odd ``height`` x ``width`` values around each; border values are repeated outwards."""
    return _mean_along(_mean_along(planes, width, 3), height, 2)


def _mean_along(planes: Tensor, length: int, dim: int) -> Tensor:
    if length == 1:
        return planes
    reach = length // 2
    padded = F.pad(planes, (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach), mode="replicate")
    return _sum_along(padded, length, dim).mul_(1 / length)


def _sum_along(planes: Tensor, length: int, dim: int) -> Tensor:
    """Sums of ``length`` neighbours: by halves, several times faster than PyTorch's pooling of so few planes."""
    if length == 1:
        return planes
    half = length // 2
    sums, count = _sum_along(planes, half, dim), planes.shape[dim] - length + 1
    total = sums.narrow(dim, 0, count) + sums.narrow(dim, half, count)
    return total + planes.narrow(dim, length - 1, count) if length % 2 else total

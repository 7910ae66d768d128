"""Real-ESRGAN's generator: a residual-in-residual dense network that enlarges four times (Wang et al., "Real-ESRGAN",
2021; the network is that of Wang et al., "ESRGAN", 2018, section 3.1).

It is deterministic and not a diffusion model: here it is what results are compared with, and a teacher for
distillation. Parameters have the names of the official checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.models.generators import Generator, MemoryCost, Origin, Rng

SLOPE = 0.2
"""Negative slope of every leaky ReLU."""
RESIDUAL_SCALE = 0.2
"""Factor on the residual branch of dense blocks and of groups of them."""
MEMORY_PER_PIXEL = 11_000.0
"""Bytes per LR pixel in float32 without gradients: growth of the peak resident size, 10,500 to 10,700 at
128x128 to 320x320. Two maps of the full width at output resolution make most of it."""


@dataclass(frozen=True, kw_only=True)
class RealESRGANConfig:
    """Sizes of the network; the defaults are those of x4plus."""

    blocks: int = 23
    """Groups of three dense blocks."""
    width: int = 64
    """Channels between the blocks."""
    growth: int = 32
    """Channels that each convolution of a dense block adds."""

    def __post_init__(self) -> None:
        if min(self.blocks, self.width, self.growth) < 1:
            raise ValueError(f"blocks, width and growth must be at least 1, got {self}")


PUBLISHED = {"realesrgan-x4plus": RealESRGANConfig(), "realesrgan-x4plus-anime": RealESRGANConfig(blocks=6)}
"""Sizes of the published networks by alias."""


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees the block's input and all outputs before it."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, growth, 3, padding=1)
        self.conv2 = nn.Conv2d(width + growth, growth, 3, padding=1)
        self.conv3 = nn.Conv2d(width + 2 * growth, growth, 3, padding=1)
        self.conv4 = nn.Conv2d(width + 3 * growth, growth, 3, padding=1)
        self.conv5 = nn.Conv2d(width + 4 * growth, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        seen = [x]
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen.append(F.leaky_relu(conv(torch.cat(seen, dim=1)), SLOPE))
        return torch.add(x, self.conv5(torch.cat(seen, dim=1)), alpha=RESIDUAL_SCALE)


class ResidualGroup(nn.Module):
    """Three dense blocks with a residual connection around them (RRDB)."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = DenseBlock(width, growth)
        self.rdb2 = DenseBlock(width, growth)
        self.rdb3 = DenseBlock(width, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return torch.add(x, self.rdb3(self.rdb2(self.rdb1(x))), alpha=RESIDUAL_SCALE)


class RealESRGANGenerator(Generator):
    """RGB (N, 3, h, w) in [0, 1] to (N, 3, 4h, 4w) in about [0, 1], for any size from 1x1 on."""

    def __init__(self, config: RealESRGANConfig | None = None) -> None:
        super().__init__()
        self.config = config or RealESRGANConfig()
        width = self.config.width
        self.conv_first = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(ResidualGroup(width, self.config.growth) for _ in range(self.config.blocks)))
        self.conv_body = nn.Conv2d(width, width, 3, padding=1)
        self.conv_up1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_up2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_hr = nn.Conv2d(width, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, 3, 3, padding=1)

    def memory_cost(self, dtype: torch.dtype) -> MemoryCost:
        """Feature maps of all of the network on one tile."""
        return MemoryCost(bytes_per_pixel=MEMORY_PER_PIXEL * dtype.itemsize / 4)

    def forward(self, lr: Tensor, *, rng: Rng = None, origin: Origin = None, prompt: Tensor | None = None) -> Tensor:
        """Enlarged image, not clamped, in the dtype of ``lr``."""
        h = self.conv_first(lr)
        h = h + self.conv_body(self.body(h))
        for conv in (self.conv_up1, self.conv_up2):
            h = F.leaky_relu_(conv(F.interpolate(h, scale_factor=2.0, mode="nearest")), SLOPE)
        return torch.as_tensor(self.conv_last(F.leaky_relu_(self.conv_hr(h), SLOPE)))

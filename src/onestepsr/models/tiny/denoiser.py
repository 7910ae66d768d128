"""A small denoising network for residual shifting that trains and runs on a CPU: the counterpart of ResShift's UNet on
the latents of :class:`onestepsr.models.tiny.networks.TinyAutoencoder`.

It is called like that UNet, ``net(x, timesteps, lq)``, and predicts the clean latent. As the other tiny networks it has
no normalisation and nothing in it mixes distant positions, so a tile means the same as the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.models.generators import LatentUNet, NetworkCost
from onestepsr.models.tiny.networks import FACTOR, MEMORY_PER_PIXEL, ResidualBlock, TinyConfig, timestep_embedding


@dataclass(frozen=True, kw_only=True)
class TinyDenoiserConfig:
    """Sizes of the network; the defaults fit the latents of the bundled model's autoencoder."""

    latent_channels: int = TinyConfig().latent_channels
    """Channels of the latents, in and out."""
    widths: tuple[int, ...] = (48, 64, 96)
    """Channels by level, the first at latent resolution, each further one at half the resolution before."""
    down_blocks: tuple[int, ...] = (1, 1, 2)
    """Residual blocks by level on the way down."""
    up_blocks: tuple[int, ...] = (1, 1, 1)
    """Residual blocks by level on the way up."""
    time_width: int = 128
    """Width of the time embedding."""

    def __post_init__(self) -> None:
        if not len(self.widths) == len(self.down_blocks) == len(self.up_blocks) >= 1:
            raise ValueError("widths, down_blocks and up_blocks must have one entry per level")
        if min(self.latent_channels, *self.widths, *self.down_blocks, *self.up_blocks) < 1:
            raise ValueError("latent_channels, widths, down_blocks and up_blocks must be at least 1")
        if self.time_width < 2 or self.time_width % 2:
            raise ValueError(f"time_width must be even, got {self.time_width}")


class TinyDenoiser(LatentUNet):
    """Predicts the clean latent from a noisy one, the step and the LR image.

    Latents are (N, C, h, w) with sides multiples of :attr:`size_multiple`. The noisy latent comes scaled to about unit
    variance; steps are integers from 0 on. The LR image has the sides of the latent: factor 4 down after x4 up.
    """

    def __init__(self, config: TinyDenoiserConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TinyDenoiserConfig()
        self.latent_channels = config.latent_channels
        self.size_multiple = 2 ** (len(config.widths) - 1)
        self.feature_channels = config.widths
        self.halved_channels = (*config.widths[1:], config.widths[-1], config.widths[-1])
        self.time_channels = config.time_width
        self.time_embed = nn.Sequential(
            nn.Linear(config.time_width, config.time_width), nn.SiLU(), nn.Linear(config.time_width, config.time_width)
        )
        self.conv_in = nn.Conv2d(config.latent_channels + 3, config.widths[0], 3, padding=1)
        self.down = nn.ModuleList(map(self._blocks, config.widths, config.down_blocks))
        self.downsamplers = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in pairwise(config.widths)
        )
        self.middle = self._blocks(config.widths[-1], 1)
        self.up = nn.ModuleList(map(self._blocks, config.widths, config.up_blocks))
        self.upsamplers = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairwise(config.widths))
        self.conv_out = nn.Conv2d(config.widths[0], config.latent_channels, 3, padding=1)
        self.lq_path = nn.Conv2d(3, config.latent_channels, 5, padding=2)
        self.skip_gain = nn.Linear(config.time_width, config.latent_channels)
        for module in (self.conv_out, self.lq_path, self.skip_gain):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def _blocks(self, width: int, count: int) -> nn.ModuleList:
        return nn.ModuleList(ResidualBlock(width, self.config.time_width) for _ in range(count))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.conv_in.weight.dtype

    def network_cost(self, dtype: torch.dtype) -> NetworkCost:
        """Cost of one evaluation; the autoencoder's figure was measured over both, so this adds nothing to it."""
        return NetworkCost(bytes_per_position=FACTOR**2 * MEMORY_PER_PIXEL * dtype.itemsize / 4)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Activated time embedding (N, :attr:`time_channels`) of integer steps (N,)."""
        sinusoid = timestep_embedding(timesteps, self.config.time_width).to(self.dtype)
        return F.silu(cast(Tensor, self.time_embed(sinusoid)))

    def encode(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The half of the network before it goes up again, for the arguments of :meth:`forward`.

        Returns the middle features (N, C_mid, h / 2^(levels - 1), ...), the output of every level on the way down, the
        finest first, and the time embedding.
        """
        self._check_sizes(x, lq)
        emb = self.embed_time(timesteps)
        h = self.conv_in(torch.cat([x.to(self.dtype), lq.to(self.dtype)], dim=1))
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.down):
            h = _run(blocks, self.downsamplers[level - 1](h) if level else h, emb)
            skips.append(h)
        return _run(self.middle, h, emb), skips, emb

    def features(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> tuple[Tensor, ...]:
        """Features (N, C_k, h / 2^k, w / 2^k) by level k for the arguments of :meth:`forward`: the end of each level on
        the way down, on the last one the middle features. Their channels are :attr:`feature_channels`."""
        middle, skips, _ = self.encode(x, timesteps, lq)
        return (*skips[:-1], middle)

    def halved_features(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> tuple[Tensor, ...]:
        """Features (N, C_k, h / 2^(k + 1), w / 2^(k + 1)) behind the halving of each level k, the end of the last
        level, and the middle features; their channels are :attr:`halved_channels`."""
        middle, skips, _ = self.encode(x, timesteps, lq)
        halved = (downsampler(skip) for downsampler, skip in zip(self.downsamplers, skips[:-1], strict=True))
        return (*halved, skips[-1], middle)

    def forward(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> Tensor:
        """Predicted z_0, of the shape and type of ``x``.

        ``x`` (N, C, h, w) is the scaled noisy latent, ``timesteps`` (N,) integers, ``lq`` (N, 3, h, w) the LR image in
        [-1, 1]. Raises ValueError for other sides.

        Two short paths carry what a linear estimate of z_0 needs: a gain per step and channel for ``x``, and a
        convolution of ``lq``, from which the latent of the bicubic image follows almost linearly.
        """
        h, skips, emb = self.encode(x, timesteps, lq)
        for level in reversed(range(len(skips))):
            if level < len(skips) - 1:
                h = F.interpolate(self.upsamplers[level](h), scale_factor=2.0, mode="nearest")
            h = _run(self.up[level], h + skips[level], emb)
        short = self.skip_gain(emb)[:, :, None, None] * x.to(self.dtype) + self.lq_path(lq.to(self.dtype))
        return torch.as_tensor(self.conv_out(h) + short).to(x.dtype)

    def _check_sizes(self, x: Tensor, lq: Tensor) -> None:
        height, width = x.shape[-2:]
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(f"latent sides must be multiples of {self.size_multiple}, got {height}x{width}")
        if lq.shape[-2:] != x.shape[-2:]:
            given = "x".join(map(str, lq.shape[-2:]))
            raise ValueError(f"the condition of a {height}x{width} latent must be {height}x{width}, got {given}")


def _run(blocks: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    """A feature map (N, C, H, W) through residual blocks."""
    for block in cast(nn.ModuleList, blocks):
        h = block(h, emb)
    return h

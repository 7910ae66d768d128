"""The vector-quantised autoencoder below ResShift, SinSR and TAD-SR, with the parameter names of the published weights.

Images are (N, 3, H, W) in [-1, 1] here; latents (N, C, H/f, W/f) are not scaled. The encoder's output is continuous;
it is rounded to the nearest code only on its way into the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.models.cpu_kernels import attention
from onestepsr.models.generators import LatentAutoencoder, NetworkCost

DISTANCES_AT_ONCE = 2**24
"""Number of distances between latent positions and codes in memory at a time: 64 MiB."""
LARGEST_LATENT = 256
"""Side of latents beyond which tiles cost more, not less: the attention over all positions grows with the square of the
area, and at 256 costs the decoder as much as everything else together."""
ENCODER_BREAKEVEN, DECODER_BREAKEVEN = 28_000.0, 62_000.0
"""Latent positions of a tile at which it does, in encoder and decoder.

From ``python scripts/stages.py random:resshift-realsr 64 128 192 256`` in bfloat16, two threads of an AMD EPYC
without AMX.
"""


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Sizes of the autoencoder; the defaults are those of the published x4 models (f4, 8192 codes of 3 numbers;
    55,322,782 parameters)."""

    width: int = 128
    """Channels at the resolution of the image, a multiple of ``norm_groups``."""
    multipliers: tuple[int, ...] = (1, 2, 4)
    """Channels of each level over ``width``; each further level has half the resolution of the one before."""
    blocks: tuple[int, ...] = (2, 2, 2)
    """Residual blocks of each level of the encoder; the decoder has one more in each."""
    latent_channels: int = 3
    """Channels of the latent, and length of a code."""
    codes: int = 8192
    """Size of the codebook."""
    norm_groups: int = 32
    """Groups of all norms."""

    def __post_init__(self) -> None:
        if min(self.width, self.norm_groups, self.latent_channels, self.codes) < 1:
            raise ValueError("width, norm_groups, latent_channels and codes must be 1 or more")
        if self.width % self.norm_groups:
            raise ValueError(f"width must be a multiple of norm_groups {self.norm_groups}, got {self.width}")
        if not len(self.multipliers) == len(self.blocks) >= 1 or min(*self.multipliers, *self.blocks) < 1:
            raise ValueError(
                f"multipliers and blocks must have one entry of 1 or more per level, got {self.multipliers} and "
                f"{self.blocks}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)


VQ_F8_FACE = VQConfig(width=64, multipliers=(1, 2, 4, 8), blocks=(1, 2, 3, 4), latent_channels=8, codes=4096)
"""ResShift for faces at 512 x 512."""


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _activated(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU of the normalised ``x``, in place of the norm's output: one full-resolution feature map less."""
    return F.silu(norm(x), inplace=True)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 convolution on x where widths differ."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, out_channels, H, W)."""
        h = self.conv1(_activated(self.norm1, x))
        h = _activated(self.norm2, h)
        h = cast(Tensor, self.conv2(h))
        h += x if self.nin_shortcut is None else self.nin_shortcut(x)
        return h


class SelfAttention(nn.Module):
    """Every latent position attends to every other, one head over all channels, with a residual connection."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, h, w) to the same shape."""
        h = self.norm(x)
        # (N, 1, h w, C); rows must be contiguous, or the products of all pairs of positions are stored
        q, k, v = (layer(h).flatten(2).mT[:, None].contiguous() for layer in (self.q, self.k, self.v))
        h = attention(q, k, v)[:, 0].mT.reshape(x.shape)
        return cast(Tensor, x + self.proj_out(h))


class Middle(nn.Module):
    """Block, attention, block at the resolution of the latent."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = SelfAttention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, h, w) to the same shape."""
        return cast(Tensor, self.block_2(self.attn_1(self.block_1(x))))


class Downsample(nn.Module):
    """Half the resolution: a 3x3 convolution of stride 2 after one row and column of zeros at the bottom and right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H/2, W/2)."""
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Twice the resolution: every value repeated, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, h, w) to (N, C, 2h, 2w)."""
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution, except where the network ends."""

    def __init__(self, widths: Sequence[int], groups: int, resample: Literal["down", "up"] | None) -> None:
        """``widths`` are the channels before the first block and after each."""
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(*pair, groups) for pair in pairwise(widths))
        self.downsample = Downsample(widths[-1]) if resample == "down" else None
        self.upsample = Upsample(widths[-1]) if resample == "up" else None

    def layers(self) -> list[nn.Module]:
        """The layers that map (N, C, H, W) to (N, C', H', W'), one after the other.

        A forward of its own would keep its input until it ends, which is as much as the widest feature maps.
        """
        return [layer for layer in (*self.block, self.downsample, self.upsample) if layer is not None]


class Encoder(nn.Module):
    """Image to latent, before the last 1x1 convolution."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, groups, last = config.widths, config.norm_groups, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level([widths[max(level - 1, 0)], *[widths[level]] * blocks], groups, "down" if level < last else None)
            for level, blocks in enumerate(config.blocks)
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, latent_channels, H/f, W/f)."""
        h = self.conv_in(x)
        for level in self.down:
            for layer in cast(Level, level).layers():
                h = layer(h)
        return cast(Tensor, self.conv_out(_activated(self.norm_out, self.mid(h))))


class Decoder(nn.Module):
    """Latent, after the first 1x1 convolution, to image. Levels are stored from fine to coarse and run the other
    way."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, groups, last = config.widths, config.norm_groups, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(
            Level([widths[min(level + 1, last)], *[widths[level]] * (blocks + 1)], groups, "up" if level else None)
            for level, blocks in enumerate(config.blocks)
        )
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Map (N, latent_channels, h, w) to (N, 3, f h, f w)."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for layer in cast(Level, level).layers():
                h = layer(h)
        return cast(Tensor, self.conv_out(_activated(self.norm_out, h)))


class Codebook(nn.Module):
    """The codes, and rounding to the nearest of them."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        # with a weight to start from: the normal one of nn.Embedding makes PyTorch load its compiler on the meta device
        self.embedding = nn.Embedding(codes, channels, _weight=torch.empty(codes, channels))
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index (N, h, w) of the code nearest to each position of ``z`` (N, C, h, w), by squared Euclidean distance.

        Always in float32: neighbouring codes are closer together than 16-bit products are exact.
        """
        kind = "cpu" if z.is_meta else z.device.type  # the meta device has no switch of its own
        with torch.autocast(kind, enabled=False):
            codes = self.embedding.weight.float()
            # |z - e|^2 = |z|^2 - 2 (z e - |e|^2 / 2): the nearest code is where the bracket is largest.
            offsets = -0.5 * codes.square().sum(1)
            positions = z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
            parts = torch.split(positions, max(1, DISTANCES_AT_ONCE // len(codes)))
            indices = torch.cat([torch.addmm(offsets, part, codes.mT).argmax(1) for part in parts])
        return indices.reshape(z.shape[0], *z.shape[2:])

    def forward(self, z: Tensor) -> Tensor:
        """The nearest codes (N, C, h, w); the gradient passes to ``z`` as if nothing had been rounded."""
        rounded = F.embedding(self.nearest(z), self.embedding.weight).permute(0, 3, 1, 2).to(z.dtype)
        return rounded.detach() + (z - z.detach())


class VQAutoencoder(LatentAutoencoder):
    """Vector-quantised autoencoder; ``latent_channels`` and ``factor`` (pixels per latent position) follow from the
    configuration."""

    largest_latent = LARGEST_LATENT

    def __init__(self, config: VQConfig | None = None) -> None:
        super().__init__()
        self.config = config or VQConfig()
        channels = self.config.latent_channels
        self.latent_channels = channels
        self.factor = 2 ** (len(self.config.multipliers) - 1)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quantize = Codebook(self.config.codes, channels)
        self.quant_conv = nn.Conv2d(channels, channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and of what :meth:`encode` and :meth:`decode` return."""
        return self.quant_conv.weight.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Continuous latent (N, C, H/f, W/f) of ``x`` (N, 3, H, W) in [-1, 1], sides multiples of f."""
        return cast(Tensor, self.quant_conv(self.encoder(x.to(self.dtype))))

    def decode(self, z: Tensor, quantize: bool = True) -> Tensor:
        """Image (N, 3, f h, f w) in about [-1, 1] of a latent (N, C, h, w), by default of the codes nearest to it."""
        z = self.quantize(z) if quantize else z  # before the latent loses digits to a 16-bit network
        return cast(Tensor, self.decoder(self.post_quant_conv(z.to(self.dtype))))

    def memory_per_pixel(self, dtype: torch.dtype) -> float:
        """Peak bytes per image pixel of encoding or decoding without gradients, measured on a CPU in channels_last.

        The decoder needs most, where it changes to the resolution and the width of its last level: 2644 bytes with the
        published sizes in float32 at 512 x 512, 1657 in bfloat16.
        """
        widths = self.config.widths
        return float((2 * widths[min(1, len(widths) - 1)] + 3 * widths[0]) * dtype.itemsize)

    def network_costs(self, dtype: torch.dtype) -> tuple[NetworkCost, NetworkCost]:
        """Cost of encoder and decoder. Encoding takes 951 bytes per pixel in bfloat16, 1570 in float32."""
        pixels, encoder, decoder = self.factor**2, 4.0 * self.config.widths[0], self.memory_per_pixel(dtype)
        return (
            NetworkCost(bytes_per_position=encoder * dtype.itemsize * pixels, attention_breakeven=ENCODER_BREAKEVEN),
            NetworkCost(bytes_per_position=decoder * pixels, attention_breakeven=DECODER_BREAKEVEN),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction (N, 3, H, W) of ``x`` (N, 3, H, W) in [-1, 1], sides multiples of f."""
        return self.decode(self.encode(x))

"""The tagging network of RAM (Zhang et al., "Recognize Anything", 2023), without its captioning half.

A Swin transformer (Liu et al., ICCV 2021) sees the image. A decoder then asks it about every tag at once: each tag is
a query, made from a text embedding of its name, that attends to the image in two layers and ends in one logit. Names
of parameters are the published ones.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.models.resshift.unet import MASKED, relative_positions

HEAD_NORM_EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class RamConfig:
    """Sizes; the defaults are those of ``ram_swin_large_14m``."""

    tags: int = 4585
    """Number of tags."""
    side: int = 384
    """Side of the image in pixels."""
    patch: int = 4
    """Side of the patches that become the first tokens."""
    width: int = 192
    """Channels of the first level; each of the others has twice as many as the one before."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks per level; every second one shifts its windows."""
    heads: tuple[int, ...] = (6, 12, 24, 48)
    """Attention heads per level."""
    window: int = 12
    """Side of the windows in tokens."""
    text_width: int = 512
    """Channels in which tags and image meet."""
    head_width: int = 768
    """Channels of the decoder."""
    head_heads: int = 4
    """Its attention heads."""
    head_layers: int = 2
    """Its layers."""

    @property
    def image_width(self) -> int:
        """Channels of the last level."""
        return self.width << (len(self.depths) - 1)


class RamNetwork(nn.Module):
    """Image to one logit per tag."""

    def __init__(self, config: RamConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = SwinEncoder(config)
        self.image_proj = nn.Linear(config.image_width, config.text_width)
        self.label_embed = nn.Parameter(torch.zeros(config.tags, config.text_width))
        self.wordvec_proj = nn.Linear(config.text_width, config.head_width)
        layers = nn.ModuleList(_TagLayer(config) for _ in range(config.head_layers))
        self.tagging_head = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": layers})})
        self.fc = nn.Linear(config.head_width, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, tags) of ``image`` (N, 3, side, side) in ImageNet's statistics."""
        seen = self.image_proj(self.visual_encoder(image))
        queries = F.relu(self.wordvec_proj(self.label_embed)).expand(len(image), -1, -1)
        for layer in self.tagging_head["encoder"]["layer"]:  # type: ignore[index]
            queries = layer(queries, seen)
        logits: Tensor = self.fc(queries)
        return logits[..., 0]


class SwinEncoder(nn.Module):
    """Image (N, 3, S, S) to tokens (N, 1 + L, C): their mean, then the L tokens of the last level."""

    def __init__(self, config: RamConfig) -> None:
        super().__init__()
        projection = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.patch_embed = nn.ModuleDict({"proj": projection, "norm": nn.LayerNorm(config.width)})
        self.layers = nn.ModuleList(_SwinLevel(config, level) for level in range(len(config.depths)))
        self.norm = nn.LayerNorm(config.image_width)

    def forward(self, image: Tensor) -> Tensor:
        """Tokens of ``image``."""
        x = self.patch_embed["norm"](self.patch_embed["proj"](image).permute(0, 2, 3, 1))
        for layer in self.layers:
            x = layer(x)
        tokens = self.norm(x).flatten(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


class _SwinLevel(nn.Module):
    """Blocks at one resolution (N, H, W, C), then half of it with twice the channels, except at the end."""

    def __init__(self, config: RamConfig, level: int) -> None:
        super().__init__()
        width, side = config.width << level, config.side // config.patch >> level
        window = min(config.window, side)
        self.blocks = nn.ModuleList(
            _SwinBlock(width, config.heads[level], window, shift=window // 2 if index % 2 and side > window else 0)
            for index in range(config.depths[level])
        )
        self.downsample = _Merge(width) if level < len(config.depths) - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class _Merge(nn.Module):
    """Each square of four tokens becomes one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(corners, -1)))
        return merged


class _SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = _WindowAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, H, W, C) to the same shape; H and W are multiples of the window."""
        count, height, width, channels = x.shape
        moved = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
        mask = _shift_mask(height, width, self.window, self.shift).to(x) if self.shift else None
        attended = self.attn(_windows(moved, self.window), mask)
        attended = attended.view(count, height // self.window, width // self.window, self.window, self.window, channels)
        attended = attended.transpose(2, 3).reshape(x.shape)
        x = x + torch.roll(attended, (self.shift, self.shift), (1, 2))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class _WindowAttention(nn.Module):
    """Attention among the tokens of each window, with a learnt bias per head and relative position."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (N * M, L, C) of the M windows of N images to the same shape; ``mask`` is (M, L, L)."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        positions = relative_positions(self.window).to(tokens.device)
        bias = self.relative_position_bias_table[positions].permute(2, 0, 1)[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(tokens) // len(mask), 1, 1, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class _TagLayer(nn.Module):
    """Queries look at the image, not at each other; norms come after the sums, as in BERT."""

    def __init__(self, config: RamConfig) -> None:
        super().__init__()
        width = config.head_width
        self.heads = config.head_heads
        attention = {name: nn.Linear(size, width) for name, size in self._sources(config).items()}
        self.crossattention = nn.ModuleDict({"self": nn.ModuleDict(attention), "output": _sum_and_norm(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = _sum_and_norm(4 * width, width)

    @staticmethod
    def _sources(config: RamConfig) -> dict[str, int]:
        return {"query": config.head_width, "key": config.text_width, "value": config.text_width}

    def forward(self, queries: Tensor, seen: Tensor) -> Tensor:
        """Queries (N, K, C) with what they find in ``seen`` (N, L, text_width)."""
        attention, joined = self.crossattention["self"], self.crossattention["output"]
        sources = {"query": queries, "key": seen, "value": seen}
        q, k, v = (
            attention[name](source).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # type: ignore[index]
            for name, source in sources.items()
        )
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        queries = joined["LayerNorm"](joined["dense"](found) + queries)  # type: ignore[index]
        hidden = F.gelu(self.intermediate["dense"](queries))
        result: Tensor = self.output["LayerNorm"](self.output["dense"](hidden) + queries)
        return result


def _sum_and_norm(before: int, after: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(before, after), "LayerNorm": nn.LayerNorm(after, eps=HEAD_NORM_EPS)})


def _windows(x: Tensor, side: int) -> Tensor:
    """Map (N, H, W, C) as tokens of its windows (N * M, side^2, C), windows and tokens in raster order."""
    count, height, width, channels = x.shape
    parts = x.view(count, height // side, side, width // side, side, channels).transpose(2, 3)
    return parts.reshape(-1, side * side, channels)


def _shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """Mask to add to the logits (M, L, L) of a shifted map: tokens from opposite borders do not see each other."""
    rows, columns = (_regions(length, window, shift) for length in (height, width))
    regions = _windows((3 * rows[:, None] + columns)[None, :, :, None], window)[..., 0]
    return torch.where(regions[:, :, None] == regions[:, None, :], 0.0, MASKED)


def _regions(length: int, window: int, shift: int) -> Tensor:
    """Part of an axis to which each token of a shifted map belongs: 0 inside, 1 and 2 before and behind the seam."""
    position = torch.arange(length)
    return (position >= length - window).long() + (position >= length - shift).long()

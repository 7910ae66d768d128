"""Transformer blocks on feature maps with attention inside windows, as in ResShift's UNet (Yue et al., NeurIPS 2023).

They differ from the Swin transformer (Liu et al., ICCV 2021) in two ways that published weights rely on: norms are
group norms over the whole map, and the mask of shifted windows is another one, see :func:`column_mask`. Parameter names
are the published ones.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -100.0
"""Added to the logit of two tokens that shall not see each other."""


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Sizes of the attention layers; the defaults are the published ones."""

    width: int = 192
    """Channels inside the layers."""
    head_width: int = 32
    """Channels of each attention head."""
    depth: int = 2
    """Blocks per layer; every second one shifts its windows."""
    window: int = 8
    """Side of the windows, even."""
    mlp_ratio: int = 4
    """Hidden channels of the feed-forward part, in multiples of ``width``."""

    def __post_init__(self) -> None:
        if min(self.width, self.head_width, self.depth, self.window, self.mlp_ratio) < 1:
            raise ValueError("width, head_width, depth, window and mlp_ratio must be at least 1")
        if self.width % self.head_width:
            raise ValueError(f"width must be a multiple of head_width {self.head_width}, got {self.width}")
        if self.window % 2:
            raise ValueError(f"window must be even, as windows shift by half their side, got {self.window}")

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // self.head_width


class GroupNorm(nn.GroupNorm):
    """Group norm with its statistics and arithmetic in float32, whatever the type of its input and weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape and type."""
        y = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def column_mask(window: int, device: torch.device | None = None) -> Tensor:
    """What is added to the logits (L, L) of windows in the last row of a shifted map, L = window^2 tokens in raster
    order.

    After the shift, the last row of windows holds rows from both ends of the map, and the last column likewise. The
    published code takes one axis of the map for another when it marks them: its mask parts the left from the right half
    of every window in the last row, and does nothing anywhere else. The published weights were trained with that.
    """
    left = torch.arange(window * window, device=device) % window < window // 2
    return torch.where(left[:, None] == left[None, :], 0.0, MASKED)


def shifted_window_masks(rows: int, columns: int, window: int) -> Tensor:
    """The masks (rows * columns, L, L) of all windows of a shifted map in raster order, see :func:`column_mask`; on the
    CPU."""
    masks = torch.zeros(rows, columns, window**2, window**2, device="cpu")
    masks[-1] = column_mask(window, masks.device)
    return masks.flatten(0, 1)


def relative_positions(window: int) -> Tensor:
    """Row of the bias table for each pair of tokens in a window: (L, L) of (dy + w - 1) * (2 w - 1) + dx + w - 1; on
    the CPU."""
    side = torch.arange(window, device="cpu")
    row, column = torch.meshgrid(side, side, indexing="ij")
    dy = row.flatten()[:, None] - row.flatten()[None, :]
    dx = column.flatten()[:, None] - column.flatten()[None, :]
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


def _placed(table: Tensor) -> Tensor:
    """A table on the default device. It is computed elsewhere, because for the operations of a table on the meta device
    PyTorch loads its compiler."""
    return table.to(torch.empty(0).device)


class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of each window, with a learnt bias per head and relative position."""

    relative_position_index: Tensor

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * config.window - 1) ** 2, config.heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", _placed(relative_positions(config.window)))
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, windows: Tensor, shifted: bool) -> Tensor:
        """Map tokens (R, M, L, C) to the same shape; R is the rows of windows in the map, M the windows per row."""
        qkv = self.qkv(windows).reshape(*windows.shape[:3], 3, self.config.heads, self.config.head_width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (R, M, heads, L, head_width)
        bias = self._bias().to(q.dtype)
        if shifted:
            masked = bias + column_mask(self.config.window, bias.device).to(bias.dtype)
            last = _attend(q[-1:], k[-1:], v[-1:], masked)
            attended = torch.cat([_attend(q[:-1], k[:-1], v[:-1], bias), last]) if len(q) > 1 else last
        else:
            attended = _attend(q, k, v, bias)
        out: Tensor = self.proj(attended.transpose(2, 3).flatten(3))
        return out

    def _bias(self) -> Tensor:
        """(heads, L, L)."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for (R, M, heads, L, d) and bias (heads, L, L)."""
    out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=bias[None])
    return out.reshape(q.shape)


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on feature maps."""

    attn_mask: Tensor

    def __init__(self, config: SwinConfig, norm_groups: int, side: int, *, shifted: bool) -> None:
        """``side`` is that of the map the block is made for: where it is a single window, windows never shift."""
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.window = config.window
        self.shift = config.window // 2 if shifted and side > config.window else 0
        if self.shift:  # part of the published weights; the masks in use depend on the size at hand
            masks = shifted_window_masks(side // config.window, side // config.window, config.window)
            self.register_buffer("attn_mask", _placed(masks))
        self.norm1 = GroupNorm(norm_groups, width)
        self.attn = WindowAttention(config)
        self.norm2 = GroupNorm(norm_groups, width)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Conv2d(width, hidden, 1), act=nn.GELU(), fc2=nn.Conv2d(hidden, width, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W), sides multiples of the window, to the same shape."""
        x = x + self._attention(self.norm1(x))
        return x + torch.as_tensor(self.mlp(self.norm2(x)))

    def _attention(self, x: Tensor) -> Tensor:
        grid = x.permute(0, 2, 3, 1)  # (N, H, W, C)
        if self.shift:
            grid = grid.roll((-self.shift, -self.shift), (1, 2))
        windows = self.attn(self._windows(grid), shifted=self.shift > 0)
        grid = self._grid(windows, grid.shape)
        if self.shift:
            grid = grid.roll((self.shift, self.shift), (1, 2))
        return grid.permute(0, 3, 1, 2)

    def _windows(self, grid: Tensor) -> Tensor:
        """(N, H, W, C) as (rows of windows, N * windows per row, L, C): rows first, since the last one is special."""
        n, height, width, channels = grid.shape
        split = grid.reshape(n, height // self.window, self.window, width // self.window, self.window, channels)
        return split.permute(1, 0, 3, 2, 4, 5).reshape(height // self.window, -1, self.window**2, channels)

    def _grid(self, windows: Tensor, shape: torch.Size) -> Tensor:
        n, height, width, channels = shape
        split = windows.reshape(-1, n, width // self.window, self.window, self.window, channels)
        return split.permute(1, 0, 3, 2, 4, 5).reshape(n, height, width, channels)


class SwinLayer(nn.Module):
    """A projection to the width of the blocks, the blocks, and a projection back; there is no path around them."""

    def __init__(self, channels: int, config: SwinConfig, norm_groups: int, side: int) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, config.width, 1)))
        self.blocks = nn.Sequential(
            *(SwinBlock(config, norm_groups, side, shifted=index % 2 == 1) for index in range(config.depth))
        )
        self.patch_unembed = nn.Sequential(OrderedDict(proj=nn.Conv2d(config.width, channels, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W), sides multiples of the window, to the same shape."""
        out: Tensor = self.patch_unembed(self.blocks(self.patch_embed(x)))
        return out

"""The UNet of ResShift (Yue et al., NeurIPS 2023), which SinSR and TAD-SR share: residual blocks, conditioned on the
step, with windowed attention once per level.

It predicts the clean latent z_0 from a noisy one and the LR image. Parameter names and shapes are those of the
published checkpoints. Its attention layers differ from the Swin transformer (Liu et al., ICCV 2021) in two ways that
these rely on: norms are group norms over the whole map, and the mask of shifted windows is another one, see
:func:`column_mask`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onestepsr.models.cpu_kernels import use_cpu_kernels
from onestepsr.models.generators import LatentUNet, NetworkCost
from onestepsr.models.tiny.networks import timestep_embedding

# ---- attention inside windows ----

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
    """Term added to the logits (L, L) of windows in the last row of a shifted map, L = window^2 tokens in raster
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
        table = self.relative_position_bias_table
        bias = table[self.relative_position_index].permute(2, 0, 1).to(q.dtype)  # (heads, L, L)
        if shifted:
            masked = bias + column_mask(self.config.window, bias.device).to(bias.dtype)
            last = _attend(q[-1:], k[-1:], v[-1:], masked)
            attended = torch.cat([_attend(q[:-1], k[:-1], v[:-1], bias), last]) if len(q) > 1 else last
        else:
            attended = _attend(q, k, v, bias)
        out: Tensor = self.proj(attended.transpose(2, 3).flatten(3))
        return out


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


# ---- the UNet ----

EXTRACTOR_WIDTH = 16
"""Channels of the first convolution on an LR image that is larger than the latent."""
TIME_RATIO = 4
"""Channels of the time embedding, in multiples of ``model_channels``."""

FLOAT32_BYTES_PER_POSITION = 4000.0
"""Peak bytes per latent position in maps that are float32 whatever the type: the insides of norms."""
VALUES_PER_POSITION = 4250.0
"""Peak values per latent position in other maps. Measured with the line above as growth of the resident size at the
published sizes, 192x192 latents on a CPU: 21 kB in float32, 12.5 kB in bfloat16."""
PUBLISHED_WIDTHS = 160 + 192
"""Channels of the finest level and of its attention, to which these numbers belong."""


@dataclass(frozen=True, kw_only=True)
class SwinUNetConfig:
    """Sizes of the UNet; the defaults are those published for real-world x4."""

    image_size: int = 64
    """Side of the latents that the network is made for: it decides on which levels windows shift. Any multiple of
    ``window * 2^(levels - 1)`` can be run."""
    latent_channels: int = 3
    """Channels of the latents, in and out."""
    lq_channels: int = 3
    """Channels of the condition: 3 for an RGB image, 4 for an image and a mask."""
    lq_size: int = 64
    """Side of the condition that belongs to latents of ``image_size``: as large, or larger by a power of two."""
    model_channels: int = 160
    """Channels on the finest level."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 4)
    """Channels by level, in multiples of ``model_channels``; each level has half the side of the one before."""
    res_blocks: int = 2
    """Residual blocks per level on the way down; on the way up there is one more."""
    norm_groups: int = 32
    """Groups of all norms; every width must be a multiple."""
    swin: SwinConfig = field(default_factory=SwinConfig)
    """Sizes of the attention layers."""

    def __post_init__(self) -> None:
        if min(self.latent_channels, self.lq_channels, self.res_blocks, self.norm_groups, *self.channel_mult, 1) < 1:
            raise ValueError("channels, channel_mult, res_blocks and norm_groups must be at least 1")
        if not self.channel_mult:
            raise ValueError("channel_mult must have one entry per level")
        if self.model_channels < 2 or self.model_channels % 2:
            raise ValueError(f"model_channels must be even, got {self.model_channels}")
        for name, width in (("model_channels", self.model_channels), ("swin.width", self.swin.width)):
            if width % self.norm_groups:
                raise ValueError(f"{name} must be a multiple of norm_groups {self.norm_groups}, got {width}")
        if self.image_size < 1 or self.image_size % self.size_multiple:
            raise ValueError(f"image_size must be a multiple of {self.size_multiple}, got {self.image_size}")
        if self.lq_size != self.image_size << self.lq_halvings:
            raise ValueError(f"lq_size must be image_size {self.image_size} times 1, 2, 4..., got {self.lq_size}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels by level, the finest first."""
        return tuple(self.model_channels * multiple for multiple in self.channel_mult)

    @property
    def size_multiple(self) -> int:
        """Latent sides must be multiples of this: whole windows on the coarsest level."""
        return int(self.swin.window * 2 ** (len(self.channel_mult) - 1))

    @property
    def lq_halvings(self) -> int:
        """Number of times that the condition is halved to the latent's size."""
        return max(0, (self.lq_size // self.image_size).bit_length() - 1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions behind norms, the second norm scaled and shifted by the time embedding, and a path around
    them."""

    def __init__(self, channels: int, out_channels: int, time_width: int, norm_groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(norm_groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, 2 * out_channels))
        last = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        for parameter in last.parameters():  # the block starts as its path around
            nn.init.zeros_(parameter)
        # the published name of the last convolution counts a dropout, whose rate is zero
        self.out_layers = nn.Sequential(GroupNorm(norm_groups, out_channels), nn.SiLU(), nn.Identity(), last)
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C_out, H, W); ``emb`` is the time embedding (N, time_width)."""
        h = self.in_layers(x)
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return torch.as_tensor(self.skip_connection(x)) + torch.as_tensor(self.out_layers[1:](h))


class Stage(nn.ModuleList):
    """Modules in a row, of which the residual blocks get the time embedding too."""

    checkpointed = False
    """Compute activations again in the backward pass instead of keeping them."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(modules)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map a feature map (N, C, H, W) through all of them."""
        if self.checkpointed and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._run, x, emb, use_reentrant=False))
        return self._run(x, emb)

    def _run(self, x: Tensor, emb: Tensor) -> Tensor:
        for module in self:
            x = module(x, emb) if isinstance(module, ResidualBlock) else module(x)
        return x


class SwinUNet(LatentUNet):
    """Predicts the clean latent from a noisy one, the step and the LR image.

    Latents are (N, C, h, w) with sides multiples of :attr:`size_multiple`. The noisy latent comes scaled to about unit
    variance; steps are integers from 0 on.
    """

    def __init__(self, config: SwinUNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SwinUNetConfig()
        self.latent_channels = config.latent_channels
        self.size_multiple = config.size_multiple
        self.feature_channels = config.widths
        self.halved_channels = (*config.widths, config.widths[-1])
        self.time_channels = time_width = TIME_RATIO * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        self.feature_extractor, condition_channels = _feature_extractor(config)
        first = nn.Conv2d(config.latent_channels + condition_channels, config.widths[0], 3, padding=1)
        self.input_blocks = nn.ModuleList([Stage(first), *_down_stages(config)])
        deepest, side = config.widths[-1], config.image_size >> (len(config.widths) - 1)
        self.middle_block = Stage(
            _residual(config, deepest, deepest), _attention(config, deepest, side), _residual(config, deepest, deepest)
        )
        self.output_blocks = nn.ModuleList(_up_stages(config))
        self.out = nn.Sequential(
            GroupNorm(config.norm_groups, config.widths[0]),
            nn.SiLU(),
            nn.Conv2d(config.widths[0], config.latent_channels, 3, padding=1),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    def network_cost(self, dtype: torch.dtype) -> NetworkCost:
        """Cost of one evaluation; its attention never leaves a window."""
        share = (self.config.model_channels + self.config.swin.width) / PUBLISHED_WIDTHS
        return NetworkCost(
            bytes_per_position=share * (FLOAT32_BYTES_PER_POSITION + VALUES_PER_POSITION * dtype.itemsize)
        )

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.checkpointed = True

    def speed_up(self) -> None:
        """Compute faster on a CPU in bfloat16, for inference; parameters and their names stay."""
        use_cpu_kernels(self)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Time embedding (N, :attr:`time_channels`), not activated, of integer steps (N,)."""
        sinusoid = timestep_embedding(timesteps, self.config.model_channels)
        return cast(Tensor, self.time_embed(sinusoid.to(self.dtype)))

    def encode(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The half of the network before it goes up again, for the arguments of :meth:`forward`.

        Returns the middle features (N, C_mid, h / 2^(levels - 1), ...), the output of every stage on the way down
        (first the input convolution, then by level ``res_blocks`` residual blocks and, but for the last level, one
        halving) and the time embedding.
        """
        self._check_sizes(x, lq)
        emb = self.embed_time(timesteps)
        h = torch.cat([x.to(self.dtype), self.feature_extractor(lq.to(self.dtype))], dim=1)
        skips: list[Tensor] = []
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        return self.middle_block(h, emb), skips, emb

    def features(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> tuple[Tensor, ...]:
        """Features (N, C_k, h / 2^k, w / 2^k) by level k for the arguments of :meth:`forward`: the end of each level on
        the way down, on the last one the middle features. Their channels are :attr:`feature_channels`."""
        middle, skips, _ = self.encode(x, timesteps, lq)
        per_level = self.config.res_blocks + 1  # stages of a level: the input convolution or a halving, then blocks
        return (*skips[per_level - 1 : -1 : per_level], middle)

    def halved_features(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> tuple[Tensor, ...]:
        """Features (N, C_k, h / 2^(k + 1), w / 2^(k + 1)) behind the halving of each level k, the end of the last
        level, and the middle features; their channels are :attr:`halved_channels`. TAD-SR's published code judges
        these."""
        middle, skips, _ = self.encode(x, timesteps, lq)
        per_level = self.config.res_blocks + 1
        return (*skips[per_level::per_level], skips[-1], middle)

    def forward(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> Tensor:
        """Predicted z_0, of the shape and type of ``x``.

        ``x`` (N, C, h, w) is the scaled noisy latent, ``timesteps`` (N,) integers, ``lq`` (N, lq_channels, H, W) the
        LR image in [-1, 1] with sides lq_size / image_size times those of ``x``. Raises ValueError for other sides.
        """
        h, skips, emb = self.encode(x, timesteps, lq)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return torch.as_tensor(self.out(h)).to(x.dtype)

    def _check_sizes(self, x: Tensor, lq: Tensor) -> None:
        height, width = x.shape[-2:]
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(f"latent sides must be multiples of {self.size_multiple}, got {height}x{width}")
        expected = (height << self.config.lq_halvings, width << self.config.lq_halvings)
        if tuple(lq.shape[-2:]) != expected:
            given = "x".join(map(str, lq.shape[-2:]))
            raise ValueError(
                f"the condition of a {height}x{width} latent must be {expected[0]}x{expected[1]}, got {given}"
            )


def _feature_extractor(config: SwinUNetConfig) -> tuple[nn.Sequential, int]:
    """Convolutions that halve the condition to the latent's size, and the channels they give."""
    layers: list[nn.Module] = []
    channels = config.lq_channels
    for stage in range(config.lq_halvings):
        width = EXTRACTOR_WIDTH << stage
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(), _halving(width, 2 * width)]
        channels = 2 * width
    return nn.Sequential(*layers), channels


def _down_stages(config: SwinUNetConfig) -> Iterator[Stage]:
    channels, side = config.widths[0], config.image_size
    for level, width in enumerate(config.widths):
        for block in range(config.res_blocks):
            attention = [_attention(config, width, side)] if block == 0 else []
            yield Stage(_residual(config, channels, width), *attention)
            channels = width
        if level < len(config.widths) - 1:
            yield Stage(_halving(width, width))
            side //= 2


def _up_stages(config: SwinUNetConfig) -> Iterator[Stage]:
    # Channels of what each stage on the way down leaves for the way up, in the order of its making.
    skips = [config.widths[0]]
    for level, width in enumerate(config.widths):
        skips += [width] * (config.res_blocks + (level < len(config.widths) - 1))
    channels, side = config.widths[-1], config.image_size >> (len(config.widths) - 1)
    for level, width in reversed(list(enumerate(config.widths))):
        for block in range(config.res_blocks + 1):
            modules: list[nn.Module] = [_residual(config, channels + skips.pop(), width)]
            if block == 0:
                modules.append(_attention(config, width, side))
            if level and block == config.res_blocks:
                enlarge, conv = nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1)
                modules.append(nn.Sequential(OrderedDict(enlarge=enlarge, conv=conv)))
                side *= 2
            yield Stage(*modules)
            channels = width


def _residual(config: SwinUNetConfig, channels: int, out_channels: int) -> ResidualBlock:
    return ResidualBlock(channels, out_channels, TIME_RATIO * config.model_channels, config.norm_groups)


def _attention(config: SwinUNetConfig, channels: int, side: int) -> SwinLayer:
    return SwinLayer(channels, config.swin, config.norm_groups, side)


def _halving(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)))

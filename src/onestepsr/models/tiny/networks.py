"""A small latent-diffusion backbone of our own: a miniature of Stable Diffusion's parts that trains and runs on a CPU.

Autoencoder (KL, factor 4) and time-conditioned UNet predicting eps, with cross-attention over a prompt embedding. Two
choices make it fast on a CPU: every residual block is free of normalisation, and every spatial operation is a dense
convolution. One choice makes it good at once: the autoencoder's linear path starts as an orthonormal block DCT of luma
and chroma, so that reconstruction is nearly lossless before the first training step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onestepsr.core.machine import is_one_of_several
from onestepsr.models.generators import LatentAutoencoder, LatentUNet, NetworkCost

# ---- Residual block and decoder -------------------------------------------------------------------------------------

FACTOR = 4
"""Pixels per latent position along each axis."""
DETAIL = ((1, 3), (3, 1), (5, 5))
"""Height and width of the local means whose differences from the image :class:`EvenContrast` evens, one after the
other: the finest detail across and down, then all that is fine."""
LEAST_ACTIVATED = -40.0
"""In training, lower values before the activation count as this. silu's derivative is 1e-16 here; further down, times a
gradient, it would be near 1e-40, and processors take twenty times as long to multiply such numbers: a step of the
bundled model took 1.4 times as long on photos."""
WINDOW = 9
"""Blocks along each side of the surroundings over which the strength of detail is measured."""
NO_DETAIL = 0.001
"""An eighth of a gray level of 255, in [-1, 1]: surroundings with much less detail than that are left as they are."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in what the eye, and the metric *grid*, takes for brightness. With their plain mean, a
lattice that the colours carry against each other would be left standing."""
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
        shift = None if self.time is None or emb is None else self.time(emb)[:, :, None, None]
        if torch.is_grad_enabled():
            h = h if shift is None else h + shift
            return x + torch.as_tensor(self.conv2(ClampedSilu.apply(h)))  # type: ignore[no-untyped-call]
        h = h if shift is None else h.add_(shift)  # in place: the same bits in fewer new pages
        return torch.as_tensor(self.conv2(F.silu(h, inplace=True))).add_(x)


class ClampedSilu(torch.autograd.Function):
    """silu of what is at least :data:`LEAST_ACTIVATED`, in training.

    Values below have its derivative there, which is as good as zero, instead of none at all: that saves a mask, and a
    tenth of the generator's time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """A tensor of any shape to the same shape."""
        ctx.save_for_backward(x)
        return F.silu(x.clamp_min(LEAST_ACTIVATED), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Gradient of ``x``."""
        (x,) = ctx.saved_tensors
        return torch.as_tensor(torch.ops.aten.silu_backward(gradient, x.clamp_min(LEAST_ACTIVATED)))


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), in place where no gradient is asked for."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


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
        h = self.block(silu(self.conv_in(z)))
        h = silu(F.pixel_shuffle(self.up(h), 2))
        h = self.half_blocks(h + silu(self.conv_half(h)))
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
        features = self.blocks(silu(self.conv1(torch.cat([image, features], dim=1))))
        return image + torch.as_tensor(self.conv2(features))


class EvenContrast(nn.Module):
    """Fine contrast of luma, made equally strong at the 4x4 pixels of a latent position.

    A decoder of shuffled pixels draws detail a little stronger at some pixels of its 4x4 blocks than at others, which
    shows as faint dots along edges and as a weave in texture. Which pixels those are differs with the degradation and
    the content of the image, so they are measured in the output itself: for every filter of :data:`DETAIL`, the mean
    absolute detail at each of the sixteen over the :data:`WINDOW` x :data:`WINDOW` blocks around is brought to that of
    all sixteen. Nothing is learnt, and no pixel's detail changes by more than :data:`LARGEST_FACTOR`.
    """

    def forward(self, image: Tensor) -> Tensor:
        """Image (N, 3, H, W) in about [-1, 1] of the same shape; H and W are multiples of 4."""
        weights = torch.tensor(LUMA, device=image.device)[:, None, None]
        before = (image.float() * weights).sum(dim=1, keepdim=True)
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


# ---- Autoencoder and UNet -------------------------------------------------------------------------------------------

LORA_TARGETS = r".*(conv\w*|to_q|to_k|to_v|to_out|time|skip_gain)"
"""Layers of the UNet that get adapters: every convolution, every projection of the attention and of the time."""
MEMORY_PER_PIXEL = 480.0
"""Bytes per image pixel in float32: measured over :data:`BUNDLED` as growth of the peak resident size, 430 to 490."""
LARGEST_LATENT = 2.5
"""Deviations beyond which the UNet's convolutions see no difference. Little of any photo lies beyond; the chroma of
pure colours does, with 5 to 13 deviations, and that of stripes of them with up to 16. Without normalisation, what is so
far from nearly all training grows from block to block: at 4, columns of green and magenta one pixel wide came out of
one model thousands of times too bright. Photos come out alike at 2.5, 3 and 4."""
LARGEST_CORRECTION = 12.0
"""Deviations that the UNet's convolutions may add to what its gain passes on: photos ask for up to 10. What some pure
colours in columns one pixel wide asked for was a hundred thousand times as much."""
STATISTICS_MOMENTUM = 0.02
"""Weight of a new batch in the running latent statistics."""


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Sizes of the tiny backbone; the defaults are a little smaller than :data:`BUNDLED`."""

    luma_channels: int = 14
    """Latent channels that start as luma DCT coefficients (of 16 in a 4x4 block, lowest frequencies first)."""
    chroma_channels: int = 3
    """Latent channels that start as DCT coefficients of each of the two chroma planes."""
    encoder_width: int = 32
    """Channels of the encoder's residual branch."""
    decoder_width: int = 48
    """Channels of the decoder's residual branch at latent resolution; half as many at twice that resolution."""
    decoder_blocks: int = 0
    """Residual blocks of the decoder at twice the latent's resolution, beside the one at the latent's own."""
    refine_width: int = 0
    """Channels of the decoder's last convolutions, at the resolution of the image, which see across the borders of
    latent positions; 0 leaves them out."""
    refine_blocks: int = 0
    """Residual blocks of the decoder at the resolution of the image, used with a ``refine_width``."""
    even_contrast: bool = False
    """Make fine contrast equally strong at all pixels of a latent position; meant for after training."""
    widths: tuple[int, ...] = (48, 64, 128)
    """UNet channels by level, the first at latent resolution, each further one at half the resolution before."""
    down_blocks: tuple[int, ...] = (1, 1, 2)
    """Residual blocks by level on the way down."""
    up_blocks: tuple[int, ...] = (1, 2, 1)
    """Residual blocks by level on the way up."""
    time_width: int = 128
    """Width of the time embedding."""
    prompt_tokens: int = 8
    """Length of the learnable prompt embedding that stands in for a text encoder."""
    prompt_width: int = 64
    """Channels of each prompt token."""

    def __post_init__(self) -> None:
        if not 1 <= self.luma_channels <= FACTOR**2 or not 0 <= self.chroma_channels <= FACTOR**2:
            raise ValueError(f"luma_channels must be 1..{FACTOR**2} and chroma_channels 0..{FACTOR**2}")
        if not len(self.widths) == len(self.down_blocks) == len(self.up_blocks) >= 1:
            raise ValueError("widths, down_blocks and up_blocks must have one entry per level")
        sizes = (self.encoder_width, self.decoder_width, self.time_width, self.prompt_tokens, self.prompt_width)
        if min(*sizes, *self.widths, *self.down_blocks, *self.up_blocks) < 1:
            raise ValueError("widths, blocks and tokens must be at least 1")
        if min(self.refine_width, self.decoder_blocks, self.refine_blocks) < 0:
            raise ValueError("refine_width, decoder_blocks and refine_blocks must not be negative")
        if self.refine_blocks and not self.refine_width:
            raise ValueError("refine_blocks needs a refine_width")

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.luma_channels + 2 * self.chroma_channels


BUNDLED = TinyConfig(
    decoder_width=64,
    decoder_blocks=1,
    refine_width=16,
    refine_blocks=1,
    widths=(64, 96, 160),
    down_blocks=(2, 3, 6),
    up_blocks=(7, 5, 6),
)
"""Sizes of the model that comes with the package."""


def block_dct(luma: int, chroma: int) -> Tensor:
    """Orthonormal DCT-II of 4x4 blocks in an orthonormal luma-chroma space: (luma + 2 chroma, 48).

    Rows are latent channels; columns follow ``pixel_unshuffle`` of an RGB image (channel, row, column). Coefficients
    are taken in order of growing frequency. Because the rows are orthonormal, the transpose decodes.
    """
    k = torch.arange(FACTOR, dtype=torch.float64)
    one_dim = torch.cos(math.pi / FACTOR * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / FACTOR)
    one_dim[0] /= math.sqrt(2)
    order = sorted(((u, v) for u in range(FACTOR) for v in range(FACTOR)), key=lambda uv: (uv[0] + uv[1], max(uv), uv))
    basis = torch.stack([torch.outer(one_dim[u], one_dim[v]).flatten() for u, v in order])  # (16, 16)
    colors = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]], dtype=torch.float64)
    colors = colors / colors.norm(dim=1, keepdim=True)  # gray, red-blue, green-magenta
    rows = [torch.kron(colors[0:1], basis[:luma])] + [torch.kron(colors[c : c + 1], basis[:chroma]) for c in (1, 2)]
    return torch.cat(rows).float()


class TinyAutoencoder(LatentAutoencoder):
    """KL autoencoder of factor 4 whose linear path starts as a block DCT.

    :meth:`encode` and :meth:`decode` work on latents of zero mean and unit variance per channel; the statistics behind
    that are tracked while training, as a batch norm would, and play the part of Stable Diffusion's latent scale.
    """

    latent_mean: Tensor
    latent_variance: Tensor
    factor = FACTOR

    def __init__(self, config: TinyConfig | None = None) -> None:
        super().__init__()
        self.config = config or TinyConfig()
        self.latent_channels = self.config.latent_channels
        latent, pixels = self.latent_channels, 3 * FACTOR**2
        width = self.config.encoder_width
        self.encoder_linear = nn.Conv2d(pixels, latent, 1, bias=False)
        self.encoder = nn.Sequential(
            nn.Conv2d(pixels, width, 3, padding=1),
            nn.SiLU(),
            ResidualBlock(width),
            nn.Conv2d(width, latent, 3, padding=1),
        )
        self.log_variance = nn.Parameter(torch.full((latent,), -6.0))
        self.decoder_linear = nn.Conv2d(latent, pixels, 3, padding=1, bias=False)
        self.decoder = TinyDecoder(
            latent,
            self.config.decoder_width,
            self.config.refine_width,
            blocks=self.config.decoder_blocks,
            refine_blocks=self.config.refine_blocks,
            even=self.config.even_contrast,
        )
        self.register_buffer("latent_mean", torch.zeros(latent))
        self.register_buffer("latent_variance", torch.ones(latent))
        self._start_at_dct()

    def _start_at_dct(self) -> None:
        if self.encoder_linear.weight.is_meta:  # nothing to fill, and PyTorch would load its compiler to find that out
            return
        basis = block_dct(self.config.luma_channels, self.config.chroma_channels)
        with torch.no_grad():
            self.encoder_linear.weight.copy_(basis[:, :, None, None])
            self.decoder_linear.weight.zero_()
            self.decoder_linear.weight[:, :, 1, 1] = basis.T
            last = self.encoder[-1]
            for parameter in last.parameters():
                parameter.zero_()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and of what :meth:`encode` and :meth:`decode` return."""
        return self.encoder_linear.weight.dtype

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance, in units of the latent statistics.

        ``x`` is (N, 3, H, W) in [-1, 1] with H and W multiples of 4; the mean is (N, C, H/4, W/4), the log-variance
        (C,): one learnt noise level per channel, which is all that a nearly lossless autoencoder needs.
        """
        patches = F.pixel_unshuffle(x, FACTOR).contiguous(memory_format=torch.channels_last)
        raw = self.encoder_linear(patches) + self.encoder(patches)
        if self.training and self.encoder_linear.weight.requires_grad:  # a frozen encoder keeps its statistics
            self._track(raw.detach())
        mean, std = self._scale()
        return (raw - mean) / std, self.log_variance

    def _track(self, raw: Tensor) -> None:
        mean, variance = raw.float().mean(dim=(0, 2, 3)), raw.float().var(dim=(0, 2, 3))
        mean, variance = over_processes(mean, variance, raw[:, 0].numel())
        weight = torch.where((self.latent_variance == 1.0).all(), 1.0, STATISTICS_MOMENTUM)
        self.latent_mean.lerp_(mean, weight)
        self.latent_variance.lerp_(variance, weight)

    def _scale(self) -> tuple[Tensor, Tensor]:
        return self.latent_mean[:, None, None], self.latent_variance.sqrt()[:, None, None]

    def encode(self, x: Tensor) -> Tensor:
        """Posterior mean (N, C, H/4, W/4), about unit variance, of ``x`` (N, 3, H, W) in [-1, 1]."""
        return self.moments(x.to(self.dtype))[0]

    def decode(self, z: Tensor) -> Tensor:
        """Image (N, 3, 4h, 4w) in about [-1, 1] of the latent ``z`` (N, C, h, w)."""
        mean, std = self._scale()
        z = z.to(self.dtype)
        raw = z * std + mean
        return torch.as_tensor(self.decoder(z, F.pixel_shuffle(self.decoder_linear(raw), FACTOR)))

    def memory_per_pixel(self, dtype: torch.dtype) -> float:
        """Peak bytes per image pixel of a whole generator on this backbone, UNet included."""
        return MEMORY_PER_PIXEL * dtype.itemsize / 4

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, posterior mean and log-variance; ``noise`` (latent shape) samples the posterior."""
        mean, log_variance = self.moments(x)
        z = mean if noise is None else mean + noise * (0.5 * log_variance).exp()[:, None, None]
        return self.decode(z), mean, log_variance


def over_processes(mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all processes' values together, from those of ``count`` values in each process."""
    if not is_one_of_several():
        return mean, variance
    sums = torch.stack([mean, mean.square(), variance]).double()
    dist.all_reduce(sums)
    processes = dist.get_world_size()
    whole, square, within = sums / processes
    deviations = (count - 1) * within + count * (square - whole.square())  # within and between, per process
    return whole.to(mean), (deviations * processes / (count * processes - 1)).to(variance)


class PromptAttention(nn.Module):
    """Cross-attention of every latent position to the prompt tokens, with a residual connection.

    It mixes no positions, so the network means the same on a tile as on the whole image.
    """

    def __init__(self, channels: int, prompt_width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(prompt_width, channels, bias=False)
        self.to_v = nn.Linear(prompt_width, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; ``prompt`` is (1 or N, L, prompt_width)."""
        n, c, height, width = x.shape
        prompt = prompt.expand(n, -1, -1)
        q = self._split(self.to_q(x.permute(0, 2, 3, 1).reshape(n, height * width, c)))
        attended = F.scaled_dot_product_attention(q, self._split(self.to_k(prompt)), self._split(self.to_v(prompt)))
        out = self.to_out(attended.transpose(1, 2).reshape(n, height, width, c))
        return x + torch.as_tensor(out).permute(0, 3, 1, 2)

    def _split(self, tokens: Tensor) -> Tensor:
        n, length, c = tokens.shape
        return tokens.reshape(n, length, self.heads, c // self.heads).transpose(1, 2)  # (N, heads, L, C/heads)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (N, width) of integer steps ``t`` (N,): cosines, then sines, base 10000."""
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TinyUNetEncoder(nn.Module):
    """Time embedding, downsampling blocks and middle block: the half of the UNet that a diffusion discriminator
    reuses."""

    latent_gain = 1.0
    lora_targets = LORA_TARGETS

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_channels = config.widths[-1]
        self.latent_channels = config.latent_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.time_width, config.time_width), nn.SiLU(), nn.Linear(config.time_width, config.time_width)
        )
        self.conv_in = nn.Conv2d(config.latent_channels, config.widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            nn.ModuleList(ResidualBlock(width, config.time_width) for _ in range(count))
            for width, count in zip(config.widths, config.down_blocks, strict=True)
        )
        self.downsamplers = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in pairwise(config.widths)
        )
        deepest = config.widths[-1]
        self.mid_block1 = ResidualBlock(deepest, config.time_width)
        self.mid_attention = PromptAttention(deepest, config.prompt_width)
        self.mid_block2 = ResidualBlock(deepest, config.time_width)

    def embed_time(self, t: Tensor) -> Tensor:
        """Activated time embedding (N, time_width) of integer steps (N,)."""
        sinusoid = timestep_embedding(t, self.config.time_width).to(self.conv_in.weight.dtype)
        return F.silu(self.time_embed(sinusoid))

    def forward(self, z_t: Tensor, t: Tensor, prompt: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Middle features (N, C_mid, h/f, w/f), skip features by level (finest first) and the time embedding."""
        emb = self.embed_time(t)
        h = self.conv_in(z_t.clamp(-LARGEST_LATENT, LARGEST_LATENT))
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.levels):
            if level:
                h = self.downsamplers[level - 1](h)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, emb)
            skips.append(h)
        h = self.mid_block2(self.mid_attention(self.mid_block1(h, emb), prompt), emb)
        return h, skips, emb


class TinyUNet(LatentUNet):
    """Predicts eps from (z_t, t, prompt); latents (N, C, h, w) with h and w multiples of :attr:`size_multiple`."""

    lora_targets = LORA_TARGETS

    def __init__(self, config: TinyConfig | None = None) -> None:
        super().__init__()
        self.config = config or TinyConfig()
        widths, time_width = self.config.widths, self.config.time_width
        self.size_multiple = 2 ** (len(widths) - 1)
        self.encoder = TinyUNetEncoder(self.config)
        self.levels = nn.ModuleList(
            nn.ModuleList(ResidualBlock(width, time_width) for _ in range(count))
            for width, count in zip(widths, self.config.up_blocks, strict=True)
        )
        self.upsamplers = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairwise(widths))
        self.conv_out = nn.Conv2d(widths[0], self.config.latent_channels, 3, padding=1)
        self.skip_gain = nn.Linear(time_width, self.config.latent_channels)
        for module in (self.conv_out, self.skip_gain):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias if module.bias is not None else torch.empty(0))

    def network_cost(self, dtype: torch.dtype) -> NetworkCost:
        """Cost of one evaluation; the autoencoder's figure was measured over both, so this adds nothing to it."""
        return NetworkCost(bytes_per_position=FACTOR**2 * MEMORY_PER_PIXEL * dtype.itemsize / 4)

    def forward(self, z_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """Predicted noise, shaped like ``z_t``; ``t`` is (N,) integers, ``prompt`` (1 or N, L, prompt_width).

        A step-dependent gain per channel passes ``z_t`` straight to the output: the best linear noise estimate for
        unit-variance latents is sqrt(1 - alpha_bar_t) z_t, and the network only has to learn what differs from it.
        """
        h, skips, emb = self.encoder(z_t, t, prompt)
        for level in reversed(range(len(skips))):
            if level < len(skips) - 1:
                h = F.interpolate(self.upsamplers[level](h), scale_factor=2.0, mode="nearest")
            h = h + skips[level]
            for block in self.levels[level]:  # type: ignore[attr-defined]
                h = block(h, emb)
        correction = self.conv_out(h).clamp(-LARGEST_CORRECTION, LARGEST_CORRECTION)
        return torch.as_tensor(correction + self.skip_gain(emb)[:, :, None, None] * z_t)

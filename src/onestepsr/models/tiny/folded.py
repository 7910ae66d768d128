"""The tiny generator with everything computed beforehand that does not depend on the image, for export and inference.

Step and prompt of a one-step generator are fixed, so that its time embedding becomes part of biases, its attention to
the prompt two 1x1 convolutions around a softmax, and Eq. 1 of D3SR a factor and a scaled last convolution. Enlarging by
the latent's factor and cutting into its blocks is one 5x5 convolution of the LR image. What is left are convolutions,
SiLU, clamps and pixel shuffles, which every engine has; the result is that of the generator but for rounding.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.imaging.resize import BICUBIC_REACH, bicubic_weights
from onestepsr.models.generators import Generator, OneStepLatentGenerator
from onestepsr.models.tiny.generator import TinyGeneratorConfig
from onestepsr.models.tiny.networks import (
    DETAIL,
    FACTOR,
    LARGEST_CORRECTION,
    LARGEST_FACTOR,
    LARGEST_LATENT,
    LUMA,
    NO_DETAIL,
    WINDOW,
    PromptAttention,
    Refinement,
    ResidualBlock,
    TinyAutoencoder,
    TinyUNet,
)


def is_foldable(generator: nn.Module) -> bool:
    """True for a one-step generator on the tiny backbone that starts from the LR latent and enlarges by its factor."""
    if not isinstance(generator, OneStepLatentGenerator) or generator.reads_text:
        return False
    config = generator.config
    return isinstance(config, TinyGeneratorConfig) and not config.noised and config.scale == FACTOR


class FoldedTiny(nn.Module):
    """RGB (N, 3, h, w) in [0, 1] to (N, 3, 4h, 4w) in about [0, 1], not clamped, for sides that are multiples of
    :attr:`multiple`; in float32, from a copy of the weights."""

    def __init__(self, generator: Generator, *, plain: bool = False) -> None:
        """Raises :class:`UserError` unless :func:`is_foldable` is true of the generator.

        ``plain``: of convolutions, ReLU, arithmetic between two maps, padding, nearest enlargement and pixel shuffles
        alone. Programs made for Real-ESRGAN have no other layers of ncnn.
        """
        super().__init__()
        if not is_foldable(generator):
            raise UserError(f"a {type(generator).__name__} is no one-step generator on the tiny backbone")
        source = cast(OneStepLatentGenerator, generator)
        autoencoder, unet = cast(TinyAutoencoder, source.autoencoder), cast(TinyUNet, source.unet)
        self.scale, self.multiple = source.scale, source.lr_multiple
        with torch.no_grad():
            mean, std = autoencoder.latent_mean.float(), autoencoder.latent_variance.float().sqrt()
            step = torch.tensor([source.timestep])
            emb = unet.encoder.embed_time(step).float()[0]
            signal, sigma = (float(value) for value in source.schedule.coefficients(source.timestep, mean))

            # Encoder: [0, 1] to [-1, 1], enlarged, in blocks of 4x4 pixels; latents of zero mean and unit variance.
            self.blocks = _blocks_of_enlarged()
            self.linear = _scaled(autoencoder.encoder_linear, 1 / std, -mean / std)
            self.encoder = nn.Sequential(
                _copied(autoencoder.encoder[0]),
                Swish(plain),
                Block(cast(ResidualBlock, autoencoder.encoder[2]), plain=plain),
                _scaled(cast(nn.Conv2d, autoencoder.encoder[3]), 1 / std),
            )

            # UNet.
            half = unet.encoder
            self.unet_in = _copied(half.conv_in)
            self.clamp = Clamp(-LARGEST_LATENT, LARGEST_LATENT, plain)
            self.down = nn.ModuleList(_blocks(level, emb, plain) for level in half.levels)
            self.downsamplers = nn.ModuleList(_copied(layer) for layer in half.downsamplers)
            self.middle = nn.Sequential(
                Block(half.mid_block1, emb, plain=plain),
                Attention(half.mid_attention, source.prompt, plain=plain),
                Block(half.mid_block2, emb, plain=plain),
            )
            self.up = nn.ModuleList(_blocks(level, emb, plain) for level in unet.levels)
            self.upsamplers = nn.ModuleList(_copied(layer) for layer in unet.upsamplers)
            # z_H = (z_L - sigma (correction + gain z_L)) / signal  (D3SR, Eq. 1)
            factor = -sigma / signal
            self.unet_out = _scaled(unet.conv_out, torch.full_like(mean, factor))
            self.limit = Clamp(-abs(factor) * LARGEST_CORRECTION, abs(factor) * LARGEST_CORRECTION, plain)
            gain = unet.skip_gain(emb).float()
            self.gain = _each((1 - sigma * gain) / signal, None)

            # Decoder.
            self.raw = _each(std, mean)
            self.decoder_linear = _copied(autoencoder.decoder_linear)
            decoder = autoencoder.decoder
            self.decoder_in, self.decoder_block = _copied(decoder.conv_in), Block(decoder.block, plain=plain)
            self.decoder_up, self.decoder_half = _copied(decoder.up), _copied(decoder.conv_half)
            self.swish = Swish(plain)
            self.half_blocks = nn.Sequential(
                *(Block(cast(ResidualBlock, block), plain=plain) for block in decoder.half_blocks)
            )
            self.decoder_out = _copied(decoder.conv_out)
            self.refine = Refine(decoder.refine, plain=plain) if decoder.refine is not None else None
            self.even = (PlainEven() if plain else Even()) if decoder.even is not None else None
        self.eval().requires_grad_(False)

    def forward(self, lr: Tensor) -> Tensor:
        """Enlarged image, as the generator's."""
        return self.decode(self.restore(self.encode(lr)))

    def encode(self, lr: Tensor) -> Tensor:
        """Latent (N, C, h, w) of the enlarged LR (N, 3, h, w)."""
        reach = BICUBIC_REACH
        blocks = self.blocks(F.pad(lr * 2 - 1, (reach, reach, reach, reach), mode="replicate"))
        return cast(Tensor, self.linear(blocks) + self.encoder(blocks))

    def restore(self, z: Tensor) -> Tensor:
        """Estimate of the HR latent, shaped like ``z``."""
        h = self.unet_in(self.clamp(z))
        skips = []
        for level, blocks in enumerate(self.down):
            h = blocks(self.downsamplers[level - 1](h) if level else h)
            skips.append(h)
        h = self.middle(h)
        for level in reversed(range(len(self.up))):
            if level < len(self.up) - 1:
                h = F.interpolate(self.upsamplers[level](h), scale_factor=2.0, mode="nearest")
            h = self.up[level](h + skips[level])
        return cast(Tensor, self.gain(z) + self.limit(self.unet_out(h)))

    def decode(self, z: Tensor) -> Tensor:
        """Image (N, 3, 4h, 4w) of a latent."""
        linear = F.pixel_shuffle(self.decoder_linear(self.raw(z)), FACTOR)
        h = self.decoder_block(self.swish(self.decoder_in(z)))
        h = self.swish(F.pixel_shuffle(self.decoder_up(h), 2))
        h = self.half_blocks(h + self.swish(self.decoder_half(h)))
        image = linear + F.pixel_shuffle(self.decoder_out(h), 2)
        if self.refine is not None:
            image = self.refine(image, h)
        if self.even is not None:
            image = self.even(image)
        return image * 0.5 + 0.5


class Block(nn.Module):
    """A residual block whose time embedding is part of the first convolution's bias."""

    def __init__(self, block: ResidualBlock, emb: Tensor | None = None, *, plain: bool = False) -> None:
        super().__init__()
        shift = block.time(emb.to(block.time.weight.dtype)) if block.time is not None and emb is not None else None
        self.conv1 = _scaled(block.conv1, None, shift)
        self.conv2, self.swish = _copied(block.conv2), Swish(plain)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return x + cast(Tensor, self.conv2(self.swish(self.conv1(x))))


class Swish(nn.Module):
    """x sigmoid(x), also known as SiLU; plain: in powers, x / (1 + (1/e)^x)."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return x / (_power(math.exp(-1.0), x) + 1.0) if self.plain else F.silu(x)


def _power(base: float, x: Tensor) -> Tensor:
    """base^x, in operations on two maps: ncnn raises maps to constants, but not constants to maps."""
    return torch.pow(x * 0.0 + base, x)


class Clamp(nn.Module):
    """Values between two limits; plain: by two ReLUs, which is exact also for values far outside."""

    def __init__(self, least: float, most: float, plain: bool) -> None:
        super().__init__()
        self.least, self.most, self.plain = least, most, plain

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        if not self.plain:
            return x.clamp(self.least, self.most)
        below = self.most - F.relu(self.most - x)
        return F.relu(below - self.least) + self.least


class Attention(nn.Module):
    """Attention to a fixed prompt: scores are a 1x1 convolution, and so is what their softmax weighs."""

    def __init__(self, attention: PromptAttention, prompt: Tensor, *, plain: bool = False) -> None:
        super().__init__()
        tokens, heads = prompt.float()[0], attention.heads
        channels = attention.to_q.weight.shape[0]
        width = channels // heads
        key = (tokens @ attention.to_k.weight.float().T).reshape(-1, heads, width)  # (L, heads, C/heads)
        value = (tokens @ attention.to_v.weight.float().T).reshape(-1, heads, width)
        query = attention.to_q.weight.float().reshape(heads, width, channels)
        out = attention.to_out.weight.float().reshape(channels, heads, width)
        self.heads, length = heads, tokens.shape[0]
        scores = torch.einsum("lhw,hwc->hlc", key, query) * width**-0.5
        weighed = torch.einsum("chw,lhw->chl", out, value)
        self.scores = nn.Conv2d(channels, heads * length, 1, bias=False)
        self.scores.weight.copy_(scores.reshape(heads * length, channels, 1, 1))
        self.out = nn.Conv2d(heads * length, channels, 1)
        self.out.weight.copy_(weighed.reshape(channels, heads * length, 1, 1))
        cast(Tensor, self.out.bias).copy_(attention.to_out.bias)
        self.sum = nn.Conv2d(heads * length, heads * length, 1, bias=False) if plain else None
        if self.sum is not None:  # of powers, whose sums over the tokens are a convolution too
            own = torch.kron(torch.eye(heads), torch.ones(length, length))
            self.sum.weight.copy_(own[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        if self.sum is not None:
            powers = _power(math.e, self.scores(x))
            return x + cast(Tensor, self.out(powers / self.sum(powers)))
        weights = [part.softmax(dim=1) for part in self.scores(x).chunk(self.heads, dim=1)]
        return x + cast(Tensor, self.out(torch.cat(weights, dim=1)))


class Refine(nn.Module):
    """Convolutions at the image's resolution over the image and features of half that resolution."""

    def __init__(self, refinement: Refinement, *, plain: bool = False) -> None:
        super().__init__()
        self.up, self.conv1 = _copied(refinement.up), _copied(refinement.conv1)
        self.swish = Swish(plain)
        self.blocks = nn.Sequential(*(Block(cast(ResidualBlock, block), plain=plain) for block in refinement.blocks))
        self.conv2 = _copied(refinement.conv2)

    def forward(self, image: Tensor, half: Tensor) -> Tensor:
        """Image (N, 3, H, W), corrected; ``half`` is (N, C, H/2, W/2)."""
        features = F.pixel_shuffle(self.up(half), 2)
        features = self.blocks(self.swish(self.conv1(torch.cat([image, features], dim=1))))
        return image + cast(Tensor, self.conv2(features))


class Even(nn.Module):
    """:class:`onestepsr.models.tiny.networks.EvenContrast` in average pooling, which every engine has."""

    def __init__(self) -> None:
        super().__init__()
        self.luma = nn.Conv2d(3, 1, 1, bias=False)
        self.luma.weight.copy_(torch.tensor(LUMA)[None, :, None, None])

    def forward(self, image: Tensor) -> Tensor:
        """Image (N, 3, H, W) in about [-1, 1] of the same shape; H and W are multiples of 4."""
        before = brightness = self.luma(image)
        for height, width in DETAIL:
            mean = _mean(brightness, height, width)
            detail = brightness - mean
            strength = _mean(_mean(F.pixel_unshuffle(detail.abs(), FACTOR), WINDOW, 1), 1, WINDOW) + NO_DETAIL
            factor = (strength.mean(dim=1, keepdim=True) / strength).clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
            brightness = mean + detail * F.pixel_shuffle(factor, FACTOR)
        return torch.add(image, brightness - before)


class PlainEven(nn.Module):
    """The same in convolutions: means, the cut into 4x4 pixels, and the mean of these."""

    def __init__(self) -> None:
        super().__init__()
        cells = FACTOR**2
        self.luma = nn.Conv2d(3, 1, 1, bias=False)
        self.luma.weight.copy_(torch.tensor(LUMA)[None, :, None, None])
        self.means = nn.ModuleList(_constant(1, 1, size, 1 / (size[0] * size[1])) for size in DETAIL)
        self.cut = nn.Conv2d(1, cells, FACTOR, FACTOR, bias=False)
        self.cut.weight.copy_(torch.eye(cells).reshape(cells, 1, FACTOR, FACTOR))
        self.down, self.across = (_constant(cells, cells, size, 1 / WINDOW) for size in ((WINDOW, 1), (1, WINDOW)))
        self.mean = nn.Conv2d(cells, cells, 1, bias=False)
        self.mean.weight.fill_(1 / cells)
        self.clamp = Clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR, True)
        self.gray = nn.Conv2d(1, 3, 1, bias=False)
        self.gray.weight.fill_(1.0)

    def forward(self, image: Tensor) -> Tensor:
        """Image (N, 3, H, W) in about [-1, 1] of the same shape; H and W are multiples of 4."""
        before = brightness = self.luma(image)
        reach = WINDOW // 2
        for (height, width), average in zip(DETAIL, self.means, strict=True):
            sides = (width // 2, width // 2, height // 2, height // 2)
            mean = average(F.pad(brightness, sides, mode="replicate"))
            detail = brightness - mean
            strength = self.cut(torch.maximum(detail, detail * -1.0))
            strength = self.down(F.pad(strength, (0, 0, reach, reach), mode="replicate"))
            strength = self.across(F.pad(strength, (reach, reach, 0, 0), mode="replicate")) + NO_DETAIL
            factor = F.pixel_shuffle(self.clamp(self.mean(strength) / strength), FACTOR)
            brightness = mean + detail * factor
        return image + cast(Tensor, self.gray(brightness - before))


def _constant(channels: int, outputs: int, size: tuple[int, int], value: float) -> nn.Conv2d:
    """A convolution without padding that weighs ``size`` pixels of each channel alike."""
    conv = nn.Conv2d(channels, outputs, size, bias=False)
    conv.weight.copy_((torch.eye(outputs, channels) * value)[:, :, None, None].expand(-1, -1, *size))
    return conv


def _each(factor: Tensor, shift: Tensor | None) -> nn.Conv2d:
    """A 1x1 convolution that multiplies each channel by its factor, and adds ``shift``."""
    conv = nn.Conv2d(len(factor), len(factor), 1, bias=shift is not None)
    with torch.no_grad():
        conv.weight.copy_(torch.diag(factor)[:, :, None, None])
        if shift is not None and conv.bias is not None:
            conv.bias.copy_(shift)
    return conv


def _mean(planes: Tensor, height: int, width: int) -> Tensor:
    """Mean over odd ``height`` x ``width`` values around each; border values are repeated outwards."""
    down, across = height // 2, width // 2
    return F.avg_pool2d(F.pad(planes, (across, across, down, down), mode="replicate"), (height, width), stride=1)


# ---- layers with changed weights -------------------------------------------------------------------------------------


def _blocks_of_enlarged() -> nn.Conv2d:
    """Bicubic enlargement by four and the cut into 4x4 blocks behind it, as one convolution of the padded image: its
    channels follow ``pixel_unshuffle`` (channel, row, column)."""
    weights = bicubic_weights(FACTOR)  # (16, 1, 5, 5)
    side = weights.shape[-1]
    conv = nn.Conv2d(3, 3 * FACTOR**2, side, bias=False)
    conv.weight.zero_()
    for channel in range(3):
        conv.weight[channel * FACTOR**2 : (channel + 1) * FACTOR**2, channel] = weights[:, 0]
    return conv


def _copied(layer: nn.Module) -> nn.Conv2d:
    return _scaled(layer)


def _scaled(layer: nn.Module, factor: Tensor | None = None, shift: Tensor | None = None) -> nn.Conv2d:
    """A copy of a convolution whose outputs are multiplied by ``factor`` and then shifted, both by channel."""
    plain = cast(nn.Conv2d, layer)
    bias = plain.bias is not None or shift is not None
    size, stride, padding = plain.kernel_size, plain.stride, plain.padding
    made = nn.Conv2d(plain.in_channels, plain.out_channels, size, stride, padding, bias=bias)  # type: ignore[arg-type]
    weight = plain.weight.float()
    made.weight.copy_(weight if factor is None else weight * factor[:, None, None, None])
    if made.bias is not None:
        value = torch.zeros_like(made.bias) if plain.bias is None else plain.bias.float()
        made.bias.copy_((value if factor is None else value * factor) + (0.0 if shift is None else shift.float()))
    return made


def _blocks(level: nn.Module, emb: Tensor, plain: bool) -> nn.Sequential:
    return nn.Sequential(*(Block(cast(ResidualBlock, block), emb, plain=plain) for block in level.children()))

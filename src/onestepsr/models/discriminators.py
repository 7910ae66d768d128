"""Discriminators of latents, by the features of a diffusion UNet, and of images, by a small network of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as named_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from onestepsr.core.errors import UserError
from onestepsr.models.seesr.networks import SeeSRCondition, SeeSRUNet
from onestepsr.models.stable_diffusion.networks import StableDiffusionUNet
from onestepsr.models.tiny.networks import TinyUNet, timestep_embedding


class DiffusionEncoder(Protocol):
    """The half of a diffusion UNet that a discriminator reuses: time embedding, downsampling blocks, middle block."""

    feature_channels: int
    """Channels of the middle features."""
    latent_channels: int
    """Channels of the latents it takes."""
    latent_gain: float
    """Factor on a unit-variance latent of the generator before noise is added to it.

    1 unless another latent scale is asked for: noise levels of a diffusion process assume unit variance.
    """

    def __call__(self, z_t: Tensor, t: Tensor, prompt: Tensor) -> tuple[Tensor, ...]:
        """Middle features (N, feature_channels, h', w') first, of latents (N, latent_channels, h, w) at steps (N,);
        ``prompt`` is (1 or N, L, C)."""
        ...


class NoiseAwareDiscriminator(nn.Module):
    """The discriminator of D3SR (section 3.2): a diffusion UNet's down and middle blocks, then an MLP on the middle
    features.

    It is told the diffusion step of the noised latent that it sees, as any diffusion UNet is, and gives one realism
    logit for every spatial region of the middle block. Adding the noise is the loss's business.
    """

    def __init__(
        self, encoder: nn.Module, prompt: Tensor, *, hidden: tuple[int, ...] = (128,), slope: float = 0.2
    ) -> None:
        """``encoder`` is a :class:`DiffusionEncoder`; ``prompt`` (1, L, C) starts its learnable condition.

        The paper leaves the MLP open: ``hidden`` gives the widths between features and logit, leaky ReLU (``slope``)
        follows each. One hidden layer as wide as the middle block is the smallest that is not linear.
        """
        super().__init__()
        self.encoder = encoder
        self.prompt = nn.Parameter(prompt.detach().clone())
        layers: list[nn.Module] = []
        width = cast(DiffusionEncoder, encoder).feature_channels
        for size in hidden:
            layers += [nn.Conv2d(width, size, 1), nn.LeakyReLU(slope)]
            width = size
        self.head = nn.Sequential(*layers, nn.Conv2d(width, 1, 1))

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Realism logits (N, 1, h', w') of latents (N, C, h, w) noised to steps ``t`` (N,)."""
        encoder = cast(DiffusionEncoder, self.encoder)
        return cast(Tensor, self.head(encoder(z_t, t, self.prompt)[0]))


class PatchCritic(nn.Module):
    """Realism of every region of an image, by strided convolutions with spectral normalisation (Miyato et al., 2018).

    It begins at half the image's resolution, every 2x2 pixels as one position, which costs a quarter and hides
    nothing.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (48, 96, 128),
        *,
        slope: float = 0.2,
        contrast_floor: float | None = None,
        condition_channels: int = 0,
    ) -> None:
        """``widths`` are the channels at a half, a quarter, ... of the image's resolution. With ``contrast_floor`` it
        sees :func:`local_contrast` beside the colours, with ``condition_channels`` whatever else it is shown, such as
        the enlarged input of the generator."""
        super().__init__()
        self.contrast_floor, self.condition_channels = contrast_floor, condition_channels
        channels = 4 * (3 + (contrast_floor is not None) + condition_channels)
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), nn.LeakyReLU(slope)]
        for fine, coarse in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(fine, coarse, 4, stride=2, padding=1)), nn.LeakyReLU(slope)]
        deepest = widths[-1]
        layers += [spectral_norm(nn.Conv2d(deepest, deepest, 3, padding=1)), nn.LeakyReLU(slope)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(deepest, 1, 3, padding=1))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, ...]:
        """Realism logits (N, 1, h', w') of images (N, 3, H, W) in [0, 1], H and W even, then the features behind
        every activation, finest first; ``condition`` (N, condition_channels, H, W) in [0, 1] is seen beside them."""
        if self.condition_channels != (0 if condition is None else condition.shape[1]):
            raise ValueError(f"this critic needs a condition of {self.condition_channels} channels")
        seen = [x * 2 - 1]
        seen += [local_contrast(x, self.contrast_floor)] if self.contrast_floor is not None else []
        seen += [condition * 2 - 1] if condition is not None else []
        h, features = F.pixel_unshuffle(torch.cat(seen, dim=1), 2), []
        for layer in self.layers:
            h = layer(h)
            if isinstance(layer, nn.LeakyReLU):
                features.append(h)
        return h, *features


def local_contrast(x: Tensor, floor: float, *, window: int = 7) -> Tensor:
    """Brightness (N, 1, H, W) of images (N, 3, H, W) in [0, 1], less its local mean, over its local deviation.

    In it, faint texture is as strong as an edge, as it is to the eye and to natural-scene statistics (Ruderman, 1994).
    ``floor`` is added to the deviation: what varies less stays faint.
    """
    y = x.float().mean(dim=1, keepdim=True)
    y = F.pad(y, (window // 2,) * 4, mode="reflect")
    mean, square = (F.avg_pool2d(plane, window, stride=1) for plane in (y, y.square()))
    deviation = (square - mean.square()).clamp(min=1e-7).sqrt()
    inner = y[..., window // 2 : -(window // 2), window // 2 : -(window // 2)]
    return (inner - mean) / (deviation + floor)


# ---- TAD-SR: features of a frozen diffusion model, and heads that judge noised latents by them ----


class FeatureDenoiser(Protocol):
    """Interface of the denoising networks of the residual-shifting family as sources of features."""

    feature_channels: tuple[int, ...]
    """Channels of the features by level, the finest first."""
    halved_channels: tuple[int, ...]
    """Channels of the features behind the halvings."""
    time_channels: int
    """Width of the time embedding."""

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Time embedding (N, time_channels) of integer steps (N,)."""
        ...

    def features(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> tuple[Tensor, ...]:
        """One map (N, C_k, h / 2^k, w / 2^k) per level for the arguments of the network."""
        ...

    def halved_features(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> tuple[Tensor, ...]:
        """One map (N, C_k, h / 2^(k + 1), w / 2^(k + 1)) behind the halving of each level k; of the last level, which
        has none, its end and the middle features."""
        ...


class ResidualShiftFeatures(nn.Module):
    """Encoder half of a residual-shifting network, on that network's own weights (TAD-SR, Eq. 9)."""

    def __init__(self, denoiser: nn.Module, *, official: bool = False) -> None:
        """``denoiser`` is a :class:`FeatureDenoiser`. ``official`` takes the features that the published code takes,
        behind the halvings, and hands on the step itself instead of the network's time embedding."""
        super().__init__()
        self.denoiser, self.official = denoiser, official
        known = cast(FeatureDenoiser, denoiser)
        self.feature_channels = known.halved_channels if official else known.feature_channels
        self.time_channels = known.time_channels

    def forward(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> tuple[Tensor, ...]:
        """Time embedding (N, time_channels), or the steps (N,), then the features of every scale, for the network's
        arguments."""
        known = cast(FeatureDenoiser, self.denoiser)
        if self.official:
            return (timesteps, *known.halved_features(x, timesteps, lq))
        return (known.embed_time(timesteps), *known.features(x, timesteps, lq))


class PromptedUNet(nn.Module):
    """A noise-predicting UNet and its prompt embedding as one network."""

    def __init__(self, unet: nn.Module, prompt: Tensor) -> None:
        """``unet`` is a NoisePredictor; a copy of ``prompt`` (1, L, C) becomes a parameter."""
        super().__init__()
        self.unet = unet
        self.prompt = nn.Parameter(prompt.detach().clone())

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Predicted noise, shaped like ``z_t`` (N, C, h, w), at integer steps ``t`` (N,)."""
        return cast(Tensor, self.unet(z_t, t, self.prompt))

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        enable = getattr(self.unet, "enable_gradient_checkpointing", None)
        if enable is None:
            raise UserError(f"gradient_checkpointing: a {type(self.unet).__name__} is too small to offer it")
        enable()


class LatentDiffusionFeatures(nn.Module):
    """Encoder half of a noise-predicting UNet, on that network's own weights (TAD-SR, Eq. 9)."""

    def __init__(self, network: PromptedUNet, *, official: bool = False) -> None:
        """``official`` takes the features that the published code takes, the end of every level without the middle
        block, and hands on the step itself instead of the network's time embedding."""
        super().__init__()
        self.network, self.official = network, official
        self.feature_channels, self.time_channels = _sizes(network.unet)

    def forward(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Time embedding (N, time_channels), or the steps (N,), then the features (N, C_k, h / 2^k, w / 2^k) of every
        level k: the end of each level on the way down, on the last one the middle features unless ``official``."""
        unet, prompt = self.network.unet, self.network.prompt
        if isinstance(unet, TinyUNet):
            middle, ends, emb = unet.encoder(z_t, t, prompt)
        else:
            middle, ends, emb = _stable_diffusion_features(cast(StableDiffusionUNet, unet).unet, z_t, t, prompt)
        return (t, *ends) if self.official else (emb, *ends[:-1], middle)


class SeeSRFeatures(nn.Module):
    """Encoder half of SeeSR's UNet with its ControlNet, on their own weights, as in TAD-SR's published code."""

    time_channels = 0

    def __init__(self, network: SeeSRUNet) -> None:
        super().__init__()
        self.network = network
        self.feature_channels = network.config.block_out_channels

    def forward(self, z_t: Tensor, t: Tensor, y: SeeSRCondition) -> tuple[Tensor, ...]:
        """The steps (N,), then the features of every level."""
        return (t, *self.network.features(z_t, t, y))


def _sizes(unet: nn.Module) -> tuple[tuple[int, ...], int]:
    if isinstance(unet, TinyUNet):
        return unet.config.widths, unet.config.time_width
    if isinstance(unet, StableDiffusionUNet):
        return unet.config.block_out_channels, unet.unet.time_embedding.linear_2.out_features
    raise UserError(f"a {type(unet).__name__} has no features that a discriminator could use")


def _stable_diffusion_features(
    unet: Any, z_t: Tensor, t: Tensor, prompt: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Middle features, the end of every level and the time embedding of diffusers' UNet, whose own forward gives
    nothing but its end."""
    prompt = prompt.expand(z_t.shape[0], -1, -1)
    emb = unet.time_embedding(unet.get_time_embed(sample=z_t, timestep=t))
    h = unet.conv_in(z_t)
    features: list[Tensor] = []
    for block in unet.down_blocks:
        attends = getattr(block, "has_cross_attention", False)
        options = {"encoder_hidden_states": prompt} if attends else {}
        h, outputs = block(hidden_states=h, temb=emb, **options)
        features.append(outputs[-2] if block.downsamplers else outputs[-1])  # the last one is halved already
    middle = unet.mid_block(h, emb, encoder_hidden_states=prompt)
    return torch.as_tensor(middle), features, emb


# ---- TAD-SR: the discriminator of the published code -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OfficialHeadConfig:
    """The heads of the published code; the defaults are those for ResShift's networks."""

    logit_maps: int = 64
    """Logits of every position, which are averaged; 320 on Stable Diffusion."""
    time_width: int | None = None
    """Width of the sinusoid of the step; null is the width of the finest features, as published: 160 on ResShift's
    networks, 320 on Stable Diffusion."""
    norm_groups: int = 32
    """Groups of the norm that the step modulates."""
    head_groups: int = 4
    """Groups of the norms inside a head."""
    slope: float = 0.2
    """Of the leaky ReLU."""

    def __post_init__(self) -> None:
        if min(self.logit_maps, self.norm_groups, self.head_groups) < 1:
            raise ValueError(
                "logit_maps, norm_groups and head_groups must be at least 1, got "
                f"{self.logit_maps}, {self.norm_groups} and {self.head_groups}"
            )
        if self.time_width is not None and (self.time_width < 2 or self.time_width % 2):
            raise ValueError(f"time_width must be even, got {self.time_width}")


LONG_KERNEL = 9
"""Positions that the long convolution of a head spans; it wraps around, so that a sequence needs half of them."""


class _Residual(nn.Module):
    """(f(x) + x) / sqrt(2)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (torch.as_tensor(self.fn(x)) + x) / math.sqrt(2)


class SequenceHead(nn.Module):
    """The head of one scale in the published code: convolutions along the flattened positions, rows first."""

    def __init__(self, channels: int, config: OfficialHeadConfig) -> None:
        super().__init__()

        def block(kernel: int) -> nn.Sequential:
            # the form of spectral norm whose weights have the published names
            convolution = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
            norm = nn.GroupNorm(config.head_groups, channels)
            return nn.Sequential(named_spectral_norm(convolution, eps=1e-12), norm, nn.LeakyReLU(config.slope))

        self.main = nn.Sequential(block(1), _Residual(block(LONG_KERNEL)))
        self.cls = named_spectral_norm(nn.Conv1d(channels, config.logit_maps, 1), eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, logit_maps, L) of a sequence (N, C, L)."""
        return torch.as_tensor(self.cls(self.main(x)))


class OfficialDiscriminator(nn.Module):
    """The time-aware discriminator of TAD-SR's published code, with the names of its weights.

    Per scale: a group norm, scaled and shifted by a linear map of the step's own sinusoid (Eq. 10), a convolution that
    starts at zero, and a :class:`SequenceHead`. Spectral norms make one power iteration at every call in train mode,
    so the number of calls matters.
    """

    def __init__(
        self,
        channels: Sequence[int],
        config: OfficialHeadConfig | None = None,
        *,
        scales: Sequence[int] | None = None,
        time_aware: bool = True,
    ) -> None:
        """``channels``, ``scales`` and ``time_aware`` are those of :class:`TimeAwareDiscriminator`.

        Raises ValueError for a scale that is not there and for channels that a norm cannot group.
        """
        super().__init__()
        config = config or OfficialHeadConfig()
        self.scales, judged = _judged(channels, scales)
        for name, groups in (("norm_groups", config.norm_groups), ("head_groups", config.head_groups)):
            _check_groups(f"official.{name}", groups, judged)
        self.time_width = width = config.time_width or channels[0]
        self.heads = nn.ModuleList(SequenceHead(count, config) for count in judged)
        maps = (nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * count)) for count in judged)
        self.emb_layers = nn.ModuleList(maps if time_aware else ())
        self.out_layers = nn.ModuleList(_zero_start(count, config.norm_groups) for count in judged)

    def forward(self, t: Tensor, *features: Tensor) -> tuple[Tensor]:
        """Realism logits (N, sum of maps h_k w_k) of all judged scales in one tensor: a mean over it weighs every
        position alike, so that the finest scale counts most.

        ``t`` (N,) are integer steps, ``features`` (N, C_k, h_k, w_k) the teacher's features of all scales.
        """
        chosen = [features[scale] for scale in self.scales]
        for feature in chosen:
            if feature.shape[2] * feature.shape[3] < LONG_KERNEL // 2:
                side = "x".join(map(str, feature.shape[2:]))
                raise UserError(
                    f"config.discriminator: features of {side} are too small to judge; take larger crops (data.crop) "
                    "or finer scales"
                )
        sinusoid = timestep_embedding(t, self.time_width).to(chosen[0].dtype)
        logits = []
        for k, (feature, head) in enumerate(zip(chosen, self.heads, strict=True)):
            norm, *others = cast(nn.Sequential, self.out_layers[k])
            # Of channels_last in bfloat16 without a gradient of their own, a group norm's backward ends the process
            # (PyTorch 2.13, CPU).
            h = norm(feature.contiguous())
            if self.emb_layers:
                scale, shift = self.emb_layers[k](sinusoid)[:, :, None, None].chunk(2, dim=1)
                h = h * (1 + scale) + shift
            for layer in others:
                h = layer(h)
            logits.append(head(h.flatten(2)).flatten(1))
        return (torch.cat(logits, dim=1),)


def _zero_start(channels: int, groups: int) -> nn.Sequential:
    """Norm, activation, a dropout of rate zero that the published names count, and a convolution that starts at 0."""
    convolution = nn.Conv2d(channels, channels, 3, padding=1)
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), nn.Identity(), convolution)


def _judged(channels: Sequence[int], scales: Sequence[int] | None) -> tuple[tuple[int, ...], list[int]]:
    """The judged scales and their channels; ValueError for a scale that is not there."""
    chosen = tuple(range(len(channels)) if scales is None else scales)
    unknown = [scale for scale in chosen if not 0 <= scale < len(channels)]
    if unknown or not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"scales must be different numbers from 0 to {len(channels) - 1}, got {chosen}")
    return chosen, [channels[scale] for scale in chosen]


def _check_groups(name: str, groups: int, channels: Sequence[int]) -> None:
    if any(count % groups for count in channels):
        raise ValueError(f"{name} is {groups}, but the features have {list(channels)} channels")


# ---- TAD-SR: the discriminator of the paper, where that leaves everything but Eq. 10 open ----------------------------


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The head that judges the features of one scale; the paper leaves it open."""

    width: int = 128
    """Channels between the 3x3 convolution on the features and the 1x1 convolution to the logit. A head that sees a
    neighbourhood and is not linear is the smallest that can tell textures apart."""
    norm_groups: int = 16
    """Groups of the norm on the features, for all scales; every scale's channels must be a multiple. The paper says
    only "Norm": a group norm is what the teacher's own blocks modulate."""
    slope: float = 0.2
    """Of the leaky ReLU behind the first convolution."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.norm_groups < 1:
            raise ValueError(f"width and norm_groups must be at least 1, got {self.width} and {self.norm_groups}")


class ScaleHead(nn.Module):
    """Judges the features of one scale: Norm(F_k) (1 + gamma_k) + beta_k, then two convolutions (TAD-SR, Eq. 10).

    gamma and beta start at zero, where the head is what it would be without them.
    """

    def __init__(self, channels: int, time_channels: int | None, config: HeadConfig) -> None:
        """``time_channels`` is the width of the time embedding; None leaves the modulation out."""
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, affine=False)
        self.modulation = None if time_channels is None else nn.Linear(time_channels, 2 * channels)
        self.features = nn.Conv2d(channels, config.width, 3, padding=1)
        self.logit = nn.Conv2d(config.width, 1, 1)
        self.slope = config.slope
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Logits (N, 1, h, w) of features (N, C, h, w) under the time embedding (N, time_channels)."""
        x = self.norm(x)
        if self.modulation is not None:
            gamma, beta = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
            x = x * (1 + gamma) + beta
        return self.logit(F.leaky_relu(self.features(x), self.slope))  # type: ignore[no-any-return]


class TimeAwareDiscriminator(nn.Module):
    """One head for each scale of the teacher's features."""

    def __init__(
        self,
        channels: Sequence[int],
        time_channels: int,
        config: HeadConfig | None = None,
        *,
        scales: Sequence[int] | None = None,
        time_aware: bool = True,
    ) -> None:
        """``channels`` are those of every scale's features, the finest first; ``time_channels`` is the width of the
        time embedding. ``scales`` are the ones that are judged, by number from 0; None means all. Without
        ``time_aware`` nothing is modulated, which is the plain discriminator that the paper compares with.

        Raises ValueError for a scale that is not there and for channels that the norm cannot group.
        """
        super().__init__()
        config = config or HeadConfig()
        self.scales, judged = _judged(channels, scales)
        _check_groups("norm_groups", config.norm_groups, judged)
        width = time_channels if time_aware else None
        self.heads = nn.ModuleList(ScaleHead(count, width, config) for count in judged)

    def forward(self, emb: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        """Realism logits (N, 1, h_k, w_k) of each judged scale.

        ``emb`` (N, time_channels) is the teacher's time embedding, ``features`` (N, C_k, h_k, w_k) its features of all
        scales. Losses average over scales.
        """
        return tuple(head(features[scale], emb) for scale, head in zip(self.scales, self.heads, strict=True))

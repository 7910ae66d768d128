"""Parts of a diffusion model that distillation uses besides the whole: the features of its encoder half, and a UNet
that carries its own prompt."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.models.stable_diffusion.networks import StableDiffusionUNet
from onestepsr.models.tiny.networks import TinyUNet


class FeatureDenoiser(Protocol):
    """What features are taken from in the residual-shifting family: both of its networks are one."""

    feature_channels: tuple[int, ...]
    """Channels of the features by level, the finest first."""
    time_channels: int
    """Width of the time embedding."""

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Time embedding (N, time_channels) of integer steps (N,)."""
        ...

    def features(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> tuple[Tensor, ...]:
        """One map (N, C_k, h / 2^k, w / 2^k) per level for the arguments of the network."""
        ...


class ResidualShiftFeatures(nn.Module):
    """Encoder half of a residual-shifting network, on that network's own weights (TAD-SR, Eq. 9)."""

    def __init__(self, denoiser: nn.Module) -> None:
        """``denoiser`` is a :class:`FeatureDenoiser`."""
        super().__init__()
        self.denoiser = denoiser
        known = cast(FeatureDenoiser, denoiser)
        self.feature_channels, self.time_channels = known.feature_channels, known.time_channels

    def forward(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> tuple[Tensor, ...]:
        """Time embedding (N, time_channels), then the features of every level, for the network's arguments."""
        known = cast(FeatureDenoiser, self.denoiser)
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

    def __init__(self, network: PromptedUNet) -> None:
        super().__init__()
        self.network = network
        self.feature_channels, self.time_channels = _sizes(network.unet)

    def forward(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Time embedding (N, time_channels), then the features (N, C_k, h / 2^k, w / 2^k) of every level k: the end of
        each level on the way down, on the last one the middle features."""
        unet, prompt = self.network.unet, self.network.prompt
        if isinstance(unet, TinyUNet):
            middle, skips, emb = unet.encoder(z_t, t, prompt)
            return (emb, *skips[:-1], middle)
        return _stable_diffusion_features(cast(StableDiffusionUNet, unet).unet, z_t, t, prompt)


def _sizes(unet: nn.Module) -> tuple[tuple[int, ...], int]:
    if isinstance(unet, TinyUNet):
        return unet.config.widths, unet.config.time_width
    if isinstance(unet, StableDiffusionUNet):
        return unet.config.block_out_channels, unet.unet.time_embedding.linear_2.out_features
    raise UserError(f"a {type(unet).__name__} has no features that a discriminator could use")


def _stable_diffusion_features(unet: Any, z_t: Tensor, t: Tensor, prompt: Tensor) -> tuple[Tensor, ...]:
    """The way down of diffusers' UNet, whose own forward gives nothing but its end."""
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
    return (emb, *features[:-1], torch.as_tensor(middle))

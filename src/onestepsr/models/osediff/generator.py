"""OSEDiff's generator (Wu et al., "One-Step Effective Diffusion Network for Real-World Image Super-Resolution", 2024):
Stable Diffusion 2.1-base under adapters, evaluated once at the last step under a text prompt.

It is the recipe of :class:`~onestepsr.models.generators.OneStepLatentGenerator` with another step, a prompt that can
differ from image to image, and an encoder whose posterior may be sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, Self, cast

import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.models.generators import (
    LatentAutoencoder,
    LatentUNet,
    OneStepConfig,
    OneStepLatentGenerator,
    Origin,
    Rng,
)
from onestepsr.models.stable_diffusion.config import StableDiffusionGeneratorConfig
from onestepsr.models.stable_diffusion.networks import StableDiffusionAutoencoder, StableDiffusionUNet, initial_prompt
from onestepsr.models.tiny.networks import TinyAutoencoder

Posterior = Literal["mean", "sample"]
Enlarging = Literal["bicubic", "pillow"]
TIMESTEP = 999
"""The step of OSEDiff's UNet evaluation: the last of Stable Diffusion's 1000."""
UNET_LAYERS = r".*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv\w*)"
"""Layers of Stable Diffusion's UNet with adapters: attention, feed-forward, and every convolution, the first and last
included; not the time projections. 258 layers, at rank 4 4,055,712 parameters, as in the published weights."""
ENCODER_LAYERS = r"(vae\.)?(encoder|quant_conv)(\..*)?"
"""Layers of an autoencoder that belong to its encoder: in Stable Diffusion's 32, at rank 4 369,356 parameters."""
DECODER_LAYERS = r"(vae\.)?(decoder|decoder_linear|post_quant_conv)(\..*)?"
"""Those that belong to its decoder."""
FIRST_LAYER = r"(unet|encoder)\.conv_in"
"""A UNet's first convolution, whose own weights OSEDiff trains beside its adapter."""


@dataclass(frozen=True, kw_only=True)
class OSEDiffGeneratorConfig(StableDiffusionGeneratorConfig):
    """Everything that fixes a generator of OSEDiff, apart from its weights."""

    timestep: int = TIMESTEP
    """The step at which the UNet is evaluated."""
    posterior: Posterior = "mean"
    """The encoder's output for the UNet: the mean, always the same, or a sample, as the published code draws it."""
    enlarging: Enlarging = "bicubic"
    """Enlargement of the LR image: by PyTorch's bicubic filter, or as Pillow does it in 8 bits, as in the published
    inference script."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noised:
            raise ValueError("noised: OSEDiff starts from the latent itself")


class OSEDiffGenerator(OneStepLatentGenerator):
    """A one-step generator under a text prompt; without one, under the embedding that it was saved with."""

    takes_float32 = False  # a sampled posterior and its noise have the image's dtype

    def __init__(
        self,
        autoencoder: LatentAutoencoder,
        unet: LatentUNet,
        prompt: Tensor,
        config: OneStepConfig,
        *,
        posterior: Posterior = "mean",
        enlarging: Enlarging = "bicubic",
    ) -> None:
        """``config`` is an :class:`OSEDiffGeneratorConfig`, or, on another backbone, the plain one of that."""
        super().__init__(autoencoder, unet, prompt, config)
        self.enlarging = enlarging
        self.prompt_width = prompt.shape[2]
        self.posterior = posterior
        if posterior == "sample":
            self.takes_batches, self.noise_stage = False, "encode"

    @classmethod
    def of(
        cls,
        backbone: OneStepLatentGenerator,
        *,
        timestep: int = TIMESTEP,
        scale: int = 4,
        posterior: Posterior = "mean",
        enlarging: Enlarging = "bicubic",
    ) -> Self:
        """A generator of the networks and the prompt of ``backbone``, which are not copied."""
        config = replace(backbone.config, timestep=timestep, scale=scale, noised=False)
        if isinstance(config, StableDiffusionGeneratorConfig):
            values = {field.name: getattr(config, field.name) for field in fields(config)}
            config = OSEDiffGeneratorConfig(**values | {"posterior": posterior, "enlarging": enlarging})
        networks = backbone.autoencoder, backbone.unet, backbone.prompt
        made = cls(*networks, config, posterior=posterior, enlarging=enlarging)
        made.prompt = backbone.prompt
        return made

    def freeze_prompt(self) -> None:
        """Nothing: every image may come with a prompt of its own."""

    def latent_like(self, lr: Tensor) -> Tensor:
        """An empty latent (N, C, h, w) for LR (N, 3, H, W) with sides multiples of ``lr_multiple``: the shape of the
        noise that samples the posterior."""
        factor = self.autoencoder.factor
        height, width = (side * self.scale // factor for side in lr.shape[-2:])
        return lr.new_empty(lr.shape[0], self.latent_channels, height, width)

    def enlarge(self, lr: Tensor) -> Tensor:
        """The LR image (N, 3, h, w) in [0, 1] at output size, by the filter of the configuration."""
        return super().enlarge(lr) if self.enlarging == "bicubic" else pillow_bicubic(lr, self.scale)

    def encode_lr(self, lr: Tensor, *, rng: Rng = None, origin: Origin = None) -> Tensor:
        """Latent (N, C, s h/f, s w/f) of the enlarged LR (N, 3, h, w): the posterior's mean, or a sample."""
        noise = self.noise_at(rng, origin)(0, self.latent_like(lr)) if self.posterior == "sample" else None
        return self.encode_with(lr, noise)

    def encode_with(self, lr: Tensor, noise: Tensor | None) -> Tensor:
        """Latent of the enlarged LR: the posterior sampled at ``noise``, standard normal and shaped like it, or its
        mean."""
        image = self.enlarge(lr) if self.scale != 1 else lr
        return self.encode(image) if noise is None else sampled_latent(self.autoencoder, image * 2 - 1, noise)


def pillow_bicubic(lr: Tensor, scale: int) -> Tensor:
    """``lr`` (N, 3, h, w) in [0, 1] enlarged by Pillow's bicubic filter (a = -0.5) in 8 bits: along the rows, then the
    columns, rounded after each. One level off Pillow's fixed-point sums at most, on few pixels."""
    height, width = lr.shape[-2:]
    levels = (lr.float().clamp(0, 1) * 255).round()
    for size in ((height, width * scale), (height * scale, width * scale)):
        levels = F.interpolate(levels, size, mode="bicubic", antialias=True).clamp(0, 255).round()
    return (levels / 255).to(lr.dtype)


def sampled_latent(autoencoder: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    """A scaled latent (N, C, H/f, W/f) from the posterior of ``x`` (N, 3, H, W) in [-1, 1], at ``noise`` of its
    shape."""
    if isinstance(autoencoder, TinyAutoencoder):
        mean, log_variance = autoencoder.moments(x)
        return mean + noise * (0.5 * log_variance).exp()[:, None, None]
    known = cast(StableDiffusionAutoencoder, autoencoder)
    posterior = known.vae.encode(x).latent_dist
    return cast(Tensor, posterior.mean + posterior.std * noise) * known.config.scaling_factor


def osediff_generator(config: OSEDiffGeneratorConfig) -> OSEDiffGenerator:
    """Autoencoder, UNet and prompt embedding, freshly initialised, as one generator."""
    autoencoder, unet = StableDiffusionAutoencoder(config.autoencoder), StableDiffusionUNet(config.unet)
    prompt = initial_prompt(config.unet, config.prompt)
    return OSEDiffGenerator(autoencoder, unet, prompt, config, posterior=config.posterior, enlarging=config.enlarging)

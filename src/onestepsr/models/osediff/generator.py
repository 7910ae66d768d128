"""OSEDiff's generator (Wu et al., "One-Step Effective Diffusion Network for Real-World Image Super-Resolution", 2024):
Stable Diffusion 2.1-base under adapters, evaluated once at the last step under a text prompt.

It is the recipe of :class:`~onestepsr.models.generators.OneStepLatentGenerator` with another step, a prompt that can
differ from image to image, and an encoder whose posterior may be sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn

from onestepsr.diffusion.noise_field import NoisePlane
from onestepsr.diffusion.schedule import DiffusionSchedule
from onestepsr.models.generators import OneStepLatentGenerator, pad_to_multiple
from onestepsr.models.stable_diffusion.config import StableDiffusionGeneratorConfig
from onestepsr.models.stable_diffusion.networks import StableDiffusionAutoencoder, StableDiffusionUNet, initial_prompt
from onestepsr.models.tiny.networks import TinyAutoencoder

Posterior = Literal["mean", "sample"]
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
    """What the encoder gives to the UNet: the mean, always the same, or a sample, as the published code draws it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noised:
            raise ValueError("noised: OSEDiff starts from the latent itself")


class OSEDiffGenerator(OneStepLatentGenerator):
    """A one-step generator under a text prompt; without one, under the embedding that it was saved with."""

    takes_float32 = False  # a sampled posterior and its noise have the image's format

    def __init__(
        self,
        autoencoder: nn.Module,
        unet: nn.Module,
        prompt: Tensor,
        *,
        timestep: int = TIMESTEP,
        scale: int = 4,
        schedule: DiffusionSchedule | None = None,
        posterior: Posterior = "mean",
    ) -> None:
        super().__init__(autoencoder, unet, prompt, timestep=timestep, scale=scale, schedule=schedule)
        self.posterior = posterior

    @classmethod
    def of(
        cls,
        backbone: OneStepLatentGenerator,
        *,
        timestep: int = TIMESTEP,
        scale: int = 4,
        posterior: Posterior = "mean",
    ) -> Self:
        """A generator of the networks and the prompt of ``backbone``, which are not copied."""
        made = cls(
            backbone.autoencoder,
            backbone.unet,
            torch.empty(1, 1, 1, device="meta"),
            timestep=timestep,
            scale=scale,
            schedule=backbone.schedule,
            posterior=posterior,
        )
        made.prompt = backbone.prompt
        return made

    @property
    def prompt_width(self) -> int:
        """C, the channels of a prompt embedding (1 or N, L, C)."""
        return self.prompt.shape[2]

    def freeze_prompt(self) -> None:
        """Nothing: every image may come with a prompt of its own."""

    def latent_like(self, lr: Tensor) -> Tensor:
        """An empty latent (N, C, h, w) for LR (N, 3, H, W) with sides multiples of ``lr_multiple``: the shape of the
        noise that samples the posterior."""
        factor = self._latent_autoencoder.factor
        height, width = (side * self.scale // factor for side in lr.shape[-2:])
        return lr.new_empty(lr.shape[0], self.latent_channels, height, width)

    def restore(
        self, lr: Tensor, *, prompt: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """SR image (N, 3, s h, s w), not clamped, and its float32 latent, for LR (N, 3, h, w) with sides multiples of
        ``lr_multiple``.

        ``prompt`` is (1 or N, L, C). ``noise``, standard normal and shaped like the latent, samples the encoder's
        posterior; without it the mean is taken.
        """
        z_h = self.step(self._encoded(lr, noise), prompt)
        return self.decode(z_h), z_h

    def encode_lr(self, lr: Tensor, rng: torch.Generator | None = None, origin: tuple[int, int] = (0, 0)) -> Tensor:
        """Latent (N, C, s h/f, s w/f) of the enlarged LR (N, 3, h, w); ``rng`` and ``origin`` as in :meth:`forward`."""
        return self._encoded(lr, self._noise(lr, rng, origin))

    def restore_latent(self, z_l: Tensor, lr: Tensor, prompt_embedding: Tensor | None = None) -> Tensor:
        """Latent estimate of the HR image from that of the enlarged ``lr``, under ``prompt_embedding`` (1 or N, L, C)
        or the generator's own."""
        return self.step(z_l, prompt_embedding)

    def _encoded(self, lr: Tensor, noise: Tensor | None) -> Tensor:
        image = self.enlarge(lr) if self.scale != 1 else lr
        return self.encode(image) if noise is None else sampled_latent(self.autoencoder, image * 2 - 1, noise)

    def forward(
        self,
        lr: Tensor,
        rng: torch.Generator | None = None,
        origin: tuple[int, int] = (0, 0),
        prompt_embedding: Tensor | None = None,
    ) -> Tensor:
        """SR image (N, 3, s h, s w) in about [0, 1], not clamped, of LR (N, 3, h, w) in [0, 1] of any size.

        ``prompt_embedding`` (1 or N, L, C) replaces the generator's own. With ``posterior: sample``, ``rng`` decides
        the plane of noise (None: always the same one) and ``origin``, the row and column of ``lr`` in the whole
        image, the place on it.
        """
        height, width = lr.shape[-2:]
        padded = pad_to_multiple(lr, self.lr_multiple)
        sr = self.restore(padded, prompt=prompt_embedding, noise=self._noise(padded, rng, origin))[0]
        return sr[..., : self.scale * height, : self.scale * width]

    def _noise(self, lr: Tensor, rng: torch.Generator | None, origin: tuple[int, int]) -> Tensor | None:
        """What samples the posterior, where that is wanted."""
        if self.posterior == "mean":
            return None
        plane = NoisePlane.drawn(rng, origin, self.scale, self._latent_autoencoder.factor)
        return plane(0, self.latent_like(lr))


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
    return OSEDiffGenerator(
        StableDiffusionAutoencoder(config.autoencoder),
        StableDiffusionUNet(config.unet),
        initial_prompt(config.unet, config.prompt),
        timestep=config.timestep,
        scale=config.scale,
        schedule=DiffusionSchedule(config.schedule),
        posterior=config.posterior,
    )

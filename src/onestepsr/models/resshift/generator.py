"""ResShift, SinSR and TAD-SR as generators: LR image in, SR image out, in one or a few network evaluations.

Unlike the one-step generators on Stable Diffusion these start from noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from onestepsr.diffusion.residual_shift import Noise, Predict
from onestepsr.models.generators import LatentAutoencoder, LatentGenerator, LatentUNet, Origin, Rng
from onestepsr.models.resshift.config import (
    ResidualSamplingConfig,
    ResidualShiftGeneratorConfig,
    TinyResidualShiftGeneratorConfig,
)
from onestepsr.models.resshift.unet import SwinUNet
from onestepsr.models.resshift.vqgan import VQAutoencoder
from onestepsr.models.tiny.denoiser import TinyDenoiser
from onestepsr.models.tiny.networks import TinyAutoencoder


def conditioned(network: Callable[..., Tensor], lr: Tensor) -> Predict:
    """A denoising network under the LR image (N, 3, h, w) in [0, 1], as the schedule's samplers call it.

    The network is called with the scaled latent (N, C, h, w), integer steps (N,) and the LR image in [-1, 1].
    """
    condition = lr * 2 - 1
    return lambda z, timesteps: network(z, timesteps, condition)


class ResidualShiftGenerator(LatentGenerator):
    """z_y = E(enlarged LR), z_T = z_y + noise, one or more steps to z_0, SR = D(the codes nearest to z_0).

    Diffusion is computed in float32 whatever the dtype of the weights; the networks convert what they are given.
    """

    takes_batches = False
    noise_stage = "unet"

    def __init__(self, autoencoder: LatentAutoencoder, unet: LatentUNet, config: ResidualSamplingConfig) -> None:
        """``unet`` estimates z_0 from (scaled latent, steps, LR image); ``config`` says which steps are run."""
        super().__init__(autoencoder, unet, config.scale)
        self.configure(config)

    def configure(self, config: ResidualSamplingConfig) -> None:
        """Run the networks by another schedule, number of steps or sampler."""
        self.config = config
        self.schedule = config.sampling_schedule()
        self.steps = self.schedule.steps
        self.sampler = config.sampler

    def choose_sampling(self, steps: int | None = None, sampler: str | None = None) -> None:
        """Run ``steps`` of the steps that the network was trained with, evenly spread, by ``sampler``; None leaves the
        present choice. Raises UserError for a number that the schedule cannot give, or another sampler."""
        changes: dict[str, Any] = {} if sampler is None else {"sampler": sampler}
        if steps is not None:
            changes |= {"steps": None if steps == self.config.schedule.steps else steps, "respacing": "spread"}
        self.configure(replace(self.config, **changes))

    def encode(self, x: Tensor) -> Tensor:
        """Latent (N, C, H/f, W/f), float32, of an image (N, 3, H, W) in [0, 1] whose sides are multiples of f."""
        return self.autoencoder.encode(x * 2 - 1).float()

    def decode(self, z: Tensor) -> Tensor:
        """Image (N, 3, H, W) in about [0, 1], float32, not clamped, of the codes nearest to a latent."""
        return self.autoencoder.decode(z).float() * 0.5 + 0.5

    def sample(self, predict: Predict, z_y: Tensor, noise: Noise) -> Tensor:
        """An estimate of z_0 (N, C, h, w), from the latent ``z_y`` of the enlarged LR image."""
        if self.sampler == "ancestral":
            return self.schedule.sample_ancestral(predict, z_y, noise)
        return self.schedule.sample_deterministic(predict, z_y, self.schedule.prior(z_y, noise(0, z_y)))

    def encode_lr(self, lr: Tensor, *, rng: Rng = None, origin: Origin = None) -> Tensor:
        """Latent (N, C, s h/f, s w/f), float32, of the enlarged LR (N, 3, h, w)."""
        return self.encode(self.enlarge(lr.float()))

    def restore_latent(
        self, z_l: Tensor, lr: Tensor, *, rng: Rng = None, origin: Origin = None, prompt: Tensor | None = None
    ) -> Tensor:
        """An estimate of z_0, float32, before it is rounded to codes."""
        return self.sample(conditioned(self.unet, lr.float()), z_l, self.noise_at(rng, origin))


def residual_shift_generator(config: ResidualShiftGeneratorConfig) -> ResidualShiftGenerator:
    """ResShift's autoencoder and denoising network, freshly initialised, as one generator."""
    return ResidualShiftGenerator(VQAutoencoder(config.autoencoder), SwinUNet(config.unet), config)


def tiny_residual_shift_generator(config: TinyResidualShiftGeneratorConfig) -> ResidualShiftGenerator:
    """The tiny autoencoder and denoising network, freshly initialised, as one generator."""
    return ResidualShiftGenerator(TinyAutoencoder(config.autoencoder), TinyDenoiser(config.denoiser), config)

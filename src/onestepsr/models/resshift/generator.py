"""ResShift, SinSR and TAD-SR as generators: LR image in, SR image out, in one or a few network evaluations.

Unlike the one-step generators on Stable Diffusion these start from noise. It comes from a plane of noise on which every
tile of an image has its place, so that overlapping tiles see the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.diffusion.noise_field import NoisePlane
from onestepsr.diffusion.residual_shift import Noise, Predict, ResidualShiftSchedule
from onestepsr.models.generators import LatentGenerator, LatentUNet, pad_to_multiple

Sampler = Literal["ancestral", "deterministic"]
UNLIMITED = 2**16
"""Side of latents for an autoencoder that names no largest one."""


class LatentDenoiser(LatentUNet, Protocol):
    """What the generator needs of a denoising network."""

    def __call__(self, x: Tensor, timesteps: Tensor, lq: Tensor) -> Tensor:
        """Estimate of z_0, of the shape and type of the scaled latent ``x`` (N, C, h, w), at integer steps (N,); ``lq``
        is the LR image (N, 3, H, W) in [-1, 1]."""
        ...


def conditioned(network: Callable[..., Tensor], lr: Tensor) -> Predict:
    """A denoising network under the LR image (N, 3, h, w) in [0, 1], as the schedule's samplers call it."""
    condition = lr * 2 - 1
    return lambda z, timesteps: network(z, timesteps, condition)


class ResidualShiftGenerator(LatentGenerator):
    """z_y = E(enlarged LR), z_T = z_y + noise, one or more steps to z_0, SR = D(the codes nearest to z_0).

    Public tensors are RGB in [0, 1]; [-1, 1] and latents exist only in here. Diffusion is computed in float32 whatever
    the type of the weights; the networks convert what they are given.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        unet: nn.Module,
        schedule: ResidualShiftSchedule | None = None,
        *,
        sampler: Sampler = "ancestral",
        scale: int = 4,
    ) -> None:
        """``autoencoder`` is a LatentAutoencoder, ``unet`` a LatentDenoiser; every step of ``schedule`` is run."""
        super().__init__(autoencoder, unet, scale)
        self.schedule = schedule or ResidualShiftSchedule()
        self.sampler = sampler

    def choose(self, steps: int | None = None, sampler: str | None = None) -> None:
        """Run ``steps`` of the steps that the network was trained with, evenly spread, by ``sampler``; None leaves what
        is. Raises UserError for a number that the schedule cannot give, or another sampler."""
        if sampler is not None and sampler not in get_args(Sampler):
            raise UserError(f"sampler '{sampler}': accepted: {', '.join(get_args(Sampler))}")
        if steps is not None:
            self.schedule = ResidualShiftSchedule(self.schedule.config).respaced(steps)
        if sampler is not None:
            self.sampler = cast(Sampler, sampler)

    @property
    def _denoiser(self) -> LatentDenoiser:
        return cast(LatentDenoiser, self.unet)

    @property
    def largest_tile(self) -> int:
        """Side of LR tiles beyond which they cost more, not less: 256 for the published x4 models."""
        side = int(getattr(self.autoencoder, "largest_latent", UNLIMITED))
        return side * self._latent_autoencoder.factor // self.scale

    def encode(self, x: Tensor) -> Tensor:
        """Latent (N, C, H/f, W/f), float32, of an image (N, 3, H, W) in [0, 1] whose sides are multiples of f."""
        return self._latent_autoencoder.encode(x * 2 - 1).float()

    def decode(self, z: Tensor) -> Tensor:
        """Image (N, 3, H, W) in about [0, 1], float32, not clamped, of the codes nearest to a latent."""
        return self._latent_autoencoder.decode(z).float() * 0.5 + 0.5

    def sample(self, predict: Predict, z_y: Tensor, noise: Noise) -> Tensor:
        """An estimate of z_0 (N, C, h, w), from the latent ``z_y`` of the enlarged LR image."""
        if self.sampler == "ancestral":
            return self.schedule.sample_ancestral(predict, z_y, noise)
        return self.schedule.sample_deterministic(predict, z_y, self.schedule.prior(z_y, noise(0, z_y)))

    def encode_lr(self, lr: Tensor) -> Tensor:
        """Latent (N, C, s h/f, s w/f), float32, of the enlarged LR (N, 3, h, w)."""
        return self.encode(self.enlarge(lr.float()))

    def restore_latent(
        self, z_y: Tensor, lr: Tensor, rng: torch.Generator | None = None, origin: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """An estimate of z_0, float32, from the latent ``z_y`` of the enlarged ``lr``; ``rng`` and ``origin`` as in
        :meth:`forward`."""
        return self._sampled(z_y, lr, self._noise(rng, origin))

    def restore(self, lr: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """SR image (N, 3, s h, s w), not clamped, and its latent before rounding to codes, both float32, for LR (N, 3,
        h, w) with sides multiples of ``lr_multiple``."""
        z_0 = self._sampled(self.encode_lr(lr), lr, noise)
        return self.decode(z_0), z_0

    def forward(self, lr: Tensor, rng: torch.Generator | None = None, origin: tuple[int, int] = (0, 0)) -> Tensor:
        """SR image (N, 3, s h, s w) in about [0, 1], float32, not clamped, of LR (N, 3, h, w) in [0, 1] of any size.

        ``rng`` decides the plane of noise (None: always the same one) and ``origin``, the row and column of ``lr`` in
        the whole image, the place on it: tiles of one image are given equal generators and their own origins.
        """
        height, width = lr.shape[-2:]
        padded = pad_to_multiple(lr, self.lr_multiple)
        sr = self.restore(padded, self._noise(rng, origin))[0]
        return sr[..., : self.scale * height, : self.scale * width]

    def _noise(self, rng: torch.Generator | None, origin: tuple[int, int]) -> Noise:
        return NoisePlane.drawn(rng, origin, self.scale, self._latent_autoencoder.factor)

    def _sampled(self, z_y: Tensor, lr: Tensor, noise: Noise) -> Tensor:
        return self.sample(conditioned(self._denoiser, lr.float()), z_y, noise)

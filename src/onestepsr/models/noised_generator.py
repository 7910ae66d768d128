"""A one-step generator that starts from a noised LR latent instead of the LR latent itself: the student of a multi-step
diffusion teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from onestepsr.models.generators import OneStepLatentGenerator, pad_to_multiple
from onestepsr.models.residual_generator import NoisePlane
from onestepsr.residual_schedule import Noise


class NoisedLatentGenerator(OneStepLatentGenerator):
    """z_T = F(E(enlarged LR), T) with T the fixed step, one UNet evaluation at T, z_0 by Eq. 1 of D3SR, SR = D(z_0).

    The noise lies on an endless plane on which every tile of a picture has its place, as in
    :class:`onestepsr.models.residual_generator.ResidualShiftGenerator`.
    """

    def restore(self, lr: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """SR image (N, 3, s h, s w), not clamped, and its latent, for LR (N, 3, h, w) with sides multiples of
        ``lr_multiple``; without ``noise`` always the same one."""
        z_y = self.encode(self.enlarge(lr))
        drawn = (noise or NoisePlane(0))(0, z_y)
        z_0 = self.step(self.schedule.add_noise(z_y, drawn, self.timestep))
        return self.decode(z_0), z_0

    def forward(self, lr: Tensor, rng: torch.Generator | None = None, origin: tuple[int, int] = (0, 0)) -> Tensor:
        """SR image (N, 3, s h, s w) in about [0, 1], not clamped, of LR (N, 3, h, w) in [0, 1] of any size.

        ``rng`` decides the plane of noise (None: always the same one) and ``origin``, the row and column of ``lr`` in
        the whole picture, the place on it.
        """
        height, width = lr.shape[-2:]
        padded = pad_to_multiple(lr, self.lr_multiple)
        noise = NoisePlane.drawn(rng, origin, self.scale, self._latent_autoencoder.factor)
        sr = self.restore(padded, noise)[0]
        return sr[..., : self.scale * height, : self.scale * width]

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
        z_0 = self._denoised(self.encode_lr(lr), noise or NoisePlane(0))
        return self.decode(z_0), z_0

    def restore_latent(
        self, z_l: Tensor, lr: Tensor, rng: torch.Generator | None = None, origin: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """Latent estimate of the HR image from that of the enlarged ``lr``; ``rng`` and ``origin`` as in
        :meth:`forward`."""
        return self._denoised(z_l, self._noise(rng, origin))

    def forward(self, lr: Tensor, rng: torch.Generator | None = None, origin: tuple[int, int] = (0, 0)) -> Tensor:
        """SR image (N, 3, s h, s w) in about [0, 1], not clamped, of LR (N, 3, h, w) in [0, 1] of any size.

        ``rng`` decides the plane of noise (None: always the same one) and ``origin``, the row and column of ``lr`` in
        the whole picture, the place on it.
        """
        height, width = lr.shape[-2:]
        padded = pad_to_multiple(lr, self.lr_multiple)
        sr = self.restore(padded, self._noise(rng, origin))[0]
        return sr[..., : self.scale * height, : self.scale * width]

    def _noise(self, rng: torch.Generator | None, origin: tuple[int, int]) -> Noise:
        return NoisePlane.drawn(rng, origin, self.scale, self._latent_autoencoder.factor)

    def _denoised(self, z_y: Tensor, noise: Noise) -> Tensor:
        return self.step(self.schedule.add_noise(z_y, noise(0, z_y), self.timestep))

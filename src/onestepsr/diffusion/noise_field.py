"""Standard normal noise over an unbounded plane: a tile draws the same values as the whole image."""

from __future__ import annotations

import torch
from torch import Tensor

from onestepsr.core.rng import generator as seeded

NOISE_BLOCK = 64
"""Side of the blocks that the plane of noise is drawn in, in latent positions."""


class NoisePlane:
    """Unbounded standard normal noise: each value follows from seed, draw, sample and position alone.

    ``origin`` is the row and column on the plane of the latents that are asked for. Calling it is :data:`Noise`.
    """

    def __init__(self, seed: int, origin: tuple[int, int] = (0, 0)) -> None:
        self.seed, self.origin = seed, origin

    @classmethod
    def drawn(cls, rng: torch.Generator | None, origin: tuple[int, int], scale: int, factor: int) -> NoisePlane:
        """The plane that ``rng`` decides (None: always the same one), at row and column ``origin`` of an LR image.

        The image is enlarged ``scale`` times; a latent position stands for ``factor`` pixels of the output.
        """
        seed = 0 if rng is None else int(torch.randint(2**62, (), generator=rng, device=rng.device))
        return cls(seed, (origin[0] * scale // factor, origin[1] * scale // factor))

    def __call__(self, draw: int, like: Tensor) -> Tensor:
        """Noise of draw number ``draw`` with shape (N, C, h, w), device and dtype of ``like``; drawn on the CPU."""
        samples = [self._window(draw, sample, *like.shape[1:]) for sample in range(like.shape[0])]
        return torch.stack(samples).to(like.device, like.dtype)

    def _window(self, draw: int, sample: int, channels: int, height: int, width: int) -> Tensor:
        (first_row, top), (first_column, left) = (divmod(start, NOISE_BLOCK) for start in self.origin)
        rows = range(first_row, first_row - (-(top + height) // NOISE_BLOCK))
        columns = range(first_column, first_column - (-(left + width) // NOISE_BLOCK))

        def block(row: int, column: int) -> Tensor:
            rng = seeded(self.seed, "noise", draw, sample, row, column)
            return torch.randn(channels, NOISE_BLOCK, NOISE_BLOCK, generator=rng, device="cpu")

        whole = torch.cat([torch.cat([block(row, column) for column in columns], dim=2) for row in rows], dim=1)
        return whole[:, top : top + height, left : left + width]

"""Discriminators that judge latents with the features of a diffusion UNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn


class NoiseAwareDiscriminator(nn.Module):
    """The discriminator of D3SR (section 3.2): a diffusion UNet's down and middle blocks, then an MLP on the middle
    features.

    It is told the diffusion step of the noised latent that it sees, as any diffusion UNet is, and gives one realism
    logit for every spatial region of the middle block. Adding the noise is the loss's business.
    """

    def __init__(
        self, encoder: nn.Module, prompt: Tensor, *, features: int, hidden: tuple[int, ...] = (128,), slope: float = 0.2
    ) -> None:
        """``encoder(z_t, t, prompt)`` returns the middle features (N, ``features``, h', w') first; ``prompt`` is (1,
        L, C).

        The paper leaves the MLP open: ``hidden`` gives the widths between features and logit, leaky ReLU (``slope``)
        follows each. One hidden layer as wide as the middle block is the smallest that is not linear.
        """
        super().__init__()
        self.encoder = encoder
        self.prompt = nn.Parameter(prompt.detach().clone())
        layers: list[nn.Module] = []
        width = features
        for size in hidden:
            layers += [nn.Conv2d(width, size, 1), nn.LeakyReLU(slope)]
            width = size
        self.head = nn.Sequential(*layers, nn.Conv2d(width, 1, 1))

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Realism logits (N, 1, h', w') of latents (N, C, h, w) noised to steps ``t`` (N,)."""
        encode = cast(Callable[..., tuple[Tensor, ...]], self.encoder)
        return cast(Tensor, self.head(encode(z_t, t, self.prompt)[0]))

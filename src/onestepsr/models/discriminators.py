"""Discriminators that judge latents with the features of a diffusion UNet."""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor, nn


class DiffusionEncoder(Protocol):
    """The half of a diffusion UNet that a discriminator reuses: time embedding, downsampling blocks, middle block."""

    feature_channels: int
    """Channels of the middle features."""
    latent_channels: int
    """Channels of the latents it takes."""
    latent_gain: float
    """What a unit-variance latent of the generator is multiplied with before noise is added to it.

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

"""Discriminators: of latents, with the features of a diffusion UNet, and of pictures, with a small network of its
own."""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


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


class PatchCritic(nn.Module):
    """Realism of every region of a picture, by strided convolutions with spectral normalisation (Miyato et al., 2018).

    It begins at half the picture's resolution, every 2x2 pixels as one position, which costs a quarter and hides
    nothing.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (48, 96, 128),
        *,
        slope: float = 0.2,
        contrast_floor: float | None = None,
        condition_channels: int = 0,
    ) -> None:
        """``widths`` are the channels at a half, a quarter, ... of the picture's resolution. With ``contrast_floor`` it
        sees :func:`local_contrast` beside the colours, with ``condition_channels`` whatever else it is shown, such as
        the enlarged input of the generator."""
        super().__init__()
        self.contrast_floor, self.condition_channels = contrast_floor, condition_channels
        channels = 4 * (3 + (contrast_floor is not None) + condition_channels)
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), nn.LeakyReLU(slope)]
        for fine, coarse in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(fine, coarse, 4, stride=2, padding=1)), nn.LeakyReLU(slope)]
        deepest = widths[-1]
        layers += [spectral_norm(nn.Conv2d(deepest, deepest, 3, padding=1)), nn.LeakyReLU(slope)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(deepest, 1, 3, padding=1))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, ...]:
        """Realism logits (N, 1, h', w') of pictures (N, 3, H, W) in [0, 1], H and W even, then the features behind
        every activation, finest first; ``condition`` (N, condition_channels, H, W) in [0, 1] is seen beside them."""
        if self.condition_channels != (0 if condition is None else condition.shape[1]):
            raise ValueError(f"this critic needs a condition of {self.condition_channels} channels")
        seen = [x * 2 - 1]
        seen += [local_contrast(x, self.contrast_floor)] if self.contrast_floor is not None else []
        seen += [condition * 2 - 1] if condition is not None else []
        h, features = F.pixel_unshuffle(torch.cat(seen, dim=1), 2), []
        for layer in self.layers:
            h = layer(h)
            if isinstance(layer, nn.LeakyReLU):
                features.append(h)
        return h, *features


def local_contrast(x: Tensor, floor: float, *, window: int = 7) -> Tensor:
    """Brightness (N, 1, H, W) of pictures (N, 3, H, W) in [0, 1], less its local mean, over its local deviation.

    In it, faint texture is as strong as an edge, as it is to the eye and to natural-scene statistics (Ruderman, 1994).
    ``floor`` is added to the deviation: what varies less stays faint.
    """
    y = x.float().mean(dim=1, keepdim=True)
    y = F.pad(y, (window // 2,) * 4, mode="reflect")
    mean, square = (F.avg_pool2d(plane, window, stride=1) for plane in (y, y.square()))
    deviation = (square - mean.square()).clamp(min=1e-7).sqrt()
    inner = y[..., window // 2 : -(window // 2), window // 2 : -(window // 2)]
    return (inner - mean) / (deviation + floor)

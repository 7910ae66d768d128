"""Generators: LR image in, SR image out, in one network evaluation. The only inference recipes of the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.models.enlarging import bicubic
from onestepsr.models.tile_stages import Stage, StageDemand, stage_demands
from onestepsr.schedules import DiffusionSchedule


class LatentAutoencoder(Protocol):
    """What a generator needs of an autoencoder; images are (N, 3, H, W) in [-1, 1], latents (N, C, H/factor,
    W/factor)."""

    factor: int
    """Pixels per latent cell along each axis."""
    latent_channels: int
    """Channels of the latent."""

    def encode(self, x: Tensor) -> Tensor:
        """Scaled latent of an image whose sides are multiples of ``factor``."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Image of a scaled latent."""
        ...

    def memory_per_pixel(self, dtype: torch.dtype) -> float:
        """Peak bytes per image pixel of encoding or decoding without gradients: feature maps, not weights."""
        ...


class LatentUNet(Protocol):
    """What a generator needs of every UNet."""

    size_multiple: int
    """Latent sides must be multiples of this."""

    def memory_per_cell(self, dtype: torch.dtype) -> float:
        """Peak bytes per latent position of one evaluation without gradients: feature maps, not weights."""
        ...


class NoisePredictor(LatentUNet, Protocol):
    """What a generator needs of a diffusion UNet."""

    def __call__(self, z_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """Predicted noise, shaped like ``z_t`` (N, C, h, w), at integer steps ``t`` (N,)."""
        ...


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Pad (N, C, h, w) at the bottom and right to (N, C, height, width): reflected, repeated where too small to
    reflect."""
    while x.shape[-2] < height or x.shape[-1] < width:
        rows = min(height - x.shape[-2], x.shape[-2] - 1)
        columns = min(width - x.shape[-1], x.shape[-1] - 1)
        if rows > 0 or columns > 0:
            x = F.pad(x, (0, max(columns, 0), 0, max(rows, 0)), mode="reflect")
        else:  # one pixel along every axis that is still too short: nothing to reflect
            x = F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), mode="replicate")
    return x


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """:func:`pad_to` the next sides that are multiples of ``multiple``."""
    height, width = (-(-side // multiple) * multiple for side in x.shape[-2:])
    return pad_to(x, height, width)


def speed_up_parts(*networks: nn.Module) -> None:
    """``speed_up()`` of those networks that have it."""
    for network in networks:
        faster = getattr(network, "speed_up", None)
        if callable(faster):
            faster()


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32 if it has 16 bits: between the networks no digit is lost."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LatentGenerator(nn.Module):
    """What generators have in common that enlarge an LR image, encode it, restore the latent and decode that."""

    def __init__(self, autoencoder: nn.Module, unet: nn.Module, scale: int) -> None:
        """``autoencoder`` is a :class:`LatentAutoencoder`, ``unet`` a :class:`LatentUNet`."""
        super().__init__()
        self.autoencoder = autoencoder
        self.unet = unet
        self.scale = scale

    @property
    def _latent_autoencoder(self) -> LatentAutoencoder:
        return cast(LatentAutoencoder, self.autoencoder)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that encoder, UNet and decoder share."""
        return self._latent_autoencoder.latent_channels

    @property
    def lr_multiple(self) -> int:
        """LR sides are padded to multiples of this before encoding: 64 for the published x4 models of ResShift."""
        cells = self._latent_autoencoder.factor * cast(LatentUNet, self.unet).size_multiple
        return max(1, cells // self.scale)

    def memory_per_pixel(self, dtype: torch.dtype) -> float:
        """Peak bytes of one picture per LR pixel: autoencoder and UNet run one after the other."""
        unet = cast(LatentUNet, self.unet).memory_per_cell(dtype) / self._latent_autoencoder.factor**2
        return self.scale**2 * max(self._latent_autoencoder.memory_per_pixel(dtype), unet)

    def stage_demands(self, dtype: torch.dtype) -> dict[Stage, StageDemand] | None:
        """What encoder, UNet and decoder take of tiles of their own; None where they have none."""
        return stage_demands(self.autoencoder, self.unet, self.scale, dtype)

    def speed_up(self) -> None:
        """Let the networks compute faster where they can, for inference; parameters and their names stay."""
        speed_up_parts(self.autoencoder, self.unet)

    def enlarge(self, lr: Tensor) -> Tensor:
        """The LR image at output size: bicubic (a = -0.75), not clamped."""
        return bicubic(lr, self.scale)


class OneStepLatentGenerator(LatentGenerator):
    """z_L = E(enlarged LR), one UNet evaluation at T_L, z_H by Eq. 1 of D3SR, SR = D(z_H). No noise is added.

    Public tensors are RGB in [0, 1]; [-1, 1] and latents exist only in here.
    """

    prompt: nn.Parameter
    takes_float32 = True
    """Whether pictures may be float32 while the networks have 16 bits: they are enlarged before they are rounded."""

    def __init__(
        self,
        autoencoder: nn.Module,
        unet: nn.Module,
        prompt: Tensor,
        *,
        timestep: int,
        scale: int = 4,
        schedule: DiffusionSchedule | None = None,
    ) -> None:
        """``prompt`` (1, L, C) is the learnable condition, ``timestep`` the fixed step T_L of the UNet evaluation."""
        super().__init__(autoencoder, unet, scale)
        self.prompt = nn.Parameter(prompt.detach().clone())
        self.schedule = schedule or DiffusionSchedule()
        if not 0 <= timestep < self.schedule.steps:
            raise ValueError(f"timestep T_L must be 0..{self.schedule.steps - 1}, got {timestep}")
        self.timestep = timestep

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype

    def freeze_prompt(self) -> None:
        """Compute once what depends on the prompt alone, for inference; a backbone that offers nothing stays as it is.

        Weights that were needed for it are dropped: the state dict is no longer that of a weights file.
        """
        freeze = getattr(self.unet, "freeze_prompt", None)
        if callable(freeze):
            freeze(self.prompt)

    def encode(self, x: Tensor) -> Tensor:
        """Latent (N, C, H/f, W/f) of an image (N, 3, H, W) in [0, 1] whose sides are multiples of f; the image may have
        more digits than the network."""
        return self._latent_autoencoder.encode((_wide(x) * 2 - 1).to(self._dtype))

    def decode(self, z: Tensor) -> Tensor:
        """Image (N, 3, H, W) in about [0, 1], not clamped, of a latent, which may have more digits than the network;
        float32 where the network has 16 bits."""
        return _wide(self._latent_autoencoder.decode(z.to(self._dtype))) * 0.5 + 0.5

    def step(self, z_l: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Latent estimate of the HR image: z_H = (z_L - sqrt(1 - alpha_bar) eps(z_L; T_L)) / sqrt(alpha_bar) (D3SR,
        Eq. 1); under ``prompt`` (1 or N, L, C), or else under the generator's own.

        In float32 where ``z_l`` has 16 bits: the division enlarges what the prediction and the difference lose.
        """
        t = torch.full((z_l.shape[0],), self.timestep, device=z_l.device, dtype=torch.long)
        predict = cast(Callable[..., Tensor], self.unet)
        eps = predict(z_l.to(self._dtype), t, self.prompt if prompt is None else prompt)
        return self.schedule.x0_from_eps(_wide(z_l), _wide(eps), self.timestep)

    def encode_lr(self, lr: Tensor) -> Tensor:
        """Latent (N, C, s h/f, s w/f) of the enlarged LR (N, 3, h, w)."""
        return self.encode(self.enlarge(_wide(lr)))

    def restore_latent(self, z_l: Tensor, lr: Tensor) -> Tensor:
        """Latent estimate of the HR image from that of the enlarged ``lr``, shaped like ``z_l``."""
        return self.step(z_l)

    def restore(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        """SR image (N, 3, s h, s w), not clamped, and its latent, for LR (N, 3, h, w) with sides multiples of
        ``lr_multiple``."""
        z_h = self.restore_latent(self.encode_lr(lr), lr)
        return self.decode(z_h), z_h

    def forward(self, lr: Tensor) -> Tensor:
        """SR image (N, 3, s h, s w) in about [0, 1], not clamped, of LR (N, 3, h, w) in [0, 1] of any size from 1x1
        on."""
        height, width = lr.shape[-2:]
        padded = pad_to_multiple(lr, self.lr_multiple)
        return self.restore(padded)[0][..., : self.scale * height, : self.scale * width]


class BicubicGenerator(nn.Module):
    """No network at all: bicubic enlargement, the baseline that every result is compared with."""

    scale = 4

    def forward(self, lr: Tensor) -> Tensor:
        """Enlarged image (N, 3, 4h, 4w) of LR (N, 3, h, w) in [0, 1]; bicubic (a = -0.75), not clamped."""
        return bicubic(lr, self.scale)


class TrainableGenerator(nn.Module):
    """A generator as training calls it: ``forward`` also returns the latents that a discriminator judges.

    A network that is synchronised over processes may only be used through ``forward``, hence this view.
    """

    def __init__(self, generator: OneStepLatentGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, lr: Tensor, hr: Tensor | None = None) -> tuple[Tensor, ...]:
        """SR image (N, 3, s h, s w) and its latent for LR (N, 3, h, w) in [0, 1] with sides multiples of
        ``lr_multiple``; given the photo (N, 3, s h, s w) as well, its latent too, without gradient."""
        restored = self.generator.restore(lr)
        if hr is None:
            return restored
        with torch.no_grad():
            return (*restored, self.generator.encode(hr))

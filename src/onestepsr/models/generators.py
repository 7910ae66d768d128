"""Generators: LR image in, SR image out, in one network evaluation. The only inference recipes of the package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.diffusion.noise_field import NoisePlane
from onestepsr.diffusion.residual_shift import Noise
from onestepsr.diffusion.schedule import DiffusionSchedule
from onestepsr.models.memory_cost import Stage, StageCost, stage_costs

# Bicubic enlargement by whole factors, as PyTorch computes it, several times as fast on a CPU -------------------------

REACH = 2
"""How many pixels of its input bicubic interpolation looks to each side."""
SHARPNESS = -0.75
"""The cubic's parameter a, PyTorch's own."""


def bicubic(x: Tensor, scale: int) -> Tensor:
    """(N, C, h, w) to (N, C, scale h, scale w): cubic with a = -0.75, borders repeated, not clamped, in the format of
    ``x``.

    Equals ``interpolate(mode="bicubic")`` but for rounding. Pixels of the output that lie alike between those of the
    input have equal weights, so that the whole is one small convolution followed by a pixel shuffle.
    """
    if x.device.type != "cpu":  # elsewhere PyTorch's own is as fast
        return F.interpolate(x, scale_factor=float(scale), mode="bicubic", align_corners=False)
    count, channels, height, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    single = x.to(dtype).reshape(count * channels, 1, height, width)
    padded = F.pad(single, (REACH,) * 4, mode="replicate")
    enlarged = F.pixel_shuffle(F.conv2d(padded, _weights(scale).to(dtype)), scale)
    return enlarged.reshape(count, channels, scale * height, scale * width).to(x.dtype)


@functools.cache
@torch.inference_mode(False)  # tensors made in inference mode could not be used in training afterwards
def _weights(scale: int) -> Tensor:
    """Weights (scale^2, 1, 5, 5) of the surrounding pixels for every place within a pixel, in raster order."""
    offsets = (torch.arange(scale, device="cpu", dtype=torch.float64) + 0.5) / scale - 0.5
    pixels = torch.arange(-REACH, REACH + 1, device="cpu", dtype=torch.float64)
    line = _cubic((offsets[:, None] - pixels[None]).abs())  # (scale, 5)
    return torch.einsum("pi,qj->pqij", line, line).reshape(scale**2, 1, len(pixels), len(pixels))


def _cubic(distance: Tensor) -> Tensor:
    """Keys' kernel at distances of 0 and more: two cubic polynomials, zero from 2 on."""
    a, d = SHARPNESS, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


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

    def memory_per_position(self, dtype: torch.dtype) -> float:
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
        """Peak bytes of one image per LR pixel: autoencoder and UNet run one after the other."""
        unet = cast(LatentUNet, self.unet).memory_per_position(dtype) / self._latent_autoencoder.factor**2
        return self.scale**2 * max(self._latent_autoencoder.memory_per_pixel(dtype), unet)

    def stage_costs(self, dtype: torch.dtype) -> dict[Stage, StageCost] | None:
        """What encoder, UNet and decoder take of tiles of their own; None where they have none."""
        return stage_costs(self.autoencoder, self.unet, self.scale, dtype)

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
    """Whether images may be float32 while the networks have 16 bits: they are enlarged before they are rounded."""

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


# A one-step generator that starts from a noised LR latent instead of the LR latent itself: the s ----------------------


class NoisedLatentGenerator(OneStepLatentGenerator):
    """z_T = F(E(enlarged LR), T) with T the fixed step, one UNet evaluation at T, z_0 by Eq. 1 of D3SR, SR = D(z_0).

    The noise lies on an endless plane on which every tile of an image has its place, as in
    :class:`onestepsr.models.resshift.generator.ResidualShiftGenerator`.
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
        the whole image, the place on it.
        """
        height, width = lr.shape[-2:]
        padded = pad_to_multiple(lr, self.lr_multiple)
        sr = self.restore(padded, self._noise(rng, origin))[0]
        return sr[..., : self.scale * height, : self.scale * width]

    def _noise(self, rng: torch.Generator | None, origin: tuple[int, int]) -> Noise:
        return NoisePlane.drawn(rng, origin, self.scale, self._latent_autoencoder.factor)

    def _denoised(self, z_y: Tensor, noise: Noise) -> Tensor:
        return self.step(self.schedule.add_noise(z_y, noise(0, z_y), self.timestep))

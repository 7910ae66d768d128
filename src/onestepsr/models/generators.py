"""Generators: LR image in, SR image out. Their base classes, and those that evaluate a diffusion UNet once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.core.machine import multiplies_bfloat16
from onestepsr.diffusion.residual_shift import Noise, NoisePlane
from onestepsr.diffusion.schedule import DiffusionSchedule, DiffusionScheduleConfig
from onestepsr.imaging.color import ColorTransfer
from onestepsr.imaging.resize import bicubic
from onestepsr.models.cpu_kernels import use_cpu_kernels

# ---- Memory and attention cost, from which tiles are planned ---------------------------------------------------------

Stage = Literal["encode", "unet", "decode"]
STAGES: tuple[Stage, ...] = ("encode", "unet", "decode")
"""The stages of a latent generator, in the order in which they run."""


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """Cost of one network, in latent positions."""

    bytes_per_position: float
    """Peak bytes of the feature maps per position, without gradients."""
    attention_breakeven: float = math.inf
    """Positions of a tile at which attention over all of them takes as long as everything else."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Cost of one stage of a generator, in LR pixels."""

    bytes_per_pixel: float
    """Peak bytes of the feature maps per pixel."""
    multiple: int = 1
    """Tiles start at multiples of this; that of the encoder is the side of a latent position."""
    attention_breakeven: float = math.inf
    """Pixels of a tile at which attention over all of it takes as long as everything else."""
    takes_batches: bool = True
    """Several tiles of one image may be given together; not where each draws noise of its own."""


@dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """Cost of a generator, in LR pixels."""

    bytes_per_pixel: float
    """Peak bytes of the feature maps per pixel when all stages run on one tile."""
    stages: Mapping[Stage, StageCost] = field(default_factory=dict)
    """Cost of the stages that can have tiles of their own: all three or none."""
    latent_bytes_per_pixel: float = 0.0
    """Bytes per pixel of a joined latent in float32, of which two are kept between stages."""


# ---- Generators ------------------------------------------------------------------------------------------------------

DEFAULT_BYTES_PER_PIXEL = 6000.0
"""Peak bytes per LR pixel assumed of a generator that does not say, at 4 bytes per number."""
Rng = torch.Generator | None
"""Source of noise; None stands for a fixed one."""
Origin = tuple[int, int] | None
"""Row and column of a tile in the LR image; None is the first of both."""


class Generator(nn.Module):
    """Base class of all generators; :class:`onestepsr.Upscaler` takes any subclass.

    A subclass implements :meth:`forward` and sets the attributes whose defaults do not suit it. Only generators that
    run in stages implement :meth:`encode_lr`, :meth:`restore_latent` and :meth:`decode`.
    """

    scale: int = 4
    """Output side / input side."""
    lr_multiple: int = 1
    """LR sides are padded to multiples of this, and tiles start at them."""
    largest_tile: int | None = None
    """Side in LR pixels beyond which a tile costs more time, not less; None: there is none."""
    takes_batches: bool = True
    """Several tiles of one image may be given together. False for a generator that draws noise by position: its tiles
    come one by one, with ``rng`` and ``origin``."""
    takes_float32: bool = False
    """Images come in float32 even when the weights have 16 bits; otherwise in the dtype of the weights."""
    prompt_width: int = 0
    """Channels of the prompt embeddings that it reads; 0 for a generator that reads no text."""
    image_tokens: int = 0
    """Tokens of RAM's image encoder that follow a text's in its prompt embedding; 0 where it takes the text alone."""
    added_prompt: str = ""
    """Words that belong behind an image's tags."""
    color_fix: ColorTransfer = "drift"
    """The colour correction that suits its images. Colours of a wide-gamut image beyond sRGB, which no network sees,
    come back by "drift" too, but not by "none"."""
    steps: int = 1
    """Evaluations of the diffusion network for one image."""
    stages: tuple[Stage, ...] = ()
    """Stages that can be run one by one; empty for a generator that has only :meth:`forward`."""

    @property
    def reads_text(self) -> bool:
        """True if :meth:`forward` makes use of a ``prompt``."""
        return self.prompt_width > 0

    def forward(self, lr: Tensor, *, rng: Rng = None, origin: Origin = None, prompt: Tensor | None = None) -> Tensor:
        """SR image (N, 3, s h, s w) in about [0, 1], not clamped, of LR (N, 3, h, w) in [0, 1] of any size.

        ``rng`` decides the noise, where any is drawn (None: always the same), and ``origin``, the row and column of
        ``lr`` in the whole image, its part of the noise: all tiles of an image come with equal generators. ``prompt``
        (1 or N, L, C) is the embedding of a text about the image; None leaves the generator's own.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def encode_lr(self, lr: Tensor, *, rng: Rng = None, origin: Origin = None) -> Tensor:
        """Stage "encode": latent (N, C, h', w') of the enlarged LR (N, 3, h, w), sides multiples of ``lr_multiple``."""
        raise NotImplementedError(f"{type(self).__name__} has no stages")

    def restore_latent(
        self, z_l: Tensor, lr: Tensor, *, rng: Rng = None, origin: Origin = None, prompt: Tensor | None = None
    ) -> Tensor:
        """Stage "unet": estimate of the HR latent, shaped like the latent ``z_l`` of the enlarged ``lr``."""
        raise NotImplementedError(f"{type(self).__name__} has no stages")

    def decode(self, z: Tensor) -> Tensor:
        """Stage "decode": SR image (N, 3, s h, s w) of a latent."""
        raise NotImplementedError(f"{type(self).__name__} has no stages")

    def memory_cost(self, dtype: torch.dtype) -> MemoryCost:
        """Memory that a tile takes with weights of ``dtype``: feature maps without gradients, not the weights."""
        return MemoryCost(bytes_per_pixel=DEFAULT_BYTES_PER_PIXEL * dtype.itemsize / 4)

    def speed_up(self) -> None:
        """Use layers that take less time and memory in inference, where there are any; parameter names stay."""

    def freeze_prompt(self) -> None:
        """Compute once whatever depends on a fixed prompt alone, for inference."""


class BicubicGenerator(Generator):
    """No network: bicubic enlargement, the baseline that every result is compared with."""

    def forward(self, lr: Tensor, *, rng: Rng = None, origin: Origin = None, prompt: Tensor | None = None) -> Tensor:
        """Enlarged image (N, 3, 4h, 4w) of LR (N, 3, h, w) in [0, 1]; bicubic (a = -0.75), not clamped."""
        return bicubic(lr, self.scale)


# ---- padding to any size ----


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


# ---- generators in latent space: upsample, encode, restore, decode ----


class LatentAutoencoder(nn.Module):
    """Base class of autoencoders; images are (N, 3, H, W) in [-1, 1], latents (N, C, H/factor, W/factor)."""

    factor: int
    """Pixels per latent position along each axis."""
    latent_channels: int
    """Channels of the latent."""
    largest_latent: int | None = None
    """Side of latents beyond which a tile costs more time, not less; None: there is none."""

    def encode(self, x: Tensor) -> Tensor:
        """Scaled latent of an image whose sides are multiples of ``factor``."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Image of a scaled latent."""
        raise NotImplementedError

    def memory_per_pixel(self, dtype: torch.dtype) -> float:
        """Peak bytes per image pixel of encoding or decoding without gradients: feature maps, not weights."""
        raise NotImplementedError

    def network_costs(self, dtype: torch.dtype) -> tuple[NetworkCost, NetworkCost] | None:
        """Cost of encoder and decoder; None where tiles of their own do not pay."""
        return None

    def speed_up(self) -> None:
        """See :meth:`Generator.speed_up`."""


class LatentUNet(nn.Module):
    """Base class of UNets on latents."""

    size_multiple: int
    """Latent sides must be multiples of this."""

    def network_cost(self, dtype: torch.dtype) -> NetworkCost:
        """Cost of one evaluation."""
        raise NotImplementedError

    def speed_up(self) -> None:
        """See :meth:`Generator.speed_up`."""

    def freeze_prompt(self, prompt: Tensor) -> None:
        """Compute once whatever depends on ``prompt`` (1, L, C) alone; no other is given afterwards."""


class LatentGenerator(Generator):
    """Base class of generators in latent space. Public tensors are RGB in [0, 1]; [-1, 1] and latents exist only in
    here."""

    stages = STAGES
    color_fix: ColorTransfer = "wavelet"
    noise_stage: Stage | None = None
    """The stage that draws noise, if any."""

    def __init__(self, autoencoder: LatentAutoencoder, unet: LatentUNet, scale: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.unet = unet
        self.scale = scale
        self.latent_channels = autoencoder.latent_channels
        self.lr_multiple = max(1, autoencoder.factor * unet.size_multiple // scale)
        if autoencoder.largest_latent is not None:
            self.largest_tile = autoencoder.largest_latent * autoencoder.factor // scale

    def enlarge(self, lr: Tensor) -> Tensor:
        """The LR image at output size: bicubic (a = -0.75), not clamped."""
        return bicubic(lr, self.scale)

    def restore(
        self, lr: Tensor, *, rng: Rng = None, origin: Origin = None, prompt: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """SR image (N, 3, s h, s w), not clamped, and its latent, for LR (N, 3, h, w) with sides multiples of
        ``lr_multiple``; the rest as in :meth:`forward`."""
        z_l = self.encode_lr(lr, rng=rng, origin=origin)
        z_h = self.restore_latent(z_l, lr, rng=rng, origin=origin, prompt=prompt)
        return self.decode(z_h), z_h

    def forward(self, lr: Tensor, *, rng: Rng = None, origin: Origin = None, prompt: Tensor | None = None) -> Tensor:
        """SR image of LR of any size from 1x1 on; see :meth:`Generator.forward`."""
        height, width = lr.shape[-2:]
        sr, _ = self.restore(pad_to_multiple(lr, self.lr_multiple), rng=rng, origin=origin, prompt=prompt)
        return sr[..., : self.scale * height, : self.scale * width]

    def memory_cost(self, dtype: torch.dtype) -> MemoryCost:
        """Cost of the whole, whose networks run one after the other, and of each stage where it can have own tiles."""
        autoencoder, factor = self.autoencoder, self.autoencoder.factor
        unet = self.unet.network_cost(dtype)
        whole = self.scale**2 * max(autoencoder.memory_per_pixel(dtype), unet.bytes_per_position / factor**2)
        parts = autoencoder.network_costs(dtype)
        if parts is None or factor % self.scale:  # tiles in LR pixels need latent positions of whole pixels
            return MemoryCost(bytes_per_pixel=whole)
        side = factor // self.scale  # LR pixels per latent position along an axis
        networks = (parts[0], unet, parts[1])
        multiples = (side, side * self.unet.size_multiple, side)
        stages = {
            stage: StageCost(
                bytes_per_pixel=network.bytes_per_position / side**2,
                multiple=multiple,
                attention_breakeven=network.attention_breakeven * side**2,
                takes_batches=stage != self.noise_stage,
            )
            for stage, network, multiple in zip(STAGES, networks, multiples, strict=True)
        }
        return MemoryCost(
            bytes_per_pixel=whole, stages=stages, latent_bytes_per_pixel=4.0 * self.latent_channels / side**2
        )

    def speed_up(self) -> None:
        """Speed up both networks."""
        self.autoencoder.speed_up()
        self.unet.speed_up()
        if not multiplies_bfloat16():
            use_cpu_kernels(self)  # in all other layers too: in bfloat16 they then take less time

    def noise_at(self, rng: Rng, origin: Origin) -> NoisePlane:
        """The noise of a tile at ``origin``: overlapping tiles of one image see the same values where they overlap."""
        return NoisePlane.drawn(rng, origin or (0, 0), self.scale, self.autoencoder.factor)


# ---- one evaluation of a noise-predicting UNet ----


@dataclass(frozen=True, kw_only=True)
class OneStepConfig:
    """Settings of a one-step generator; the configuration of a backbone adds the sizes of its networks."""

    schedule: DiffusionScheduleConfig = field(default_factory=DiffusionScheduleConfig)
    """Noise schedule the UNet was pretrained with."""
    timestep: int = 399
    """T_L, the step at which the UNet is evaluated. The paper says only that it lies between 0 and T; a related
    release of the same group fixes 399."""
    scale: int = 4
    """Upscaling factor."""
    noised: bool = False
    """Start from the LR latent noised to ``timestep``, as a student of a multi-step teacher does, not from the LR
    latent itself."""

    def __post_init__(self) -> None:
        if not 0 <= self.timestep < self.schedule.steps:
            raise ValueError(f"timestep T_L must be 0..{self.schedule.steps - 1}, got {self.timestep}")
        if self.scale not in (1, 2, 4, 8):
            raise ValueError(f"scale must be 1, 2, 4 or 8, got {self.scale}")

    def with_prompt_tokens(self, tokens: int) -> Self:
        """The same with a prompt embedding of another length."""
        raise NotImplementedError


class OneStepLatentGenerator(LatentGenerator):
    """D3SR's generator: z_L = E(enlarged LR), one UNet evaluation at T_L, z_H by Eq. 1, SR = D(z_H). No noise is
    added."""

    prompt: nn.Parameter
    takes_float32 = True  # images are enlarged before they are rounded to 16 bits

    def __init__(self, autoencoder: LatentAutoencoder, unet: LatentUNet, prompt: Tensor, config: OneStepConfig) -> None:
        """``unet`` predicts noise from (z_t, t, prompt); ``prompt`` (1, L, C) is its learnable condition."""
        super().__init__(autoencoder, unet, config.scale)
        self.config = config
        self.prompt = nn.Parameter(prompt.detach().clone())
        self.schedule = DiffusionSchedule(config.schedule)

    @property
    def timestep(self) -> int:
        """T_L, the fixed step of the UNet evaluation."""
        return self.config.timestep

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype

    def set_prompt(self, prompt: Tensor) -> None:
        """Replace the prompt embedding by ``prompt`` (1, L, C), which may have another length."""
        self.prompt = nn.Parameter(prompt)
        self.config = self.config.with_prompt_tokens(prompt.shape[1])

    def freeze_prompt(self) -> None:
        """Compute once what depends on the prompt alone.

        Weights that were needed for it are dropped: the state dict is no longer that of a weights file.
        """
        self.unet.freeze_prompt(self.prompt)

    def encode(self, x: Tensor) -> Tensor:
        """Latent (N, C, H/f, W/f) of an image (N, 3, H, W) in [0, 1] whose sides are multiples of f; the image may have
        more digits than the network."""
        return self.autoencoder.encode((_wide(x) * 2 - 1).to(self._dtype))

    def decode(self, z: Tensor) -> Tensor:
        """Image (N, 3, H, W) in about [0, 1], not clamped, of a latent, which may have more digits than the network;
        float32 where the network has 16 bits."""
        return _wide(self.autoencoder.decode(z.to(self._dtype))) * 0.5 + 0.5

    def step(self, z_l: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Latent estimate of the HR image: z_H = (z_L - sqrt(1 - alpha_bar) eps(z_L; T_L)) / sqrt(alpha_bar) (D3SR,
        Eq. 1); under ``prompt`` (1 or N, L, C), or else under the generator's own.

        In float32 where ``z_l`` has 16 bits: the division enlarges what the prediction and the difference lose.
        """
        t = torch.full((z_l.shape[0],), self.timestep, device=z_l.device, dtype=torch.long)
        eps: Tensor = self.unet(z_l.to(self._dtype), t, self.prompt if prompt is None else prompt)
        return self.schedule.x0_from_eps(_wide(z_l), _wide(eps), self.timestep)

    def encode_lr(self, lr: Tensor, *, rng: Rng = None, origin: Origin = None) -> Tensor:
        """Latent (N, C, s h/f, s w/f) of the enlarged LR (N, 3, h, w)."""
        return self.encode(self.enlarge(_wide(lr)))

    def restore_latent(
        self, z_l: Tensor, lr: Tensor, *, rng: Rng = None, origin: Origin = None, prompt: Tensor | None = None
    ) -> Tensor:
        """Latent estimate of the HR image, by :meth:`step`."""
        return self.step(z_l, prompt)


class NoisedLatentGenerator(OneStepLatentGenerator):
    """z_T = F(E(enlarged LR), T) with T the fixed step, one UNet evaluation at T, z_0 by Eq. 1 of D3SR, SR = D(z_0)."""

    takes_batches = False
    noise_stage = "unet"

    def restore_latent(
        self, z_l: Tensor, lr: Tensor, *, rng: Rng = None, origin: Origin = None, prompt: Tensor | None = None
    ) -> Tensor:
        """Latent estimate of the HR image from the noised ``z_l``."""
        return self.denoise(z_l, self.noise_at(rng, origin), prompt)

    def denoise(self, z_y: Tensor, noise: Noise, prompt: Tensor | None = None) -> Tensor:
        """Estimate of z_0 from the latent ``z_y`` of the enlarged LR image."""
        return self.step(self.schedule.add_noise(z_y, noise(0, z_y), self.timestep), prompt)


def one_step_generator(
    autoencoder: LatentAutoencoder, unet: LatentUNet, prompt: Tensor, config: OneStepConfig
) -> OneStepLatentGenerator:
    """The generator that ``config`` asks for: from the LR latent itself, or from a noised one."""
    kind = NoisedLatentGenerator if config.noised else OneStepLatentGenerator
    return kind(autoencoder, unet, prompt, config)


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


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32 if it has 16 bits: between the networks no digit is lost."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

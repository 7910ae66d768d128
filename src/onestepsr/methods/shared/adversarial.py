"""Adversarial terms: D3SR's discriminator of noised latents, and a critic of images.

A term pairs a network that judges with its part in the generator's loss; any of them can stand beside others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.core.machine import is_one_of_several
from onestepsr.diffusion.schedule import DiffusionSchedule
from onestepsr.imaging.resize import bicubic
from onestepsr.losses.adversarial import bce_discriminator_loss, bce_generator_loss
from onestepsr.methods.base import Batch, LossFn, Networks, Phase, SampleRandom, checkpoint_gradients
from onestepsr.models.backbones import load_discriminator_backbone, unet_encoder_of
from onestepsr.models.discriminators import DiffusionEncoder, NoiseAwareDiscriminator, PatchCritic
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.lora import LoraConfig, add_lora
from onestepsr.models.stable_diffusion.config import SDXLConditioning

DISCRIMINATOR, CRITIC = "discriminator", "critic"
"""Names of the judging networks in :class:`onestepsr.methods.base.Method`."""
Tuning = Literal["lora", "full"]
LARGEST_ZOOM, LARGEST_TURN = 1.5, 15.0
"""Factor and degrees of :func:`warped`."""
LARGEST_SHIFT = 8
"""Pixels by which images are moved before a critic sees them: the critic's strides and the generator's latent positions
would else share one grid, and the critic would teach patterns that follow it."""
LATTICE_PLANES = 6
"""Channels of :func:`lattice_planes`."""


@dataclass(frozen=True, kw_only=True)
class GeneratorOutput:
    """Output of the generator in this iteration, with gradients."""

    sr: Tensor
    """Images (N, 3, H, W) in about [0, 1]."""
    z_sr: Tensor
    """Their latents (N, C, h, w)."""
    prompt: Tensor | None = None
    """Prompt embeddings (N, L, C) of the images, where each has its own."""
    lr: Tensor | None = None
    """Inputs (N, 3, h, w), for a critic of images."""
    hr: Tensor | None = None
    """Target photos (N, 3, H, W), likewise."""


@dataclass(frozen=True, kw_only=True)
class AdversarialTerm:
    """One judging network: its term in the generator's loss, and its own loss on the images or latents that the
    generator's phase left in the batch."""

    network: str
    """Key in the method's networks."""
    name: str
    """Name of the generator's term."""
    start: int
    """First iteration in which it takes part."""
    generator_loss: Callable[[Networks, GeneratorOutput, SampleRandom], Tensor]
    """The generator's weighted loss."""
    discriminator_loss: LossFn
    """Its own loss, from the batch's ``hr`` and ``sr``, or ``z_hr`` and ``z_sr``."""
    begin_iteration: Callable[[], None] = lambda: None
    """Called once at the start of every iteration."""


def adversarial_phases(
    build_generator_loss: Callable[[list[AdversarialTerm]], LossFn], terms: list[AdversarialTerm]
) -> tuple[Phase, ...]:
    """The generator alone, joined by each term from its start on; then the terms.

    ``build_generator_loss`` makes the generator's loss for those terms that take part.
    """
    starts = sorted({0, *(term.start for term in terms)})
    phases = [
        Phase(
            network="generator",
            loss=build_generator_loss([term for term in terms if term.start <= start]),
            start=start,
            stop=stop,
        )
        for start, stop in zip(starts, [*starts[1:], None], strict=True)
    ]
    return (*phases, *(Phase(network=term.network, loss=term.discriminator_loss, start=term.start) for term in terms))


# ---- Noise on latents ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """Noise whose strength follows how sure the discriminator is (Wang et al., "Diffusion-GAN", 2023, section 3.3)."""

    t_initial: int = 5
    """Largest step in the beginning, and the smallest that it may fall to."""
    target: float = 0.6
    """Share of real over fake verdicts on real latents, as E[sign(D - 1/2)], at which the strength stays."""
    images: int = 100_000
    """Real images over which the largest step would grow to ``t_max`` if the discriminator were always too sure."""
    clean_share: float = 0.5
    """Part of the samples that get no noise."""
    prior: Literal["priority", "uniform"] = "priority"
    """Distribution of the step up to the present largest: in proportion to the step, or even."""

    def __post_init__(self) -> None:
        if self.t_initial < 0 or self.images < 1 or not 0 <= self.clean_share <= 1 or not -1 < self.target < 1:
            raise ValueError(f"need t_initial >= 0, images >= 1, clean_share in 0..1 and target in (-1, 1), got {self}")


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Noise added to latents before a discriminator judges them."""

    kind: Literal["noise_aware", "vanilla", "diffusion_gan"] = "noise_aware"
    """``noise_aware`` draws the step evenly from [t_min, t_max], as D3SR does (Eq. 2-3); ``vanilla`` shows clean
    latents at step 0; ``diffusion_gan`` adapts the strength (Table 6)."""
    t_min: int = 0
    """Smallest step of ``noise_aware``."""
    t_max: int = 999
    """Largest step; the paper draws from all of [0, T]."""
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    """Settings of ``diffusion_gan``."""

    def __post_init__(self) -> None:
        if not 0 <= self.t_min <= self.t_max:
            raise ValueError(f"need 0 <= t_min <= t_max, got {self.t_min} and {self.t_max}")
        if self.kind == "diffusion_gan" and self.adaptive.t_initial > self.t_max:
            raise ValueError(f"adaptive.t_initial must be at most t_max {self.t_max}, got {self.adaptive.t_initial}")


class LatentNoise(nn.Module):
    """F(z, t) = sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) noise with t drawn per sample (D3SR, Eq. 4)."""

    @staticmethod
    def of(schedule: DiffusionSchedule, config: NoiseConfig, gain: float = 1.0) -> LatentNoise:
        """The noise that ``config`` describes."""
        return (AdaptiveNoise if config.kind == "diffusion_gan" else LatentNoise)(schedule, config, gain)

    def __init__(self, schedule: DiffusionSchedule, config: NoiseConfig, gain: float) -> None:
        """``gain`` multiplies the latents first, for a discriminator that expects them on another scale."""
        super().__init__()
        if config.t_max >= schedule.steps:
            raise UserError(f"discriminator.t_max: {config.t_max}, but the diffusion has {schedule.steps} steps from 0")
        self.schedule, self.config, self.gain = schedule, config, gain

    def forward(self, z: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """Noised latents, shaped like ``z`` (N, C, h, w), and their steps (N,) on the same device."""
        z = self.gain * z
        if self.config.kind == "vanilla":
            return z, torch.zeros(len(z), dtype=torch.long, device=z.device)
        t = self.draw(random)
        noised = self.schedule.add_noise(z, random.normal(z), t)
        if self.config.kind == "diffusion_gan":  # step 0 means no noise there, not the schedule's first whiff
            noised = torch.where(t.to(z.device).reshape(-1, 1, 1, 1) == 0, z, noised)
        return noised, t.to(z.device)

    def draw(self, random: SampleRandom) -> Tensor:
        """Steps (N,)."""
        return random.integers(self.config.t_min, self.config.t_max + 1)

    def update(self, real_logits: Tensor) -> None:
        """Observe how sure the discriminator is of real latents, from its logits (N, 1, h', w')."""

    def step(self) -> None:
        """Turn what was observed since the last call into the strength of the iteration that begins."""


class AdaptiveNoise(LatentNoise):
    """Diffusion-GAN's noise: the largest step grows while the discriminator is too sure of itself, and shrinks again.

    Our reading where D3SR's Table 6 only names it: same backbone and head, the schedule of the diffusion model, and the
    discriminator sees the step. The state is in buffers, so that checkpoints hold it.
    """

    largest: Tensor
    observed: Tensor

    def __init__(self, schedule: DiffusionSchedule, config: NoiseConfig, gain: float) -> None:
        super().__init__(schedule, config, gain)
        self.register_buffer("largest", torch.tensor(float(config.adaptive.t_initial)))
        self.register_buffer("observed", torch.zeros(2))  # sum of signs, number of samples

    def draw(self, random: SampleRandom) -> Tensor:
        """Steps (N,): 0 for the clean share, else up to the present largest."""
        settings = self.config.adaptive
        clean = (random.uniform() < settings.clean_share).to(self.largest.device)
        share = random.uniform().to(self.largest.device)
        if settings.prior == "priority":  # p(t) in proportion to t: the inverse of its distribution function
            share = share.sqrt()
        steps = (share * self.largest).ceil().long()
        return torch.where(clean, torch.zeros_like(steps), steps)

    @torch.no_grad()
    def update(self, real_logits: Tensor) -> None:
        """Add up sign(D - 1/2), which is the logit's sign, averaged over regions, of all processes.

        At once, not in :meth:`step`: a checkpoint in between holds the buffers of one process for all.
        """
        signs = real_logits.float().sign().mean(dim=(1, 2, 3))
        seen = torch.stack([signs.sum(), torch.full_like(signs[0], len(signs))])
        if is_one_of_several():
            dist.all_reduce(seen)
        self.observed += seen

    def step(self) -> None:
        """Move the largest step by the images seen, up when r_d is above the target and down when below."""
        settings = self.config.adaptive
        signs, images = self.observed.clone()
        direction = (signs / images.clamp(min=1) - settings.target).sign()
        change = direction * images / settings.images * (self.config.t_max - settings.t_initial)
        self.largest.add_(change).clamp_(settings.t_initial, self.config.t_max)
        self.observed.zero_()


# ---- Discriminator of noised latents ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(NoiseConfig):
    """The diffusion discriminator: its backbone, its training, and the noise on its input."""

    backbone: str | None = None
    """Weights of the diffusion backbone whose down and middle blocks it is made of; null takes the generator's own."""
    tuning: Tuning = "lora"
    """``lora`` keeps the diffusion features frozen under adapters, as in the paper; ``full`` trains everything."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, used with ``tuning: lora``."""
    hidden: tuple[int, ...] = (128,)
    """Widths of the MLP between middle features and logit; the paper leaves them open."""
    start: int = 0
    """First iteration with a discriminator; before it the generator trains on the spatial loss alone."""
    sdxl: SDXLConditioning = field(default_factory=SDXLConditioning)
    """Conditioning of a Stable Diffusion XL backbone; other backbones have no use for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.hidden, default=1) < 1 or self.start < 0:
            raise ValueError(f"need hidden widths of at least 1 and start >= 0, got {self.hidden} and {self.start}")


def build_discriminator(
    generator: OneStepLatentGenerator, settings: DiscriminatorConfig, *, name: str, checkpointing: bool
) -> tuple[NoiseAwareDiscriminator, LatentNoise]:
    """Down and middle blocks of a diffusion backbone under an MLP, and the noise on its input.

    Without a backbone of its own it copies ``generator``'s, whose UNet must not have adapters yet; ``name`` is its
    name in messages.
    """
    if settings.backbone is not None:
        encoder, prompt = load_discriminator_backbone(settings.backbone, sdxl=settings.sdxl)
    else:
        encoder, prompt = unet_encoder_of(generator), generator.prompt
    known = cast(DiffusionEncoder, encoder)
    if known.latent_channels != generator.latent_channels:
        raise UserError(
            f"discriminator.backbone: {settings.backbone} takes latents of {known.latent_channels} channels, those of "
            f"{name} have {generator.latent_channels}"
        )
    noise = LatentNoise.of(generator.schedule, settings, known.latent_gain)
    discriminator = NoiseAwareDiscriminator(encoder, prompt, hidden=settings.hidden)
    discriminator.add_module("noise", noise)  # so that the state of adaptive noise is saved with the discriminator
    if checkpointing:
        checkpoint_gradients(encoder)
    if settings.tuning == "lora":
        add_lora(encoder, settings.lora)
    return discriminator, noise


def latent_discriminator_term(noise: LatentNoise, weight: float, start: int) -> AdversarialTerm:
    """D3SR's discriminator of noised latents (Eq. 2-4)."""

    def generator_loss(networks: Networks, output: GeneratorOutput, random: SampleRandom) -> Tensor:
        return weight * bce_generator_loss(networks[DISCRIMINATOR](*noise(output.z_sr, random)))

    def discriminator_loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        halves = [noise(batch[name], random) for name in ("z_hr", "z_sr")]
        z_t, t = (torch.cat(pair) for pair in zip(*halves, strict=True))  # one evaluation for both
        real, fake = networks[DISCRIMINATOR](z_t, t).chunk(2)
        noise.update(real)
        return {"discriminator": bce_discriminator_loss(real, fake)}

    return AdversarialTerm(
        network=DISCRIMINATOR,
        name="adversarial",
        start=start,
        generator_loss=generator_loss,
        discriminator_loss=discriminator_loss,
        begin_iteration=noise.step,
    )


# ---- Critic of images ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """A small convolutional critic of images beside the discriminator of latents."""

    weight: float = 0.0
    """Weight of its adversarial term in the generator's loss; 0 leaves the critic out. A decoder that is trained along
    makes artefacts that no latent shows."""
    widths: tuple[int, ...] = (48, 96, 128)
    """Channels at a half, a quarter, ... of the image's resolution."""
    start: int = 0
    """First iteration with a critic."""
    contrast_floor: float | None = None
    """Show it the locally normalised brightness too, in which faint texture is as strong as an edge; detail of less
    than this deviation (in [0, 1]) stays faint. Far below the noise of photos, a generator is asked for noise, and
    draws a mesh."""
    conditional: bool = False
    """Show it the enlarged input too, so that it can tell invented detail from restored detail."""
    lattice: bool = False
    """Tell it the position of every output pixel within its input pixel: texture that follows the input's grid, which
    photos never do, is then plain to see."""
    matching: float = 0.0
    """Weight of the distance between its features of image and photo, relative to its adversarial term."""

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or self.start < 0:
            raise ValueError(f"need widths of at least 1 and start >= 0, got {self.widths} and {self.start}")
        if min(self.weight, self.matching) < 0:
            raise ValueError(f"weight and matching must not be negative, got {self.weight} and {self.matching}")
        if self.contrast_floor is not None and self.contrast_floor <= 0:
            raise ValueError(f"contrast_floor must be above 0, got {self.contrast_floor}")


class ImageCritic:
    """The critic of images and its term, with the losses of the latent discriminator on images cut at random offsets:
    no noise, no step."""

    def __init__(self, config: CriticConfig) -> None:
        self.config = config
        self.condition_channels = 3 * config.conditional + LATTICE_PLANES * config.lattice
        """Number of channels that the network sees beside the images."""

    def network(self) -> PatchCritic:
        """The critic itself."""
        settings = self.config
        return PatchCritic(
            settings.widths, contrast_floor=settings.contrast_floor, condition_channels=self.condition_channels
        )

    def term(self) -> AdversarialTerm:
        """The critic as a term of the generator's loss."""
        return AdversarialTerm(
            network=CRITIC,
            name="critic_adversarial",
            start=self.config.start,
            generator_loss=self.generator_loss,
            discriminator_loss=self.discriminator_loss,
        )

    def generator_loss(self, networks: Networks, output: GeneratorOutput, random: SampleRandom) -> Tensor:
        """The adversarial term and the distance between features (Wang et al., "pix2pixHD", 2018)."""
        weight, matching = self.config.weight, self.config.matching
        if not matching or output.hr is None:
            logits, *_ = networks[CRITIC](*self._views([output.sr], output.lr, random))
            return weight * bce_generator_loss(logits)
        seen = networks[CRITIC](*self._views([output.sr, output.hr], output.lr, random))
        (logits, _), *features = (part.chunk(2) for part in seen)
        distances = [F.l1_loss(fake, real.detach()) for fake, real in features]
        return weight * (bce_generator_loss(logits) + matching * torch.stack(distances).mean())

    def discriminator_loss(self, networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """The critic's own loss, from ``hr`` and ``sr`` of the batch."""
        logits, *_ = networks[CRITIC](*self._views([batch["hr"], batch["sr"]], batch.get("lr"), random))
        return {"critic": bce_discriminator_loss(*logits.chunk(2))}

    def _views(self, images: Sequence[Tensor], lr: Tensor | None, random: SampleRandom) -> tuple[Tensor, ...]:
        """Images cut at one random offset each, joined along the batch, and their conditions at the same offsets."""
        if lr is None or not self.condition_channels:
            return (torch.cat(shifted(images, random)),)
        scale = images[0].shape[-1] // lr.shape[-1]
        beside = [bicubic(lr, scale)] if self.config.conditional else []
        beside += [lattice_planes(images[0], scale)] if self.config.lattice else []
        cut = shifted([*images, *beside], random)
        cut, condition = cut[: len(images)], torch.cat(cut[len(images) :], dim=1)
        return torch.cat(cut), condition.repeat(len(cut), 1, 1, 1)


def shifted(images: Sequence[Tensor], random: SampleRandom) -> list[Tensor]:
    """Parts (N, C, H - 8, W - 8) of images (N, C, H, W): every sample is cut at an offset of its own, the same in
    each of ``images``."""
    rows, columns = (random.integers(0, LARGEST_SHIFT + 1).tolist() for _ in range(2))
    height, width = (side - LARGEST_SHIFT for side in images[0].shape[2:])
    offsets = list(zip(rows, columns, strict=True))
    return [torch.stack([x[n, :, y : y + height, i : i + width] for n, (y, i) in enumerate(offsets)]) for x in images]


def warped(images: Sequence[Tensor], random: SampleRandom, share: float) -> list[Tensor]:
    """Images (N, C, S, S), of which about the part ``share`` is turned by up to 15 degrees and enlarged by 1 to 1.5
    times what fills the frame again, each sample in its own way and alike in all of ``images``.

    A pattern of single pixels that flatters a feature network at one scale does not at another (Kettunen et al.,
    "E-LPIPS: Robust Perceptual Image Similarity via Random Transformation Ensembles", 2019).
    """
    chosen, zoom, turn = (random.uniform() for _ in range(3))
    angle = (2 * turn - 1) * math.radians(LARGEST_TURN)
    inverse = 1 / ((1 + (LARGEST_ZOOM - 1) * zoom) * (angle.cos() + angle.sin().abs()))
    cos, sin, zero = angle.cos() * inverse, angle.sin() * inverse, torch.zeros_like(angle)
    rows = torch.stack([torch.stack([cos, -sin, zero], dim=1), torch.stack([sin, cos, zero], dim=1)], dim=1)
    first = images[0]
    grid = F.affine_grid(rows, list(first.shape), align_corners=False).to(first.device, first.dtype)
    taken = (chosen < share).to(first.device)[:, None, None, None]
    return [torch.where(taken, F.grid_sample(x, grid, "bicubic", "reflection", align_corners=False), x) for x in images]


def lattice_planes(like: Tensor, scale: int) -> Tensor:
    """Planes (N, 6, H, W) in [0, 1] that encode an output pixel's position in its input pixel of ``scale`` x ``scale``.

    Waves of one and of two periods per input pixel along both axes. Photos are independent of the phase of the LR grid,
    so any correlation that a critic finds is an artefact of the generator.
    """
    n, _, height, width = like.shape
    rows, columns = (
        torch.arange(size, device=like.device, dtype=torch.float32) * (2 * torch.pi / scale) for size in (height, width)
    )
    waves = [
        wave
        for angle in (rows[:, None].expand(height, width), columns[None].expand(height, width))
        for wave in (angle.cos(), angle.sin(), (2 * angle).cos())
    ]
    return ((torch.stack(waves) + 1) / 2).to(like.dtype).expand(n, -1, -1, -1)

"""Adversarial terms: a discriminator of noised latents, as in D3SR, or a critic of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.imaging.resize import bicubic
from onestepsr.losses.adversarial import bce_discriminator_loss, bce_generator_loss
from onestepsr.methods.base import Batch, LossFn, Networks, Phase, SampleRandom, checkpoint_gradients
from onestepsr.methods.shared.noise import LatentNoise, NoiseConfig, latent_noise
from onestepsr.models.backbones import load_discriminator_backbone, unet_encoder_of
from onestepsr.models.discriminators import DiffusionEncoder, NoiseAwareDiscriminator
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.lora import LoraConfig, add_lora
from onestepsr.models.stable_diffusion.config import SDXLConditioning

DISCRIMINATOR = "discriminator"
CRITIC = "critic"
LARGEST_SHIFT = 8
"""Pixels by which images are moved before a critic sees them: the critic's strides and the generator's latent cells
would else share one grid, and the critic would teach patterns that follow it."""
LATTICE_PLANES = 6
"""Channels of :func:`lattice_planes`."""


@dataclass(frozen=True, kw_only=True)
class GeneratorOutput:
    """What the generator has made in this iteration, with gradients."""

    sr: Tensor
    """Images (N, 3, H, W) in about [0, 1]."""
    z_sr: Tensor
    """Their latents (N, C, h, w)."""
    prompt: Tensor | None = None
    """Prompt embeddings (N, L, C) of the images, where each has its own."""
    lr: Tensor | None = None
    """What they were made from (N, 3, h, w), for a critic of images."""
    hr: Tensor | None = None
    """The photos (N, 3, H, W), likewise."""


@dataclass(frozen=True, kw_only=True)
class AdversarialTerm:
    """One judging network: its term in the generator's loss, and its own loss on what the generator left in the
    batch."""

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


def condition_channels(*, conditional: bool, lattice: bool) -> int:
    """Channels that a critic of :func:`image_critic_term` sees beside the images."""
    return 3 * conditional + LATTICE_PLANES * lattice


def image_critic_term(
    weight: float, start: int, *, conditional: bool = False, lattice: bool = False, matching: float = 0.0
) -> AdversarialTerm:
    """A critic of images, with the same losses on images cut at random places: no noise, no step.

    With ``conditional`` it sees the enlarged input beside each image, with ``lattice`` where in its input pixel
    every output pixel lies. ``matching`` weighs the mean absolute difference of its features between image and
    photo, relative to its adversarial term (Wang et al., "pix2pixHD", 2018).
    """

    def views(images: Sequence[Tensor], lr: Tensor | None, random: SampleRandom) -> tuple[Tensor, ...]:
        """Images at one random place each, joined along the batch, and what is seen beside them at these places."""
        if lr is None or not (conditional or lattice):
            return (torch.cat(shifted(images, random)),)
        scale = images[0].shape[-1] // lr.shape[-1]
        beside = [bicubic(lr, scale)] if conditional else []
        beside += [lattice_planes(images[0], scale)] if lattice else []
        cut = shifted([*images, *beside], random)
        cut, condition = cut[: len(images)], torch.cat(cut[len(images) :], dim=1)
        return torch.cat(cut), condition.repeat(len(cut), 1, 1, 1)

    def generator_loss(networks: Networks, output: GeneratorOutput, random: SampleRandom) -> Tensor:
        if not matching or output.hr is None:
            logits, *_ = networks[CRITIC](*views([output.sr], output.lr, random))
            return weight * bce_generator_loss(logits)
        seen = networks[CRITIC](*views([output.sr, output.hr], output.lr, random))
        (logits, _), *features = (part.chunk(2) for part in seen)
        distances = [F.l1_loss(fake, real.detach()) for fake, real in features]
        return weight * (bce_generator_loss(logits) + matching * torch.stack(distances).mean())

    def discriminator_loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        logits, *_ = networks[CRITIC](*views([batch["hr"], batch["sr"]], batch.get("lr"), random))
        return {"critic": bce_discriminator_loss(*logits.chunk(2))}

    return AdversarialTerm(
        network=CRITIC,
        name="critic_adversarial",
        start=start,
        generator_loss=generator_loss,
        discriminator_loss=discriminator_loss,
    )


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
    return (
        *phases,
        *(Phase(network=term.network, loss=term.discriminator_loss, start=term.start) for term in terms),
    )


def shifted(images: Sequence[Tensor], random: SampleRandom) -> list[Tensor]:
    """Parts (N, C, H - 8, W - 8) of images (N, C, H, W): every sample is cut at a place of its own, the same in each
    of ``images``."""
    rows, columns = (random.integers(0, LARGEST_SHIFT + 1).tolist() for _ in range(2))
    places = list(zip(rows, columns, strict=True))
    return [torch.stack([_part(one, *place) for one, place in zip(x, places, strict=True)]) for x in images]


def lattice_planes(like: Tensor, scale: int) -> Tensor:
    """Planes (N, 6, H, W) in [0, 1] that tell an output pixel's place in its input pixel of ``scale`` x ``scale``.

    Waves of one and of two periods per input pixel along both axes. Photos have nothing in common with them, so what
    they let a critic foretell in a generator's images is an artefact.
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


def _part(x: Tensor, row: int, column: int) -> Tensor:
    height, width = x.shape[-2] - LARGEST_SHIFT, x.shape[-1] - LARGEST_SHIFT
    return x[:, row : row + height, column : column + width]


# The noise-aware discriminator of D3SR as a method's setting, for every method that may use i ----------------------

Tuning = Literal["lora", "full"]


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(NoiseConfig):
    """The diffusion discriminator: its backbone, its training, and what it is shown."""

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
    """How a Stable Diffusion XL backbone is conditioned; other backbones have no use for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.hidden, default=1) < 1 or self.start < 0:
            raise ValueError(f"need hidden widths of at least 1 and start >= 0, got {self.hidden} and {self.start}")


def build_discriminator(
    generator: OneStepLatentGenerator, settings: DiscriminatorConfig, *, name: str, checkpointing: bool = False
) -> tuple[NoiseAwareDiscriminator, LatentNoise]:
    """Down and middle blocks of a diffusion backbone under an MLP, and the noise on what it sees.

    Without a backbone of its own it copies ``generator``'s, whose UNet must not have adapters yet; ``name`` says in
    messages where that came from.
    """
    encoder, prompt = _backbone(generator, settings)
    known = cast(DiffusionEncoder, encoder)
    if known.latent_channels != generator.latent_channels:
        raise UserError(
            f"discriminator.backbone: {settings.backbone} takes latents of {known.latent_channels} channels, those of "
            f"{name} have {generator.latent_channels}"
        )
    noise = latent_noise(generator.schedule, settings, known.latent_gain)
    discriminator = NoiseAwareDiscriminator(encoder, prompt, hidden=settings.hidden)
    discriminator.add_module("noise", noise)  # so that the state of adaptive noise is saved with the discriminator
    if checkpointing:
        checkpoint_gradients(encoder)
    if settings.tuning == "lora":
        add_lora(encoder, settings.lora)
    return discriminator, noise


def _backbone(generator: OneStepLatentGenerator, settings: DiscriminatorConfig) -> tuple[nn.Module, Tensor]:
    if settings.backbone is None:
        return unet_encoder_of(generator), generator.prompt.detach()
    return load_discriminator_backbone(settings.backbone, sdxl=settings.sdxl)

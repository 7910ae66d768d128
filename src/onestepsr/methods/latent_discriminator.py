"""The noise-aware discriminator of D3SR as a method's setting, for every method that may judge latents with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast

from torch import Tensor, nn

from onestepsr.errors import UserError
from onestepsr.methods.networks import checkpoint_gradients
from onestepsr.methods.noising import LatentNoise, NoiseConfig, latent_noise
from onestepsr.models.backbones import half_of, load_discriminator_backbone
from onestepsr.models.discriminators import DiffusionEncoder, NoiseAwareDiscriminator
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.lora import LoraConfig, add_lora
from onestepsr.models.stable_diffusion_config import SDXLConditioning

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
        return half_of(generator), generator.prompt.detach()
    return load_discriminator_backbone(settings.backbone, sdxl=settings.sdxl)

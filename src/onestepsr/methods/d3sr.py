"""D3SR, also called DFOSD: distillation-free one-step super-resolution with a diffusion discriminator (arXiv
2410.04224).

Generator: MSE + lambda_2 EA-DISTS + lambda_1 adversarial (Eq. 8 and 2). Discriminator: Eq. 3. No teacher. Every
iteration updates the generator, then the discriminator with the pair of latents that the generator's phase has made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from onestepsr.methods.base import (
    Batch,
    Exported,
    LossFn,
    Method,
    MethodEntry,
    Networks,
    SampleRandom,
    check_timestep,
    checkpoint_gradients,
    exported,
    preview_columns,
    register,
)
from onestepsr.methods.shared.adversarial import (
    CRITIC,
    DISCRIMINATOR,
    AdversarialTerm,
    DiscriminatorConfig,
    GeneratorOutput,
    Tuning,
    adversarial_phases,
    build_discriminator,
    condition_channels,
    image_critic_term,
    latent_discriminator_term,
)
from onestepsr.methods.shared.image_loss import PerceptualConfig, SpatialLoss, SpatialWeights
from onestepsr.models.backbones import load_backbone
from onestepsr.models.discriminators import PatchCritic
from onestepsr.models.generators import OneStepLatentGenerator, TrainableGenerator
from onestepsr.models.lora import LoraConfig, add_lora
from onestepsr.models.stable_diffusion.config import PromptConfig
from onestepsr.models.tiny.generator import Depth, deepened, equalize_subpixel_contrast


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """A small convolutional critic of images beside the discriminator of latents; not part of the paper."""

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
    """Tell it where in its input pixel every output pixel lies: texture that follows the input's grid, which photos
    never do, is then plain to see."""
    matching: float = 0.0
    """Weight of the distance between its features of image and photo, relative to its adversarial term."""

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or self.start < 0:
            raise ValueError(f"need widths of at least 1 and start >= 0, got {self.widths} and {self.start}")
        if self.matching < 0:
            raise ValueError(f"matching must not be negative, got {self.matching}")
        if self.contrast_floor is not None and self.contrast_floor <= 0:
            raise ValueError(f"contrast_floor must be above 0, got {self.contrast_floor}")


@dataclass(frozen=True, kw_only=True)
class D3SRConfig:
    """Backbone, tuning and loss weights. The paper gives neither T_L nor the weights; all of them are fields here."""

    backbone: str
    """Pretrained latent-diffusion backbone: a name, a diffusers folder, a single-file checkpoint, or weights of ours
    from the ``diffusion`` method or an earlier generator; ``random:NAME`` needs no file and knows nothing."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """How the learnable prompt embedding starts on a backbone that brings none."""
    prompt_file: Path | None = None
    """Safetensors file with a prompt embedding (L, C) to start from instead."""
    deepen: Depth | None = None
    """Residual blocks that a tiny backbone shall have. New ones start as the identity: training goes on from the
    backbone's own images."""
    even_contrast: bool = False
    """Make detail of a tiny backbone's images equally strong at all positions of its latent cells, while training
    already: critics see no lattice then, and the generator gains nothing by one. See
    :class:`onestepsr.models.tiny.decoder.EvenContrast`."""
    timestep: int = 399
    """T_L, the fixed step of the UNet evaluation."""
    tuning: Tuning = "lora"
    """How the generator's UNet is trained: adapters, as in the paper, or all of its parameters."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, used with ``tuning: lora``."""
    train_decoder: bool = False
    """Also train the autoencoder's decoder. The paper freezes it; a small decoder gains from knowing the generator's
    latents."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: about a third slower, far less memory."""
    mse_weight: float = 1.0
    """Weight of the squared error of images in [-1, 1]."""
    perceptual_weight: float = 1.0
    """lambda_2, the weight of the perceptual distance; 0 leaves it out (Table 5)."""
    adversarial_weight: float = 0.5
    """lambda_1; 0 leaves the discriminator out altogether (Table 6)."""
    critic_weight: float = 0.0
    """Weight of the adversarial term of a critic of images; 0, as in the paper, leaves it out. A decoder that is
    trained along makes artefacts that no latent shows."""
    lattice_weight: float = 0.0
    """Weight of the penalty on patterns locked to the latent grid, in [-1, 1]; not in the paper, whose decoder does not
    make them."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """The perceptual distance, EA-DISTS in the paper."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The noise-aware discriminator."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic of images, used with a ``critic_weight``."""

    def __post_init__(self) -> None:
        spatial, terms = self.spatial_weights, (self.adversarial_weight, self.critic_weight)
        if min(spatial.mse, spatial.perceptual, spatial.lattice, *terms) < 0:
            raise ValueError("loss weights must not be negative")
        if not self.mse_weight + self.perceptual_weight:
            raise ValueError("mse_weight and perceptual_weight are both 0: nothing ties the output to the photo")

    @property
    def spatial_weights(self) -> SpatialWeights:
        """The weights of the spatial loss."""
        return SpatialWeights(mse=self.mse_weight, perceptual=self.perceptual_weight, lattice=self.lattice_weight)


def build(config: D3SRConfig) -> Method:
    """Generator phase, then the phases of its discriminator and critic."""
    generator = _prepare_generator(config)
    spatial = SpatialLoss(config.spatial_weights, config.perceptual)
    networks: dict[str, nn.Module] = {"generator": TrainableGenerator(generator)}
    terms: list[AdversarialTerm] = []
    if config.adversarial_weight:
        networks[DISCRIMINATOR], noise = build_discriminator(
            generator, config.discriminator, name=config.backbone, checkpointing=config.gradient_checkpointing
        )
        terms.append(latent_discriminator_term(noise, config.adversarial_weight, config.discriminator.start))
    if config.critic_weight:
        critic = config.critic
        beside = {"conditional": critic.conditional, "lattice": critic.lattice}
        networks[CRITIC] = PatchCritic(
            critic.widths, contrast_floor=critic.contrast_floor, condition_channels=condition_channels(**beside)
        )
        terms.append(image_critic_term(config.critic_weight, critic.start, matching=critic.matching, **beside))
    if config.tuning == "lora":  # after the discriminator has copied the plain UNet
        add_lora(generator.unet, config.lora)
    return Method(
        networks=networks,
        frozen=spatial.frozen,
        phases=adversarial_phases(partial(_generator_phase, spatial), terms),
        ema=("generator",),
        preview=partial(_preview, generator.scale),
        export=_export,
        scale=generator.scale,
        hr_multiple=generator.scale * generator.lr_multiple,
    )


def _prepare_generator(config: D3SRConfig) -> OneStepLatentGenerator:
    generator = load_backbone(config.backbone, prompt=config.prompt, prompt_file=config.prompt_file)
    check_timestep(config.timestep, generator, config.backbone)
    generator = deepened(generator, config.deepen) if config.deepen else generator
    generator = equalize_subpixel_contrast(generator) if config.even_contrast else generator
    generator.config = replace(generator.config, timestep=config.timestep)
    for name, parameter in generator.autoencoder.named_parameters():
        parameter.requires_grad_(config.train_decoder and _belongs_to_decoder(name))
    if config.gradient_checkpointing:
        checkpoint_gradients(generator.unet, generator.autoencoder)
    return generator


def _belongs_to_decoder(name: str) -> bool:
    return any(part.startswith("decoder") or part == "post_quant_conv" for part in name.split("."))


def _generator_phase(spatial: SpatialLoss, terms: list[AdversarialTerm]) -> LossFn:
    needs_latent = any(term.network == DISCRIMINATOR for term in terms)

    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        for term in terms:
            term.begin_iteration()
        sr, z_sr, *z_hr = networks["generator"](batch["lr"], batch["hr"] if needs_latent else None)
        made = GeneratorOutput(sr=sr, z_sr=z_sr, lr=batch["lr"], hr=batch["hr"])
        if terms:
            batch |= {"sr": sr.detach(), "z_sr": z_sr.detach()} | ({"z_hr": z_hr[0]} if z_hr else {})
        return spatial(sr, batch["hr"]) | {term.name: term.generator_loss(networks, made, random) for term in terms}

    return loss


def _preview(scale: int, networks: Networks, batch: Batch) -> dict[str, Tensor]:
    return preview_columns(networks["generator"](batch["lr"])[0], batch, scale)


def _export(networks: Mapping[str, nn.Module]) -> Exported:
    return exported(cast(TrainableGenerator, networks["generator"]).generator)


register(
    MethodEntry(
        name="d3sr",
        summary="one-step generator trained with MSE, EA-DISTS and a noise-aware diffusion discriminator",
        config=D3SRConfig,
        build=build,
    )
)

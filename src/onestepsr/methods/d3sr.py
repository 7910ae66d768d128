"""D3SR, also called DFOSD: distillation-free one-step super-resolution with a diffusion discriminator (arXiv
2410.04224).

Generator: MSE + lambda_2 EA-DISTS + lambda_1 adversarial (Eq. 8 and 2). Discriminator: Eq. 3. No teacher. Every
iteration updates the generator, then the discriminator with the pair of latents that the generator's phase has made.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from onestepsr.methods.base import (
    Batch,
    LossFn,
    Method,
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
    CriticConfig,
    DiscriminatorConfig,
    GeneratorOutput,
    ImageCritic,
    Tuning,
    adversarial_phases,
    build_discriminator,
    latent_discriminator_term,
)
from onestepsr.methods.shared.image_loss import PerceptualConfig, SpatialLoss, SpatialWeights
from onestepsr.models.backbones import load_backbone
from onestepsr.models.generators import OneStepLatentGenerator, TrainableGenerator
from onestepsr.models.lora import LoraConfig, add_lora
from onestepsr.models.stable_diffusion.config import PromptConfig
from onestepsr.models.tiny.generator import Depth, deepened, equalize_subpixel_contrast


@dataclass(frozen=True, kw_only=True)
class ExtrasConfig:
    """Additions of this project, none of them in the paper and all off by default.

    They are for small backbones whose decoder is trained along: its typical artefact is a pattern locked to the latent
    grid.
    """

    deepen: Depth | None = None
    """Number of residual blocks of a tiny backbone. New ones start as the identity: training goes on from the
    backbone's own images."""
    even_contrast: bool = False
    """Equalise the contrast of detail over the positions within a latent position, on a tiny backbone and while
    training: critics see no lattice then, and the generator gains nothing by one. See
    :class:`onestepsr.models.tiny.networks.EvenContrast`."""
    train_decoder: bool = False
    """Also train the autoencoder's decoder, which the paper freezes; a small one gains from knowing the generator's
    latents."""
    lattice_weight: float = 0.0
    """Weight of the penalty on patterns locked to the latent grid, in [-1, 1]."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic of images."""

    def __post_init__(self) -> None:
        if self.lattice_weight < 0:
            raise ValueError(f"lattice_weight must not be negative, got {self.lattice_weight}")


@dataclass(frozen=True, kw_only=True)
class D3SRConfig:
    """Backbone, tuning and loss weights of the paper, which gives neither T_L nor the weights; ``extras`` are ours."""

    backbone: str
    """Pretrained latent-diffusion backbone: a name, a diffusers folder, a single-file checkpoint, or weights of ours
    from the ``diffusion`` method or an earlier generator; ``random:NAME`` needs no file and is untrained."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """Start of the learnable prompt embedding on a backbone that brings none."""
    prompt_file: Path | None = None
    """Safetensors file with a prompt embedding (L, C) to start from instead."""
    timestep: int = 399
    """T_L, the fixed step of the UNet evaluation."""
    tuning: Tuning = "lora"
    """Trained part of the generator's UNet: adapters, as in the paper, or all of its parameters."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, used with ``tuning: lora``."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: about a third slower, far less memory."""
    mse_weight: float = 1.0
    """Weight of the squared error of images in [-1, 1]."""
    perceptual_weight: float = 1.0
    """lambda_2, the weight of the perceptual distance; 0 leaves it out (Table 5)."""
    adversarial_weight: float = 0.5
    """lambda_1; 0 leaves the discriminator out altogether (Table 6)."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """The perceptual distance, EA-DISTS in the paper."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The noise-aware discriminator."""
    extras: ExtrasConfig = field(default_factory=ExtrasConfig)
    """Additions of this project, off by default."""

    def __post_init__(self) -> None:
        if min(self.mse_weight, self.perceptual_weight, self.adversarial_weight) < 0:
            raise ValueError("loss weights must not be negative")
        if not self.mse_weight + self.perceptual_weight:
            raise ValueError("mse_weight and perceptual_weight are both 0: nothing ties the output to the photo")


@register("d3sr", D3SRConfig)
def build(config: D3SRConfig) -> Method:
    """Generator phase, then the phases of its discriminator and critic."""
    generator = _prepare_generator(config)
    weights = SpatialWeights(
        mse=config.mse_weight, perceptual=config.perceptual_weight, lattice=config.extras.lattice_weight
    )
    spatial = SpatialLoss(weights, config.perceptual)
    networks: dict[str, nn.Module] = {"generator": TrainableGenerator(generator)}
    terms: list[AdversarialTerm] = []
    if config.adversarial_weight:
        networks[DISCRIMINATOR], noise = build_discriminator(
            generator, config.discriminator, name=config.backbone, checkpointing=config.gradient_checkpointing
        )
        terms.append(latent_discriminator_term(noise, config.adversarial_weight, config.discriminator.start))
    if config.extras.critic.weight:
        critic = ImageCritic(config.extras.critic)
        networks[CRITIC] = critic.network()
        terms.append(critic.term())
    if config.tuning == "lora":  # after the discriminator has copied the plain UNet
        add_lora(generator.unet, config.lora)
    return Method(
        networks=networks,
        optional=frozenset({DISCRIMINATOR, CRITIC}),
        frozen=spatial.frozen,
        phases=adversarial_phases(partial(_generator_phase, spatial), terms),
        ema=("generator",),
        preview=lambda networks, batch: preview_columns(networks["generator"](batch["lr"])[0], batch, generator.scale),
        export=lambda networks: exported(cast(TrainableGenerator, networks["generator"]).generator),
        scale=generator.scale,
        hr_multiple=generator.scale * generator.lr_multiple,
    )


def _prepare_generator(config: D3SRConfig) -> OneStepLatentGenerator:
    generator = load_backbone(config.backbone, prompt=config.prompt, prompt_file=config.prompt_file, for_training=True)
    check_timestep(config.timestep, generator, config.backbone)
    extras = config.extras
    generator = deepened(generator, extras.deepen) if extras.deepen else generator
    generator = equalize_subpixel_contrast(generator) if extras.even_contrast else generator
    generator.config = replace(generator.config, timestep=config.timestep)
    for name, parameter in generator.autoencoder.named_parameters():
        is_decoder = any(part.startswith("decoder") or part == "post_quant_conv" for part in name.split("."))
        parameter.requires_grad_(extras.train_decoder and is_decoder)
    if config.gradient_checkpointing:
        checkpoint_gradients(generator.unet, generator.autoencoder)
    return generator


def _generator_phase(spatial: SpatialLoss, terms: list[AdversarialTerm]) -> LossFn:
    needs_latent = any(term.network == DISCRIMINATOR for term in terms)

    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        for term in terms:
            term.begin_iteration()
        sr, z_sr, *z_hr = networks["generator"](batch["lr"], batch["hr"] if needs_latent else None)
        output = GeneratorOutput(sr=sr, z_sr=z_sr, lr=batch["lr"], hr=batch["hr"])
        if terms:
            batch |= {"sr": sr.detach(), "z_sr": z_sr.detach()} | ({"z_hr": z_hr[0]} if z_hr else {})
        return spatial(sr, batch["hr"]) | {term.name: term.generator_loss(networks, output, random) for term in terms}

    return loss

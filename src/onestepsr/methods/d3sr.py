"""D3SR, also called DFOSD: distillation-free one-step super-resolution with a diffusion discriminator (arXiv
2410.04224).

Generator: MSE + lambda_2 EA-DISTS + lambda_1 adversarial (Eq. 8 and 2). Discriminator: Eq. 3. No teacher. Every
iteration updates the generator, then the discriminator with the pair of latents that the generator's phase has made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.errors import UserError
from onestepsr.losses.adversarial import bce_discriminator_loss, bce_generator_loss
from onestepsr.methods.base import Batch, Exported, LossFn, Method, MethodEntry, Networks, Phase, SampleRandom, register
from onestepsr.methods.noising import LatentNoise, NoiseConfig, latent_noise
from onestepsr.methods.spatial import PerceptualConfig, SpatialLoss, SpatialWeights
from onestepsr.models.architectures import describe
from onestepsr.models.backbones import half_of, load_backbone, load_discriminator_backbone
from onestepsr.models.discriminators import DiffusionEncoder, NoiseAwareDiscriminator
from onestepsr.models.generators import OneStepLatentGenerator, TrainableGenerator
from onestepsr.models.lora import LoraConfig, add_lora, merged_state_dict
from onestepsr.models.stable_diffusion_config import PromptConfig, SDXLConditioning

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
    lattice_weight: float = 0.0
    """Weight of the penalty on patterns locked to the latent grid, in [-1, 1]; not in the paper, whose decoder does not
    make them."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """The perceptual distance, EA-DISTS in the paper."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The noise-aware discriminator."""

    def __post_init__(self) -> None:
        if min(self.mse_weight, self.perceptual_weight, self.adversarial_weight, self.lattice_weight) < 0:
            raise ValueError("loss weights must not be negative")
        if not self.mse_weight + self.perceptual_weight:
            raise ValueError("mse_weight and perceptual_weight are both 0: nothing ties the output to the photo")

    @property
    def spatial_weights(self) -> SpatialWeights:
        """The weights of the spatial loss."""
        return SpatialWeights(mse=self.mse_weight, perceptual=self.perceptual_weight, lattice=self.lattice_weight)


def build(config: D3SRConfig) -> Method:
    """Generator phase, then discriminator phase."""
    generator = _prepare_generator(config)
    spatial = SpatialLoss(config.spatial_weights, config.perceptual)
    networks: dict[str, nn.Module] = {"generator": TrainableGenerator(generator)}
    phases: tuple[Phase, ...] = (Phase(network="generator", loss=_spatial_phase(spatial)),)
    if config.adversarial_weight:
        discriminator, noise = _prepare_discriminator(generator, config)
        networks["discriminator"] = discriminator
        phases = _adversarial_phases(config, spatial, noise)
    if config.tuning == "lora":  # after the discriminator has copied the plain UNet
        add_lora(generator.unet, config.lora)
    return Method(
        networks=networks,
        frozen=spatial.frozen,
        phases=phases,
        ema=("generator",),
        preview=_preview,
        export=_export,
        scale=generator.scale,
        hr_multiple=generator.scale * generator.lr_multiple,
    )


def _prepare_generator(config: D3SRConfig) -> OneStepLatentGenerator:
    generator = load_backbone(config.backbone, prompt=config.prompt, prompt_file=config.prompt_file)
    last = generator.schedule.steps - 1
    if not 0 <= config.timestep <= last:
        raise UserError(f"config.timestep: {config.timestep}, but {config.backbone} knows steps from 0 to {last}")
    generator.timestep = config.timestep
    for name, parameter in generator.autoencoder.named_parameters():
        parameter.requires_grad_(config.train_decoder and _belongs_to_decoder(name))
    if config.gradient_checkpointing:
        _checkpoint_gradients(generator.unet, generator.autoencoder)
    return generator


def _belongs_to_decoder(name: str) -> bool:
    return any(part.startswith("decoder") or part == "post_quant_conv" for part in name.split("."))


def _checkpoint_gradients(*networks: nn.Module) -> None:
    for network in networks:
        enable = getattr(network, "enable_gradient_checkpointing", None)
        if enable is None:
            raise UserError(f"gradient_checkpointing: a {type(network).__name__} is too small to offer it")
        enable()


def _prepare_discriminator(
    generator: OneStepLatentGenerator, config: D3SRConfig
) -> tuple[NoiseAwareDiscriminator, LatentNoise]:
    """Down and middle blocks of a diffusion backbone under an MLP, and the noise on what it sees."""
    settings = config.discriminator
    encoder, prompt = _discriminator_backbone(generator, settings)
    known = cast(DiffusionEncoder, encoder)
    if known.latent_channels != generator.latent_channels:
        raise UserError(
            f"discriminator.backbone: {settings.backbone} takes latents of {known.latent_channels} channels, those of "
            f"{config.backbone} have {generator.latent_channels}"
        )
    noise = latent_noise(generator.schedule, settings, known.latent_gain)
    discriminator = NoiseAwareDiscriminator(encoder, prompt, hidden=settings.hidden)
    discriminator.add_module("noise", noise)  # so that the state of adaptive noise is saved with the discriminator
    if config.gradient_checkpointing:
        _checkpoint_gradients(encoder)
    if settings.tuning == "lora":
        add_lora(encoder, settings.lora)
    return discriminator, noise


def _discriminator_backbone(
    generator: OneStepLatentGenerator, settings: DiscriminatorConfig
) -> tuple[nn.Module, Tensor]:
    if settings.backbone is None:
        return half_of(generator), generator.prompt.detach()
    return load_discriminator_backbone(settings.backbone, sdxl=settings.sdxl)


def _adversarial_phases(config: D3SRConfig, spatial: SpatialLoss, noise: LatentNoise) -> tuple[Phase, ...]:
    """Generator on the spatial loss until the discriminator starts; from then on generator and discriminator in
    turn."""
    start = config.discriminator.start
    judged = _judged_phase(spatial, noise, config.adversarial_weight)
    phases = (
        Phase(network="generator", loss=_spatial_phase(spatial), stop=start),
        Phase(network="generator", loss=judged, start=start),
        Phase(network="discriminator", loss=_discriminator_phase(noise), start=start),
    )
    return phases if start else phases[1:]


def _spatial_phase(spatial: SpatialLoss) -> LossFn:
    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        return spatial(networks["generator"](batch["lr"])[0], batch["hr"])

    return loss


def _judged_phase(spatial: SpatialLoss, noise: LatentNoise, weight: float) -> LossFn:
    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        noise.settle()
        sr, z_sr, batch["z_hr"] = networks["generator"](batch["lr"], batch["hr"])
        batch["z_sr"] = z_sr.detach()
        logits = networks["discriminator"](*noise(z_sr, random))
        return spatial(sr, batch["hr"]) | {"adversarial": weight * bce_generator_loss(logits)}

    return loss


def _discriminator_phase(noise: LatentNoise) -> LossFn:
    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        halves = [noise(batch[name], random) for name in ("z_hr", "z_sr")]
        z_t, t = (torch.cat(pair) for pair in zip(*halves, strict=True))  # one evaluation for both
        real, fake = networks["discriminator"](z_t, t).chunk(2)
        noise.observe(real)
        return {"discriminator": bce_discriminator_loss(real, fake)}

    return loss


def _preview(networks: Networks, batch: Batch) -> dict[str, Tensor]:
    sr = networks["generator"](batch["lr"])[0]
    enlarged = F.interpolate(batch["lr"], scale_factor=4.0, mode="bicubic", align_corners=False)
    return {"LR (bicubic)": enlarged.clamp(0, 1), "SR": sr.clamp(0, 1), "HR": batch["hr"]}


def _export(networks: Mapping[str, nn.Module]) -> Exported:
    generator = cast(TrainableGenerator, networks["generator"]).generator
    architecture, described = describe(generator)
    return Exported(state_dict=merged_state_dict(generator), architecture=architecture, config=described)


register(
    MethodEntry(
        name="d3sr",
        summary="one-step generator trained with MSE, EA-DISTS and a noise-aware diffusion discriminator",
        config=D3SRConfig,
        build=build,
    )
)

"""D3SR, also called DFOSD: distillation-free one-step super-resolution with a diffusion discriminator (arXiv
2410.04224).

Generator: MSE + lambda_2 EA-DISTS + lambda_1 adversarial (Eq. 8 and 2). Discriminator: Eq. 3. No teacher. Every
iteration updates the generator, then the discriminator with the pair of latents that the generator's phase has made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.config import to_mapping
from onestepsr.errors import UserError
from onestepsr.losses.adversarial import bce_discriminator_loss, bce_generator_loss
from onestepsr.losses.lattice import lattice_loss
from onestepsr.losses.perceptual import DISTS, ea_dists
from onestepsr.methods.base import Batch, Exported, LossFn, Method, MethodEntry, Networks, Phase, register
from onestepsr.models.backbones import TinyGeneratorConfig
from onestepsr.models.discriminators import NoiseAwareDiscriminator
from onestepsr.models.features import OrientedFeatures, VGG16Features
from onestepsr.models.generators import OneStepLatentGenerator, TrainableGenerator
from onestepsr.models.lora import LoraConfig, add_lora, merge_lora
from onestepsr.models.registry import load_network
from onestepsr.models.tiny import TinyUNet
from onestepsr.schedules import DiffusionSchedule

Tuning = Literal["lora", "full"]


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The feature network behind EA-DISTS and how the distance is read."""

    features: Literal["oriented", "vgg16"] = "oriented"
    """``vgg16`` is the paper's and needs ``vgg16_weights``; ``oriented`` is a fixed filter pyramid that needs
    nothing."""
    vgg16_weights: Path | None = None
    """Safetensors file with torchvision's VGG-16 keys."""
    texture_share: float = 0.5
    """Part of the texture term in DISTS where no published channel weights exist; the rest is structure."""
    per_channel_edges: bool = False
    """Take Sobel edges per colour channel instead of on the channel mean."""
    edges: bool = True
    """Whether the edge term is there at all; without it EA-DISTS is DISTS (Table 5)."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The noise-aware discriminator."""

    tuning: Tuning = "lora"
    """``lora`` keeps the diffusion features frozen under adapters, as in the paper; ``full`` trains everything."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, used with ``tuning: lora``."""
    hidden: tuple[int, ...] = (128,)
    """Widths of the MLP between middle features and logit; the paper leaves them open."""
    t_min: int = 0
    """Smallest step to which latents are noised before they are judged."""
    t_max: int = 999
    """Largest such step; the paper draws from all of [0, T]."""
    start: int = 0
    """First iteration with a discriminator; before it the generator trains on the spatial loss alone."""


@dataclass(frozen=True, kw_only=True)
class D3SRConfig:
    """Backbone, tuning and loss weights. The paper gives neither T_L nor the weights; all of them are fields here."""

    backbone: Path
    """Weights of a pretrained latent-diffusion backbone, from the ``diffusion`` method or an earlier generator."""
    timestep: int = 399
    """T_L, the fixed step of the UNet evaluation."""
    tuning: Tuning = "lora"
    """How the generator's UNet is trained: adapters, as in the paper, or all of its parameters."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, used with ``tuning: lora``."""
    train_decoder: bool = False
    """Also train the autoencoder's decoder. The paper freezes it; a small decoder gains from knowing the generator's
    latents."""
    mse_weight: float = 1.0
    """Weight of the squared error of images in [-1, 1]."""
    ea_dists_weight: float = 1.0
    """lambda_2."""
    adversarial_weight: float = 0.5
    """lambda_1; 0 leaves the discriminator out altogether."""
    lattice_weight: float = 0.0
    """Weight of the penalty on patterns locked to the latent grid, in [-1, 1]; not in the paper, whose decoder does not
    make them."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """Feature network of EA-DISTS."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The noise-aware discriminator."""

    def __post_init__(self) -> None:
        if min(self.mse_weight, self.ea_dists_weight, self.adversarial_weight, self.lattice_weight) < 0:
            raise ValueError("loss weights must not be negative")


@dataclass(frozen=True, kw_only=True)
class SpatialLoss:
    """L_spatial = MSE + lambda_2 EA-DISTS (Eq. 8), and the lattice penalty where it is asked for."""

    mse_weight: float
    ea_dists_weight: float
    lattice_weight: float
    features: nn.Module
    dists: DISTS
    edges: bool
    per_channel_edges: bool

    def __call__(self, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Weighted terms for images (N, 3, H, W) in [0, 1]; a term of weight 0 is not computed."""
        terms = {"mse": self.mse_weight * 4 * F.mse_loss(sr, hr)}  # 4: the error is counted in [-1, 1]
        if self.ea_dists_weight:
            features = cast(Callable[[Tensor], list[Tensor]], self.features)
            if self.edges:
                distance = ea_dists(self.dists, features, sr, hr, per_channel=self.per_channel_edges)
            else:
                distance = self.dists(features, sr, hr)
            terms["ea_dists"] = self.ea_dists_weight * distance.mean()
        if self.lattice_weight:
            terms["lattice"] = self.lattice_weight * 4 * lattice_loss(sr, hr)
        return terms


def noised(
    schedule: DiffusionSchedule, z: Tensor, config: DiscriminatorConfig, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """F(z, t) with t drawn per sample from the configured range (Eq. 4), and t (N,)."""
    t = torch.randint(config.t_min, config.t_max + 1, (z.shape[0],), generator=rng).to(z.device)
    noise = torch.randn(z.shape, generator=rng).to(z)
    return schedule.add_noise(z, noise, t), t


def build(config: D3SRConfig) -> Method:
    """Generator phase, then discriminator phase."""
    generator = _prepare_generator(config)
    spatial = _build_spatial_loss(config)
    networks: dict[str, nn.Module] = {"generator": TrainableGenerator(generator)}
    if config.adversarial_weight:
        networks["discriminator"] = _prepare_discriminator(generator, config)
    frozen: dict[str, nn.Module] = {"features": spatial.features, "dists": spatial.dists}
    if config.tuning == "lora":
        add_lora(generator.unet, config.lora)
    return Method(
        networks=networks,
        frozen=frozen,
        phases=_phases(config, generator, spatial),
        ema=("generator",),
        preview=_preview,
        export=_exporter(config),
    )


def _prepare_generator(config: D3SRConfig) -> OneStepLatentGenerator:
    generator = load_network(config.backbone)
    if not isinstance(generator, OneStepLatentGenerator):
        raise UserError(f"{config.backbone}: holds a {type(generator).__name__}, expected a latent-diffusion backbone")
    generator.timestep = config.timestep
    generator.autoencoder.requires_grad_(False)
    if config.train_decoder:
        for name, parameter in generator.autoencoder.named_parameters():
            parameter.requires_grad_(name.startswith("decoder"))
    return generator


def _prepare_discriminator(generator: OneStepLatentGenerator, config: D3SRConfig) -> NoiseAwareDiscriminator:
    """Down and middle blocks start from the same diffusion prior as the generator."""
    unet = cast(TinyUNet, generator.unet)
    encoder = copy.deepcopy(unet.encoder)
    settings = config.discriminator
    discriminator = NoiseAwareDiscriminator(
        encoder, generator.prompt, features=unet.config.widths[-1], hidden=settings.hidden
    )
    if settings.tuning == "lora":
        add_lora(encoder, settings.lora)
    return discriminator


def _build_spatial_loss(config: D3SRConfig) -> SpatialLoss:
    settings = config.perceptual
    features: OrientedFeatures | VGG16Features
    if settings.features == "vgg16":
        if settings.vgg16_weights is None:
            raise UserError("perceptual.features 'vgg16' needs perceptual.vgg16_weights, a safetensors file")
        features = VGG16Features.from_file(settings.vgg16_weights)
    else:
        features = OrientedFeatures()
    features.requires_grad_(False)
    return SpatialLoss(
        mse_weight=config.mse_weight,
        ea_dists_weight=config.ea_dists_weight,
        lattice_weight=config.lattice_weight,
        features=features,
        dists=DISTS(features.channels, texture_share=settings.texture_share),
        edges=settings.edges,
        per_channel_edges=settings.per_channel_edges,
    )


def _phases(config: D3SRConfig, generator: OneStepLatentGenerator, spatial: SpatialLoss) -> tuple[Phase, ...]:
    """Generator on the spatial loss until the discriminator starts; from then on generator and discriminator in
    turn."""
    alone = _generator_loss(config, generator, spatial, adversarial=False)
    if not config.adversarial_weight:
        return (Phase(network="generator", loss=alone),)
    judged = _generator_loss(config, generator, spatial, adversarial=True)
    discriminator = _discriminator_loss(config, generator.schedule)
    start = config.discriminator.start
    return (
        Phase(network="generator", loss=alone, stop=start),
        Phase(network="generator", loss=judged, start=start),
        Phase(network="discriminator", loss=discriminator, start=start),
    )


def _generator_loss(
    config: D3SRConfig, generator: OneStepLatentGenerator, spatial: SpatialLoss, *, adversarial: bool
) -> LossFn:
    schedule = generator.schedule

    def loss(networks: Networks, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        sr, z_sr = networks["generator"](batch["lr"])
        terms = spatial(sr, batch["hr"])
        if adversarial:
            z_t, t = noised(schedule, z_sr, config.discriminator, rng)
            terms["adversarial"] = config.adversarial_weight * bce_generator_loss(networks["discriminator"](z_t, t))
            with torch.no_grad():
                batch["z_sr"], batch["z_hr"] = z_sr.detach(), generator.encode(batch["hr"])
        return terms

    return loss


def _discriminator_loss(config: D3SRConfig, schedule: DiffusionSchedule) -> LossFn:
    def loss(networks: Networks, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        pair = torch.cat([batch["z_hr"], batch["z_sr"]])  # one evaluation for both halves
        z_t, t = noised(schedule, pair, config.discriminator, rng)
        real, fake = networks["discriminator"](z_t, t).chunk(2)
        return {"discriminator": bce_discriminator_loss(real, fake)}

    return loss


def _preview(networks: Networks, batch: Batch) -> dict[str, Tensor]:
    sr, _ = networks["generator"](batch["lr"])
    enlarged = F.interpolate(batch["lr"], scale_factor=4.0, mode="bicubic", align_corners=False)
    return {"LR (bicubic)": enlarged.clamp(0, 1), "SR": sr.clamp(0, 1), "HR": batch["hr"]}


def _exporter(config: D3SRConfig) -> Callable[[Mapping[str, nn.Module]], Exported]:
    def export(networks: Mapping[str, nn.Module]) -> Exported:
        generator = copy.deepcopy(cast(TrainableGenerator, networks["generator"]).generator)
        if config.tuning == "lora":
            merge_lora(generator.unet)
        described = TinyGeneratorConfig(
            model=cast(TinyUNet, generator.unet).config,
            schedule=generator.schedule.config,
            timestep=generator.timestep,
            scale=generator.scale,
        )
        return Exported(
            state_dict=generator.state_dict(), architecture="tiny-latent-diffusion", config=to_mapping(described)
        )

    return export


register(
    MethodEntry(
        name="d3sr",
        summary="one-step generator trained with MSE, EA-DISTS and a noise-aware diffusion discriminator",
        config=D3SRConfig,
        build=build,
    )
)

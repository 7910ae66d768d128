"""ResShift: residual-shifting diffusion in a few steps (Yue et al., NeurIPS 2023), the teacher of SinSR and TAD-SR.

The network predicts z_0 from z_t at uniformly drawn steps (TAD-SR, Eq. 4). Versions 1 and 2 train on the squared error
of latents alone; from version 3 on a perceptual distance of the decoded image joins it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from onestepsr.core.errors import error_context
from onestepsr.diffusion.residual_shift import ResidualShiftConfig, ResidualShiftSchedule, Respacing
from onestepsr.methods.base import Batch, LossFn, Method, Networks, Phase, SampleRandom, checkpoint_gradients, register
from onestepsr.methods.shared.image_loss import PerceptualConfig, SpatialLoss, SpatialWeights
from onestepsr.methods.shared.residual_shift import (
    AUTOENCODER,
    DENOISER,
    FrozenAutoencoder,
    export_of,
    latents,
    preview_of,
    whole_schedule,
    with_sampling,
)
from onestepsr.models.loading import load_residual_generator, residual_generator_on
from onestepsr.models.resshift.config import Sampler
from onestepsr.models.resshift.generator import ResidualShiftGenerator, conditioned
from onestepsr.models.resshift.unet import SwinUNet, SwinUNetConfig
from onestepsr.models.tiny.denoiser import TinyDenoiser, TinyDenoiserConfig


@dataclass(frozen=True, kw_only=True)
class ResShiftConfig:
    """Origin of the networks, and the loss; the defaults are the loss of versions 1 and 2."""

    model: str | None = None
    """Generator to start from: a name, a file of ours, or ``random:NAME``. It brings autoencoder, sizes and
    schedule."""
    from_scratch: bool = False
    """Give the denoising network of ``model`` new random weights and keep the rest: a training of one's own on a
    published autoencoder."""
    autoencoder: str | None = None
    """Without ``model``: weights from the ``autoencoder`` method, on whose latents a new small network is trained."""
    denoiser: TinyDenoiserConfig | None = None
    """Sizes of that network; null takes the default ones for those latents."""
    schedule: ResidualShiftConfig | None = None
    """The diffusion; null is the one that ``model`` brings, or the 15 steps of versions 1 and 2."""
    steps: int | None = None
    """Steps that previews and the exported model take; null takes all that the network is trained for."""
    sampler: Sampler = "ancestral"
    """Noise of these steps: new in every step, or only at the start."""
    respacing: Respacing = "spread"
    """Choice of the steps where ``steps`` is smaller than their number."""
    mse_weight: float = 1.0
    """Weight of the squared error of the estimated z_0."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual distance of the decoded estimate, clamped to [-1, 1]: 0 in versions 1 and 2, 1 in
    version 3, 10 for faces."""
    perceptual: PerceptualConfig = field(default_factory=lambda: PerceptualConfig(distance="lpips", features="vgg16"))
    """That distance, LPIPS on VGG-16 as published."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower, far less memory."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.autoencoder is None):
            raise ValueError("give either model, a generator to start from, or autoencoder, to train a new one on")
        if self.from_scratch and self.model is None:
            raise ValueError("from_scratch: there is no model whose weights could be left out")
        if min(self.mse_weight, self.perceptual_weight) < 0 or not self.mse_weight + self.perceptual_weight:
            raise ValueError("mse_weight and perceptual_weight must not be negative, nor both be 0")


@register("resshift", ResShiftConfig)
def build(config: ResShiftConfig) -> Method:
    """One network, one phase."""
    generator = _prepare_generator(config)
    schedule = whole_schedule(generator)
    spatial = SpatialLoss(SpatialWeights(mse=0.0, perceptual=config.perceptual_weight), config.perceptual)
    with error_context("config.steps"):
        shown = with_sampling(generator, config.steps, config.sampler, respacing=config.respacing)
    return Method(
        networks={DENOISER: generator.unet},
        frozen={AUTOENCODER: FrozenAutoencoder(generator.autoencoder), **spatial.frozen},
        phases=(Phase(network=DENOISER, loss=_loss(generator, schedule, config, spatial)),),
        ema=(DENOISER,),
        preview=preview_of(shown),
        export=export_of(shown),
        scale=generator.scale,
        hr_multiple=generator.scale * generator.lr_multiple,
    )


def _load(config: ResShiftConfig) -> ResidualShiftGenerator:
    if config.model is not None:
        return load_residual_generator(config.model)
    return residual_generator_on(cast(str, config.autoencoder), config.denoiser)


def _prepare_generator(config: ResShiftConfig) -> ResidualShiftGenerator:
    generator = _load(config)
    if config.schedule is not None:
        generator.configure(replace(generator.config, schedule=config.schedule, steps=None))
    if config.from_scratch or config.model is None:  # here, so that the run's seed decides
        sizes = cast(SwinUNet | TinyDenoiser, generator.unet).config
        generator.unet = SwinUNet(sizes) if isinstance(sizes, SwinUNetConfig) else TinyDenoiser(sizes)
    if config.gradient_checkpointing:
        checkpoint_gradients(generator.unet)
    return generator


def _loss(
    generator: ResidualShiftGenerator, schedule: ResidualShiftSchedule, config: ResShiftConfig, spatial: SpatialLoss
) -> LossFn:
    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        z_0, z_y = latents(networks, generator, batch)
        t = random.integers(0, schedule.steps).to(z_0.device)
        z_t = schedule.q_sample(z_0, z_y, random.normal(z_0), t)
        estimate = conditioned(networks[DENOISER], batch["lr"])(schedule.scale_input(z_t, t), t)
        terms = {"mse": config.mse_weight * F.mse_loss(estimate, z_0)} if config.mse_weight else {}
        if config.perceptual_weight:
            sr = networks[AUTOENCODER](estimate, decode=True).clamp(0, 1)
            terms |= spatial(sr, batch["hr"])
        return terms

    return loss

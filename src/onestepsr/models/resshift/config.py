"""Generators of the residual-shifting family as configurations: on ResShift's networks, on the tiny ones, and with the
published settings by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from onestepsr.core.errors import UserError
from onestepsr.diffusion.residual_shift import ResidualShiftConfig, ResidualShiftSchedule, Respacing
from onestepsr.models.resshift.unet import SwinConfig, SwinUNetConfig
from onestepsr.models.resshift.vqgan import VQ_F8_FACE, VQConfig
from onestepsr.models.tiny.denoiser import TinyDenoiserConfig
from onestepsr.models.tiny.networks import FACTOR, TinyConfig

Sampler = Literal["ancestral", "deterministic"]
REALSR, FACE, SINSR, TINY, MICRO = "resshift-realsr", "resshift-face", "sinsr", "resshift-tiny", "resshift-micro"


@dataclass(frozen=True, kw_only=True)
class ResidualSamplingConfig:
    """The diffusion of a generator and how it is run; the defaults are ResShift v1 and v2 for photographs, x4."""

    schedule: ResidualShiftConfig = field(default_factory=ResidualShiftConfig)
    """The diffusion that the network was trained with."""
    steps: int | None = None
    """Network evaluations; null is one per step of the schedule. 1 is the inference of SinSR and TAD-SR: only the last
    step."""
    sampler: Sampler = "ancestral"
    """New noise in every step, as ResShift does, or only at the start, as its students learn it. One step is both."""
    respacing: Respacing = "spread"
    """Rule for the steps kept where ``steps`` is smaller than the schedule's number; "published" leaves out the last
    and is there for comparison only."""
    scale: int = 4
    """Upscaling factor; 1 restores without enlarging."""

    def __post_init__(self) -> None:
        if self.sampler not in get_args(Sampler):
            raise UserError(f"sampler '{self.sampler}': accepted: {', '.join(get_args(Sampler))}")
        if self.scale not in (1, 2, 4, 8):
            raise UserError(f"scale must be 1, 2, 4 or 8, got {self.scale}")
        self.sampling_schedule()

    def sampling_schedule(self) -> ResidualShiftSchedule:
        """The steps that are run. Raises UserError for a number that the schedule cannot give."""
        whole = ResidualShiftSchedule(self.schedule)
        return whole if self.steps is None else whole.respaced(self.steps, self.respacing)


@dataclass(frozen=True, kw_only=True)
class ResidualShiftGeneratorConfig(ResidualSamplingConfig):
    """Everything that fixes a generator on ResShift's networks; the defaults are the published ones for photographs."""

    unet: SwinUNetConfig = field(default_factory=SwinUNetConfig)
    """Sizes of the denoising network."""
    autoencoder: VQConfig = field(default_factory=VQConfig)
    """Sizes of the autoencoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_channels(self.unet.latent_channels, self.autoencoder.latent_channels)
        factor = 2 ** (len(self.autoencoder.multipliers) - 1)
        if self.scale << self.unet.lq_halvings != factor:
            raise ValueError(
                f"at scale {self.scale}, with latents {factor} times smaller than images, the LR image is "
                f"{factor / self.scale:g} times as large as the latent, but the UNet takes one that is "
                f"{1 << self.unet.lq_halvings} times as large"
            )
        if self.unet.lq_channels != 3:
            raise ValueError(f"the LR image has 3 channels, the UNet takes {self.unet.lq_channels}")


@dataclass(frozen=True, kw_only=True)
class TinyResidualShiftGeneratorConfig(ResidualSamplingConfig):
    """Everything that fixes a generator of this family on the tiny networks."""

    denoiser: TinyDenoiserConfig = field(default_factory=TinyDenoiserConfig)
    """Sizes of the denoising network."""
    autoencoder: TinyConfig = field(default_factory=TinyConfig)
    """Sizes of the autoencoder; those of a UNet in there have no part in this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_channels(self.denoiser.latent_channels, self.autoencoder.latent_channels)
        if self.scale != FACTOR:
            raise ValueError(f"scale must be {FACTOR}: the network takes an LR image as large as the latent")


def _check_channels(unet: int, autoencoder: int) -> None:
    if unet != autoencoder:
        raise ValueError(f"latents of the UNet have {unet} channels, those of the autoencoder {autoencoder}")


_FOUR_STEPS = ResidualShiftConfig(steps=4, min_noise=0.2)
_FACE = ResidualShiftGeneratorConfig(
    unet=SwinUNetConfig(latent_channels=8, lq_size=512), autoencoder=VQ_F8_FACE, schedule=_FOUR_STEPS, scale=1
)
_SINSR = ResidualShiftGeneratorConfig(steps=1, sampler="deterministic")

PUBLISHED: dict[str, ResidualShiftGeneratorConfig] = {
    f"{REALSR}-v1": ResidualShiftGeneratorConfig(),
    f"{REALSR}-v2": ResidualShiftGeneratorConfig(),
    f"{REALSR}-v3": ResidualShiftGeneratorConfig(schedule=_FOUR_STEPS),
    "resshift-bicubic": ResidualShiftGeneratorConfig(schedule=_FOUR_STEPS),
    FACE: _FACE,
    SINSR: _SINSR,
    "tadsr-realsr": _SINSR,
    "tadsr-face": replace(_FACE, steps=1, sampler="deterministic"),
}
"""Settings of the published checkpoints by alias; v1 and v2 differ in the length of their training only, and SinSR and
TAD-SR, which take one step, in nothing but their weights."""

RANDOM_RESIDUAL: dict[str, ResidualShiftGeneratorConfig | TinyResidualShiftGeneratorConfig] = {
    REALSR: ResidualShiftGeneratorConfig(),
    **PUBLISHED,
    TINY: TinyResidualShiftGeneratorConfig(),
    MICRO: ResidualShiftGeneratorConfig(
        unet=SwinUNetConfig(
            image_size=16,
            lq_size=16,
            model_channels=16,
            channel_mult=(1, 2),
            res_blocks=1,
            norm_groups=4,
            swin=SwinConfig(width=16, head_width=8, mlp_ratio=1),
        ),
        autoencoder=VQConfig(width=8, blocks=(1, 1, 1), codes=64, norm_groups=4),
        schedule=_FOUR_STEPS,
    ),
}
"""Settings behind ``random:NAME``; the last is the smallest network with every part of the published ones."""

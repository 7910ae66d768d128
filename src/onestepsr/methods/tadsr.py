"""TAD-SR: one step distilled from a multi-step diffusion model, with high-frequency enhanced score distillation and a
time-aware discriminator (He et al., "One Step Diffusion-based Super-Resolution with Time-Aware Distillation", 2024).

Student: distillation + lambda_1 score distillation + lambda_2 adversarial (Eq. 13). Every iteration updates the
discriminator, then the student, both from the same start z_T and with the same step and noise on the
discriminator's input (Algorithm 1).

Where the paper is silent, the defaults follow the authors' code. What looks like a slip in that code happens only with
``published_slips``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.data.datasets import TAUGHT
from onestepsr.diffusion.residual_shift import NoisePlane
from onestepsr.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss
from onestepsr.losses.distillation import distillation_loss, gradient_loss, hsd_gradient, sds_gradient
from onestepsr.methods.base import (
    Batch,
    Exported,
    LossFn,
    Method,
    Networks,
    Phase,
    SampleRandom,
    checkpoint_gradients,
    exported,
    register,
)
from onestepsr.methods.shared.residual_shift import AUTOENCODER, FrozenAutoencoder, latents
from onestepsr.methods.shared.teachers import (
    LatentDiffusionConfig,
    LatentDiffusionTeacher,
    ResidualShiftTeacher,
    SeeSRTeacher,
    SeeSRTeacherConfig,
    Teacher,
)
from onestepsr.models.discriminators import (
    HeadConfig,
    OfficialDiscriminator,
    OfficialHeadConfig,
    TimeAwareDiscriminator,
)
from onestepsr.models.lora import LoraConfig, add_lora

if TYPE_CHECKING:
    from onestepsr.prompts.embedder import EmbeddingCache, PromptEmbedder

STUDENT, TEACHER, FEATURES, DISCRIMINATOR = "student", "teacher", "features", "discriminator"
Z_Y, Z_HR, Z_T, NOISE, JUDGED_NOISE, STEP = "z_y", "z_hr", "z_T", "noise", "judged_noise", "t"
"""Entries of the batch that the discriminator's phase leaves for the student's."""


@dataclass(frozen=True, kw_only=True)
class StepRange:
    """Steps from which one is drawn evenly per sample, counted from 0 (the paper counts from 1)."""

    t_min: int = 0
    """Smallest step."""
    t_max: int | None = None
    """Largest step; null is the published one."""
    stride: int = 1
    """Distance between the steps that may be drawn; 20 in the published code for Stable Diffusion."""

    def __post_init__(self) -> None:
        if self.t_min < 0 or (self.t_max is not None and self.t_max < self.t_min):
            raise ValueError(f"need 0 <= t_min <= t_max, got {self.t_min} and {self.t_max}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(StepRange):
    """Score distillation; null as ``t_max`` leaves the first three steps of residual shifting, however many there are,
    and those before T/5 of latent diffusion."""

    kind: Literal["hsd", "sds", "none"] = "hsd"
    """``hsd`` compares the teacher's views of both results (Eq. 7-8), ``sds`` the student's result with the teacher's
    view of it (Table V)."""


@dataclass(frozen=True, kw_only=True)
class TimeAwareConfig(StepRange):
    """The discriminator of noised latents; null as ``t_max`` leaves out the last step alone, as published. The paper
    draws from all of [0, T]."""

    kind: Literal["time_aware", "plain", "none"] = "time_aware"
    """``plain`` is the same without modulation by the step (Table V)."""
    architecture: Literal["official", "paper"] = "official"
    """``official`` is that of the published code, which judges five scales behind the teacher's halvings. ``paper`` is
    our reading of the paper alone: small heads on the levels themselves, under the teacher's time embedding."""
    noise: Literal["fresh", "start"] = "fresh"
    """Noise on what is judged: drawn anew as published, or that of z_T (Algorithm 1)."""
    scales: tuple[int, ...] | None = None
    """Scales of the teacher's features that are judged, 0 being the finest; null takes all."""
    official: OfficialHeadConfig = field(default_factory=OfficialHeadConfig)
    """Heads of ``official``."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """Heads of ``paper``."""


@dataclass(frozen=True, kw_only=True)
class TADSRConfig:
    """Teacher, student and the three terms; the defaults are the published ones for photographs."""

    teacher: str
    """The multi-step model: a name, a file of ours, or ``random:NAME``; with ``family: latent_diffusion`` anything that
    a backbone loads from, with ``family: seesr`` a file converted from SeeSR's. It stays frozen, and the student starts
    as its copy."""
    family: Literal["residual_shift", "latent_diffusion", "seesr"] = "residual_shift"
    """The teacher's kind: ResShift, a plain Stable Diffusion, or SeeSR. What SeeSR makes of LR images is not made in
    training: ``data.taught_paths``."""
    latent_diffusion: LatentDiffusionConfig = field(default_factory=LatentDiffusionConfig)
    """Settings of a Stable Diffusion backbone as a teacher."""
    seesr: SeeSRTeacherConfig = field(default_factory=SeeSRTeacherConfig)
    """Settings of SeeSR as a teacher."""
    teacher_steps: int | None = None
    """Deterministic steps of the teacher; null takes all that residual shifting has, as the paper does, and 50 of
    latent diffusion. Fewer make training faster and the target worse."""
    tuning: Literal["full", "lora", "image_branch"] = "full"
    """Train all of the student's network, as the paper does, or adapters on it. With SeeSR it is ``image_branch``: the
    layers that attend to image tokens and those that read the control image, as published."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, used with ``tuning: lora``."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower, far less memory."""
    distillation_weight: float = 1.0
    """Weight of the distillation term; 0.2 in the published code for Stable Diffusion."""
    score_weight: float = 1.0
    """lambda_1: 1 for photographs, 0.1 for faces."""
    adversarial_weight: float = 0.02
    """lambda_2: 0.02 for photographs, 0.2 for faces."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Score distillation."""
    discriminator: TimeAwareConfig = field(default_factory=TimeAwareConfig)
    """The discriminator."""
    published_slips: bool = False
    """Repeat what look like slips of the published code for residual shifting: noise of score distillation and
    discriminator from U[0, 1) instead of a normal distribution, the teacher's input in score distillation scaled
    twice, and sqrt(eta) of step 0 at most 0.0316, which changes the schedule of the face teacher."""

    def __post_init__(self) -> None:
        if self.published_slips and self.family != "residual_shift":
            raise ValueError("published_slips: the published code for Stable Diffusion has none of them")
        if (self.family == "seesr") != (self.tuning == "image_branch"):
            raise ValueError("tuning: image_branch is for family seesr, which takes no other")
        if self.family == "seesr" and (self.score.kind, self.discriminator.architecture) != ("hsd", "official"):
            raise ValueError("family seesr takes score.kind hsd and discriminator.architecture official alone")
        if self.distillation_weight <= 0:
            raise ValueError(f"distillation_weight must be above 0, got {self.distillation_weight}")
        for name, kind in (("score", self.score.kind), ("adversarial", self.discriminator.kind)):
            if kind != "none" and getattr(self, f"{name}_weight") <= 0:
                part = "discriminator" if name == "adversarial" else name
                raise ValueError(f"{name}_weight must be above 0; {part}.kind: none leaves the term out")


@register("tadsr", TADSRConfig)
def build(config: TADSRConfig) -> Method:
    """Discriminator phase, then student phase."""
    teacher = load_teacher(config)
    student = _prepare_student(teacher, config)
    networks: dict[str, nn.Module] = {STUDENT: student}
    frozen: dict[str, nn.Module] = {
        AUTOENCODER: FrozenAutoencoder(teacher.generator.autoencoder),
        TEACHER: teacher.network,
        **teacher.frozen,
    }
    phases: tuple[Phase, ...] = (Phase(network=STUDENT, loss=_student_phase(teacher, config)),)
    if config.discriminator.kind != "none":
        networks[DISCRIMINATOR] = _prepare_discriminator(teacher, config.discriminator)
        frozen[FEATURES] = teacher.features
        phases = (Phase(network=DISCRIMINATOR, loss=_discriminator_phase(teacher, config)), *phases)
    generator = teacher.generator
    seesr = config.seesr if config.family == "seesr" else None
    return Method(
        networks=networks,
        optional=frozenset({DISCRIMINATOR}),
        frozen=frozen,
        phases=phases,
        ema=(STUDENT,),
        preview=_preview_of(teacher),
        export=_export_of(teacher),
        embedder=None if seesr is None else partial(_embedder, seesr.text_encoder),
        scale=generator.scale,
        hr_multiple=generator.scale * generator.lr_multiple,
    )


def load_teacher(config: TADSRConfig) -> Teacher:
    """The teacher that ``config`` names, frozen."""
    official = config.discriminator.architecture == "official"
    teacher: Teacher
    if config.family == "residual_shift":
        slips = config.published_slips
        teacher = ResidualShiftTeacher(config.teacher, config.teacher_steps, official=official, capped=slips)
    elif config.family == "seesr":
        teacher = SeeSRTeacher(config.teacher, config.seesr)
    else:
        own = config.latent_diffusion
        teacher = LatentDiffusionTeacher(config.teacher, config.teacher_steps, own, official=official)
    teacher.network.requires_grad_(False).eval()
    return teacher


def _embedder(text_encoder: str, cache: EmbeddingCache) -> PromptEmbedder:
    """Of the photos' tags, which are cut off after 75 tokens as in the published code."""
    from onestepsr.prompts.embedder import PromptEmbedder

    return PromptEmbedder(text_encoder, cache=cache, truncate=True)


def _prepare_student(teacher: Teacher, config: TADSRConfig) -> nn.Module:
    student = teacher.student()
    if config.gradient_checkpointing:
        for network in (student, teacher.network):  # the discriminator's gradient passes the teacher's features
            checkpoint_gradients(network)
    if config.tuning == "lora":
        add_lora(getattr(student, "unet", student), config.lora)
    return student


def _prepare_discriminator(teacher: Teacher, config: TimeAwareConfig) -> nn.Module:
    channels, aware = teacher.features.feature_channels, config.kind == "time_aware"
    try:
        if config.architecture == "official":
            return OfficialDiscriminator(channels, config.official, scales=config.scales, time_aware=aware)
        return TimeAwareDiscriminator(
            channels, teacher.features.time_channels, config.head, scales=config.scales, time_aware=aware
        )
    except ValueError as error:
        raise UserError(f"config.discriminator: {error}") from error


def step_range(config: StepRange, largest: int, last: int, where: str) -> range:
    """The steps that may be drawn; ``largest`` is the published last one, ``last`` that of the teacher. Raises
    UserError, naming ``where``, for steps that the teacher does not have."""
    t_max = max(largest, config.t_min) if config.t_max is None else config.t_max
    if t_max > last:
        name = "t_min" if config.t_max is None else "t_max"
        raise UserError(f"config.{where}.{name}: {t_max}, but the steps of this teacher run from 0 to {last}")
    return range(config.t_min, t_max + 1, config.stride)


def _draw(steps: range, random: SampleRandom, like: Tensor) -> Tensor:
    """One of ``steps`` per sample (N,), on the device of ``like``."""
    return (steps.start + steps.step * random.integers(0, len(steps))).to(like.device)


def _noise(config: TADSRConfig, random: SampleRandom, like: Tensor) -> Tensor:
    return random.uniform_noise(like) if config.published_slips else random.normal(like)


def _begin(teacher: Teacher, networks: Networks, batch: Batch, random: SampleRandom) -> None:
    """Latents, conditions and start of the iteration, left in the batch."""
    batch[Z_HR], batch[Z_Y] = latents(networks, teacher.generator, batch)
    batch[NOISE] = random.normal(batch[Z_Y])
    batch[Z_T] = teacher.start(batch[Z_HR if teacher.starts_from_hr else Z_Y], batch[NOISE])
    teacher.look(networks, batch, random)


def _one_step(teacher: Teacher, networks: Networks, batch: Batch) -> Tensor:
    """z_0 of the student: f(z_T, T, y)."""
    z_T = batch[Z_T]
    t = torch.full((len(z_T),), teacher.steps - 1, device=z_T.device)
    return teacher.estimate(networks[STUDENT], z_T, t, teacher.sees(batch, judging=False))


def _twice(y: Any) -> Any:
    """A condition, a tensor or a tuple of them, for the samples one time after the other."""
    return torch.cat([y, y]) if isinstance(y, Tensor) else type(y)(*map(_twice, y))


def _discriminator_phase(teacher: Teacher, config: TADSRConfig) -> LossFn:
    """Eq. 12 on the real latent and the student's, both noised to one step with the same noise."""
    settings = config.discriminator
    steps = step_range(settings, teacher.steps - 2, teacher.steps - 1, "discriminator")

    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        _begin(teacher, networks, batch, random)
        batch[JUDGED_NOISE] = batch[NOISE] if settings.noise == "start" else _noise(config, random, batch[Z_Y])
        batch[STEP] = _draw(steps, random, batch[Z_Y])
        with torch.no_grad():
            z_0 = torch.cat([batch[Z_HR], _one_step(teacher, networks, batch)])  # one evaluation for both
            z_y, noise, t = (torch.cat([batch[name]] * 2) for name in (Z_Y, JUDGED_NOISE, STEP))
            y = _twice(teacher.sees(batch, judging=True))
            seen = teacher.evaluate(networks[FEATURES], teacher.noised(z_0, z_y, noise, t), t, y)
        judge = networks[DISCRIMINATOR]
        if settings.architecture == "official":  # as published, one power iteration of its norms for each half
            halves = zip(*(part.chunk(2) for part in seen), strict=True)
            real, fake = (judge(*half) for half in halves)
        else:
            real, fake = zip(*(scale.chunk(2) for scale in judge(*seen)), strict=True)
        return {"hinge": hinge_discriminator_loss(real, fake)}

    return loss


def _student_phase(teacher: Teacher, config: TADSRConfig) -> LossFn:
    """The terms of Eq. 13, each as far as the configuration has it."""
    score = _score_term(teacher, config)

    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        if config.discriminator.kind == "none":
            _begin(teacher, networks, batch, random)
        z_student = _one_step(teacher, networks, batch)
        with torch.no_grad():
            if TAUGHT in batch:  # what the teacher made beforehand
                z_teacher = networks[AUTOENCODER](batch[TAUGHT])
            else:
                y = teacher.sees(batch, judging=False)
                z_teacher = teacher.sample(networks[TEACHER], batch[Z_T], batch[Z_Y], y)
        terms = {"distillation": config.distillation_weight * distillation_loss(z_student, z_teacher)}
        if score is not None:
            terms[config.score.kind] = config.score_weight * score(networks, batch, random, z_student, z_teacher)
        if config.discriminator.kind != "none":
            terms["adversarial"] = config.adversarial_weight * _adversarial_term(teacher, networks, batch, z_student)
        return terms

    return loss


ScoreTerm = Callable[[Networks, Batch, SampleRandom, Tensor, Tensor], Tensor]


def _score_term(teacher: Teacher, config: TADSRConfig) -> ScoreTerm | None:
    """Score distillation at a small step t', with noise of its own (Eq. 7-8)."""
    if config.score.kind == "none":
        return None
    steps = step_range(config.score, teacher.largest_score_step, teacher.steps - 1, "score")

    def term(networks: Networks, batch: Batch, random: SampleRandom, z_student: Tensor, z_teacher: Tensor) -> Tensor:
        t, noise = _draw(steps, random, z_student), _noise(config, random, z_student)
        weight = teacher.score_weight(t)

        def noised(z_0: Tensor) -> Tensor:
            z_t = teacher.noised(z_0, batch[Z_Y], noise, t)
            # the published code scales it by hand, and once more where it evaluates the network
            return teacher.scale_input(z_t, t) if config.published_slips else z_t

        def estimate(z_t: Tensor) -> Tensor:
            return teacher.estimate(networks[TEACHER], z_t, t, teacher.sees(batch, judging=True))

        if config.score.kind == "hsd":
            return gradient_loss(z_student, hsd_gradient(z_student, z_teacher, noised, estimate, weight))
        return gradient_loss(z_student, sds_gradient(z_student, noised, estimate, weight))

    return term


def _adversarial_term(teacher: Teacher, networks: Networks, batch: Batch, z_student: Tensor) -> Tensor:
    """Eq. 11, at the step and with the noise of the discriminator's phase."""
    z_t = teacher.noised(z_student, batch[Z_Y], batch[JUDGED_NOISE], batch[STEP])
    seen = teacher.evaluate(networks[FEATURES], z_t, batch[STEP], teacher.sees(batch, judging=True))
    return hinge_generator_loss(networks[DISCRIMINATOR](*seen))


def _preview_of(teacher: Teacher) -> Callable[[Networks, Batch], dict[str, Tensor]]:
    """LR | SR | teacher, where it is at hand | HR, from the noised LR latent and the same noise each time."""

    def preview(networks: Networks, batch: Batch) -> dict[str, Tensor]:
        batch, decode = dict(batch), networks[AUTOENCODER]
        enlarged = teacher.generator.enlarge(batch["lr"])
        z_y = networks[AUTOENCODER](enlarged)
        batch[Z_T] = teacher.start(z_y, NoisePlane(0)(0, z_y))
        teacher.look(networks, batch, SampleRandom("preview", samples=range(len(z_y))))
        columns = {"LR (bicubic)": enlarged, "SR": decode(_one_step(teacher, networks, batch), decode=True)}
        if TAUGHT in batch:
            columns["teacher"] = batch[TAUGHT]
        elif not isinstance(teacher, SeeSRTeacher):
            taught = teacher.sample(networks[TEACHER], batch[Z_T], z_y, teacher.sees(batch, judging=False))
            columns["teacher"] = decode(taught, decode=True)
        columns["HR"] = batch["hr"]
        return {title: image.clamp(0, 1) for title, image in columns.items()}

    return preview


def _export_of(teacher: Teacher) -> Callable[[Mapping[str, nn.Module]], Exported]:
    """The one-step generator around the student, its adapters merged."""

    def export(networks: Mapping[str, nn.Module]) -> Exported:
        return exported(teacher.student_generator(networks[STUDENT]))

    return export

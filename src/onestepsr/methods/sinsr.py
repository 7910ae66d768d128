"""SinSR: a one-step student of ResShift (Wang et al., CVPR 2024), distilled from its deterministic sampling.

The student starts as a copy of the teacher. Three terms, in :mod:`onestepsr.losses.distillation`: it repeats what all
steps of the teacher give, finds the way back, and goes from there to the real image.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onestepsr.core.errors import error_context
from onestepsr.diffusion.residual_shift import ResidualShiftSchedule
from onestepsr.losses.distillation import Student, distillation_loss, ground_truth_loss, inverse_loss
from onestepsr.methods.base import Batch, LossFn, Method, Networks, Phase, SampleRandom, checkpoint_gradients, register
from onestepsr.methods.shared.residual_shift import (
    AUTOENCODER,
    DENOISER,
    FrozenAutoencoder,
    check_same_latents,
    export_of,
    latents,
    preview_of,
    whole_schedule,
    with_sampling,
)
from onestepsr.models.loading import load_residual_generator
from onestepsr.models.resshift.generator import ResidualShiftGenerator, conditioned

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class SinSRConfig:
    """Teacher, student and the weights of the three terms, which are equal in the published configuration."""

    teacher: str
    """A ResShift model: a name, a file of ours, or ``random:NAME``. It stays frozen; autoencoder and schedule are its
    own."""
    student: str | None = None
    """Generator whose network the student starts as; null copies the teacher, as published."""
    teacher_steps: int | None = None
    """Deterministic steps of the teacher, always with the last; null takes all of its schedule, as published. Fewer
    make training faster and the target worse."""
    distillation_weight: float = 1.0
    """Weight of the student's error against the teacher's result."""
    inverse_weight: float = 1.0
    """Weight of the error of the way back from that result to the noise it came from."""
    ground_truth_weight: float = 1.0
    """Weight of the error against the real latent, from the start that the student assigns to it."""
    published_slips: bool = False
    """Begin the schedule at a sqrt(eta) of at most sqrt(0.001), as SinSR's code does: with the faces' 4 steps 0.0316
    instead of the 0.1 that the teacher was trained with. Without effect on the 15 steps, and on inference."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower, far less memory."""

    def __post_init__(self) -> None:
        if min(self.distillation_weight, self.inverse_weight, self.ground_truth_weight) < 0:
            raise ValueError("loss weights must not be negative")
        if not self.distillation_weight + self.ground_truth_weight:
            raise ValueError("distillation_weight and ground_truth_weight are both 0: nothing makes images")


@register("sinsr", SinSRConfig)
def build(config: SinSRConfig) -> Method:
    """One trained network, the student; its teacher and the autoencoder are frozen."""
    teacher = load_residual_generator(config.teacher)
    student = with_sampling(teacher, 1, "deterministic", unet=_student_of(teacher, config))
    if config.gradient_checkpointing:
        checkpoint_gradients(student.unet)
    return Method(
        networks={DENOISER: student.unet},
        frozen={
            AUTOENCODER: FrozenAutoencoder(teacher.autoencoder),
            TEACHER: teacher.unet.requires_grad_(False).eval(),
        },
        phases=(Phase(network=DENOISER, loss=_loss(teacher, config)),),
        ema=(DENOISER,),
        preview=preview_of(student),
        export=export_of(student),
        scale=teacher.scale,
        hr_multiple=teacher.scale * teacher.lr_multiple,
    )


def _student_of(teacher: ResidualShiftGenerator, config: SinSRConfig) -> nn.Module:
    """The student's network."""
    if config.student is None:
        return copy.deepcopy(teacher.unet)
    loaded = load_residual_generator(config.student)
    check_same_latents(teacher, loaded, (config.teacher, config.student))
    return loaded.unet


def _loss(generator: ResidualShiftGenerator, config: SinSRConfig) -> LossFn:
    schedule = whole_schedule(generator, capped=config.published_slips)
    with error_context("config.teacher_steps"):
        teaching = schedule if config.teacher_steps is None else schedule.respaced(config.teacher_steps)

    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        z_0, z_y = latents(networks, generator, batch)
        z_T = schedule.prior(z_y, random.normal(z_y))
        with torch.no_grad():
            teacher = conditioned(networks[TEACHER], batch["lr"])
            target = teaching.sample_deterministic(teacher, z_y, z_T)
        student = student_at_last_scale(networks, batch["lr"], schedule)
        return terms(student, config, z_T=z_T, target=target, z_0=z_0, last_step=schedule.steps - 1)

    return loss


def terms(
    student: Student, config: SinSRConfig, *, z_T: Tensor, target: Tensor, z_0: Tensor, last_step: int
) -> dict[str, Tensor]:
    """The weighted terms, of which those of weight 0 are not computed.

    ``z_T`` is the start, ``target`` where it led the teacher, ``z_0`` the real latent, all (N, C, h, w).
    """
    found: dict[str, Tensor] = {}
    if config.distillation_weight:
        estimate = student(z_T, last_step)
        found["distillation"] = config.distillation_weight * distillation_loss(estimate, target)
    if config.inverse_weight:
        found["inverse"] = config.inverse_weight * inverse_loss(student, target, z_T)
    if config.ground_truth_weight:
        found["ground_truth"] = config.ground_truth_weight * ground_truth_loss(student, z_0, last_step)
    return found


def student_at_last_scale(networks: Networks, lr: Tensor, schedule: ResidualShiftSchedule) -> Student:
    """The student under the LR image (N, 3, h, w) in [0, 1]; its input always has the scale of the last step."""
    predict = conditioned(networks[DENOISER], lr)
    last_step = schedule.steps - 1

    def student(z: Tensor, step: int) -> Tensor:
        steps = torch.full((len(z),), step, device=z.device)
        return predict(schedule.scale_input(z, last_step), steps)

    return student

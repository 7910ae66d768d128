"""Distillation losses of one-step students: score distillation (TAD-SR, OSEDiff) and the terms of SinSR.

Score distillation is a gradient on the student's output rather than a loss: the derivative of the teacher's network is
left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onestepsr.diffusion.residual_shift import ResidualShiftSchedule
from onestepsr.diffusion.schedule import DiffusionSchedule, expand_as

# ---- TAD-SR: high-frequency enhanced score distillation, and plain score distillation sampling -----------------------
# Written for networks that estimate z_0; ``weight`` turns a difference of such estimates into one of predicted noises.

Map = Callable[[Tensor], Tensor]
"""Latents (N, C, h, w) to latents of the same shape."""


def residual_shift_weight(schedule: ResidualShiftSchedule, t: Tensor) -> Tensor:
    """(1 - eta_t) / (kappa sqrt(eta_t)), (N,), float32: omega_2 over omega (TAD-SR, Eq. 8 and 15-16).

    It follows from solving Eq. 1 for the noise. The paper's Eq. 14 has kappa under the root, its process does not.
    """
    table = (1.0 - schedule.eta) / (schedule.config.kappa * schedule.sqrt_eta)
    return table.float().to(t.device)[t.long()]


def diffusion_weight(schedule: DiffusionSchedule, t: Tensor) -> Tensor:
    """sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t), (N,), float32: the same for the process of Stable Diffusion."""
    table = (schedule.alpha_bar / (1.0 - schedule.alpha_bar)).sqrt()
    return table.to(t.device)[t.long()]


def hsd_gradient(z_student: Tensor, z_teacher: Tensor, noised: Map, estimate: Map, weight: Tensor) -> Tensor:
    """omega_2 (z_student - z_teacher + F(z_t' of the teacher) - F(z_t' of the student)), shaped like ``z_student`` (N,
    C, h, w) (TAD-SR, Eq. 7-8).

    ``z_student`` and ``z_teacher`` are both estimates of z_0 from the same start. ``noised`` takes a latent to a small
    step t' per sample, with the same noise in every call; ``estimate`` is the teacher's estimate of z_0 at that step;
    ``weight`` (N,) is omega_2 / omega, and omega = 1 / (C h w). Exactly zero where the student equals the teacher.
    """
    with torch.no_grad():
        disagreement = z_student - z_teacher + (estimate(noised(z_teacher)) - estimate(noised(z_student)))
        return _weighted(disagreement, weight)


def sds_gradient(z_student: Tensor, noised: Map, estimate: Map, weight: Tensor) -> Tensor:
    """omega_2 (z_student - F(z_t' of the student)), shaped like ``z_student`` (N, C, h, w): score distillation sampling
    (Poole et al., "DreamFusion", 2022) with the same arguments and weights as :func:`hsd_gradient`.

    It is not zero where the student equals the teacher: errors of the teacher's network about its own results stay in
    it.
    """
    with torch.no_grad():
        return _weighted(z_student - estimate(noised(z_student)), weight)


def gradient_loss(z: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose derivative by ``z`` (N, C, h, w) is ``gradient`` / N, to the last bit.

    Its value, the product of both as in the published code, is only there to be logged: it has no lower bound, and 0
    where the gradient vanishes.
    """
    return (z * (gradient.detach() / z.shape[0])).sum()


def _weighted(disagreement: Tensor, weight: Tensor) -> Tensor:
    return expand_as(weight, disagreement) * disagreement / disagreement[0].numel()


# ---- SinSR: consistency-preserving distillation ----------------------------------------------------------------------

Student = Callable[[Tensor, int], Tensor]
"""The trained network under its condition: a latent (N, C, h, w) and a step to a latent.

For every step, the latent is divided by the scale of the last one before the network sees it: with the scale of
step 0 a clean latent would enter with the variance of a clean latent, which is not what the published network learnt.
"""


def distillation_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """|f(z_T, T) - F(z_T)|^2: one step of the student against all steps of the teacher from the same start (TAD-SR, Eq.
    6); the gradient reaches ``estimate`` alone."""
    return F.mse_loss(estimate, target.detach())


def inverse_loss(student: Student, z_0: Tensor, z_T: Tensor) -> Tensor:
    """|f(F(z_T), 0) - z_T|^2: at step 0, the student maps the teacher's result ``z_0`` back to its start
    ``z_T``. The gradient reaches the student alone."""
    return F.mse_loss(student(z_0.detach(), 0), z_T.detach())


def ground_truth_loss(student: Student, z_0: Tensor, last_step: int) -> Tensor:
    """|f(f(z_0, 0), T) - z_0|^2: from the start that the student assigns to the real latent ``z_0``, one step leads to
    it. That start is a constant: the gradient passes the outer evaluation only."""
    with torch.no_grad():
        start = student(z_0, 0)
    return F.mse_loss(student(start, last_step), z_0.detach())


# ---- OSEDiff: variational score distillation -------------------------------------------------------------------------


def guided(eps_negative: Tensor, eps_positive: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: the prediction (N, C, h, w) moved away from that of the negative prompt.

    ``scale`` 1 is the positive prediction itself; OSEDiff's teacher uses 7.5.
    """
    return eps_negative + scale * (eps_positive - eps_negative)


def variational_gradient(z: Tensor, x0_teacher: Tensor, x0_regularizer: Tensor) -> Tensor:
    """(x0_regularizer - x0_teacher) / mean|z - x0_teacher|, shaped like ``z`` (N, C, h, w); the mean is per sample.

    Both estimates of the undamaged latent come from the same noised ``z``. The weight makes the step independent of
    how much noise there was; there is no factor of the noise level (read from the published code).
    """
    weight = (z - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (x0_regularizer - x0_teacher) / weight


def variational_loss(z: Tensor, gradient: Tensor) -> Tensor:
    """A scalar, mean((z - (z - gradient))^2) with the bracket held fixed, whose derivative by ``z`` is 2 gradient /
    numel.

    Its value, the mean square of the gradient, measures how far regulariser and teacher disagree; it does not reach 0.
    """
    return F.mse_loss(z, (z - gradient).detach())


def noise_prediction_loss(eps: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted noise: what the regulariser is trained with, every step weighted alike."""
    return F.mse_loss(eps, noise)

"""Score distillation of a one-step student from a frozen diffusion model: TAD-SR's high-frequency enhanced one, and
plain score distillation sampling, to which its paper compares it.

Both are gradients on the student's output rather than losses: the derivative of the teacher's network is left out.
Written for networks that estimate z_0; ``weight`` turns a difference of such estimates into one of predicted noises.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onestepsr.residual_schedule import ResidualShiftSchedule
from onestepsr.schedules import DiffusionSchedule, expand_as

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

    It is not zero where the student equals the teacher: what the teacher's network gets wrong about its own results
    stays in it.
    """
    with torch.no_grad():
        return _weighted(z_student - estimate(noised(z_student)), weight)


def gradient_loss(z: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose derivative by ``z`` (N, C, h, w) is ``gradient`` / N, to the last bit.

    Its value, half the sum of the squared gradient times C h w, is only there to be watched: for the gradients above it
    is half the mean square of the weighted disagreement.
    """
    samples = z.shape[0]
    product = (z * (gradient.detach() / samples)).sum()
    value = 0.5 * gradient.detach().square().sum() * gradient[0].numel() / samples
    return value + (product - product.detach())


def _weighted(disagreement: Tensor, weight: Tensor) -> Tensor:
    return expand_as(weight, disagreement) * disagreement / disagreement[0].numel()

"""What makes one step of a residual-shifting network equal many: the terms of SinSR, in the form of the published code.

(Wang et al., "SinSR: Diffusion-Based Image Super-Resolution in a Single Step", CVPR 2024.)

All are mean squared errors of latents (N, C, h, w). Symbols are those of :mod:`onestepsr.residual_schedule`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Student = Callable[[Tensor, int], Tensor]
"""The trained network under its condition: a latent (N, C, h, w) and the step it is told, to a latent.

Whatever that step is, the latent is divided by the scale of the last one before the network sees it: with the scale of
step 0 a clean latent would enter with the variance of a clean latent, which is not what the published network learnt.
"""


def distillation_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """|f(z_T, T) - F(z_T)|^2: one step of the student against all steps of the teacher from the same start (TAD-SR, Eq.
    6); the gradient reaches ``estimate`` alone."""
    return F.mse_loss(estimate, target.detach())


def inverse_loss(student: Student, z_0: Tensor, z_T: Tensor) -> Tensor:
    """|f(F(z_T), 0) - z_T|^2: the student, told step 0, finds back from the teacher's result ``z_0`` to the start
    ``z_T`` that led there. The gradient reaches the student alone."""
    return F.mse_loss(student(z_0.detach(), 0), z_T.detach())


def ground_truth_loss(student: Student, z_0: Tensor, last_step: int) -> Tensor:
    """|f(f(z_0, 0), T) - z_0|^2: from the start that the student assigns to the real latent ``z_0``, one step leads to
    it. That start is a constant: the gradient passes the outer evaluation only."""
    with torch.no_grad():
        start = student(z_0, 0)
    return F.mse_loss(student(start, last_step), z_0.detach())

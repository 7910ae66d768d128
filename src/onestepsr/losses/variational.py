"""Variational score distillation as OSEDiff uses it (Wu et al., "One-Step Effective Diffusion Network for Real-World
Image Super-Resolution", 2024): the generator is pulled from where its own distribution is denser to where photos are.

Two diffusion networks judge a noised latent of the generator: the teacher knows photos, the regulariser follows what
the generator makes. All functions take tensors; which networks made them is the method's business.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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

    Its value, the mean square of the gradient, says how far regulariser and teacher disagree; it is no distance that
    reaches 0.
    """
    return F.mse_loss(z, (z - gradient).detach())


def noise_prediction_loss(eps: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted noise: what the regulariser is trained with, every step weighted alike."""
    return F.mse_loss(eps, noise)

"""Adversarial losses. All take logits, so that nothing overflows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def bce_generator_loss(fake_logits: Tensor) -> Tensor:
    """-E log D(fake), averaged over regions (D3SR, Eq. 2): softplus(-logit)."""
    return F.softplus(-fake_logits).mean()


def bce_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E log(1 - D(fake)) - E log D(real), averaged over regions (D3SR, Eq. 3)."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def hinge_generator_loss(fake_logits: Sequence[Tensor]) -> Tensor:
    """-E D_k(fake), averaged over scales k and over the regions of each (TAD-SR, Eq. 11).

    ``fake_logits`` are maps (N, 1, h_k, w_k) of any sizes, one for each scale.
    """
    return torch.stack([-logits.mean() for logits in fake_logits]).mean()


def hinge_discriminator_loss(real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Tensor:
    """E max(0, 1 + D_k(fake)) + E max(0, 1 - D_k(real)), averaged over scales k and over regions (TAD-SR, Eq. 12)."""
    pairs = zip(real_logits, fake_logits, strict=True)
    return torch.stack([F.relu(1 + fake).mean() + F.relu(1 - real).mean() for real, fake in pairs]).mean()

"""Adversarial losses. All take logits, so that nothing overflows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bce_generator_loss(fake_logits: Tensor) -> Tensor:
    """-E log D(fake), averaged over regions (D3SR, Eq. 2): softplus(-logit)."""
    return F.softplus(-fake_logits).mean()


def bce_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E log(1 - D(fake)) - E log D(real), averaged over regions (D3SR, Eq. 3)."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()

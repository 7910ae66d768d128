"""Eq. 2 and 3 of D3SR on logits."""

import pytest
import torch

from onestepsr.losses.adversarial import bce_discriminator_loss, bce_generator_loss


def test_losses_equal_the_papers_logarithms():
    real, fake = torch.tensor([[0.3, -1.2]], dtype=torch.float64), torch.tensor([[0.8, 2.0]], dtype=torch.float64)
    expected = -(1 - fake.sigmoid()).log().mean() - real.sigmoid().log().mean()
    assert bce_discriminator_loss(real, fake).item() == pytest.approx(expected.item())
    assert bce_generator_loss(fake).item() == pytest.approx(-fake.sigmoid().log().mean().item())


def test_extreme_logits_stay_finite_and_keep_their_gradient():
    logits = torch.tensor([-1e4, 1e4], requires_grad=True)
    bce_generator_loss(logits).backward()
    assert torch.allclose(logits.grad, torch.tensor([-0.5, 0.0]))

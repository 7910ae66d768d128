"""Eq. 2 and 3 of D3SR and Eq. 11 and 12 of TAD-SR on logits."""

import pytest
import torch

from onestepsr.losses.adversarial import (
    bce_discriminator_loss,
    bce_generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
)

pytestmark = pytest.mark.numeric


def test_losses_equal_the_papers_logarithms():
    real, fake = torch.tensor([[0.3, -1.2]], dtype=torch.float64), torch.tensor([[0.8, 2.0]], dtype=torch.float64)
    expected = -(1 - fake.sigmoid()).log().mean() - real.sigmoid().log().mean()
    assert bce_discriminator_loss(real, fake).item() == pytest.approx(expected.item())
    assert bce_generator_loss(fake).item() == pytest.approx(-fake.sigmoid().log().mean().item())


def test_discriminators_gradient_reaches_both_sides():
    """By hand: sigmoid(fake) / n on fake logits, -sigmoid(-real) / n on real ones."""
    real, fake = torch.tensor([0.3, -1.2], requires_grad=True), torch.tensor([0.8, 2.0], requires_grad=True)
    bce_discriminator_loss(real, fake).backward()
    assert torch.allclose(fake.grad, fake.detach().sigmoid() / 2)
    assert torch.allclose(real.grad, -(-real.detach()).sigmoid() / 2)


def test_extreme_logits_stay_finite_and_keep_their_gradient():
    logits = torch.tensor([-1e4, 1e4], requires_grad=True)
    bce_generator_loss(logits).backward()
    assert torch.allclose(logits.grad, torch.tensor([-0.5, 0.0]))


def test_hinge_losses_equal_the_papers_formulas():
    real = [torch.tensor([[0.5, 2.0]]), torch.tensor([[-1.0]])]
    fake = [torch.tensor([[-3.0, 0.5]]), torch.tensor([[-0.5]])]
    # by hand, Eq. 12: scale 0 (0 + 1.5) / 2 + (0.5 + 0) / 2 = 1; scale 1 0.5 + 2 = 2.5; their mean
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(1.75)
    # Eq. 11: -((-3 + 0.5) / 2 - 0.5) / 2
    assert hinge_generator_loss(fake).item() == pytest.approx(0.875)


def test_hinge_leaves_what_is_told_apart_alone():
    real, fake = (torch.tensor([value], requires_grad=True) for value in (1.5, -1.5))
    hinge_discriminator_loss([real], [fake]).backward()
    assert real.grad.item() == fake.grad.item() == 0
    hinge_generator_loss([fake]).backward()
    assert fake.grad.item() == -1, "the generator's push never fades"


def test_hinge_counts_every_scale_alike_whatever_its_size():
    small, large = torch.ones(2, 1, 1, 1), -torch.ones(2, 1, 8, 8)
    assert hinge_generator_loss([small, large]).item() == 0
    with pytest.raises(ValueError, match="shorter"):
        hinge_discriminator_loss([small, large], [small])

"""Variational score distillation against the published code's numbers, and its own properties."""

from pathlib import Path

import numpy as np
import pytest
import torch

from onestepsr.diffusion.schedule import DiffusionSchedule
from onestepsr.losses.distillation import guided, noise_prediction_loss, variational_gradient, variational_loss

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parents[1] / "golden" / "osediff_variational.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDEN).items()}


def test_loss_and_gradient_equal_the_published_code(golden: dict[str, torch.Tensor]) -> None:
    schedule, t = DiffusionSchedule(), golden["t"]
    z = golden["latent"].clone().requires_grad_(True)
    with torch.no_grad():
        z_t = schedule.add_noise(z, golden["noise"], t)
        teacher = schedule.x0_from_eps(z_t, guided(golden["eps_neg"], golden["eps_pos"], 7.5), t)
        regularizer = schedule.x0_from_eps(z_t, golden["eps_update"], t)
        gradient = variational_gradient(z, teacher, regularizer)
    loss = variational_loss(z, gradient)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.grad, golden["grad"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(z.grad, 2 * gradient / z.numel(), rtol=1e-4, atol=1e-9)


def test_regularizers_loss_equals_the_published_code(golden: dict[str, torch.Tensor]) -> None:
    loss = noise_prediction_loss(golden["eps_update"], golden["noise"])
    torch.testing.assert_close(loss, golden["diff_loss"], rtol=1e-5, atol=1e-5)


def test_regularizers_gradient_is_that_of_the_squared_error(golden: dict[str, torch.Tensor]) -> None:
    eps = golden["eps_update"].clone().requires_grad_(True)
    noise_prediction_loss(eps, golden["noise"]).backward()
    torch.testing.assert_close(eps.grad, 2 * (golden["eps_update"] - golden["noise"]) / eps.numel())


def test_each_sample_has_a_weight_of_its_own() -> None:
    rng = torch.Generator().manual_seed(0)
    z, teacher, regularizer = (torch.randn(2, 3, 4, 4, generator=rng) for _ in range(3))
    both = variational_gradient(z, teacher, regularizer)
    alone = torch.cat([variational_gradient(z[k : k + 1], teacher[k : k + 1], regularizer[k : k + 1]) for k in (0, 1)])
    torch.testing.assert_close(both, alone)
    # Ten times the disagreement at ten times the distance is the same step.
    torch.testing.assert_close(variational_gradient(10 * z, 10 * teacher, 10 * regularizer), both)


def test_where_both_networks_agree_nothing_moves() -> None:
    z = torch.ones(1, 2, 3, 3, requires_grad=True)
    estimate = torch.zeros(1, 2, 3, 3)
    variational_loss(z, variational_gradient(z.detach(), estimate, estimate)).backward()
    assert z.grad is not None
    assert not z.grad.any()


def test_a_step_against_the_gradient_goes_from_the_regularizer_towards_the_teacher() -> None:
    z = torch.zeros(1, 1, 2, 2, requires_grad=True)
    teacher, regularizer = torch.ones(1, 1, 2, 2), -torch.ones(1, 1, 2, 2)
    variational_loss(z, variational_gradient(z.detach(), teacher, regularizer)).backward()
    assert z.grad is not None
    assert (z.grad < 0).all(), "gradient descent adds what the teacher wants"


def test_guidance_of_one_is_the_positive_prediction() -> None:
    negative, positive = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert float(guided(negative, positive, 1.0)) == 1.0
    assert float(guided(negative, positive, 7.5)) == 7.5

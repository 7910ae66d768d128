"""SinSR's terms: closed formulas on a network that can be worked out by hand, and where their gradients go."""

import pytest
import torch
from torch import Tensor

from onestepsr.losses.distillation import distillation_loss, ground_truth_loss, inverse_loss

pytestmark = pytest.mark.numeric

LAST = 14


class Line(torch.nn.Module):
    """gain z + step-dependent offset: one number each for step 0 and the last."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.offset = torch.nn.Parameter(torch.tensor([0.2, -0.3], dtype=torch.float64))
        self.told: list[int] = []

    def forward(self, z: Tensor, step: int) -> Tensor:
        self.told.append(step)
        return self.gain * z + self.offset[int(step > 0)]


def latent(seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, 4, generator=rng, dtype=torch.float64).requires_grad_()


def test_distillation_is_the_mean_squared_error_and_leaves_the_teacher_alone():
    estimate, target = latent(0), latent(1)
    loss = distillation_loss(estimate, target)
    assert loss.item() == pytest.approx((estimate - target).square().mean().item())
    loss.backward()
    assert torch.allclose(estimate.grad, 2 * (estimate - target) / estimate.numel())
    assert target.grad is None


def test_inverse_goes_from_the_teachers_result_to_its_start_at_step_zero():
    student, z_0, z_T = Line(), latent(0), latent(1)
    loss = inverse_loss(student, z_0, z_T)
    error = 0.7 * z_0 + 0.2 - z_T
    assert loss.item() == pytest.approx(error.square().mean().item())
    assert student.told == [0]
    loss.backward()
    assert student.gain.grad.item() == pytest.approx((2 * error * z_0).mean().item())
    assert student.offset.grad.tolist() == pytest.approx([2 * error.mean().item(), 0])
    assert z_0.grad is None
    assert z_T.grad is None


def test_ground_truth_goes_through_the_students_own_start_without_a_gradient_there():
    student, z_0 = Line(), latent(0)
    loss = ground_truth_loss(student, z_0, LAST)
    start = 0.7 * z_0 + 0.2
    error = 0.7 * start - 0.3 - z_0
    assert loss.item() == pytest.approx(error.square().mean().item())
    assert student.told == [0, LAST]
    loss.backward()
    # through the start, the gain would get 2 error (start + 0.7 z_0), and the offset of step 0 something
    assert student.gain.grad.item() == pytest.approx((2 * error * start).mean().item())
    assert student.offset.grad.tolist() == pytest.approx([0, 2 * error.mean().item()])
    assert z_0.grad is None

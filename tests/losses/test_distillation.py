"""Score distillation: gradients in closed form, nothing where student and teacher agree, nothing for the teacher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from onestepsr.diffusion.residual_shift import ResidualShiftSchedule
from onestepsr.diffusion.schedule import DiffusionSchedule
from onestepsr.losses.distillation import (
    diffusion_weight,
    gradient_loss,
    hsd_gradient,
    residual_shift_weight,
    sds_gradient,
)
from small import added_noise

pytestmark = pytest.mark.numeric

SHAPE = (3, 4, 6, 5)


class Setting:
    """A teacher on latents of :data:`SHAPE`, with one step and one noise per sample."""

    def __init__(self, t: tuple[int, ...] = (0, 1, 2)) -> None:
        rng = torch.Generator().manual_seed(0)
        self.z_y, self.noise = torch.randn(SHAPE, generator=rng), torch.randn(SHAPE, generator=rng)
        self.z_student, self.z_teacher = torch.randn(SHAPE, generator=rng), torch.randn(SHAPE, generator=rng)
        self.schedule, self.t = ResidualShiftSchedule(), torch.tensor(t)
        torch.manual_seed(0)
        self.teacher = nn.Conv2d(4, 4, 3, padding=1)
        self.weight = residual_shift_weight(self.schedule, self.t)

    def noised(self, z: Tensor) -> Tensor:
        return self.schedule.q_sample(z, self.z_y, self.noise, self.t)

    def hsd(self, z_student: Tensor, z_teacher: Tensor) -> Tensor:
        return hsd_gradient(z_student, z_teacher, self.noised, self.teacher, self.weight)


def test_weights_turn_estimates_into_noises() -> None:
    """omega_2 / omega is what a difference of estimates of z_0 becomes when Eq. 1 is solved for the noise."""
    setting = Setting()
    z_t, others = setting.noised(setting.z_student), (setting.z_student, setting.z_teacher)
    eta, kappa = setting.schedule.eta[setting.t].reshape(-1, 1, 1, 1).float(), setting.schedule.config.kappa
    first, second = ((z_t - z_0 - eta * (setting.z_y - z_0)) / (kappa * eta.sqrt()) for z_0 in others)
    expected = setting.weight.reshape(-1, 1, 1, 1) * (setting.z_teacher - setting.z_student)
    torch.testing.assert_close(first - second, expected, rtol=1e-4, atol=1e-4)
    eta = setting.schedule.eta[1].item()
    assert setting.weight[1].item() == pytest.approx((1 - eta) / (2 * eta**0.5))


def test_weights_of_stable_diffusion_likewise() -> None:
    schedule, t = DiffusionSchedule(), torch.tensor([0, 180, 999])
    rng = torch.Generator().manual_seed(0)
    z_t, first, second = (torch.randn(SHAPE, generator=rng, dtype=torch.float64) for _ in range(3))
    difference = added_noise(schedule, z_t, first, t) - added_noise(schedule, z_t, second, t)
    expected = diffusion_weight(schedule, t).reshape(-1, 1, 1, 1) * (second - first)
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-4)


def test_hsd_gradient_is_the_closed_formula() -> None:
    setting = Setting()
    z = setting.z_student.clone().requires_grad_()
    gradient_loss(z, setting.hsd(z, setting.z_teacher)).backward()
    with torch.no_grad():
        of_teacher, of_student = (setting.teacher(setting.noised(z_0)) for z_0 in (setting.z_teacher, z))
        disagreement = setting.z_student - setting.z_teacher + (of_teacher - of_student)
    samples, size = SHAPE[0], 4 * 6 * 5
    expected = setting.weight.reshape(-1, 1, 1, 1) * disagreement / size / samples
    assert torch.equal(z.grad, expected)
    eta, kappa = setting.schedule.eta[setting.t], 2.0
    by_hand = (1 - eta) / (kappa * eta.sqrt()) / size
    torch.testing.assert_close(z.grad[2], by_hand[2].float() * disagreement[2] / samples)


def test_sds_gradient_is_the_closed_formula_and_biased() -> None:
    setting = Setting()
    z = setting.z_student.clone().requires_grad_()
    gradient = sds_gradient(z, setting.noised, setting.teacher, setting.weight)
    gradient_loss(z, gradient).backward()
    with torch.no_grad():
        expected = setting.weight.reshape(-1, 1, 1, 1) * (z - setting.teacher(setting.noised(z))) / (4 * 6 * 5) / 3
    assert torch.equal(z.grad, expected)
    assert gradient.abs().max() > 0, "even where the student is the teacher, since its argument is all there is"


def test_hsd_is_the_difference_of_two_sds() -> None:
    setting = Setting()
    both = [
        sds_gradient(z, setting.noised, setting.teacher, setting.weight) for z in (setting.z_student, setting.z_teacher)
    ]
    torch.testing.assert_close(setting.hsd(setting.z_student, setting.z_teacher), both[0] - both[1])


def test_nothing_where_student_equals_teacher() -> None:
    setting = Setting()
    z = setting.z_teacher.clone().requires_grad_()
    loss = gradient_loss(z, setting.hsd(z, setting.z_teacher))
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(z.grad) == 0


def test_no_gradient_reaches_the_teacher_nor_its_result() -> None:
    setting = Setting()
    z = setting.z_student.clone().requires_grad_()
    z_teacher = setting.z_teacher.clone().requires_grad_()
    gradients = [setting.hsd(z, z_teacher), sds_gradient(z, setting.noised, setting.teacher, setting.weight)]
    assert not any(gradient.requires_grad for gradient in gradients), "no graph of the teacher's evaluations is kept"
    loss = gradient_loss(z, gradients[0]) + gradient_loss(z, gradients[1])
    loss.backward()
    assert z_teacher.grad is None
    assert all(parameter.grad is None for parameter in setting.teacher.parameters())


def test_value_is_the_mean_of_latent_times_weighted_disagreement() -> None:
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weighted = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    loss = gradient_loss(z, weighted / weighted[0].numel())
    assert loss.item() == pytest.approx((z * weighted).mean().item(), rel=1e-5)


def test_a_gradient_with_a_graph_of_its_own_is_a_constant_for_one_sample_too() -> None:
    z = torch.full((1, 2, 2, 2), 3.0, requires_grad=True)
    teacher = torch.ones(1, 2, 2, 2, requires_grad=True)
    gradient = (z.detach() - teacher) * 2
    gradient_loss(z, gradient).backward()
    assert teacher.grad is None
    assert torch.equal(z.grad, torch.full_like(z, 4.0))
    found = sds_gradient(z.detach(), lambda x: x, lambda x: x - 1, torch.tensor([2.0]))
    assert torch.equal(found, torch.full((1, 2, 2, 2), 2 / 8))

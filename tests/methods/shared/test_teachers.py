"""Both kinds of teachers: what the networks are shown, where sampling leads, what a student becomes."""

from __future__ import annotations

import pytest
import torch
from residual_pairs import MICRO
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.methods.shared.teachers import (
    LatentDiffusionConfig,
    LatentDiffusionTeacher,
    ResidualShiftTeacher,
)
from small import added_noise

pytestmark = pytest.mark.numeric

TINY = "random:d3sr-tiny"


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_diffusion(start: int | None = 399, steps: int | None = 4) -> LatentDiffusionTeacher:
    return LatentDiffusionTeacher(TINY, steps, LatentDiffusionConfig(start=start))


def test_residual_shifting_shows_scaled_latents_and_the_lr_image() -> None:
    teacher = ResidualShiftTeacher(MICRO, None)
    z_t, t, lr = noise(0, 2, 3, 16, 16), torch.tensor([0, 3]), torch.rand(2, 3, 16, 16)
    seen: list[Tensor] = []

    def spy(*arguments: Tensor) -> Tensor:
        seen.extend(arguments)
        return arguments[0]

    teacher.estimate(spy, z_t, t, lr)
    scale = (1 + 4 * teacher.schedule.eta[t]).sqrt().float().reshape(2, 1, 1, 1)
    torch.testing.assert_close(seen[0], z_t / scale)
    assert torch.equal(seen[1], t)
    assert torch.equal(seen[2], lr * 2 - 1)
    assert teacher.steps == 4


def test_residual_shifting_starts_without_the_real_latent_and_samples_with_as_many_steps_as_asked() -> None:
    z_y, drawn, lr = noise(0, 1, 3, 16, 16), noise(1, 1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    for steps in (1, 3, None):
        teacher = ResidualShiftTeacher(MICRO, steps)
        z_T = teacher.start(z_y, drawn)
        torch.testing.assert_close(z_T, z_y + 2 * 0.99 * drawn)
        told: list[int] = []

        def network(x: Tensor, t: Tensor, lq: Tensor, told: list[int] = told) -> Tensor:
            told.append(int(t))
            return torch.zeros_like(x)

        assert torch.equal(teacher.sample(network, z_T, z_y, lr), torch.zeros_like(z_T))
        assert len(told) == (steps or 4)
        assert told[0] == 3, "the last step of the schedule, whatever their number"


def test_ddim_of_a_network_that_knows_the_answer_gives_the_answer() -> None:
    """If the predicted noise always points to one z_0, every deterministic path ends there."""
    teacher = latent_diffusion(start=None, steps=7)
    answer, z_y = noise(0, 2, 20, 4, 4), noise(1, 2, 20, 4, 4)
    told: list[int] = []

    def network(z_t: Tensor, t: Tensor) -> Tensor:
        told.append(int(t[0]))
        return added_noise(teacher.schedule, z_t, answer, t)

    z_T = teacher.start(z_y, noise(2, 2, 20, 4, 4))
    torch.testing.assert_close(teacher.sample(network, z_T, z_y, z_y), answer, rtol=1e-3, atol=1e-3)
    assert (told[0], told[-1], len(told)) == (999, 0, 7)
    assert told == sorted(told, reverse=True)
    t = torch.tensor([300, 900])
    z_t = teacher.noised(answer, z_y, noise(3, 2, 20, 4, 4), t)
    torch.testing.assert_close(teacher.estimate(network, z_t, t, z_y), answer, rtol=1e-3, atol=1e-3)


def test_ddim_step_is_the_papers() -> None:
    """Two steps by hand: z_s = sqrt(alpha_bar_s) z_0 + sqrt(1 - alpha_bar_s) eps."""
    teacher = latent_diffusion(start=399, steps=2)
    alpha_bar = teacher.schedule.alpha_bar
    z_T = noise(0, 1, 20, 4, 4)
    eps = 0.3 * z_T
    z_0 = (z_T - (1 - alpha_bar[399]).sqrt() * eps) / alpha_bar[399].sqrt()
    z_s = alpha_bar[0].sqrt() * z_0 + (1 - alpha_bar[0]).sqrt() * eps
    expected = (z_s - (1 - alpha_bar[0]).sqrt() * 0.3 * z_s) / alpha_bar[0].sqrt()
    torch.testing.assert_close(teacher.sample(lambda z, t: 0.3 * z, z_T, z_T, z_T), expected)


def test_latent_diffusion_starts_from_the_noised_lr_latent() -> None:
    teacher = latent_diffusion(start=399)
    assert teacher.steps == 400
    z_y, drawn = noise(0, 1, 20, 4, 4), noise(1, 1, 20, 4, 4)
    alpha_bar = teacher.schedule.alpha_bar[399]
    torch.testing.assert_close(teacher.start(z_y, drawn), alpha_bar.sqrt() * z_y + (1 - alpha_bar).sqrt() * drawn)
    assert latent_diffusion(start=None).steps == 1000
    generator = teacher.student_generator(teacher.student())
    assert generator.timestep == 399


def test_students_are_copies() -> None:
    for teacher in (ResidualShiftTeacher(MICRO, None), latent_diffusion()):
        teacher.network.requires_grad_(False)
        student = teacher.student()
        for (name, own), (_, taught) in zip(
            student.named_parameters(), teacher.network.named_parameters(), strict=True
        ):
            assert torch.equal(own, taught), name
            assert own.data_ptr() != taught.data_ptr(), name
            assert own.requires_grad, name


@pytest.mark.parametrize(("start", "steps"), [(0, 4), (1000, 4), (20, 50), (399, 401)])
def test_starts_and_steps_that_a_backbone_does_not_have(start: int, steps: int) -> None:
    with pytest.raises(UserError, match=r"has steps from 1 to 999|this schedule has"):
        latent_diffusion(start, steps)


def test_teachers_of_the_other_kind_are_refused() -> None:
    with pytest.raises(UserError, match="expected a model of the ResShift family"):
        ResidualShiftTeacher(TINY, None)
    with pytest.raises(UserError, match="is no latent-diffusion backbone"):
        LatentDiffusionTeacher(MICRO, None, LatentDiffusionConfig())
    with pytest.raises(UserError, match=r"config\.teacher_steps: 9 steps: this schedule has 4"):
        ResidualShiftTeacher(MICRO, 9)

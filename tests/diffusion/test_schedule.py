"""Stable Diffusion's schedule: published values, and conversions that undo each other."""

from pathlib import Path

import numpy as np
import pytest
import torch

from onestepsr.diffusion.schedule import DiffusionSchedule, DiffusionScheduleConfig

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parents[1] / "golden" / "osediff_x0.npz"


@pytest.fixture
def schedule() -> DiffusionSchedule:
    return DiffusionSchedule()


def test_alpha_bar_is_stable_diffusions(schedule):
    golden = np.load(GOLDEN)
    assert np.array_equal(schedule.alpha_bar.numpy()[golden["steps"]], golden["alphas_cumprod"])
    assert schedule.alpha_bar[999].item() == pytest.approx(0.00466009508818388, rel=1e-6)


def test_x0_equals_published_code(schedule):
    golden = np.load(GOLDEN)
    x0 = schedule.x0_from_eps(torch.tensor(golden["latent"]), torch.tensor(golden["model_pred"]), 999)
    assert np.abs(x0.numpy() - golden["x0_formula"]).max() < 1e-5


@pytest.mark.parametrize("t", [0, 1, 399, 999])
def test_noise_that_was_added_is_removed(schedule, t):
    rng = torch.Generator().manual_seed(t)
    z, noise = (torch.randn(2, 4, 8, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    z_t = schedule.add_noise(z, noise, t)
    assert torch.allclose(schedule.x0_from_eps(z_t, noise, t), z, atol=1e-5)


def test_steps_per_sample_equal_single_steps(schedule):
    z, noise = torch.ones(3, 2, 4, 4), torch.full((3, 2, 4, 4), 2.0)
    together = schedule.add_noise(z, noise, torch.tensor([5, 500, 999]))
    for row, t in zip(together, (5, 500, 999), strict=True):
        assert torch.equal(row, schedule.add_noise(z[:1], noise[:1], t)[0])


def test_variance_is_preserved(schedule):
    signal, sigma = schedule.coefficients(torch.arange(1000), torch.zeros(1000, 1))
    assert torch.allclose(signal**2 + sigma**2, torch.ones(1000, 1), atol=1e-6)


def test_bad_betas_are_refused():
    with pytest.raises(ValueError, match="beta_start"):
        DiffusionScheduleConfig(beta_start=0.1, beta_end=0.01)
    with pytest.raises(ValueError, match="beta_end < 1"):
        DiffusionScheduleConfig(beta_end=1.0)
    with pytest.raises(ValueError, match="0 < beta_start"):
        DiffusionScheduleConfig(beta_start=0.0)
    with pytest.raises(ValueError, match="steps must be 1"):
        DiffusionScheduleConfig(steps=0)
    assert DiffusionScheduleConfig(steps=1, beta_start=0.01, beta_end=0.01).steps == 1


def test_a_sampled_step_is_the_papers():
    """alpha_bar 0.5 after 0.8, so that 0.625 of the signal is kept; the variance is 0.2 / 0.5 * 0.375."""
    schedule = DiffusionSchedule()
    schedule.alpha_bar = torch.tensor([0.8, 0.5], dtype=torch.float64)
    z_t, x0, noise = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (3.0, 2.0, -2.0))
    mean = (0.8**0.5 * 0.375 * 2 + 0.625**0.5 * 0.2 * 3) / 0.5
    assert schedule.ancestral_step(z_t, x0, 1, 0, noise).item() == pytest.approx(mean - 2 * 0.15**0.5)
    assert schedule.ancestral_step(z_t, x0, 0, -1, noise) is x0


def test_the_longest_schedule():
    assert DiffusionScheduleConfig(steps=100_000).steps == 100_000
    with pytest.raises(ValueError, match="1 to 100,000, got 100,001"):
        DiffusionScheduleConfig(steps=100_001)

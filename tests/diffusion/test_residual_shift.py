"""Residual shifting: the published code's tables and arithmetic, and both samplers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from onestepsr.core.config import from_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.rng import generator as seeded
from onestepsr.diffusion.residual_shift import (
    NOISE_BLOCK,
    NoisePlane,
    ResidualShiftConfig,
    ResidualShiftSchedule,
    kept_steps,
)

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parents[1] / "golden" / "residual_schedule.npz"
SCHEDULES = {
    "s15": ResidualShiftSchedule(),
    "s4": ResidualShiftSchedule(ResidualShiftConfig(steps=4, min_noise=0.2)),
    "s15_respaced4": ResidualShiftSchedule().respaced(4, "published"),
}
TABLES = {
    "sqrt_etas": "sqrt_eta",
    "etas": "eta",
    "etas_prev": "eta_previous",
    "alpha": "alpha",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "mean_of_z_t",
    "posterior_mean_coef2": "mean_of_z_0",
    "timestep_map": "timesteps",
}
AT = [("s15", 0), ("s15", 7), ("s15", 14), ("s4", 0), ("s4", 1), ("s4", 3)]


@pytest.fixture(scope="module")
def golden():
    return {key: torch.tensor(value) for key, value in np.load(GOLDEN).items()}


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_equal_published_code(golden, name):
    for theirs, ours in TABLES.items():
        table = getattr(SCHEDULES[name], ours)
        assert (table - golden[f"{name}.{theirs}"]).abs().max() <= 1e-12, ours


@pytest.mark.parametrize("name", ["s15", "s15_respaced4"])
def test_deterministic_coefficients_equal_published_code(golden, name):
    for letter in "kmj":  # gathered there in float32
        table = getattr(SCHEDULES[name], letter)
        assert (table - golden[f"{name}.ddim_{letter}"]).abs().max() < 1e-7, letter


@pytest.mark.parametrize(("name", "t"), AT)
def test_conversions_equal_published_code(golden, name, t):
    schedule, steps = SCHEDULES[name], torch.tensor([t, t])
    x0, y, noise, xt = (golden[key] for key in ("x0", "y", "noise", "xt"))
    near = {"rtol": 1e-6, "atol": 1e-6}
    assert torch.allclose(schedule.q_sample(x0, y, noise, steps), golden[f"{name}.q_sample_t{t}"], **near)
    assert torch.allclose(schedule.posterior(x0, xt, steps)[0], golden[f"{name}.post_mean_t{t}"], **near)
    assert torch.allclose(schedule.scale_input(xt, steps), golden[f"{name}.scale_input_t{t}"], **near)
    assert torch.allclose(schedule.prior(y, noise), golden[f"{name}.prior_sample"], **near)


def test_deterministic_step_equals_published_code(golden):
    schedule, x0, y, xt = SCHEDULES["s15"], golden["x0"], golden["y"], golden["xt"]
    assert torch.allclose(schedule.deterministic_step(x0, xt, y, 7), golden["s15.ddim_sample_t7"], atol=1e-6)


def latents(count=3, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    return (torch.randn(2, 3, 4, 5, generator=rng, dtype=dtype) for _ in range(count))


def test_deterministic_steps_stay_on_the_path_of_one_noise():
    schedule = SCHEDULES["s15"]
    z_0, z_y, noise = latents()
    for t in range(1, 15):
        step = schedule.deterministic_step(z_0, schedule.q_sample(z_0, z_y, noise, t), z_y, t)
        assert torch.allclose(step, schedule.q_sample(z_0, z_y, noise, t - 1), atol=1e-12)


def test_coefficients_of_a_step_add_up_to_one():
    schedule = SCHEDULES["s15"]
    assert torch.allclose(schedule.k + schedule.m + schedule.j, torch.ones(15, dtype=torch.float64), atol=1e-15)
    assert [schedule.k[0].item(), schedule.m[0].item(), schedule.j[0].item()] == [1, 0, 0]


def test_steps_per_sample_equal_single_steps():
    schedule = SCHEDULES["s15"]
    z_0, z_y, noise = latents()
    together = schedule.q_sample(z_0, z_y, noise, torch.tensor([3, 14]))
    for row, t in enumerate((3, 14)):
        assert torch.equal(together[row], schedule.q_sample(z_0, z_y, noise, t)[row])


def test_input_scaling_of_latents_images_and_none():
    scales = {
        kind: ResidualShiftSchedule(ResidualShiftConfig(input_scaling=kind)).input_scale
        for kind in ("latent", "pixel", "none")
    }
    eta = SCHEDULES["s15"].eta
    assert torch.allclose(scales["latent"], (1 + 4 * eta).sqrt())
    assert torch.allclose(scales["pixel"], 1 + 6 * eta.sqrt())
    assert torch.equal(scales["none"], torch.ones_like(eta))


def test_a_perfect_network_samples_its_target_both_ways():
    z_0, z_y, noise = latents()
    for schedule in (*SCHEDULES.values(), SCHEDULES["s15"].respaced(1)):
        seen = []

        def predict(z, t, seen=seen):
            seen.append((z.std().item(), t.tolist()))
            return z_0

        assert torch.equal(schedule.sample_deterministic(predict, z_y, schedule.prior(z_y, noise)), z_0)
        assert [t for _, t in seen] == [[t, t] for t in schedule.timesteps.flip(0).tolist()]
        assert torch.equal(schedule.sample_ancestral(predict, z_y, lambda draw, like: noise), z_0)
        assert len(seen) == 2 * schedule.steps


@pytest.mark.parametrize("sampler", ["deterministic", "ancestral"])
def test_sampling_with_a_network_that_halves_its_input_by_hand(sampler):
    """One number through all four steps, and the derivatives by z_T and z_y that follow since each step is linear."""
    schedule = SCHEDULES["s4"]
    sqrt_eta = [0.1 * 9.9 ** ((t / 3) ** 0.3) for t in range(4)]
    scale = [(1 + 4 * root**2) ** 0.5 for root in sqrt_eta]
    noises = [0.0, 0.3, -0.7, 1.1]

    def by_hand(z, z_y, strength=1.0):
        for draw, t in enumerate((3, 2, 1), start=1):
            estimate, eta, before = 0.5 * z / scale[t], sqrt_eta[t] ** 2, sqrt_eta[t - 1] ** 2
            if sampler == "deterministic":
                m, j = (before / eta) ** 0.5, before - (before * eta) ** 0.5
                z = (1 - j - m) * estimate + m * z + j * z_y
            else:
                sigma = 2 * (before / eta * (eta - before)) ** 0.5
                z = before / eta * z + (eta - before) / eta * estimate + strength * sigma * noises[draw]
        return 0.5 * z / scale[0]

    z_T, z_y = (torch.full((1, 1, 1, 1), value, dtype=torch.float64, requires_grad=True) for value in (1.7, -0.4))
    if sampler == "deterministic":
        z_0 = schedule.sample_deterministic(lambda z, t: 0.5 * z, z_y, z_T)
        assert z_0.item() == pytest.approx(by_hand(1.7, -0.4))
        z_0.backward()
        assert z_T.grad.item() == pytest.approx(by_hand(1.0, 0.0))
        assert z_y.grad.item() == pytest.approx(by_hand(0.0, 1.0))
    else:  # it starts at z_y, as the first noise is 0
        z_0 = schedule.sample_ancestral(
            lambda z, t: 0.5 * z, z_y, lambda draw, like: torch.full_like(like, noises[draw])
        )
        assert z_0.item() == pytest.approx(by_hand(-0.4, -0.4))
        z_0.backward()
        assert z_y.grad.item() == pytest.approx(by_hand(1.0, 0.0, strength=0.0))


def test_ancestral_sampling_numbers_its_draws_and_needs_none_for_the_last_step():
    z_0, z_y, noise = latents()
    draws = []

    def record(draw, like):
        draws.append(draw)
        return noise

    SCHEDULES["s4"].sample_ancestral(lambda z, t: z_0, z_y, record)
    assert draws == [0, 1, 2, 3]


def test_ancestral_step_has_the_posteriors_moments():
    schedule = SCHEDULES["s4"]
    z_0, z_t = torch.full((1, 1, 300, 300), 0.3), torch.full((1, 1, 300, 300), -1.0)
    noise = torch.randn(z_t.shape, generator=torch.Generator().manual_seed(0))
    step = schedule.ancestral_step(z_0, z_t, noise, 2)
    mean, variance = schedule.posterior(z_0, z_t, 2)
    assert step.mean().item() == pytest.approx(mean.mean().item(), abs=0.01)
    assert step.var().item() == pytest.approx(variance.item(), rel=0.02)
    assert torch.equal(schedule.ancestral_step(z_0, z_t, noise, 0), z_0)


def test_spread_steps_keep_both_ends_and_the_published_rule_loses_the_last():
    assert kept_steps(15, 4) == [0, 5, 9, 14]
    assert kept_steps(15, 1) == [14]
    assert kept_steps(15, 15) == kept_steps(15, 15, "published") == list(range(15))
    assert kept_steps(15, 4, "published") == [0, 3, 7, 11]
    for count in range(2, 16):
        kept = kept_steps(15, count)
        assert kept == sorted(set(kept))
        assert (len(kept), kept[0], kept[-1]) == (count, 0, 14)


def test_respacing_keeps_what_the_network_is_told():
    schedule = SCHEDULES["s15"].respaced(4)
    assert schedule.sqrt_eta.tolist() == SCHEDULES["s15"].sqrt_eta[[0, 5, 9, 14]].tolist()
    assert torch.equal(schedule.input_scale, SCHEDULES["s15"].input_scale[[0, 5, 9, 14]])
    single = SCHEDULES["s15"].respaced(1)
    assert single.posterior_log_variance.exp().tolist() == pytest.approx([4 * 0.99**2]), "for want of another step"


@pytest.mark.parametrize(("count", "rule"), [(0, "spread"), (16, "spread"), (1, "published")])
def test_steps_that_the_schedule_cannot_give_are_one_line(count, rule):
    with pytest.raises(UserError, match=rf"{count} steps: this schedule has 15, accepted: [12] to 15"):
        SCHEDULES["s15"].respaced(count, rule)


def test_strength_of_the_noise_enters_squared():
    """kappa 3, since 2 squared is 2 doubled; sqrt(eta) is 0.1 and 0.9, and alpha 0.81 - 0.01."""
    schedule = ResidualShiftSchedule(ResidualShiftConfig(steps=2, kappa=3.0, min_noise=0.3, sqrt_eta_end=0.9))
    assert schedule.sqrt_eta.tolist() == pytest.approx([0.1, 0.9])
    assert schedule.posterior_variance.tolist() == pytest.approx([0, 9 * 0.01 / 0.81 * 0.8])
    assert schedule.posterior_log_variance.exp().tolist() == pytest.approx([9 * 0.01 / 0.81 * 0.8] * 2)
    assert schedule.input_scale.tolist() == pytest.approx([1.09**0.5, (1 + 9 * 0.81) ** 0.5])
    assert schedule.respaced(1).posterior_log_variance.exp().item() == pytest.approx(9 * 0.81)
    z = torch.zeros(1, 1, 1, 1)
    assert schedule.q_sample(z, z, z + 1, 1).item() == pytest.approx(2.7)


def test_smallest_and_largest_settings_are_accepted():
    settings = ResidualShiftConfig(steps=2, min_noise=0.04, sqrt_eta_end=1.0)
    assert ResidualShiftSchedule(settings).sqrt_eta.tolist() == pytest.approx([0.02, 1.0])


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 1},
        {"kappa": 0.0},
        {"min_noise": 4.0},
        {"min_noise": 0.0},
        {"sqrt_eta_end": 1.5},
        {"power": 0.0},
        {"input_scaling": "rgb"},
    ],
)
def test_bad_settings_are_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        from_mapping(ResidualShiftConfig, values)


def test_a_window_of_the_plane_of_noise_is_cut_from_its_blocks():
    like = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    cut = NoisePlane(7, (2 * NOISE_BLOCK - 2, NOISE_BLOCK - 1))(1, like)
    assert cut.shape == like.shape
    for sample in range(2):
        blocks = [
            [torch.randn(3, 64, 64, generator=seeded(7, "noise", 1, sample, row, column)) for column in (0, 1)]
            for row in (1, 2)
        ]
        rows = [torch.cat([left[..., -1:], right[..., :3]], dim=2) for left, right in blocks]
        expected = torch.cat([rows[0][:, -2:], rows[1][:, :3]], dim=1)
        assert torch.equal(cut[sample], expected.double())


def test_the_plane_of_an_image_is_drawn_once_and_placed_by_latent_positions():
    fixed = NoisePlane.drawn(None, (6, 10), 4, 8)
    assert (fixed.seed, fixed.origin) == (0, (3, 5))
    first = NoisePlane.drawn(torch.Generator().manual_seed(1), (0, 0), 4, 8)
    assert first.origin == (0, 0)
    assert first.seed == int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(1)))
    assert NoisePlane(3).origin == (0, 0)

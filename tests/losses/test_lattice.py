"""The lattice penalty: loud for a grid, quiet for texture and for an even shift."""

import pytest
import torch

from onestepsr.losses.perceptual import lattice_loss

pytestmark = pytest.mark.numeric


def test_grid_is_penalised_far_more_than_noise_of_the_same_energy():
    hr = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    grid = torch.zeros_like(hr)
    grid[..., ::4, ::4] = 0.4
    noise = torch.randn(hr.shape, generator=torch.Generator().manual_seed(1)) * grid.std()
    assert lattice_loss(hr + grid, hr) > 10 * lattice_loss(hr + noise, hr)


def test_even_shift_and_identity_cost_nothing():
    hr = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert lattice_loss(hr, hr) == 0
    assert lattice_loss(hr + 0.2, hr).item() == pytest.approx(0, abs=1e-10)


def test_value_of_a_known_grid():
    hr = torch.zeros(1, 1, 32, 32)
    sr = hr.clone()
    sr[..., ::4, ::4] = 1.0  # one of 16 positions: deviations 15/16 once and -1/16 fifteen times
    assert lattice_loss(sr, hr).item() == pytest.approx((15 / 16) ** 2 / 16 + 15 / 16 * (1 / 16) ** 2)


def test_defaults_are_four_pixels_and_four_positions():
    sr, hr = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert lattice_loss(sr, hr) == lattice_loss(sr, hr, factor=4, window=4)


@pytest.mark.parametrize(("window", "rows", "share"), [(4, 6, 1 / 4), (2, 3, 1 / 2)])
def test_windows_overlap_by_half(window, rows, share):
    """An error of 1 in the first latent row at one of 4 positions: two windows, of which one holds it."""
    sr = torch.zeros(1, 1, 2 * rows, 2 * window)
    sr[..., 0, ::2] = 1.0
    by_hand = ((3 / 4 * share) ** 2 + 3 * (share / 4) ** 2) / (4 * 2)
    assert lattice_loss(sr, torch.zeros_like(sr), factor=2, window=window).item() == pytest.approx(by_hand)

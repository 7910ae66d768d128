"""The lattice penalty: loud for a grid, quiet for texture and for an even shift."""

import pytest
import torch

from onestepsr.losses.lattice import lattice_detail_loss, lattice_loss


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


def test_dots_of_either_sign_are_seen_by_their_energy():
    rng = torch.Generator().manual_seed(0)
    photo = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 130, 130, generator=rng), 3, stride=1)
    dots = torch.zeros_like(photo)
    signs = torch.randint(0, 2, (1, 1, 32, 32), generator=rng) * 2.0 - 1.0
    dots[..., ::4, ::4] = 0.2 * signs
    assert lattice_detail_loss(photo) < 0.01
    assert lattice_detail_loss(photo + dots) > 20 * lattice_detail_loss(photo)
    assert lattice_loss(photo + dots, photo) < 0.1 * lattice_loss(photo + dots.abs(), photo)


def test_detail_has_a_finite_gradient_on_a_flat_picture():
    flat = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    lattice_detail_loss(flat).backward()
    assert flat.grad.isfinite().all()

"""The map of likely artefacts."""

import pytest
import torch

from onestepsr.losses.perceptual import artifact_map


def test_wild_residuals_weigh_more_than_even_ones_of_the_same_size() -> None:
    rng = torch.Generator().manual_seed(0)
    hr = torch.rand(1, 3, 32, 64, generator=rng) * 0.5 + 0.25
    error = torch.full_like(hr, 0.1)
    signs = (torch.rand(1, 1, 32, 32, generator=rng) < 0.5).float()
    error[..., 32:] *= 2 * signs  # 0 or .2: the same mean absolute error as on the left
    weights = artifact_map((hr + error).requires_grad_(), hr)
    assert weights.shape == (1, 1, 32, 64)
    assert not weights.requires_grad
    assert weights[..., 4:26].max() < 1e-6
    assert weights[..., 38:60].min() > 1e-3


def test_an_exact_image_has_no_artefacts() -> None:
    hr = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    weights = artifact_map(hr, hr)
    assert weights.shape == (2, 1, 16, 16)
    assert weights.abs().max() == 0


def test_value_of_one_wrong_pixel() -> None:
    """0.6 in one of 64 pixels: (48 / 49) 0.36 / 49 where the window holds it, and 0.36 / 64 in the whole image."""
    hr = torch.full((1, 3, 8, 8), 0.5)
    sr = hr.clone()
    sr[..., 4, 4] += 0.2
    weights = artifact_map(sr, hr)
    assert weights[0, 0, 4, 4].item() == pytest.approx(48 / 49 * 0.36 / 49 * (0.36 / 64) ** 0.2, rel=1e-4)
    assert weights[0, 0, 0, 0].item() == pytest.approx(0, abs=1e-7)

"""Fidelity metrics against published implementations, artefact measures against pictures with a known artefact."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onestepsr.errors import UserError
from onestepsr.evaluate.metrics import (
    Metric,
    as_eight_bit,
    grid_artifact,
    overshoot,
    psnr_rgb,
    psnr_y,
    ssim_y,
    studio_luma,
)

GOLDEN = Path(__file__).parent.parent / "golden"


def load_pair() -> tuple[Tensor, Tensor, dict[str, float]]:
    with np.load(GOLDEN / "metrics_sr.npz") as scores, np.load(GOLDEN / "metrics_hr.npz") as reference:
        sr, hr = (torch.from_numpy(a).permute(2, 0, 1)[None].float() / 255 for a in (scores["sr"], reference["hr"]))
        return sr, hr, {name: float(scores[name]) for name in scores.files if scores[name].ndim == 0}


def noise_image(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("metric", "name", "tolerance"), [(psnr_y, "psnr_y", 1e-4), (psnr_rgb, "psnr_rgb", 1e-4), (ssim_y, "ssim_y", 2e-6)]
)
def test_published_implementation_is_matched(metric: Metric, name: str, tolerance: float) -> None:
    sr, hr, published = load_pair()
    assert metric(sr, hr).item() == pytest.approx(published[name], abs=tolerance)


@pytest.mark.parametrize(("metric", "best"), [(psnr_y, 80.0), (psnr_rgb, 80.0), (ssim_y, 1.0), (overshoot, 0.0)])
def test_equal_images_score_best(metric: Metric, best: float) -> None:
    image = noise_image(1, 3, 24, 31)
    assert metric(image, image).item() == pytest.approx(best, abs=1e-9)


def test_every_image_of_a_batch_is_scored_alone() -> None:
    sr, hr = noise_image(3, 3, 20, 24), noise_image(3, 3, 20, 24, seed=1)
    for metric in (psnr_y, psnr_rgb, ssim_y, overshoot):
        together = metric(sr, hr)
        assert together.shape == (3,)
        assert together[1].item() == pytest.approx(metric(sr[1:2], hr[1:2]).item(), abs=1e-12)


def test_psnr_of_a_known_error() -> None:
    hr = torch.full((1, 3, 16, 16), 0.5)
    assert psnr_rgb(hr + 0.1, hr).item() == pytest.approx(20.0, abs=1e-4)
    # An equal step in the three channels moves studio luma by 219/255 of it.
    assert psnr_y(hr + 0.1, hr).item() == pytest.approx(20 - 20 * np.log10(219 / 255), abs=1e-4)


def test_studio_luma_of_black_and_white() -> None:
    ends = torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)])
    assert studio_luma(ends).flatten().tolist() == pytest.approx([16 / 255, 235 / 255])


def test_ssim_ignores_changes_that_rounding_removes() -> None:
    sr, hr, _ = load_pair()
    assert ssim_y(as_eight_bit(sr + 0.3 / 255), hr).item() == ssim_y(sr, hr).item()


@pytest.mark.parametrize("metric", [psnr_y, psnr_rgb, ssim_y, overshoot])
def test_different_sizes_name_both(metric: Metric) -> None:
    with pytest.raises(UserError, match=r"SR is 12 x 16 but HR is 13 x 16"):
        metric(noise_image(1, 3, 16, 12), noise_image(1, 3, 16, 13))


def test_images_below_the_window_are_refused() -> None:
    with pytest.raises(UserError, match="at least 11 x 11"):
        ssim_y(noise_image(1, 3, 10, 40), noise_image(1, 3, 10, 40))
    with pytest.raises(UserError, match="at least 8 x 8"):
        grid_artifact(noise_image(1, 3, 7, 40))
    with pytest.raises(UserError, match="RGB"):
        grid_artifact(noise_image(1, 1, 40, 40))


def test_grid_artifact_sees_a_lattice_and_not_a_photo() -> None:
    photo = load_pair()[1]
    lattice = torch.zeros(4, 4)
    lattice[0, 0], lattice[2, 1] = 8 / 255, -8 / 255
    tiled = lattice.repeat(photo.shape[-2] // 4 + 1, photo.shape[-1] // 4 + 1)[: photo.shape[-2], : photo.shape[-1]]
    assert grid_artifact(photo).item() < 0.03
    assert grid_artifact((photo + tiled).clamp(0, 1)).item() > 3 * grid_artifact(photo).item()


def test_grid_artifact_is_the_same_wherever_the_lattice_starts() -> None:
    lattice = torch.zeros(1, 3, 4, 4)
    lattice[..., 1, 2] = 1.0
    image = lattice.repeat(1, 1, 12, 12)
    values = [grid_artifact(image[..., i : i + 40, i : i + 40]).item() for i in range(4)]
    assert values == pytest.approx([values[0]] * 4)
    assert grid_artifact(torch.full((1, 3, 16, 16), 0.5)).item() == 0.0


def test_overshoot_counts_halos_but_not_blur() -> None:
    hr = torch.full((1, 3, 32, 32), 0.2)
    hr[..., 16:] = 0.8
    blurred = F.avg_pool2d(F.pad(hr, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    sharpened = hr + (hr - blurred)
    assert overshoot(blurred, hr).item() == pytest.approx(0.0, abs=1e-5)
    assert overshoot(sharpened, hr).item() > 5.0
    flat = torch.full_like(hr, 0.4)
    assert overshoot(sharpened, flat).item() == 0.0

"""Fidelity metrics against published implementations, artefact measures against images with a known artefact."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sample_images import GOLDEN, published_pair
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.evaluate.metrics.fidelity import (
    MS_SSIM_WEIGHTS,
    Metric,
    as_eight_bit,
    grid_artifact,
    ms_ssim,
    overshoot,
    psnr_rgb,
    psnr_y,
    ssim,
    ssim_basicsr,
    ssim_rgb,
    ssim_y,
    studio_luma,
)

pytestmark = pytest.mark.numeric


def load_pair(which: str = "first") -> tuple[Tensor, Tensor, dict[str, float]]:
    sr, hr = published_pair(which)
    with np.load(GOLDEN / "metrics_second.npz") as arrays:
        prefix = f"{which}."
        return sr, hr, {name.removeprefix(prefix): float(arrays[name]) for name in arrays if name.startswith(prefix)}


def noise_image(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize(
    ("metric", "name", "tolerance"),
    [
        (psnr_y, "psnr_y", 1e-4),
        (psnr_rgb, "psnr_rgb", 1e-4),
        (ssim_y, "ssim_y", 2e-6),
        (partial(ssim, planes="yiq"), "ssim_yiq_default", 5e-6),  # ties of rounding fall as float32 has them there
        (ssim_basicsr, "basicsr_ssim_y", 1e-8),
        (psnr_y, "basicsr_psnr_y", 1e-4),
    ],
)
def test_published_implementations_are_matched(metric: Metric, name: str, tolerance: float, which: str) -> None:
    sr, hr, published = load_pair(which)
    assert metric(sr, hr).item() == pytest.approx(published[name], abs=tolerance)


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_border_of_four_is_that_of_basicsr(which: str) -> None:
    sr, hr, published = load_pair(which)
    inner = (image[..., 4:-4, 4:-4] for image in (sr, hr))
    assert psnr_y(*inner).item() == pytest.approx(published["basicsr_psnr_y_crop4"], abs=1e-4)


def test_rounding_and_clamping_are_told_apart() -> None:
    # Without these two the published digits would be missed by hundreds of tolerances.
    sr, hr, published = load_pair()
    assert abs(ssim_basicsr(sr, hr).item() - published["ssim_y"]) > 2e-4
    opposite = torch.cat([hr, hr], dim=-1), torch.cat([1 - hr, 1 - hr], dim=-1)
    assert ssim(*opposite, clamped=False).item() < 0 < ssim(*opposite).item()


def test_ssim_of_rgb_is_the_mean_of_the_channels() -> None:
    sr, hr, _ = load_pair()
    channels = [ssim_rgb(*(image[:, c : c + 1].expand(-1, 3, -1, -1) for image in (sr, hr))).item() for c in range(3)]
    assert ssim_rgb(sr, hr).item() == pytest.approx(np.mean(channels), abs=1e-12)
    gray = sr.mean(1, keepdim=True).expand(-1, 3, -1, -1), hr.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert ssim_rgb(*gray).item() == pytest.approx(ssim(*gray, planes="yiq").item(), abs=1e-6)


def test_ms_ssim_of_two_flat_images_is_the_luminance_term_of_the_coarsest_scale() -> None:
    a, b = 50.0, 100.0
    flat = [torch.full((1, 3, 176, 161), (level - 16) / 219) for level in (a, b)]
    c1 = (0.01 * 255) ** 2
    expected = ((2 * a * b + c1) / (a * a + b * b + c1)) ** MS_SSIM_WEIGHTS[-1]
    assert ms_ssim(*flat).item() == pytest.approx(expected, abs=1e-9)


def test_ms_ssim_is_the_product_over_scales() -> None:
    sr, hr, _ = load_pair()
    planes = [(studio_luma(image)[0, 0] * 255).round().numpy() for image in (sr, hr)]
    offset = np.arange(11) - 5
    taps = np.exp(-(offset**2) / 4.5)
    window = np.outer(taps, taps) / taps.sum() ** 2
    expected = 1.0
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        if scale:
            planes = [0.25 * (p[::2, ::2] + p[1::2, ::2] + p[::2, 1::2] + p[1::2, 1::2]) for p in planes]
        windows = [np.lib.stride_tricks.sliding_window_view(p, (11, 11)) for p in planes]
        x, y = (np.einsum("abij,ij->ab", w, window) for w in windows)
        xx, yy, xy = (
            np.einsum("abij,abij,ij->ab", windows[i], windows[j], window) for i, j in ((0, 0), (1, 1), (0, 1))
        )
        term = np.clip((2 * (xy - x * y) + 58.5225) / (xx - x * x + yy - y * y + 58.5225), 0, None)
        if scale == 4:
            term = term * (2 * x * y + 6.5025) / (x * x + y * y + 6.5025)
        expected *= term.mean() ** weight
    assert ms_ssim(sr[..., :208, :224], hr).item() == pytest.approx(expected, abs=1e-9)


def test_ms_ssim_of_opposites_is_a_number() -> None:
    # The mean of negative terms to a broken power would be none.
    hr = load_pair()[1]
    assert 0 <= ms_ssim(1 - hr, hr).item() < 0.1


def test_values_that_are_no_numbers_are_refused() -> None:
    bad = noise_image(1, 3, 24, 24)
    bad[0, 1, 3, 4] = float("nan")
    for measure in (
        lambda: psnr_y(bad, bad),
        lambda: psnr_y(noise_image(1, 3, 24, 24), bad),
        lambda: grid_artifact(bad),
    ):
        with pytest.raises(UserError, match="1 of 1728 values are not finite"):
            measure()


def test_every_image_of_a_batch_is_scored_alone() -> None:
    sr, hr = noise_image(3, 3, 20, 24), noise_image(3, 3, 20, 24, seed=1)
    for metric in (psnr_y, psnr_rgb, ssim_y, ssim_rgb, overshoot):
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
    with pytest.raises(UserError, match="at least 161 x 161"):
        ms_ssim(noise_image(1, 3, 160, 400), noise_image(1, 3, 160, 400))
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

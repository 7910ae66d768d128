"""Colour transfer against published numbers, bands against the whole, luma against its definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from onestepsr.imaging import color

pytestmark = pytest.mark.numeric

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "color_transfer.npz")
TARGET, SOURCE = (torch.from_numpy(GOLDEN[name]) for name in ("target", "source"))


def from_octets(name: str) -> torch.Tensor:
    return (torch.from_numpy(GOLDEN[name]) * 255).round() / 255


@pytest.mark.parametrize("name", ["adain", "wavelet"])
def test_published_numbers(name: str) -> None:
    result = getattr(color, name)(TARGET, SOURCE)[..., 1::4, 1::4]
    expected = torch.from_numpy(GOLDEN[name]).clamp(0, 1)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["adain", "wavelet"])
def test_published_eight_bit_results(name: str) -> None:
    result = getattr(color, name)(from_octets("target"), from_octets("source"))
    octets = (result * 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()  # truncated, as that code does
    difference = np.abs(octets.astype(int) - GOLDEN[f"{name}_u8"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_published_blur() -> None:
    expected = torch.from_numpy(GOLDEN["blur_r4"])
    torch.testing.assert_close(color.blur(TARGET, 4)[..., 1::4, 1::4], expected, atol=1e-6, rtol=0)


def test_nothing_changes_when_the_colours_agree() -> None:
    torch.testing.assert_close(color.adain(TARGET, TARGET), TARGET.clamp(0, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(color.wavelet(TARGET, TARGET), TARGET.clamp(0, 1), atol=1e-6, rtol=0)


def test_statistics_of_bands_equal_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 60, 50, generator=generator) * 0.01 + 0.7
    whole = color.statistics([image])
    bands = color.statistics(image.split([7, 1, 30, 22], dim=2))
    torch.testing.assert_close(bands.mean, whole.mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(bands.deviation, whole.deviation, atol=1e-12, rtol=0)
    expected = (image.double().var(dim=(2, 3), keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(whole.deviation, expected, atol=1e-12, rtol=0)


def test_one_pixel_is_no_obstacle() -> None:
    pixel = torch.full((1, 3, 1, 1), 0.5)
    for correct in (color.adain, color.wavelet):
        assert torch.isfinite(correct(pixel, pixel * 0.5)).all()


def test_wavelet_looks_no_further_than_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    content, style = torch.rand(2, 1, 1, 101, 101, generator=generator).unbind()
    changed = style.clone()
    changed[..., 50, 50] += 100.0
    moved = (color.low_frequencies(changed - content) - color.low_frequencies(style - content)).abs() > 0
    rows = moved[0, 0].any(dim=1).nonzero()
    assert int(rows.min()) == 50 - sum(color.WAVELET_RADII)
    assert int(rows.max()) == 50 + sum(color.WAVELET_RADII)


def test_with_a_tolerance_small_differences_stay() -> None:
    """Of a whole image that is too bright, what goes beyond the tolerance is taken back; fine detail stays."""
    style = torch.full((1, 3, 40, 40), 0.5)
    detail = torch.zeros_like(style)
    detail[..., ::2] = 0.1
    detail -= color.low_frequencies(detail)
    for shift, left in ((0.02, 0.02), (-0.03, -0.03), (0.2, 0.03), (-0.2, -0.03)):
        corrected = color.wavelet(style + detail + shift, style, tolerance=0.03)
        torch.testing.assert_close(corrected, style + detail + left, atol=5e-3, rtol=0)


def test_luma_of_known_colours() -> None:
    white, black, red = (
        torch.tensor(c).reshape(1, 3, 1, 1) for c in ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    )
    assert float(color.luma(white)) * 255 == pytest.approx(235, abs=1e-4)
    assert float(color.luma(black)) * 255 == pytest.approx(16, abs=1e-4)
    assert float(color.gray(white)) == pytest.approx(1, abs=1e-6)
    assert float(color.luma(red)) * 255 == pytest.approx(81.481, abs=1e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_fast_correction_equals_its_formula_exactly(layout: torch.memory_format) -> None:
    def plain_blur(values: torch.Tensor, r: int) -> torch.Tensor:
        p = torch.nn.functional.pad(values, (r,) * 4, mode="replicate")
        columns = p[..., : -2 * r] + p[..., 2 * r :] + 2 * p[..., r:-r]
        return (columns[..., : -2 * r, :] + columns[..., 2 * r :, :] + 2 * columns[..., r:-r, :]) / 16

    content = TARGET.contiguous(memory_format=layout)
    low = SOURCE - content
    for radius in color.WAVELET_RADII:
        low = plain_blur(low, radius)
    kept = content.clone(), SOURCE.clone()
    assert torch.equal(color.wavelet(content, SOURCE), (content + low).clamp(0, 1))
    assert torch.equal(content, kept[0])
    assert torch.equal(SOURCE, kept[1])

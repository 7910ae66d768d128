import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from onestepsr.data.degradation.operators import jpeg

pytestmark = pytest.mark.numeric

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "degradation.npz")
IMAGES = torch.from_numpy(GOLDEN["images"])


def assert_matches(result, name, window):
    expected = torch.from_numpy(GOLDEN[name])
    off = (result[window] - expected).abs() > 2e-6
    assert off.float().mean() <= 1e-3  # a coefficient on a rounding tie may fall either way


@pytest.mark.parametrize(
    ("name", "quality"), [("q20", 20), ("q75", 75), ("float_q42.7", 42.7), ("mixed_q30_80", torch.tensor([30.0, 80.0]))]
)
def test_matches_the_published_code(name, quality):
    assert_matches(jpeg(IMAGES, quality), f"jpeg.{name}", np.s_[:, :, :16, -24:])


def test_sides_need_not_be_multiples_of_16():
    odd = torch.from_numpy(GOLDEN["jpeg.odd"])
    result = jpeg(odd, 60)
    assert result.shape == odd.shape == (1, 3, 37, 45)
    assert_matches(result, "jpeg.odd_q60", np.s_[:, :, -16:, -16:])


def test_close_to_a_real_encoder_and_worse_at_lower_quality():
    ramp = torch.linspace(0.2, 0.8, 64)
    image = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.flip(0).expand(64, 64)])
    stream = io.BytesIO()
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(stream, "JPEG", quality=50, subsampling="4:2:0")
    real = torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1) / 255
    assert (jpeg(image[None], 50)[0] - real).abs().mean() < 0.01
    errors = [float((jpeg(IMAGES, quality) - IMAGES).square().mean()) for quality in (95, 60, 20)]
    assert errors == sorted(errors)


def test_quality_given_is_left_as_it_was():
    quality = torch.tensor([30.0, 80.0])
    jpeg(IMAGES, quality)
    assert quality.tolist() == [30.0, 80.0]


def encoded(pixels, quality):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(stream) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("quality", [30, 60, 75])
def test_standard_variant_is_what_an_encoder_makes_of_a_small_image(quality):
    """On average over the pixels: an encoder's integer transform rounds some coefficients the other way, and so does
    a processor with other kernels (0.8 to 1.2 levels), where a coefficient lies between two steps."""
    gray = np.random.default_rng(0).integers(70, 180, (21, 37, 1), dtype=np.uint8).repeat(3, axis=2)
    picture, real = torch.from_numpy(gray).permute(2, 0, 1)[None].float() / 255, encoded(gray, quality)
    assert ((jpeg(picture, quality, variant="standard")[0] - real) * 255).abs().mean() < 2
    assert ((jpeg(picture, quality)[0] - real) * 255).abs().mean() > 6


def test_standard_variant_keeps_the_colour_of_the_last_columns():
    flat = np.full((37, 37, 3), (204, 153, 102), np.uint8)
    picture = torch.from_numpy(flat).permute(2, 0, 1)[None].float() / 255
    assert (jpeg(picture, 50, variant="standard")[0] - encoded(flat, 50)).abs().max() < 0.02
    assert (jpeg(picture, 50)[0] - encoded(flat, 50)).abs().max() > 0.1


def test_quality_100_is_nearly_lossless_in_both_variants():
    smooth = torch.linspace(0, 1, 48).expand(1, 3, 48, 48)
    for variant in ("published", "standard"):
        assert (jpeg(smooth, 100, variant=variant) - smooth).abs().max() < 0.02

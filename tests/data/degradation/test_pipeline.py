from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.rng import choose, generator
from onestepsr.data.degradation.operators import (
    add_gaussian_noise,
    add_poisson_noise,
    filter2d,
    gaussian_profile,
    reflect_pad,
    rescale,
    to_8bit,
    unsharp_mask,
)
from onestepsr.data.degradation.pipeline import (
    Degradation,
    DegradationConfig,
    StageConfig,
    apply_degradation,
    degrade,
    draw_degradation,
)
from onestepsr.data.degradation.presets import PRESETS, get_preset, mix

pytestmark = pytest.mark.numeric

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "degradation.npz")
IMAGES = torch.from_numpy(GOLDEN["images"])
CENTRE = np.s_[:, :, 24:40, 20:36]


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def photo(side=64):
    coarse = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    return F.interpolate(coarse, size=(side, side), mode="bicubic")[0].clamp(0, 1)


def test_filter_matches_the_published_code():
    result = filter2d(IMAGES, golden("filter.kernels"))
    torch.testing.assert_close(result[:, :, :16, -24:], golden("filter.out"), rtol=0, atol=2e-6)


def test_filter_equals_a_plain_convolution_to_float_rounding():
    kernels = golden("filter.kernels").double()
    padded = F.pad(IMAGES.double(), (10, 10, 10, 10), mode="reflect")
    plain = torch.cat([F.conv2d(padded[i : i + 1].transpose(0, 1), kernels[i][None, None]) for i in range(2)], 1)
    assert (filter2d(IMAGES, kernels.float()) - plain.transpose(0, 1)).abs().max() < 1e-6


def test_borders_reflect_again_where_the_image_is_smaller_than_the_kernel():
    image = torch.rand(1, 1, 3, 5)
    expected = np.pad(image[0, 0].numpy(), 7, mode="reflect")
    np.testing.assert_array_equal(reflect_pad(image, 7)[0, 0].numpy(), expected)
    assert reflect_pad(torch.rand(1, 1, 1, 9), 2).shape == (1, 1, 5, 13)


def test_unsharp_mask_matches_the_published_code():
    torch.testing.assert_close(unsharp_mask(IMAGES)[CENTRE], golden("usm.out"), rtol=0, atol=2e-6)
    strong = unsharp_mask(IMAGES, weight=0.9, threshold=5)
    torch.testing.assert_close(strong[CENTRE], golden("usm.strong"), rtol=0, atol=3e-6)
    np.testing.assert_allclose(gaussian_profile(51).numpy(), GOLDEN["usm.profile"], rtol=0, atol=1e-12)


def test_noise_matches_the_published_code_for_the_same_generator():
    rng = torch.Generator().manual_seed(7)
    sigma, gray = torch.rand(2, generator=rng) * 29 + 1, torch.rand(2, generator=rng) < 0.4
    result = add_gaussian_noise(IMAGES, sigma, gray, rng)
    torch.testing.assert_close(result[CENTRE], golden("noise.gaussian_seed7"), rtol=0, atol=1e-6)
    rng = torch.Generator().manual_seed(7)
    scale, gray = torch.rand(2, generator=rng) * 2.95 + 0.05, torch.rand(2, generator=rng) < 0.4
    result = add_poisson_noise(IMAGES, scale, gray, rng)
    torch.testing.assert_close(result[CENTRE], golden("noise.poisson_seed7"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("add", [add_gaussian_noise, add_poisson_noise])
def test_gray_noise_is_equal_in_all_channels_and_coloured_noise_is_not(add):
    flat = torch.full((2, 3, 32, 32), 0.5)
    flat[:, :, ::2] = 0.4
    noise = add(flat, torch.tensor([2.0, 2.0]), torch.tensor([True, False]), generator(0)) - flat
    assert (noise[0] - noise[0, :1]).abs().max() < 1e-6
    assert (noise[1] - noise[1, :1]).abs().max() > 1e-3


def test_noise_has_the_level_that_was_asked_for():
    flat = torch.full((1, 3, 128, 128), 0.5)
    noise = add_gaussian_noise(flat, torch.tensor([20.0]), torch.tensor([False]), generator(0)) - flat
    assert float(noise.std()) * 255 == pytest.approx(20, rel=0.03)
    two_levels = flat.clone()
    two_levels[..., ::2] = 0.25  # two distinct values: two photons at white
    shot = add_poisson_noise(two_levels, torch.tensor([0.1]), torch.tensor([False]), generator(0)) - two_levels
    assert float(shot[..., 1::2].std()) == pytest.approx(0.1 * (0.5 / 2) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_an_8bit_image_of_a_quarter_of_the_size(name):
    hr = photo(64)
    lr = degrade(hr, get_preset(name), generator(0, name))
    assert lr.shape == (3, 16, 16)
    torch.testing.assert_close(lr, to_8bit(lr), rtol=0, atol=0)
    assert torch.equal(lr, degrade(hr, get_preset(name), generator(0, name)))
    assert (F.interpolate(hr[None], scale_factor=0.25, mode="area")[0] - lr).abs().mean() < 0.2


def test_presets_order_by_damage():
    hr = photo(128)
    clean = degrade(hr, get_preset("bicubic"), generator(0))
    damage = {
        name: np.mean([float((degrade(hr, get_preset(name), generator(i)) - clean).abs().mean()) for i in range(12)])
        for name in ("camera", "real_esrgan")
    }
    assert 0 < damage["camera"] < 0.6 * damage["real_esrgan"]


def test_web_leaves_compression_blocks_in_the_lr_image():
    """Steps between columns are larger where blocks of 8 meet."""
    hr = photo(256)

    def blocks(name: str) -> float:
        steps = torch.stack([degrade(hr, get_preset(name), generator(i)).diff(dim=-1).abs() for i in range(12)])
        at_borders = torch.arange(steps.shape[-1]) % 8 == 7
        return float(steps[..., at_borders].mean() / steps[..., ~at_borders].mean())

    assert blocks("bicubic") < 1.1
    assert blocks("web") > 1.2 * max(blocks("camera"), blocks("real_esrgan"))


def test_published_settings():
    real, resshift = PRESETS["real_esrgan"](), PRESETS["resshift"]()
    assert real.first.kernels.sizes == tuple(range(7, 22, 2)) == real.final_sinc_sizes
    assert real.second.probability == 1
    assert real.sharpen is False
    assert resshift.first.kernels.sizes == tuple(range(3, 20, 2))
    assert resshift.second.kernels.sizes == tuple(range(3, 14, 2)) == resshift.final_sinc_sizes
    assert resshift.second.probability == 0.5
    assert resshift.second.blur_probability == resshift.final_sinc_probability == 0.8
    assert (resshift.first.kernels.sigma, resshift.second.kernels.sigma) == ((0.2, 3), (0.2, 1.5))
    assert (resshift.first.resize_range, resshift.second.resize_range) == ((0.15, 1.5), (0.3, 1.2))
    assert (resshift.first.gaussian_sigma, resshift.second.gaussian_sigma) == ((1, 30), (1, 25))
    assert (resshift.first.poisson_scale, resshift.second.poisson_scale) == ((0.05, 3), (0.05, 2.5))
    assert resshift.first_jpeg == resshift.final_jpeg == (30, 95)
    assert resshift.sharpen is False
    assert (real.second.gaussian_sigma, real.second.resize_range) == ((1, 25), (0.3, 1.2))


def test_drawn_parameters_follow_the_configuration():
    config, rng = get_preset("resshift"), generator(0, "draws")
    drawn = [draw_degradation(config, rng) for _ in range(600)]
    assert sum(d.second is None for d in drawn) / 600 == pytest.approx(0.5, abs=0.06)
    assert sum(d.final_sinc is not None for d in drawn) / 600 == pytest.approx(0.8, abs=0.05)
    assert sum(d.final_resize_first for d in drawn) / 600 == pytest.approx(0.5, abs=0.06)
    assert sum(d.first.scale < 1 for d in drawn) / 600 == pytest.approx(0.7, abs=0.06)
    assert all(0.15 <= d.first.scale <= 1.5 and 30 <= d.first_jpeg <= 95 for d in drawn)


def test_what_was_drawn_survives_being_written_down():
    drawn = draw_degradation(get_preset("real_esrgan"), generator(11))
    again = from_mapping(Degradation, to_mapping(drawn))
    assert again == drawn
    hr = photo()
    assert torch.equal(apply_degradation(hr, drawn, generator(1)), apply_degradation(hr, again, generator(1)))


def test_batches_get_one_draw_per_image():
    hr = photo()[None].repeat(2, 1, 1, 1)
    lr = degrade(hr, get_preset("real_esrgan"), generator(2))
    assert lr.shape == (2, 3, 16, 16)
    assert not torch.equal(lr[0], lr[1])


def test_bicubic_preset_is_antialiased_bicubic():
    hr = photo()
    expected = F.interpolate(hr[None], size=(16, 16), mode="bicubic", antialias=True)[0]
    assert torch.equal(degrade(hr, get_preset("bicubic"), generator(0)), to_8bit(expected))


def test_sharpening_changes_the_source():
    plain = replace(get_preset("bicubic"), sharpen=False)
    hr = (photo() > 0.5).float() * 0.5 + 0.25
    assert not torch.equal(degrade(hr, plain, generator(0)), degrade(hr, replace(plain, sharpen=True), generator(0)))


def test_tiny_and_oblong_images_work():
    for size in ((4, 4), (8, 64)):
        hr = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
        for seed in range(6):
            assert degrade(hr, get_preset("real_esrgan"), generator(seed)).shape == (3, size[0] // 4, size[1] // 4)


def test_sides_must_fit_the_scale():
    with pytest.raises(ValueError, match="multiples of 4"):
        degrade(torch.rand(3, 30, 32), get_preset("camera"), generator(0))


def test_rescale_samples_at_the_exact_factor():
    image = photo(50)[None]
    assert torch.equal(rescale(image, 0.33, "bilinear"), F.interpolate(image, scale_factor=0.33, mode="bilinear"))
    assert rescale(image, 0.001, "area").shape[-2:] == (1, 1)


def test_mixtures_take_both_parts_in_their_shares():
    recipe = mix({"bicubic": 3, "real_esrgan": 1})
    drawn = [draw_degradation(recipe, generator(i, "mix")) for i in range(400)]
    assert sum(d.first is None for d in drawn) / 400 == pytest.approx(0.75, abs=0.07)


def test_bad_names_and_numbers_are_named():
    with pytest.raises(UserError, match="did you mean 'camera'"):
        get_preset("camara")
    with pytest.raises(UserError, match="itself a mixture"):
        mix({"mixed": 1.0})
    with pytest.raises(ValueError, match="weights"):
        mix({"camera": 0.0})
    with pytest.raises(ValueError, match="resize_range"):
        StageConfig(resize_range=(0.5, 0.9))
    with pytest.raises(ValueError, match="final_jpeg"):
        DegradationConfig(final_jpeg=(0.0, 95.0))
    with pytest.raises(UserError, match=r"unknown setting 'degradation.first.blur'"):
        from_mapping(DegradationConfig, {"first": {"blur": 1}}, "degradation")


def test_entries_of_no_weight_are_never_drawn():
    assert {choose([0, 1, 0], generator(i)) for i in range(20)} == {1}

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.rng import generator
from onestepsr.data.datasets import DataConfig, build_dataset
from onestepsr.data.degradation.operators import filter2d, jpeg, to_8bit
from onestepsr.data.degradation.pipeline import (
    Degradation,
    FaceDegradationConfig,
    apply_degradation,
    degrade_pair,
    draw_degradation,
)
from onestepsr.data.degradation.presets import get_preset, mix
from onestepsr.methods.base import Method
from onestepsr.train.run import check_sizes

pytestmark = pytest.mark.numeric

NEVER_GREY = FaceDegradationConfig(gray_probability=0.0)


def face(side=96):
    coarse = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    return F.interpolate(coarse, size=(side, side), mode="bicubic")[0].clamp(0, 1)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    for number in range(3):
        pixels = (face(64 + 8 * number) * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_published_settings():
    ours, osediff = get_preset("face_resshift"), get_preset("face_osediff")
    for config in (ours, osediff):
        assert config.kernels.sizes == (41,)
        assert config.kernels.gaussian == (0.5, 0.5)
        assert config.kernels.sinc_probability == sum(config.kernels.generalized) == sum(config.kernels.plateau) == 0
        assert (config.noise_sigma, config.jpeg, config.resize_mode) == ((0, 20), (30, 100), "bilinear")
    assert (ours.kernels.sigma, ours.shrink, ours.gray_probability) == ((0.1, 15), (0.8, 32), 0.01)
    assert (osediff.kernels.sigma, osediff.shrink, osediff.gray_probability) == ((1, 15), (1, 30), 0)


def test_draws_are_even_in_the_factor_by_which_the_image_shrinks():
    drawn = [draw_degradation(get_preset("face_resshift"), generator(i, "face")) for i in range(600)]
    factors = np.array([1 / d.second.scale for d in drawn])
    assert factors.min() >= 0.8 - 1e-9
    assert factors.max() <= 32
    np.testing.assert_allclose(
        np.quantile(factors, [0.25, 0.5, 0.75]), 0.8 + 31.2 * np.array([0.25, 0.5, 0.75]), atol=2
    )
    isotropic = [d.second.blur.sigma_x == d.second.blur.sigma_y for d in drawn]
    assert np.mean(isotropic) == pytest.approx(0.5, abs=0.07)
    assert all(d.second.noise.kind == "gaussian" and not d.second.noise.gray for d in drawn)
    assert 0 < np.mean([d.gray == "both" for d in drawn]) < 0.03


def test_the_image_is_the_formula_step_by_step():
    hr = face(96)
    drawn = draw_degradation(replace(NEVER_GREY, shrink=(7.0, 7.5), jpeg=(60.0, 60.0)), generator(4))
    sigma = drawn.second.noise.level / 255
    assert sigma > 0.01
    small = F.interpolate(filter2d(hr[None], drawn.second.blur.tensor()), size=(13, 13), mode="bilinear")
    noisy = (small + sigma * torch.randn(small.shape, generator=generator(8))).clamp(0, 1)
    expected = F.interpolate(jpeg(noisy, 60.0, variant="standard"), size=(96, 96), mode="bilinear")
    torch.testing.assert_close(apply_degradation(hr, drawn, generator(8), scale=1), to_8bit(expected)[0])


def test_lr_and_hr_lie_on_each_other():
    """A ramp comes back as the same ramp: cutting to whole pixels on the way down must not stretch the image."""
    ramp = torch.linspace(0.2, 0.8, 100).expand(3, 100, 100)
    kernels = replace(NEVER_GREY.kernels, sigma=(0.1, 0.1))
    gentle = replace(NEVER_GREY, kernels=kernels, shrink=(10.9, 10.9), noise_sigma=(0.0, 0.0), jpeg=(100.0, 100.0))
    _, lr = degrade_pair(ramp, gentle, generator(0), scale=1)
    assert (lr - ramp)[:, :, 10:-10].abs().max() < 0.02


def test_images_without_colour_have_targets_without_colour():
    hr = face()
    target, lr = degrade_pair(hr, replace(NEVER_GREY, gray_probability=1.0), generator(0), scale=1)
    assert all(torch.equal(image[0], image[channel]) for image in (target, lr) for channel in (1, 2))
    expected = 0.299 * hr[0] + 0.587 * hr[1] + 0.114 * hr[2]
    assert (target[0] - expected).abs().max() <= 0.5 / 255 + 1e-6
    target, lr = degrade_pair(hr, replace(NEVER_GREY, gray_probability=1.0, gray_target=False), generator(0), scale=1)
    assert torch.equal(target, hr)
    assert torch.equal(lr[0], lr[1])


def test_what_was_drawn_survives_being_written_down():
    drawn = draw_degradation(get_preset("face_osediff"), generator(11))
    assert from_mapping(Degradation, to_mapping(drawn)) == drawn


def test_photos_give_pairs_of_one_size(photos, tmp_path):
    config = DataConfig(paths=(photos,), crop=48, scale=1, degradation="face_resshift", cache_dir=tmp_path / "cache")
    samples = [build_dataset(config, seed=0)[index] for index in range(4)]
    for sample in samples:
        assert sample["hr"].shape == sample["lr"].shape == (3, 48, 48)
        assert not torch.equal(sample["hr"], sample["lr"])
    pooled = build_dataset(replace(config, pool_size=2, flips=False), seed=0)
    fresh = build_dataset(replace(config, flips=False), seed=0)
    assert torch.equal(pooled.entry(1)["lr"], fresh[1]["lr"])
    pairs = DataConfig(kind="pairs", paths=(photos,), lr_paths=(photos,), crop=48, scale=1, flips=False)
    sample = build_dataset(pairs, seed=0)[0]
    assert torch.equal(sample["hr"], sample["lr"])


def test_networks_of_another_scale_refuse_the_data(photos):
    data = DataConfig(paths=(photos,), crop=48, scale=1, degradation="face_resshift")
    check_sizes(Method(networks={}, phases=(), scale=1, hr_multiple=8), data, "data")
    with pytest.raises(UserError, match=r"data.scale: 1, but the backbone of this run enlarges 4 times"):
        check_sizes(Method(networks={}, phases=(), scale=4), data, "data")


def test_settings_can_be_given_one_by_one(photos):
    values = {"paths": [str(photos)], "scale": 1, "degradation": {"shrink": [1, 8], "noise_sigma": [0, 5]}}
    recipe = from_mapping(DataConfig, values).recipe()
    assert recipe == FaceDegradationConfig(shrink=(1.0, 8.0), noise_sigma=(0.0, 5.0))
    parts = mix({"face_resshift": 1, "face_osediff": 3}).shares
    assert [part.degradation for part in parts] == [get_preset("face_resshift"), get_preset("face_osediff")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shrink": (8.0, 2.0)}, "shrink is"),
        ({"noise_sigma": (-1.0, 2.0)}, "noise_sigma is"),
        ({"jpeg": (0.0, 100.0)}, "jpeg is"),
        ({"gray_probability": 1.5}, "gray_probability is 1.5"),
    ],
)
def test_numbers_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FaceDegradationConfig(**settings)

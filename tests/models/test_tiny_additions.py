"""Grain and even contrast for a trained generator: neutral until they are used, and in step on every tile."""

from __future__ import annotations

import pytest
import torch

from onestepsr.errors import UserError
from onestepsr.models.architectures import TinyGeneratorConfig, tiny_generator
from onestepsr.models.blend import blend
from onestepsr.models.generators import BicubicGenerator, OneStepLatentGenerator
from onestepsr.models.tiny import TinyConfig
from onestepsr.models.tiny_additions import alike, tiny_config, with_gain, with_grain

SIZES = TinyConfig(
    widths=(8, 8), down_blocks=(1, 1), up_blocks=(1, 1), decoder_width=8, encoder_width=8, refine_width=4
)


@pytest.fixture
def generator() -> OneStepLatentGenerator:
    torch.manual_seed(0)
    made = tiny_generator(TinyGeneratorConfig(model=SIZES)).eval()
    with torch.no_grad():  # else the last convolution of a fresh decoder is zero
        made.autoencoder.decoder.refine.conv2.weight.normal_(std=0.1)
    return made


def grainy(generator: OneStepLatentGenerator) -> OneStepLatentGenerator:
    made = with_grain(generator)
    with torch.no_grad():
        made.autoencoder.decoder.refine.conv1.weight[:, -1].normal_()
    return made


def test_additions_change_nothing_by_themselves(generator: OneStepLatentGenerator) -> None:
    lr = torch.rand(2, 3, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(with_grain(generator)(lr), generator(lr), rtol=0, atol=1e-6)
        torch.testing.assert_close(with_gain(generator)(lr), generator(lr), rtol=0, atol=1e-6)


def test_grain_is_the_same_every_time_and_at_every_place_of_a_tile(generator: OneStepLatentGenerator) -> None:
    made = grainy(generator)
    assert made.lr_multiple == 16, "64 pixels of the output"
    lr = torch.full((1, 3, 48, 48), 0.5)
    with torch.no_grad():
        whole = made(lr)
        assert torch.equal(whole, made(lr))
        assert whole[..., 40:-40, 40:-40].std() > 1e-3, "grain on a flat picture"
        tile = made(lr[..., 16:, 16:])
    torch.testing.assert_close(tile[..., 64:, 64:], whole[..., 128:, 128:], rtol=0, atol=1e-5)


def test_models_of_one_family_can_be_blended_whatever_they_have(generator: OneStepLatentGenerator) -> None:
    first, second = alike(with_gain(generator, torch.full((4, 4), 2.0)), grainy(generator))
    for model in (first, second):
        config = tiny_config(model)
        assert config is not None
        assert config.grain
        assert config.even_contrast
    half = blend(first, second, 0.5)
    assert half.autoencoder.decoder.even.gain.mean().item() == pytest.approx(1.5)
    assert alike(generator, generator) == (generator, generator)
    assert alike(BicubicGenerator(), generator)[1] is generator


def test_what_has_no_such_decoder_is_refused(generator: OneStepLatentGenerator) -> None:
    with pytest.raises(UserError, match="grain is for models on the tiny backbone"):
        with_grain(BicubicGenerator())
    plain = tiny_generator(TinyGeneratorConfig(model=TinyConfig(widths=(8,), down_blocks=(1,), up_blocks=(1,))))
    with pytest.raises(UserError, match="refine_width"):
        with_grain(plain)
    with pytest.raises(ValueError, match="refine_width"):
        TinyConfig(grain=True)


def test_a_frozen_part_stays_frozen(generator: OneStepLatentGenerator) -> None:
    generator.autoencoder.encoder.requires_grad_(False)
    made = with_grain(generator)
    assert not any(p.requires_grad for p in made.autoencoder.encoder.parameters())
    assert made.autoencoder.decoder.refine.conv1.weight.requires_grad

"""Fine contrast by position in a latent cell: measured, taken back, and kept in the weights file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from onestepsr.errors import UserError
from onestepsr.models.architectures import TinyGeneratorConfig, describe, tiny_generator
from onestepsr.models.blend import blend
from onestepsr.models.convert import convert, lr_pictures
from onestepsr.models.even_contrast import GAIN, alike, make_even, with_gain
from onestepsr.models.generators import BicubicGenerator, OneStepLatentGenerator
from onestepsr.models.registry import load_network, save_model
from onestepsr.models.tiny import TinyConfig
from onestepsr.models.tiny_decoder import EvenContrast, fine_contrast

SIZES = TinyConfig(widths=(8, 8), down_blocks=(1, 1), up_blocks=(1, 1), decoder_width=8, encoder_width=8)


@pytest.fixture
def uneven() -> OneStepLatentGenerator:
    """A generator without training: bicubic enlargement through the autoencoder, weaker between the samples."""
    torch.manual_seed(0)
    return tiny_generator(TinyGeneratorConfig(model=SIZES)).eval()


def pictures(count: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.rand(1, 3, 20, 24) for _ in range(count)]


def unevenness(generator: torch.nn.Module) -> float:
    with torch.no_grad():
        detail = torch.cat([fine_contrast(generator(lr)) for lr in pictures()]).abs()
    averages = detail.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(0, 1, 2, 3))
    return float(averages.std() / averages.mean())


def test_contrast_comes_out_even_and_the_means_stay(uneven: OneStepLatentGenerator) -> None:
    even = make_even(uneven, pictures())
    assert unevenness(uneven) > 0.05
    assert unevenness(even) < 0.1 * unevenness(uneven)
    before, after = (torch.cat([net(lr) for lr in pictures()]).mean() for net in (uneven, even))
    assert after.item() == pytest.approx(before.item(), abs=2e-3)


def test_colour_is_left_alone(uneven: OneStepLatentGenerator) -> None:
    scaled = EvenContrast()
    scaled.gain += torch.rand(4, 4)
    image = torch.rand(1, 3, 16, 8)
    torch.testing.assert_close((scaled(image) - image)[:, 0], (scaled(image) - image)[:, 2])
    assert torch.equal(EvenContrast()(image), image), "factors of one change nothing"


def test_factors_of_one_change_nothing_and_make_models_alike(uneven: OneStepLatentGenerator) -> None:
    lr = pictures()[0]
    with torch.no_grad():
        torch.testing.assert_close(with_gain(uneven)(lr), uneven(lr), rtol=0, atol=1e-6)
    first, second = alike(with_gain(uneven, torch.full((4, 4), 2.0)), uneven)
    assert blend(first, second, 0.5).state_dict()[GAIN].mean().item() == pytest.approx(1.5)
    assert alike(uneven, uneven) == (uneven, uneven)
    assert alike(BicubicGenerator(), uneven)[1] is uneven


def test_a_file_keeps_the_factors(uneven: OneStepLatentGenerator, tmp_path: Path) -> None:
    architecture, config = describe(uneven)
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_model(source, architecture=architecture, config=config, state_dict=uneven.state_dict())
    (tmp_path / "LR").mkdir()
    for number, lr in enumerate(pictures()):
        pixels = (lr[0].permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "LR" / f"{number}.png")
    (tmp_path / "LR" / "notes.txt").write_text("no picture")
    convert(source, target, even_contrast=tmp_path / "LR")
    assert unevenness(load_network(target).eval()) < 0.1 * unevenness(uneven)


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="for models on the tiny backbone"):
        make_even(BicubicGenerator(), pictures())
    with pytest.raises(UserError, match="no such folder"):
        next(lr_pictures(tmp_path / "missing"))
    with pytest.raises(UserError, match="no pictures"):
        next(lr_pictures(tmp_path))

"""Fine contrast at the positions of a latent cell: made equal, for any image, and kept in the weights file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onestepsr.core.config import from_mapping
from onestepsr.core.errors import UserError
from onestepsr.evaluate.metrics.fidelity import grid_artifact
from onestepsr.methods.d3sr import D3SRConfig, build
from onestepsr.models.architectures import describe
from onestepsr.models.convert import convert
from onestepsr.models.generators import BicubicGenerator, OneStepLatentGenerator
from onestepsr.models.loading import load_network
from onestepsr.models.tiny.generator import (
    TinyGeneratorConfig,
    equalize_subpixel_contrast,
    match_architecture,
    tiny_generator,
)
from onestepsr.models.tiny.networks import LARGEST_FACTOR, EvenContrast, TinyConfig, local_mean
from onestepsr.weights.files import save_model

pytestmark = pytest.mark.numeric

SIZES = TinyConfig(widths=(8, 8), down_blocks=(1, 1), up_blocks=(1, 1), decoder_width=8, encoder_width=8)


@pytest.fixture
def uneven() -> OneStepLatentGenerator:
    """A generator without training: bicubic enlargement through the autoencoder, weaker between the samples."""
    torch.manual_seed(0)
    return tiny_generator(TinyGeneratorConfig(model=SIZES)).eval()


def grid(image: Tensor) -> float:
    return float(grid_artifact((image + 1) / 2).mean())


def texture(height: int = 96, width: int = 128) -> Tensor:
    """Gray noise (1, 3, height, width) in [-0.5, 0.5], rough on the left and fine on the right."""
    torch.manual_seed(2)
    noise = torch.rand(1, 1, height, width) - 0.5
    smooth = local_mean(noise, 3, 3)
    return torch.cat([smooth[..., : width // 2], noise[..., width // 2 :]], dim=-1).expand(1, 3, -1, -1).contiguous()


def on_lattice(gain: Tensor, image: Tensor) -> Tensor:
    """The image with its detail scaled by a factor (4, 4) for each position in a cell."""
    detail = image - local_mean(image, 5, 5)
    return image + detail * (gain - 1).repeat(image.shape[-2] // 4, image.shape[-1] // 4)


def test_a_lattice_that_differs_from_place_to_place_is_taken_back() -> None:
    plain = texture()
    gain = 0.85 + 0.3 * torch.rand(4, 4)
    left, right = on_lattice(gain, plain), on_lattice(2 - gain, plain)
    uneven = torch.cat([left[..., :64], right[..., 64:]], dim=-1)
    assert grid(left) > 0.06
    for image in (left, right, uneven):
        even = EvenContrast()(image)
        for part in (slice(0, 64), slice(64, 128)):
            assert grid(even[..., part]) < 0.45 * grid(image[..., part])


def test_texture_without_a_lattice_changes_little() -> None:
    plain = texture()
    change, detail = EvenContrast()(plain) - plain, plain - local_mean(plain, 5, 5)
    assert change.square().mean() < 0.02 * detail.square().mean()


def test_brightness_and_colour_stay() -> None:
    image = texture() * torch.tensor([1.0, 0.5, -0.5])[:, None, None]
    change = EvenContrast()(image) - image
    torch.testing.assert_close(change[:, 0], change[:, 2])
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(F.avg_pool2d(change, 16), torch.zeros(1, 3, 6, 8), rtol=0, atol=0.02)


def test_what_has_no_detail_or_little_is_left_alone() -> None:
    flat = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(EvenContrast()(flat), flat)
    faint = flat + 0.0001 * torch.randn(1, 1, 16, 16)  # an eightieth of a gray level
    torch.testing.assert_close(EvenContrast()(faint), faint, rtol=0, atol=5e-5)


def test_a_lattice_that_colours_carry_against_each_other_is_taken_back() -> None:
    plain = texture()
    gain = 0.7 + 0.6 * torch.rand(4, 4)
    red, green = on_lattice(gain, plain)[:, :1], on_lattice(2 - gain, plain)[:, 1:2]  # their mean has none
    image = torch.cat([red, green, plain[:, 2:]], dim=1)
    assert grid(image) > 0.04
    assert grid(EvenContrast()(image)) < 0.5 * grid(image)


def test_detail_changes_by_no_more_than_the_largest_factor() -> None:
    dots = torch.zeros(1, 3, 64, 64)
    dots[..., ::4, ::4] = 1.0
    change = (EvenContrast()(dots) - dots).abs().max()
    assert 0 < change < LARGEST_FACTOR**3 - 1


def test_a_part_of_a_image_comes_out_as_in_the_whole() -> None:
    reach = 4 * 16
    wide = texture(64 + 2 * reach, 64 + 2 * reach)
    inner = EvenContrast()(wide[..., 4:-4, 4:-4])[..., reach - 4 : -reach + 4, reach - 4 : -reach + 4]
    torch.testing.assert_close(inner, EvenContrast()(wide)[..., reach:-reach, reach:-reach])


def test_half_precision_agrees() -> None:
    image = texture()
    torch.testing.assert_close(EvenContrast()(image.bfloat16()).float(), EvenContrast()(image), rtol=0, atol=0.01)


def test_models_are_made_alike(uneven: OneStepLatentGenerator) -> None:
    even = equalize_subpixel_contrast(uneven)
    assert all(torch.equal(value, uneven.state_dict()[key]) for key, value in even.state_dict().items())
    for first, second in (match_architecture(even, uneven), match_architecture(uneven, even)):
        assert describe(first) == describe(second) == describe(even)
    assert match_architecture(uneven, uneven) == (uneven, uneven)
    assert match_architecture(BicubicGenerator(), uneven)[1] is uneven


def test_a_file_keeps_it(uneven: OneStepLatentGenerator, tmp_path: Path) -> None:
    architecture, config = describe(uneven)
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_model(source, architecture=architecture, config=config, state_dict=uneven.state_dict())
    convert(source, target, even_contrast=True)
    torch.manual_seed(1)
    lr = torch.rand(1, 3, 40, 48)
    with torch.no_grad():
        before, after = (grid(load_network(file).eval()(lr) * 2 - 1) for file in (source, target))
    assert after < 0.8 * before


def test_d3sr_trains_through_it(uneven: OneStepLatentGenerator, tmp_path: Path) -> None:
    architecture, config = describe(uneven)
    file = tmp_path / "a.safetensors"
    save_model(file, architecture=architecture, config=config, state_dict=uneven.state_dict())
    values = {
        "backbone": str(file),
        "adversarial_weight": 0.0,
        "extras": {"train_decoder": True, "even_contrast": True},
    }
    trained = build(from_mapping(D3SRConfig, values, "recipe")).networks["generator"]
    assert any(isinstance(module, EvenContrast) for module in trained.modules())
    trained(torch.rand(1, 3, 16, 16))[0].square().mean().backward()
    weight = trained.get_parameter("generator.autoencoder.decoder.conv_out.weight")
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().max() > 0


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="for models on the tiny backbone"):
        equalize_subpixel_contrast(BicubicGenerator())

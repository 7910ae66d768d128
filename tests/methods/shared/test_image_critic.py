"""What a critic of images is shown: cut images, the enlarged input and the lattice, at the same places."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from onestepsr.imaging.resize import bicubic
from onestepsr.methods.base import SampleRandom
from onestepsr.methods.shared.adversarial import (
    CRITIC,
    CriticConfig,
    GeneratorOutput,
    ImageCritic,
    lattice_planes,
    shifted,
    warped,
)


class Fixed(SampleRandom):
    """Draws the same integers for all axes."""

    def __init__(self, values: Sequence[int]) -> None:
        self.values, self.asked = torch.tensor(values), list[tuple[int, int]]()

    def integers(self, low: int, high: int) -> Tensor:
        self.asked.append((low, high))
        return self.values


class Watched:
    """A critic with one region, whose logit is the images' mean and whose only feature is the images."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, ...]] = []

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        self.seen.append(arguments)
        images = arguments[0]
        return images.mean(dim=(1, 2, 3), keepdim=True), images


def image(number: int, count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(number))


def test_images_are_moved_by_up_to_eight_pixels_along_both_axes() -> None:
    x = torch.arange(9 * 10, dtype=torch.float32).reshape(1, 1, 9, 10).expand(300, -1, -1, -1)
    (parts,) = shifted([x], SampleRandom("places", samples=range(300)))
    assert parts.shape == (300, 1, 1, 2)
    rows, columns = (parts[:, 0, 0, 0] // 10).tolist(), (parts[:, 0, 0, 0] % 10).tolist()
    assert set(rows) == set(columns) == set(range(9))
    assert rows != columns


def test_images_are_turned_and_enlarged_within_their_frame() -> None:
    """Images of columns and of rows show where each pixel of a warped image comes from."""
    count, side = 300, 33
    rows, columns = torch.meshgrid(torch.arange(33.0), torch.arange(33.0), indexing="ij")
    x, y = (plane.expand(count, 1, -1, -1) for plane in (columns, rows))
    from_x, from_y = (one[:, 0] for one in warped([x, y], SampleRandom("warp", samples=range(count)), 0.5))
    far = side - 5  # over many pixels: this bicubic interpolation bends straight lines a little between them
    right = torch.stack([one[:, 16, far] - one[:, 16, 4] for one in (from_x, from_y)], dim=1) / (far - 4)
    down = torch.stack([one[:, far, 16] - one[:, 4, 16] for one in (from_x, from_y)], dim=1) / (far - 4)
    kept = (from_x == columns).flatten(1).all(dim=1) & (from_y == rows).flatten(1).all(dim=1)
    assert 120 < kept.sum() < 180, "half of the samples stay"
    right, down = right[~kept], down[~kept]
    torch.testing.assert_close(down, torch.stack([-right[:, 1], right[:, 0]], dim=1), rtol=0, atol=0.01)
    angle = torch.atan2(right[:, 1], right[:, 0])
    assert -15.5 < angle.rad2deg().min() < -14
    assert 14 < angle.rad2deg().max() < 15.5
    zoom = 1 / (angle.cos() + angle.sin().abs()) / right.norm(dim=1)
    assert 0.99 < zoom.min() < 1.03
    assert 1.47 < zoom.max() < 1.51
    assert (from_x[:, 16, 16] - 16).abs().max() < 1e-3, "around the middle"
    corners = torch.stack([one[:, i, j] for one in (from_x, from_y) for i in (1, -2) for j in (1, -2)])
    assert corners.min() > 0, "nothing from beyond the frame"
    assert corners.max() < side - 1


@pytest.mark.parametrize(("conditional", "lattice"), [(True, False), (False, True), (True, True)])
def test_conditions_are_cut_at_the_places_of_the_images(conditional: bool, lattice: bool) -> None:
    """Two images and one condition for both: the input enlarged fourfold, then the lattice."""
    critic = ImageCritic(CriticConfig(conditional=conditional, lattice=lattice))
    hr, sr, lr, watched = image(0, 2, 16, 24), image(1, 2, 16, 24), image(2, 2, 4, 6), Watched()
    random = Fixed([3, 5])
    critic.discriminator_loss({CRITIC: watched}, {"hr": hr, "sr": sr, "lr": lr}, random)
    ((images, condition),) = watched.seen

    def cut(x: Tensor) -> Tensor:
        return torch.stack([x[0, :, 3:11, 3:19], x[1, :, 5:13, 5:21]])

    assert random.asked == [(0, 9), (0, 9)]
    assert torch.equal(images, torch.cat([cut(hr), cut(sr)]))
    whole = [bicubic(lr, 4)] if conditional else []
    whole += [lattice_planes(hr, 4)] if lattice else []
    expected = cut(torch.cat(whole, dim=1))
    assert condition.shape[1] == critic.condition_channels == 3 * conditional + 6 * lattice
    assert torch.equal(condition, torch.cat([expected, expected]))


@pytest.mark.parametrize("told", [False, True])
def test_without_matching_the_critic_sees_restored_images_alone(told: bool) -> None:
    sr, watched = image(0, 2, 16, 16), Watched()
    output = GeneratorOutput(sr=sr, z_sr=sr, hr=sr, lr=image(1, 2, 4, 4))
    critic = ImageCritic(CriticConfig(weight=1.0, conditional=told, lattice=told))
    critic.generator_loss({CRITIC: watched}, output, Fixed([0, 8]))
    ((images, *conditions),) = watched.seen
    assert torch.equal(images, torch.stack([sr[0, :, :8, :8], sr[1, :, 8:, 8:]]))
    assert [tuple(condition.shape) for condition in conditions] == [(2, 9, 8, 8)] * told


def test_a_conditional_critic_says_what_it_misses() -> None:
    critic = ImageCritic(CriticConfig(weight=1.0, conditional=True, lattice=True))
    sr = image(0, 2, 16, 16)
    with pytest.raises(ValueError, match="needs a condition of 9 channels"):
        critic.generator_loss({CRITIC: critic.network()}, GeneratorOutput(sr=sr, z_sr=sr), Fixed([0, 0]))


def test_matching_reaches_the_generator_through_features_and_logits() -> None:
    """-0.1 sigmoid(2) of the logit, and -0.1 * 0.5 of |fake - real| at every one of its values, averaged."""
    critic, watched = ImageCritic(CriticConfig(weight=0.1, matching=0.5)), Watched()
    sr = torch.full((3, 3, 16, 16), -2.0, requires_grad=True)
    hr = torch.ones(3, 3, 16, 16, requires_grad=True)
    critic.generator_loss({CRITIC: watched}, GeneratorOutput(sr=sr, z_sr=sr, hr=hr), Fixed([0, 0, 0])).backward()
    assert sr.grad is not None
    assert sr.grad.sum().item() == pytest.approx(-0.1 / (1 + math.exp(-2)) - 0.1 * 0.5, rel=1e-5)


def test_planes_are_waves_of_one_and_two_periods_per_input_pixel() -> None:
    """cos, sin and cos of the double angle, each as 0 to 1, of rows and then of columns."""
    planes = lattice_planes(torch.zeros(2, 3, 8, 12), 4)
    assert planes.shape == (2, 6, 8, 12)
    one_period = torch.tensor([[1, 0.5, 0, 0.5], [0.5, 1, 0.5, 0], [1, 0, 1, 0]])  # (wave, position in the input pixel)
    torch.testing.assert_close(planes[0, :3], one_period.repeat(1, 2)[:, :, None].expand(3, 8, 12))
    torch.testing.assert_close(planes[1, 3:], one_period.repeat(1, 3)[:, None].expand(3, 8, 12))
    assert lattice_planes(torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), 4).dtype == torch.bfloat16

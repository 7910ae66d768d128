"""Latents, schedules, previews and exports of the residual-shifting methods, with networks that can be followed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from residual_pairs import MICRO
from torch import Tensor, nn

from onestepsr.diffusion.residual_shift import NoisePlane
from onestepsr.imaging.resize import bicubic
from onestepsr.methods.shared.residual_shift import (
    AUTOENCODER,
    DENOISER,
    FrozenAutoencoder,
    latents,
    preview_of,
    whole_schedule,
    with_sampling,
)
from onestepsr.models.loading import load_residual_generator
from onestepsr.models.resshift.generator import ResidualShiftGenerator


class Linear(nn.Module):
    """An autoencoder of images of one size: their values times a trained factor, and plus 3 on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(10.0))

    def encode(self, x: Tensor) -> Tensor:
        return self.factor * x

    def decode(self, z: Tensor) -> Tensor:
        return z / self.factor + 3


def images(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    sharp = torch.randint(0, 2, (3, 3, 4, 4), generator=rng).float()  # overshoots where it is enlarged
    return {"hr": torch.rand(3, 3, 16, 16, generator=rng), "lr": sharp}


@pytest.fixture(scope="module")
def generator() -> ResidualShiftGenerator:
    return load_residual_generator(MICRO)


def test_images_are_coded_and_decoded_as_minus_one_to_one() -> None:
    network, x = FrozenAutoencoder(Linear()), torch.tensor([0.0, 0.25, 1.0]).reshape(1, 1, 1, 3)
    assert network(x).flatten().tolist() == [-10, -5, 10]
    z = torch.tensor([-10.0, 0.0, 30.0], requires_grad=True)
    image = network(z, decode=True)
    assert image.tolist() == [1.5, 2, 3.5]
    image.sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == pytest.approx([0.05] * 3)
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training


def test_latents_are_those_of_the_photo_and_of_the_enlarged_image_without_a_graph(
    generator: ResidualShiftGenerator,
) -> None:
    batch, network = images(), nn.Conv2d(3, 3, 1)
    z_0, z_y = latents({AUTOENCODER: network}, generator, batch)
    torch.testing.assert_close(z_0, network(batch["hr"]))
    torch.testing.assert_close(z_y, network(bicubic(batch["lr"], 4)))
    assert not z_0.requires_grad
    assert not z_y.requires_grad


@pytest.mark.parametrize(
    ("kappa", "min_noise", "capped", "start"),
    [
        (1.0, 0.2, True, 0.0316228),
        (2.0, 0.2, True, 0.0316228),
        (0.5, 0.2, True, 0.0316228),
        (2.0, 0.04, True, 0.02),
        (0.5, 0.03, True, 0.03),
        (2.0, 0.2, False, 0.1),
    ],
)
def test_first_sqrt_eta_is_capped_at_the_root_of_a_thousandth(
    generator: ResidualShiftGenerator, kappa: float, min_noise: float, capped: bool, start: float
) -> None:
    process = replace(generator.config.schedule, kappa=kappa, min_noise=min_noise)
    other = ResidualShiftGenerator(generator.autoencoder, generator.unet, replace(generator.config, schedule=process))
    schedule = whole_schedule(other, capped=capped)
    assert schedule.sqrt_eta[0].item() == pytest.approx(start, rel=1e-5)
    assert schedule.sqrt_eta[-1].item() == pytest.approx(0.99)


def test_sampling_by_other_steps_keeps_the_networks_unless_there_is_another(generator: ResidualShiftGenerator) -> None:
    unet = copy.deepcopy(generator.unet)
    own, other = (with_sampling(generator, 2, "deterministic", unet=network) for network in (None, unet))
    assert own.unet is generator.unet
    assert other.unet is unet
    for made in (own, other):
        assert made.autoencoder is generator.autoencoder
        assert (made.steps, made.sampler, made.config.respacing) == (2, "deterministic", "spread")


def test_preview_clamps_the_enlarged_image_and_the_restored_one(generator: ResidualShiftGenerator) -> None:
    """One step of a denoiser that gives back what it sees: the start, as the network sees it."""
    shown, batch = with_sampling(generator, 1, "deterministic"), images()

    def autoencoder(x: Tensor, **how: Any) -> Tensor:
        return 3 * x if how == {"decode": True} else x - 0.5

    columns = preview_of(shown)({DENOISER: lambda z, t, lq: z, AUTOENCODER: autoencoder}, batch)
    enlarged = bicubic(batch["lr"], 4)
    assert enlarged.min() < 0
    assert enlarged.max() > 1
    z_y = enlarged - 0.5
    z_T = shown.schedule.prior(z_y, NoisePlane(0)(0, z_y))
    sr = 3 * shown.schedule.scale_input(z_T, 0)
    assert sr.min() < 0
    assert sr.max() > 2
    expected = {"LR (bicubic)": enlarged.clamp(0, 1), "SR": sr.clamp(0, 1), "HR": batch["hr"]}
    assert list(columns) == list(expected)
    for title, column in columns.items():
        torch.testing.assert_close(column, expected[title])

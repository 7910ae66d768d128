"""Tiles of their own for encoder, UNet and decoder: planned by what each takes, and joined to what the whole gives."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from onestepsr.core.errors import UserError
from onestepsr.imaging.read import LoadedImage
from onestepsr.inference import memory_plan
from onestepsr.inference.generator_cost import InputSize, MemoryCost
from onestepsr.inference.memory_plan import Planner, smaller
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
from onestepsr.models.memory_cost import Stage, StageCost
from onestepsr.models.resshift.config import random_residual_generator
from onestepsr.models.stable_diffusion.config import StableDiffusionGeneratorConfig
from onestepsr.models.stable_diffusion.networks import stable_diffusion_generator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PIXELS = np.random.default_rng(0).integers(0, 256, (203, 250, 3), dtype=np.uint8)
CELL, UNET_CELLS = 2, 4
LARGE = InputSize(height=2000, width=2000)


class Staged(nn.Module):
    """Every stage looks one pixel or latent position around itself; the latents are half as large as the LR image."""

    scale, lr_multiple, latent_channels = 4, CELL * UNET_CELLS, 3

    def __init__(self, **balances: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.balances = balances
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    def memory_per_pixel(self, dtype: torch.dtype) -> float:
        return 4000.0

    def stage_costs(self, dtype: torch.dtype) -> dict[Stage, StageCost]:
        bytes_per_pixel: dict[Stage, float] = {"encode": 2000.0, "unet": 1000.0, "decode": 4000.0}
        return {
            stage: StageCost(
                per_pixel=per_pixel,
                multiple=CELL * (UNET_CELLS if stage == "unet" else 1),
                balance=self.balances.get(stage, float("inf")),
            )
            for stage, per_pixel in bytes_per_pixel.items()
        }

    def encode_lr(self, lr: Tensor) -> Tensor:
        self.shapes.append(("encode", tuple(lr.shape)))
        return functional.avg_pool2d(self.first(lr), CELL)

    def restore_latent(self, z_l: Tensor, lr: Tensor) -> Tensor:
        assert [CELL * side for side in z_l.shape[2:]] == list(lr.shape[2:])
        self.shapes.append(("unet", tuple(z_l.shape)))
        return z_l + self.second(z_l) + 0.1 * functional.avg_pool2d(lr, CELL)

    def decode(self, z: Tensor) -> Tensor:
        self.shapes.append(("decode", tuple(z.shape)))
        return functional.interpolate(self.third(z), scale_factor=8.0) + 0.5

    def forward(self, lr: Tensor) -> Tensor:
        height, width = lr.shape[2:]
        padded = functional.pad(lr, (0, -width % self.lr_multiple, 0, -height % self.lr_multiple), mode="reflect")
        sr = self.decode(self.restore_latent(self.encode_lr(padded), padded))
        return sr[..., : 4 * height, : 4 * width]


@pytest.fixture(autouse=True)
def much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 20e9)


@pytest.mark.parametrize("color_fix", ["none", "wavelet", "adain"])
def test_stages_in_tiles_of_their_own_equal_the_whole(color_fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 0.1e9)
    generator = Staged()
    upscaler = Upscaler(generator, "cpu", "float32", "staged")
    seen: list[tuple[int, int]] = []
    image, options = LoadedImage(pixels=PIXELS), UpscaleOptions(color_fix=color_fix)
    tiles = upscaler.upscale_image(image, options, lambda *at: seen.append(at)).pixels
    plan = upscaler.last_plan
    assert plan is not None
    assert plan.stages is not None
    areas = {stage: found.tile[0] * found.tile[1] for stage, found in plan.stages.items()}
    assert areas["decode"] < areas["encode"] < areas["unet"]
    assert [name for name, _ in generator.shapes] == [
        stage for stage, found in plan.stages.items() for _ in range(found.tiles)
    ]
    assert seen == [(done, plan.steps) for done in range(1, plan.steps + 1)]
    whole = upscaler.upscale_image(image, replace(options, tile="off")).pixels
    assert np.abs(tiles.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("tile", [64, 96, 101])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_given_side_is_that_of_all_stages(tile: int, batch: int) -> None:
    generator = Staged()
    upscaler = Upscaler(generator, "cpu", "float32")
    image = LoadedImage(pixels=PIXELS)
    tiles = upscaler.upscale_image(image, UpscaleOptions(tile=tile, tile_batch=batch)).pixels
    rounded = {
        stage: -(-tile // multiple) * multiple // cell
        for stage, multiple, cell in (("encode", 2, 1), ("unet", 8, 2), ("decode", 2, 2))
    }
    assert {(name, shape[2], shape[3]) for name, shape in generator.shapes} == {
        (stage, side, side) for stage, side in rounded.items()
    }
    assert max(shape[0] for _, shape in generator.shapes) == batch
    whole = upscaler.upscale_image(image, UpscaleOptions(tile="off")).pixels
    assert np.abs(tiles.astype(int) - whole).max() <= 1


def test_published_tiles_go_through_all_stages_one_after_the_other() -> None:
    generator = Staged()
    upscaler = Upscaler(generator, "cpu", "float32")
    upscaler.upscale_image(LoadedImage(pixels=PIXELS), UpscaleOptions(tile=128, tile_blend="average"))
    assert [name for name, _ in generator.shapes[:6]] == ["encode", "unet", "decode"] * 2
    assert upscaler.last_plan is not None
    assert upscaler.last_plan.stages is None


def planned(extent: InputSize, device: torch.device = CPU, **balances: float) -> memory_plan.Plan:
    demand = MemoryCost.of(Staged(**balances), torch.float32, "staged")
    return Planner(extent, demand, UpscaleOptions(), device).plan()


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_attention_makes_tiles_smaller_and_a_whole_that_takes_little_more_stays_whole(device: torch.device) -> None:
    plain, attending = planned(LARGE, device), planned(LARGE, device, unet=40_000.0)
    assert plain.stages is not None
    assert attending.stages is not None
    assert min(plain.stages["unet"].tile) > 250
    side = max(attending.stages["unet"].tile)
    assert 96 <= side < 200 < max(attending.stages["encode"].tile)
    assert attending.stages["encode"] == plain.stages["encode"]

    def work(side: int) -> float:
        return (1 + side**2 / 40_000) * (side / (side - 32)) ** 2

    assert work(side) < 1.1 * min(work(other) for other in range(96, 400))
    assert planned(InputSize(height=200, width=200), device, unet=40_000.0).stages is None
    cut = planned(InputSize(height=300, width=300), device, unet=40_000.0)
    assert cut.stages is not None
    assert (cut.stages["encode"].tiles, cut.stages["decode"].tiles, cut.cuts_autoencoder) == (1, 1, False)
    assert cut.stages["unet"].tiles > 1
    assert str(cut).startswith(f"encode whole; unet {cut.stages['unet'].tiles} tiles of ")


@pytest.mark.parametrize("limit", [0.6, 0.8, 1.5])
def test_every_stage_keeps_to_the_limit(limit: float) -> None:
    demand = MemoryCost.of(Staged(), torch.float32, "staged")
    plan = Planner(LARGE, demand, UpscaleOptions(memory=limit), CPU).plan()
    assert plan.expected_peak <= limit * 1e9
    assert plan.stages is not None
    assert demand.stages is not None
    for stage, found in plan.stages.items():
        alone = Planner(LARGE, demand.stages[stage], UpscaleOptions(tile=max(found.tile)), CPU).plan()
        assert alone.expected_peak <= 1.2 * limit * 1e9, "a square of the longer side, which is at most a fifth longer"
    assert plan.as_json()["stages"]["unet"]["tiles"] == plan.stages["unet"].tiles


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.floats(0.05, 3.0),
    st.sampled_from([1000.0, 40_000.0, float("inf")]),
    st.sampled_from(["cpu", "cuda"]),
)
def test_a_limit_is_kept_or_one_is_named_that_can_be(
    height: int, width: int, limit: float, balance: float, device: str
) -> None:
    demand = MemoryCost.of(Staged(unet=balance, decode=3 * balance), torch.float32, "staged")

    def found(memory: float) -> memory_plan.Plan:
        options = UpscaleOptions(memory=memory)
        return Planner(InputSize(height=height, width=width), demand, options, torch.device(device)).plan()

    try:
        plan = found(limit)
    except UserError as error:
        named = re.search(r"accepted: ([\d.]+) and more", str(error))
        assert named is not None
        assert limit < float(named[1])
        plan, limit = found(float(named[1])), float(named[1])
    assert plan.expected_peak <= limit * 1e9


def test_memory_that_runs_out_in_one_stage_makes_the_tiles_of_all_smaller(caplog: pytest.LogCaptureFixture) -> None:
    class Bounded(Staged):
        def decode(self, z: Tensor) -> Tensor:
            if z.shape[2] * z.shape[3] > 60**2:
                torch.empty(2**62, dtype=torch.uint8)  # what no machine can give: the allocator's own error
            return super().decode(z)

    upscaler = Upscaler(Bounded(), "cpu", "float32", "bounded")
    upscaler.upscale_image(LoadedImage(pixels=PIXELS))
    plan = upscaler.last_plan
    assert plan is not None
    assert plan.stages is not None
    assert (plan.retries, max(plan.tile) <= 120) == (1, True)
    assert "memory ran out with whole" in caplog.text


class Normed(Staged):
    """With a norm in the encoder and one in the decoder."""

    def __init__(self, **balances: float) -> None:
        super().__init__(**balances)
        self.autoencoder = nn.ModuleDict({name: nn.GroupNorm(1, 3) for name in ("encoder", "decoder")})

    def encode_lr(self, lr: Tensor) -> Tensor:
        return super().encode_lr(self.autoencoder["encoder"](lr))

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(self.autoencoder["decoder"](z))


@pytest.mark.parametrize("cut", ["encode", "decode", "unet"])
def test_norms_are_given_statistics_only_where_they_meet_tiles(cut: str) -> None:
    upscaler = Upscaler(Normed(**{cut: 4000.0}), "cpu", "float32")
    gradient = np.linspace(0, 255, PIXELS.shape[1]).astype(np.uint8)
    image = LoadedImage(pixels=PIXELS // 2 + gradient[:, None] // 2)
    errors = {}
    whole = upscaler.upscale_image(image, UpscaleOptions(tile="off", color_fix="none")).pixels.astype(int)
    for norms in ("picture", "tile"):
        options = UpscaleOptions(color_fix="none", tile_norms=norms)
        errors[norms] = np.abs(upscaler.upscale_image(image, options).pixels - whole).mean()
    plan = upscaler.last_plan
    assert plan is not None
    assert plan.stages is not None
    assert [stage for stage, found in plan.stages.items() if found.tiles > 1] == [cut]
    if cut == "unet":
        assert errors["picture"] == errors["tile"] < 1.0
    else:
        assert errors["picture"] < 0.5 * errors["tile"]


def test_networks_of_large_cells_are_not_cut_where_a_cell_is_the_image() -> None:
    """A reduced copy for the norms would be as large as the image itself."""
    with torch.device("meta"):
        faces = random_residual_generator("resshift-face")
    demand = MemoryCost.of(faces, torch.bfloat16, "faces")
    for side in (100, 320, 512):
        plan = Planner(InputSize(height=side, width=side), demand, UpscaleOptions(scale=1.0), CPU).plan()
        assert (plan.tiles, plan.stages) == (1, None)


def test_networks_that_do_not_enlarge_are_cut_by_the_size_of_their_output() -> None:
    with torch.device("meta"):
        faces = stable_diffusion_generator(StableDiffusionGeneratorConfig(scale=1))
    demand = MemoryCost.of(faces, torch.bfloat16, "faces")
    plan = Planner(InputSize(height=512, width=512), demand, UpscaleOptions(scale=1.0), CPU).plan()
    assert (plan.tiles, plan.stages) == (1, None)


def test_what_every_stage_takes_whole_is_not_cut_for_the_sake_of_one_tile_for_all() -> None:
    with torch.device("meta"):
        shifting = random_residual_generator("resshift-realsr")
    demand = MemoryCost.of(shifting, torch.bfloat16, "shifting")
    assert demand.largest_tile == 256
    plan = Planner(InputSize(height=300, width=300), demand, UpscaleOptions(), CUDA).plan()
    assert plan.stages is not None
    assert plan.steps == 3


def test_the_unet_sees_as_much_as_little_work_more_allows() -> None:
    with torch.device("meta"):
        diffusion = stable_diffusion_generator(StableDiffusionGeneratorConfig())
    demand = MemoryCost.of(diffusion, torch.bfloat16, "diffusion")
    for device, least, most in ((CPU, 144, 224), (CUDA, 192, 192)):
        plan = Planner(InputSize(height=1225, width=1225), demand, UpscaleOptions(), device).plan()
        assert plan.stages is not None
        height, width = plan.stages["unet"].tile
        assert least <= min(height, width) <= max(height, width) <= most


def test_without_an_overlap_tiles_do_not_shrink_to_nothing() -> None:
    for device in (CPU, CUDA):
        demand = MemoryCost.of(Staged(unet=40_000.0), torch.float32, "staged")
        plan = Planner(LARGE, demand, UpscaleOptions(overlap=0), device).plan()
        assert plan.stages is not None
        assert min(plan.stages["unet"].tile) >= 96


def test_after_a_failure_a_stage_of_large_cells_shrinks_as_the_others_do() -> None:
    with torch.device("meta"):
        shifting = random_residual_generator("resshift-realsr")
    demand = MemoryCost.of(shifting, torch.bfloat16, "shifting")
    planner = Planner(InputSize(height=1000, width=1000), demand, UpscaleOptions(), CPU)
    found = [planner.plan()]
    while (most := smaller(found[-1], planner.options)) is not None and len(found) < 9:
        found.append(planner.plan(most))
        assert found[-1].pixels < found[-2].pixels
    assert found[-1].stages is not None
    assert found[-1].stages["unet"].tile == (128, 128)

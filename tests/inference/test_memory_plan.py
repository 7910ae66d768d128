"""The plan follows memory and limit, keeps its promises in number, and shrinks until it fits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from onestepsr.core.errors import UserError
from onestepsr.imaging.read import LoadedImage
from onestepsr.inference import memory_plan
from onestepsr.inference.devices import is_out_of_memory
from onestepsr.inference.generator_cost import InputSize, MemoryCost
from onestepsr.inference.memory_plan import Plan, Planner, largest_side, smaller
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LARGE = InputSize(height=1225, width=1225)
SD = MemoryCost(name="sd", dtype=torch.bfloat16, scale=4, weights=1_900_000_000, per_pixel=32_200.0, multiple=16)


@pytest.fixture(autouse=True)
def much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 20e9)


def plan(extent: InputSize = LARGE, demand: MemoryCost = SD, device: torch.device = CPU, **options: object) -> Plan:
    return Planner(extent, demand, UpscaleOptions(**options), device).plan()


def test_side_follows_the_memory() -> None:
    assert largest_side(0.6e9, 6000.0) == 304
    assert largest_side(0.6e9, 60_000.0) == 96
    assert largest_side(0.0, 1.0) == 0
    side = largest_side(1e9, 5000.0, 100_000.0)
    assert side**2 * 5000 + side * 100_000 <= 1e9 < (side + 16) ** 2 * 5000 + (side + 16) * 100_000


def test_without_a_limit_tiles_stay_at_what_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(InputSize(height=320, width=608)).tile == (320, 320)
    assert plan(device=CUDA).tile == (608, 608)
    assert (
        plan(demand=MemoryCost(name="small", dtype=torch.float32, scale=4, weights=0, per_pixel=900.0)).pixels <= 320**2
    )
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 0.5e9)
    with pytest.raises(UserError, match=r"0\.5 GB free, about 0\.\d GB needed for the smallest tile \(96 px\)"):
        plan()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.floats(0.05, 8.0),
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from([16, 64]),
)
@example(49, 1121, 4.5, "cpu", 16)  # fits unless it is padded
@example(1225, 1225, 3.7, "cuda", 64)  # a side of 208 would be one of 256
@example(112, 1975, 2.9375, "cpu", 64)  # sides of 112 and 96 are both 128, but not the rows that are joined
def test_a_limit_is_kept_or_refused(height: int, width: int, limit: float, device: str, multiple: int) -> None:
    extent, demand = InputSize(height=height, width=width), replace(SD, multiple=multiple)
    least = plan(extent, demand, torch.device(device), tile=96, tile_batch=1).expected_peak
    if least > limit * 1e9:
        with pytest.raises(UserError, match="accepted: "):
            plan(extent, demand, torch.device(device), memory=limit)
        return
    found = plan(extent, demand, torch.device(device), memory=limit)
    assert found.expected_peak <= limit * 1e9
    assert min(found.tile) >= 96 or found.tiles == 1


SMALL = MemoryCost(name="small", dtype=torch.float32, scale=4, weights=10_000_000, per_pixel=900.0)


def test_the_last_step_to_another_size_is_counted() -> None:
    """At the end the network's image and the one of the wanted size stand side by side."""
    extent = InputSize(height=1000, width=1200)
    usual, shrunk, larger, largest = (plan(extent, SMALL, scale=scale) for scale in (4, 3, 7, 8))
    assert shrunk.expected_peak == usual.expected_peak, "less than the network needs to work"
    assert usual.expected_peak < larger.expected_peak < largest.expected_peak
    assert largest.expected_peak - larger.expected_peak == 3 * extent.height * extent.width * (8**2 - 7**2)
    both = 3 * extent.height * extent.width * (1 + 4**2 + 8**2)
    assert largest.expected_peak >= SMALL.weights + both
    assert plan(extent, SMALL, width=9600) == largest
    assert plan(extent, SMALL, CUDA, scale=8).expected_peak == plan(extent, SMALL, CUDA).expected_peak
    limit = usual.expected_peak / 1e9
    with pytest.raises(UserError, match=r"accepted: 0\.\d and more"):
        plan(extent, SMALL, memory=limit, scale=8)
    assert plan(extent, SMALL, memory=limit).expected_peak <= limit * 1e9


def test_transparency_is_counted() -> None:
    rgb = InputSize(height=1000, width=1200, pixel_bytes=3)
    rgba, deep = replace(rgb, alpha_bytes=1), replace(rgb, pixel_bytes=6, alpha_bytes=2)
    pixels = rgb.height * rgb.width
    assert plan(rgba).expected_peak - plan(rgb).expected_peak == pixels * (3 + 1), "a filled copy, and transparency"
    assert plan(deep).expected_peak - plan(replace(deep, alpha_bytes=0)).expected_peak == pixels * (6 + 2)
    enlarged = [plan(extent, SMALL, scale=8).expected_peak for extent in (rgb, rgba)]
    assert enlarged[1] - enlarged[0] == pixels * (1 + 8**2)
    light = replace(SMALL, scale=1, per_pixel=1.0)  # a network that takes less than what comes before it
    assert plan(rgba, light, scale=1).expected_peak >= SMALL.weights + pixels * (4 + 57)


def test_memory_that_does_not_hold_the_result_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 2e9)
    huge = InputSize(height=3000, width=4000)
    assert plan(huge, SMALL).expected_peak < 2e9
    with pytest.raises(UserError, match=r"2\.0 GB free, about 3\.1 GB needed"):
        plan(huge, SMALL, scale=8)


def test_a_image_tells_the_plan_of_its_transparency() -> None:
    upscaler = Upscaler(Bounded(10**9), "cpu", "float32")
    alpha = np.full(PIXELS.shape[:2], 255, np.uint8)
    peaks = []
    for image in (LoadedImage(pixels=PIXELS), LoadedImage(pixels=PIXELS, alpha=alpha)):
        upscaler.upscale_image(image)
        assert upscaler.last_plan is not None
        peaks.append(upscaler.last_plan.expected_peak)
    assert peaks[1] - peaks[0] == 4 * alpha.size
    assert upscaler.plan(*PIXELS.shape[:2], UpscaleOptions(), alpha_bytes=1).expected_peak == peaks[1]


def test_stated_peaks_can_be_had() -> None:
    huge = InputSize(height=2500, width=2500)
    for extent in (LARGE, huge):  # 24 and 100 megapixels at the size of Stable Diffusion
        found = plan(extent, memory=6.0)
        assert found.tiles * found.pixels < 1.4 * extent.height * extent.width
    assert plan(huge).expected_peak < 1.1 * plan(tile=320).expected_peak


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 4, 16, 64]))
@example(1024, 1024, 4)
@example(1000, 333, 4)
@example(10, 2500, 64)
def test_no_square_tiles_take_less_work(height: int, width: int, multiple: int) -> None:
    extent, demand = InputSize(height=height, width=width), replace(SD, multiple=multiple)
    found = plan(extent, demand)
    assert found.pixels <= 320**2 or found.tiles == 1
    assert min(found.tile) >= 96 or found.tiles == 1
    for side in (96, 128, 192, 256, 280, 300, 320):
        squares = plan(extent, demand, tile=side)
        assert found.tiles * found.pixels <= memory_plan.MAX_OVERHEAD_MEMORY * squares.tiles * squares.pixels


def test_images_of_common_sizes_are_cut_sparingly() -> None:
    tiny = MemoryCost(name="tiny", dtype=torch.bfloat16, scale=4, weights=13_000_000, per_pixel=4040.0, multiple=4)
    for size, tile, tiles in (
        ((333, 500), (336, 268), 2),
        ((480, 640), (256, 336), 4),
        ((1024, 1024), (280, 280), 16),  # 12 of 364 x 280 would be 2.5 % less work, with a third more memory
        ((60, 2000), (96, 688), 3),
    ):
        found = plan(InputSize(height=size[0], width=size[1]), tiny)
        assert (found.tile, found.tiles) == (tile, tiles)
    ready = plan(InputSize(height=333, width=500), replace(tiny, largest_tile=256))
    assert max(ready.tile) <= 256


def test_a_limit_that_cannot_be_kept_names_one_that_can() -> None:
    with pytest.raises(UserError, match=r"memory 2 GB: sd in bfloat16 needs about 2\.6 GB .* 2\.6 and more$"):
        plan(memory=2.0)
    assert plan(memory=2.6).tile == (96, 96)
    with pytest.raises(UserError, match=r"tiles of 512x512 pixels; accepted: 16\.\d and more, or --tile auto"):
        plan(memory=6.0, tile=512)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="accepted: more than 0"):
            UpscaleOptions(memory=wrong)


def test_batches_are_even_and_only_where_they_help() -> None:
    small = MemoryCost(name="small", dtype=torch.float16, scale=4, weights=0, per_pixel=1000.0)
    found = plan(demand=small, device=CUDA, tile=256)  # 6 x 6 tiles
    assert (found.tiles, found.batch) == (36, 8)
    assert plan(demand=small, device=CUDA, tile=320).batch == 7  # 25 tiles in four batches, not 8 + 8 + 8 + 1
    assert plan(demand=small, tile=256).batch == 1
    assert plan(demand=small, tile=256, tile_batch=4).batch == 4
    one_by_one = MemoryCost(
        name="noisy", dtype=torch.float16, scale=4, weights=0, per_pixel=1000.0, takes_batches=False
    )
    assert plan(demand=one_by_one, device=CUDA, tile=256).batch == 1
    with pytest.raises(UserError, match="tile batch 0: accepted: auto or 1"):
        UpscaleOptions(tile_batch=0)


def test_half_of_what_was_too_much() -> None:
    options = UpscaleOptions()
    found = plan()
    pixels = smaller(found, options)
    assert pixels == (math.isqrt(found.pixels) // 2) ** 2
    second = Planner(LARGE, SD, options, CPU).plan(pixels)
    assert second.pixels < found.pixels / 3, "a quarter, in whole cells"
    third = smaller(second, options)
    assert third == 96**2
    assert smaller(Planner(LARGE, SD, options, CPU).plan(third), options) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (UserError("not enough memory"), False),
    ],
)
def test_what_counts_as_running_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


class Bounded(nn.Module):
    """Enlarges; fails as PyTorch does when it is given more than ``most`` pixels at once. Counts its calls."""

    scale = 4

    def __init__(self, most: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(3, 3, 3, padding=1)
        self.most, self.shapes = most, list[tuple[int, ...]]()

    def forward(self, lr: Tensor) -> Tensor:
        self.shapes.append(tuple(lr.shape))
        if lr.shape[0] * lr.shape[2] * lr.shape[3] > self.most:
            torch.empty(2**62, dtype=torch.uint8)  # what no machine can give: the allocator's own error
        return functional.interpolate(self.mix(lr), scale_factor=4.0)


PIXELS = np.random.default_rng(0).integers(0, 256, (200, 230, 3), dtype=np.uint8)


def test_memory_that_runs_out_halves_the_tile_once_for_all(caplog: pytest.LogCaptureFixture) -> None:
    upscaler = Upscaler(Bounded(128**2), "cpu", "float32", "bounded")
    whole = Upscaler(Bounded(10**9), "cpu", "float32").upscale_image(LoadedImage(pixels=PIXELS))
    result = upscaler.upscale_image(LoadedImage(pixels=PIXELS))
    assert np.abs(result.pixels.astype(int) - whole.pixels).max() <= 1
    used = upscaler.last_plan
    assert used is not None
    assert (used.tile, used.retries) == ((107, 107), 1)  # the square root of 200 x 230 is 214
    assert caplog.text.count("memory ran out with whole") == 1
    upscaler.upscale_image(LoadedImage(pixels=PIXELS))
    assert upscaler.last_plan is not None
    assert (upscaler.last_plan.tile, upscaler.last_plan.retries) == ((107, 107), 0)
    assert caplog.text.count("memory ran out") == 1


def test_memory_that_never_suffices_is_one_line() -> None:
    upscaler = Upscaler(Bounded(0), "cpu", "float32", "bounded")
    with pytest.raises(
        UserError, match=r"bounded: memory ran out on cpu even in tiles of 96x96 pixels in float32; free"
    ):
        upscaler.upscale_image(LoadedImage(pixels=PIXELS))
    assert upscaler.last_plan is None


def test_other_errors_are_not_tried_again() -> None:
    class Wrong(Bounded):
        def forward(self, lr: Tensor) -> Tensor:
            self.shapes.append(tuple(lr.shape))
            raise RuntimeError("shapes cannot be multiplied")

    generator = Wrong(0)
    with pytest.raises(RuntimeError, match="multiplied"):
        Upscaler(generator, "cpu", "float32").upscale_image(LoadedImage(pixels=PIXELS))
    assert len(generator.shapes) == 1


def test_float32_that_does_not_fit_becomes_bfloat16(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("onestepsr.inference.devices._bfloat16_pays", lambda: False)
    options = UpscaleOptions(memory=0.13)  # needs 155 MB in float32, 106 MB in bfloat16
    automatic = Upscaler(Bounded(10**9), "cpu", "auto", "bounded")
    automatic.upscale_image(LoadedImage(pixels=PIXELS), options)
    assert automatic.last_plan is not None
    assert automatic.last_plan.dtype == "bfloat16"
    assert "does not fit: bfloat16 from here on" in caplog.text
    with pytest.raises(UserError, match="accepted"):
        Upscaler(Bounded(10**9), "cpu", "float32").upscale_image(LoadedImage(pixels=PIXELS), options)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_of_tiles_equal_one_by_one(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a device that is given more work before its results are looked at."""
    monkeypatch.setattr("onestepsr.inference.tile_runner.AHEAD", {"cpu": ahead})
    seen: list[tuple[int, int]] = []
    results = []
    for batch in (1, 4):
        generator = Bounded(10**9)
        upscaler = Upscaler(generator, "cpu", "float32")
        options = UpscaleOptions(tile=96, tile_batch=batch)
        results.append(upscaler.upscale_image(LoadedImage(pixels=PIXELS), options, lambda *at: seen.append(at)).pixels)
    assert generator.shapes == [(4, 3, 96, 96)] * 3
    assert np.abs(results[0].astype(int) - results[1]).max() <= 1
    assert seen == [(done, 12) for done in range(1, 13)] * 2


def test_the_plan_in_one_line_and_as_data() -> None:
    found = plan(memory=6.0)
    assert str(found).startswith(
        f"{found.tiles} tiles of {found.tile[0]}x{found.tile[1]} pixels, bfloat16 on cpu: about "
    )
    assert found.as_json()["expected_peak"] == found.expected_peak
    assert str(plan(InputSize(height=64, width=64))).startswith("whole, bfloat16 on cpu")


@pytest.mark.parametrize(("overlap", "multiple"), [(1, 16), (5, 16), (21, 64), (0, 1), (0, 64)])
@pytest.mark.parametrize("size", [(512, 1024), (2, 2048), (700, 90)])
def test_small_overlaps_and_large_cells_still_make_a_plan(overlap: int, multiple: int, size: tuple[int, int]) -> None:
    found = plan(InputSize(height=size[0], width=size[1]), replace(SD, multiple=multiple), overlap=overlap)
    assert found.tiles * found.pixels < 4 * max(size[0], multiple) * max(size[1], multiple)

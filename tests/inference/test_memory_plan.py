"""The plan follows memory and limit, agrees with what a run takes, and shrinks until it fits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.imaging.read import LoadedImage
from onestepsr.inference import memory_plan
from onestepsr.inference.devices import is_out_of_memory
from onestepsr.inference.memory_plan import InputSize, Plan, Workload, fewer_pixels, plan_image
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
from onestepsr.models.architectures import random_generator
from onestepsr.models.generators import Generator, MemoryCost
from onestepsr.models.stable_diffusion.config import StableDiffusionGeneratorConfig
from onestepsr.models.stable_diffusion.networks import stable_diffusion_generator
from small import Nearest

pytestmark = pytest.mark.numeric

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PIXELS = np.random.default_rng(0).integers(0, 256, (200, 230, 3), dtype=np.uint8)
EXAMPLE = Path(__file__).parents[2] / "examples" / "rocket_rotated.jpg"


class Stated(Generator):
    """A generator of 10 MB of weights that is planned and never run."""

    def __init__(self, cost: float = 2000.0, multiple: int = 16, **attributes: Any) -> None:
        super().__init__()
        with torch.device("meta"):
            self.weight = nn.Parameter(torch.empty(2_500_000))
        self.cost, self.lr_multiple = cost, multiple
        for name, value in attributes.items():
            setattr(self, name, value)

    def memory_cost(self, dtype: torch.dtype) -> MemoryCost:
        return MemoryCost(bytes_per_pixel=self.cost * dtype.itemsize)


@pytest.fixture(scope="module")
def staged() -> dict[str, Generator]:
    """Generators of the published sizes, without contents."""
    with torch.device("meta"):
        return {
            "diffusion": stable_diffusion_generator(StableDiffusionGeneratorConfig()),
            "shifting": random_generator("random:resshift-realsr"),
            "faces": random_generator("random:resshift-face"),
        }


def plan(
    generator: Generator,
    height: int,
    width: int,
    /,
    device: torch.device = CPU,
    most: int | None = None,
    **options: Any,
) -> Plan:
    return plan_image(load(generator, height, width, device, **options), most)


def load(generator: Generator, height: int, width: int, /, device: torch.device, **options: Any) -> Workload:
    return Workload(
        generator=generator,
        name="planned",
        dtype=torch.bfloat16,
        size=InputSize(height=height, width=width, **{k: options.pop(k) for k in list(options) if k.endswith("bytes")}),
        options=UpscaleOptions(**options),
        device=device,
    )


@pytest.fixture(autouse=True)
def _much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same memory on every machine, and a GPU's where there is none."""
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 20e9)


# ---- what is planned is what is taken ----


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_planned_peaks_cover_the_measured_ones(tmp_path: Path) -> None:
    """In a process of its own: growth of the peak resident memory from before the weights are read."""
    Image.open(EXAMPLE).resize((400, 320)).save(tmp_path / "image.png")
    code = f"""
import json, re, torch
from pathlib import Path
from onestepsr.imaging.read import read_image
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
import onestepsr.models.loading

def resident(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
before, found = resident("VmRSS"), []
upscaler = Upscaler.from_pretrained("d3sr-tiny", "cpu", "float32")
for limit in (0.25, None):
    upscaler.upscale_image(read_image(Path({str(tmp_path / "image.png")!r})), UpscaleOptions(memory=limit))
    found.append([upscaler.last_plan.expected_peak, resident("VmHWM") - before])
print(json.dumps(found))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limited, free = json.loads(run.stdout)
    for planned, measured in (limited, free):
        assert 0.4 * planned < measured < 1.05 * planned
    assert limited[0] <= 0.25e9 < free[0]


# ---- limits ----


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.floats(0.05, 3.0),
    st.tuples(st.sampled_from(["16", "64", "diffusion", "shifting"]), st.sampled_from([CPU, CUDA])),
)
@example(49, 1121, 0.8, ("16", CPU))  # fits unless it is padded
@example(1225, 1225, 0.7, ("64", CUDA))
@example(112, 1975, 0.7, ("64", CPU))  # sides of 112 and 96 are both 128, but not the rows that are joined
def test_a_limit_is_kept_or_one_is_named_that_can_be(
    staged: dict[str, Generator], height: int, width: int, limit: float, kind: tuple[str, torch.device]
) -> None:
    generator, device = staged.get(kind[0]) or Stated(15_000.0, int(kind[0])), kind[1]
    try:
        found = plan(generator, height, width, device, memory=limit)
    except UserError as error:
        named = re.search(r"accepted: ([\d.]+) and more", str(error))
        assert named is not None
        assert limit < float(named[1])
        limit = float(named[1])
        found = plan(generator, height, width, device, memory=limit)
    assert found.expected_peak <= limit * 1e9
    assert min(found.tile) >= 96 or found.tiles == 1


def test_limits_that_cannot_be_kept_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="accepted: more than 0"):
            UpscaleOptions(memory=wrong)
    with pytest.raises(UserError, match=r"tiles of 512x512 pixels; accepted: [\d.]+ and more, or --tile auto"):
        plan(Stated(15_000.0), 1225, 1225, memory=6.0, tile=512)
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 0.3e9)
    with pytest.raises(UserError, match=r"0\.3 GB free, about [\d.]+ GB needed for the smallest tile \(96 px\)"):
        plan(Stated(15_000.0), 1225, 1225)


def test_another_output_size_and_transparency_are_counted() -> None:
    """At the end the network's image and the one of the wanted size stand side by side."""
    usual, shrunk, larger = (plan(Stated(200.0), 1000, 1200, scale=scale).expected_peak for scale in (4, 3, 8))
    assert shrunk == usual < larger, "a smaller image takes less than the network needs to work"
    assert larger >= 3 * 1000 * 1200 * (1 + 4**2 + 8**2)
    assert plan(Stated(200.0), 1000, 1200, width=9600).expected_peak == larger
    on_gpu = [plan(Stated(200.0), 1000, 1200, CUDA, scale=scale, tile=128).expected_peak for scale in (4, 8)]
    assert on_gpu[0] == on_gpu[1]
    transparent = plan(Stated(200.0), 1000, 1200, alpha_bytes=1)
    assert transparent.expected_peak - usual == 1000 * 1200 * (3 + 1), "a filled copy, and transparency"


# ---- tiles ----


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 4, 16, 64]))
@example(1024, 1024, 4)
@example(1000, 333, 4)
@example(10, 2500, 64)
def test_no_square_tiles_take_less_compute(height: int, width: int, multiple: int) -> None:
    generator = Stated(multiple=multiple)
    found = plan(generator, height, width)
    assert found.pixels <= 320**2 or found.tiles == 1
    assert min(found.tile) >= 96 or found.tiles == 1
    for side in (96, 128, 192, 256, 280, 300, 320):
        squares = plan(generator, height, width, tile=side)
        assert found.tiles * found.pixels <= memory_plan.MAX_OVERHEAD_MEMORY * squares.tiles * squares.pixels


@pytest.mark.parametrize(("overlap", "multiple"), [(1, 16), (5, 16), (21, 64), (0, 1), (0, 64)])
@pytest.mark.parametrize("size", [(512, 1024), (2, 2048), (700, 90)])
def test_small_overlaps_and_large_multiples_still_make_a_plan(overlap: int, multiple: int, size: Any) -> None:
    found = plan(Stated(multiple=multiple), *size, overlap=overlap)
    assert found.tiles * found.pixels < 4 * max(size[0], multiple) * max(size[1], multiple)


def test_batches_are_even_and_only_where_they_help() -> None:
    found = plan(Stated(500.0), 1225, 1225, CUDA, tile=256)  # 6 x 6 tiles
    assert (found.tiles, found.batch) == (36, 8)
    assert plan(Stated(500.0), 1225, 1225, CUDA, tile=320).batch == 7  # 25 tiles in four batches, not 8 + 8 + 8 + 1
    assert plan(Stated(500.0), 1225, 1225, tile=256).batch == 1
    assert plan(Stated(500.0), 1225, 1225, tile=256, tile_batch=4).batch == 4
    assert plan(Stated(500.0, takes_batches=False), 1225, 1225, CUDA, tile=256).batch == 1
    with pytest.raises(UserError, match="tile batch 0: accepted: auto or 1"):
        UpscaleOptions(tile_batch=0)


# ---- stages with tiles of their own ----


def test_attention_makes_tiles_of_the_unet_smaller(staged: dict[str, Generator]) -> None:
    for device in (CPU, CUDA):
        found = plan(staged["diffusion"], 1225, 1225, device, memory=8.0)
        assert found.stages is not None
        height, width = found.stages["unet"].tile
        assert 96 <= min(height, width) <= max(height, width) < min(found.stages["encode"].tile)
        assert str(found).startswith(f"encode {found.stages['encode'].tiles} tiles of ")
        assert found.as_json()["stages"]["unet"]["tiles"] == found.stages["unet"].tiles


def test_small_images_stay_whole(staged: dict[str, Generator]) -> None:
    for name, side, options in (
        ("diffusion", 128, {}),
        ("shifting", 256, {}),
        ("faces", 100, {"scale": 1.0}),  # a reduced copy for the norms would be as large as the image itself
        ("faces", 512, {"scale": 1.0}),
    ):
        found = plan(staged[name], side, side, **options)
        assert (found.tiles, found.stages) == (1, None), (name, side)


def test_what_every_stage_takes_whole_is_not_cut_for_the_sake_of_one_tile_for_all(staged: dict[str, Generator]) -> None:
    assert staged["shifting"].largest_tile == 256
    found = plan(staged["shifting"], 300, 300, CUDA)
    assert found.stages is not None
    assert found.steps == 3


def test_after_a_failure_every_plan_takes_less(staged: dict[str, Generator]) -> None:
    for generator in (Stated(), *staged.values()):
        found = [plan(generator, 1000, 1000)]
        while (most := fewer_pixels(found[-1], UpscaleOptions())) is not None and len(found) < 9:
            smaller = plan(generator, 1000, 1000, most=most)
            if smaller.pixels >= found[-1].pixels:
                break
            found.append(smaller)
        assert len(found) > 1 or found[-1].tiles == 1
        assert len(found) < 9


# ---- memory that runs out ----


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


class Bounded(Nearest):
    """Fails as PyTorch does when it is given more than ``most`` pixels at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
        if lr.shape[0] * lr.shape[2] * lr.shape[3] > self.most:
            torch.empty(2**62, dtype=torch.uint8)  # what no machine can give: the allocator's own error
        return super().forward(lr, **conditions)


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
    assert upscaler.last_plan == replace(used, retries=0)
    assert caplog.text.count("memory ran out") == 1


def test_memory_that_never_suffices_is_one_line() -> None:
    upscaler = Upscaler(Bounded(0), "cpu", "float32", "bounded")
    with pytest.raises(
        UserError, match=r"bounded: memory ran out on cpu even in tiles of 96x96 pixels in float32; free"
    ):
        upscaler.upscale_image(LoadedImage(pixels=PIXELS))
    assert upscaler.last_plan is None


def test_other_errors_are_not_tried_again() -> None:
    class Wrong(Nearest):
        def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
            super().forward(lr)
            raise RuntimeError("shapes cannot be multiplied")

    generator = Wrong()
    with pytest.raises(RuntimeError, match="multiplied"):
        Upscaler(generator, "cpu", "float32").upscale_image(LoadedImage(pixels=PIXELS))
    assert len(generator.given) == 1


def test_float32_that_does_not_fit_becomes_bfloat16(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("onestepsr.inference.devices.prefers_bfloat16", lambda: False)
    monkeypatch.setattr("onestepsr.inference.memory_plan.multiplies_bfloat16", lambda: True)
    options = UpscaleOptions(memory=0.13)  # needs 155 MB in float32, 106 MB in bfloat16
    automatic = Upscaler(Nearest(), "cpu", "auto", "nearest")
    automatic.upscale_image(LoadedImage(pixels=PIXELS), options)
    assert automatic.last_plan is not None
    assert automatic.last_plan.dtype == "bfloat16"
    assert "does not fit: bfloat16 from here on" in caplog.text
    with pytest.raises(UserError, match="accepted"):
        Upscaler(Nearest(), "cpu", "float32").upscale_image(LoadedImage(pixels=PIXELS), options)

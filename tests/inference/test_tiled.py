"""Tiles through a generator: what it is given, and stages with tiles of their own against the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from onestepsr.imaging.read import LoadedImage
from onestepsr.inference import memory_plan
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
from onestepsr.models.generators import LatentAutoencoder, LatentGenerator, LatentUNet, NetworkCost
from small import Nearest, small_generator

pytestmark = pytest.mark.numeric

PIXELS = np.random.default_rng(0).integers(0, 256, (203, 250, 3), dtype=np.uint8)
FACTOR, POSITION, UNET_MULTIPLE = 8, 2, 4


class Coder(LatentAutoencoder):
    """Looks one pixel or latent position around itself; latents are half as large as the LR image."""

    factor, latent_channels = FACTOR, 3

    def __init__(self, *, norms: bool, breakeven: dict[str, float]) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(1, 3) if norms else nn.Identity() for _ in range(2))
        self.breakeven = breakeven
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def encode(self, x: Tensor) -> Tensor:
        self.calls.append(("encode", tuple(x.shape)))
        return functional.avg_pool2d(self.first(self.norms[0](x)), FACTOR)

    def decode(self, z: Tensor) -> Tensor:
        self.calls.append(("decode", tuple(z.shape)))
        return functional.interpolate(self.last(self.norms[1](z)), scale_factor=float(FACTOR))

    def memory_per_pixel(self, dtype: torch.dtype) -> float:
        return 250.0

    def network_costs(self, dtype: torch.dtype) -> tuple[NetworkCost, NetworkCost]:
        return self._cost("encode", 8000.0), self._cost("decode", 16_000.0)

    def _cost(self, stage: str, bytes_per_position: float) -> NetworkCost:
        breakeven = self.breakeven.get(stage, float("inf")) / POSITION**2
        return NetworkCost(bytes_per_position=bytes_per_position, attention_breakeven=breakeven)


class Denoiser(LatentUNet):
    size_multiple = UNET_MULTIPLE

    def __init__(self, breakeven: float) -> None:
        super().__init__()
        self.middle = nn.Conv2d(3, 3, 3, padding=1)
        self.breakeven = breakeven

    def network_cost(self, dtype: torch.dtype) -> NetworkCost:
        return NetworkCost(bytes_per_position=4000.0, attention_breakeven=self.breakeven / POSITION**2)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.middle(z)


class Staged(LatentGenerator):
    def __init__(self, *, norms: bool = False, **breakeven: float) -> None:
        torch.manual_seed(0)
        autoencoder = Coder(norms=norms, breakeven=breakeven)
        super().__init__(autoencoder, Denoiser(breakeven.get("unet", float("inf"))), scale=4)
        self.calls = autoencoder.calls

    def encode_lr(self, lr: Tensor, **noise: Any) -> Tensor:
        return self.autoencoder.encode(lr.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3))

    def restore_latent(self, z_l: Tensor, lr: Tensor, **conditions: Any) -> Tensor:
        assert [POSITION * side for side in z_l.shape[2:]] == list(lr.shape[2:])
        self.calls.append(("unet", tuple(z_l.shape)))
        return self.unet(z_l) + 0.1 * functional.avg_pool2d(lr, POSITION)

    def decode(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z) + 0.5


@pytest.fixture(autouse=True)
def _much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 20e9)


# ---- what the generator is given ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wide", [False, True])
def test_tiles_have_the_dtype_that_the_generator_takes(dtype: str, wide: bool) -> None:
    generator = Nearest()
    generator.takes_float32 = wide
    Upscaler(generator, "cpu", dtype)(PIXELS[:12, :16])
    assert [lr.dtype for lr in generator.given] == [torch.float32 if wide else getattr(torch, dtype)]
    assert generator.weight.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("noised", [False, True])
def test_images_are_enlarged_before_they_are_rounded(noised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = small_generator(noised=noised)
    encoded: list[Tensor] = []
    encode = generator.encode
    monkeypatch.setattr(generator, "encode", lambda x: (encoded.append(x), encode(x))[1])
    Upscaler(generator, "cpu", "bfloat16")(PIXELS[:12, :16])
    lr = torch.from_numpy(PIXELS[:12, :16]).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(encoded[0], generator.enlarge(lr), atol=1e-5, rtol=0.0)


def test_only_generators_that_want_them_are_given_noise_and_prompt() -> None:
    embedding = torch.zeros(1, 2, 5)
    for batches, width, wanted in ((True, 0, set()), (False, 0, {"rng", "origin"}), (True, 5, {"prompt"})):
        generator = Nearest()
        generator.takes_batches, generator.prompt_width = batches, width
        options = UpscaleOptions(tile=128, tile_batch=3, prompt_embedding=embedding if width else None)
        Upscaler(generator, "cpu", "float32").upscale_image(LoadedImage(pixels=PIXELS), options)
        assert {frozenset(given) for given in generator.conditions} == {frozenset(wanted)}
        assert max(len(lr) for lr in generator.given) == (3 if batches else 1)
        if "origin" in wanted:
            assert [given["origin"] for given in generator.conditions[:2]] == [(0, 0), (0, 96)]
            assert len({given["rng"].initial_seed() for given in generator.conditions}) == 1


class Foreign(Tensor):
    """On a device where little more runs than the networks: it can be looked at, and brought home."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.aminmax, Tensor.clamp, Tensor.nan_to_num):
            raise NotImplementedError(f"{func.__name__} is not implemented for this device")
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(Tensor) if func is Tensor.to else result


def test_on_other_devices_nothing_but_the_network_runs() -> None:
    class Elsewhere(Nearest):
        def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
            return super().forward(lr).as_subclass(Foreign)

    assert Upscaler(Elsewhere(), "cpu", "float32")(PIXELS[:12, :16]).size == (64, 48)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_of_tiles_equal_one_by_one(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a device that is given more work before its results are waited for."""
    monkeypatch.setattr("onestepsr.inference.tiled.AHEAD", {"cpu": ahead})
    seen: list[tuple[int, int]] = []
    results = []
    for batch in (1, 4):
        generator = Nearest()
        options = UpscaleOptions(tile=96, tile_batch=batch)
        upscaler = Upscaler(generator, "cpu", "float32")
        image = LoadedImage(pixels=PIXELS[:200, :230])
        results.append(upscaler.upscale_image(image, options, lambda *at: seen.append(at)).pixels)
    assert [tuple(lr.shape) for lr in generator.given] == [(4, 3, 96, 96)] * 3
    assert np.abs(results[0].astype(int) - results[1]).max() <= 1
    assert seen == [(done, 12) for done in range(1, 13)] * 2


# ---- stages with tiles of their own ----


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
    assert [name for name, _ in generator.calls] == [
        stage for stage, found in plan.stages.items() for _ in range(found.tiles)
    ]
    assert seen == [(done, plan.steps) for done in range(1, plan.steps + 1)]
    whole = upscaler.upscale_image(image, replace(options, tile="off")).pixels
    assert np.abs(tiles.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("tile", [64, 101])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_given_side_is_that_of_all_stages(tile: int, batch: int) -> None:
    generator = Staged()
    upscaler = Upscaler(generator, "cpu", "float32")
    image = LoadedImage(pixels=PIXELS)
    tiles = upscaler.upscale_image(image, UpscaleOptions(tile=tile, tile_batch=batch)).pixels
    multiples = {"encode": (2, 0.25), "unet": (8, 2), "decode": (2, 2)}  # of a tile, and input pixels per unit
    rounded = {stage: int(-(-tile // multiple) * multiple / unit) for stage, (multiple, unit) in multiples.items()}
    assert {(name, *shape[2:]) for name, shape in generator.calls} == {(s, side, side) for s, side in rounded.items()}
    assert max(shape[0] for _, shape in generator.calls) == batch
    whole = upscaler.upscale_image(image, UpscaleOptions(tile="off")).pixels
    assert np.abs(tiles.astype(int) - whole).max() <= 1


def test_published_tiles_go_through_all_stages_one_after_the_other() -> None:
    generator = Staged()
    upscaler = Upscaler(generator, "cpu", "float32")
    upscaler.upscale_image(LoadedImage(pixels=PIXELS), UpscaleOptions(tile=128, tile_blend="average"))
    assert [name for name, _ in generator.calls[:6]] == ["encode", "unet", "decode"] * 2
    assert upscaler.last_plan is not None
    assert upscaler.last_plan.stages is None


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


@pytest.mark.parametrize("cut", ["encode", "decode", "unet"])
def test_norms_are_given_statistics_only_where_they_meet_tiles(cut: str) -> None:
    upscaler = Upscaler(Staged(norms=True, **{cut: 4000.0}), "cpu", "float32")
    gradient = np.linspace(0, 255, PIXELS.shape[1]).astype(np.uint8)
    image = LoadedImage(pixels=PIXELS // 2 + gradient[:, None] // 2)
    errors = {}
    whole = upscaler.upscale_image(image, UpscaleOptions(tile="off", color_fix="none")).pixels.astype(int)
    for norms in ("image", "tile"):
        options = UpscaleOptions(color_fix="none", tile_norms=norms)
        errors[norms] = np.abs(upscaler.upscale_image(image, options).pixels - whole).mean()
    plan = upscaler.last_plan
    assert plan is not None
    assert plan.stages is not None
    assert [stage for stage, found in plan.stages.items() if found.tiles > 1] == [cut]
    if cut == "unet":
        assert errors["image"] == errors["tile"] < 1.0
    else:
        assert errors["image"] < 0.5 * errors["tile"]

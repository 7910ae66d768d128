"""Exact geometry, tiles against the whole, colours, alpha, gray, depth, dtypes, memory."""

from __future__ import annotations

import io
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from test_icc import ADOBE_RGB, DISPLAY_P3, GAMMA_22, SRGB_CURVE, matrix_icc, table_icc
from torch import Tensor, nn
from torch.nn import functional

from onestepsr.core.errors import OneStepSRError, UserError
from onestepsr.imaging.read import LoadedImage, read_image
from onestepsr.imaging.write import write_image
from onestepsr.inference import devices, memory_plan
from onestepsr.inference import upscaler as module
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler, resolve_device, resolve_dtype, target_size
from onestepsr.models import loading
from onestepsr.models.generators import Generator
from onestepsr.weights import download
from small import Nearest

pytestmark = pytest.mark.numeric


class Bicubic(Generator):
    """Enlarges; optionally shifts the colours, as a network may."""

    def __init__(self, tint: float = 0.0) -> None:
        super().__init__()
        self.tint = nn.Parameter(torch.tensor([tint, 0.0, -tint]).reshape(1, 3, 1, 1))

    def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
        height, width = (4 * side for side in lr.shape[-2:])
        return (
            functional.interpolate(lr.float(), (height, width), mode="bicubic", antialias=True).to(lr.dtype) + self.tint
        )


class SmallConvolution(Generator):
    """Two random convolutions that reach four input pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.SiLU(), nn.Conv2d(8, 48, 5, padding=2))

    def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
        return functional.pixel_shuffle(self.body(lr), 4) + functional.interpolate(lr, scale_factor=4)


class Noisy(Bicubic):
    takes_batches = False

    def forward(self, lr: Tensor, *, rng: torch.Generator | None = None, **conditions: Any) -> Tensor:
        big = super().forward(lr)
        return big + 0.1 * torch.randn(big.shape, generator=rng)


class Broken(Bicubic):
    def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
        return super().forward(lr) / (0.0 if lr.dtype != torch.float32 else 1.0)


def photo(height: int, width: int, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(70, 185, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return smooth if dtype == np.uint8 else smooth.astype(np.uint16) * 257


@pytest.fixture(scope="module")
def upscaler() -> Upscaler:
    return Upscaler(SmallConvolution(), "cpu", "float32")


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (5, 1), (37, 211)])
def test_exactly_four_times(upscaler: Upscaler, height: int, width: int) -> None:
    for color_fix in ("wavelet", "adain", "none"):
        assert upscaler(photo(height, width), color_fix=color_fix).size == (4 * width, 4 * height)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.decimals(1, 8, places=3))
def test_any_scale_is_exact(upscaler: Upscaler, height: int, width: int, scale: object) -> None:
    size = upscaler(photo(height, width), scale=float(scale)).size
    assert size == tuple(int(side * scale + type(scale)("0.5")) for side in (width, height))


def test_target_sizes() -> None:
    assert target_size(100, 50, UpscaleOptions(scale=1.005)) == (101, 50)
    assert target_size(100, 50, UpscaleOptions(width=250)) == (250, 125)
    assert target_size(3, 100, UpscaleOptions(height=150)) == (5, 150)
    assert target_size(100, 50, UpscaleOptions(width=300, height=100)) == (300, 100)
    for wrong in ({"scale": 9.0}, {"scale": 0.5}, {"scale": float("nan")}, {"width": 99}, {"height": 401}):
        with pytest.raises(UserError, match="accepted"):
            target_size(100, 50, UpscaleOptions(**wrong))
    others = ({"tile": "big"}, {"color_fix": "x"}, {"overlap": -1}, {"tile_blend": "mean"}, {"tile_norms": "whole"})
    for wrong in ({"tile": 8}, *others):
        with pytest.raises(UserError, match="accepted"):
            UpscaleOptions(**wrong)


@pytest.mark.parametrize("color_fix", ["wavelet", "adain", "none"])
@pytest.mark.parametrize("tile", [40, 64, 97])
def test_tiles_equal_the_whole(upscaler: Upscaler, color_fix: str, tile: int) -> None:
    image = LoadedImage(pixels=photo(110, 150))
    whole = upscaler.upscale_image(image, UpscaleOptions(color_fix=color_fix, tile="off"))
    seen: list[tuple[int, int]] = []
    options = UpscaleOptions(color_fix=color_fix, tile=tile)
    parts = upscaler.upscale_image(image, options, lambda done, total: seen.append((done, total)))
    assert np.abs(parts.pixels.astype(int) - whole.pixels).max() <= 1
    assert seen[-1][0] == seen[-1][1] == len(seen) > 1


class Bordered(Bicubic):
    """Darkens the outermost pixel of what it is given, as zero padding may."""

    lr_multiple = 16

    def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
        big = super().forward(lr)
        big[..., :4, :] = big[..., -4:, :] = big[..., :4] = big[..., -4:] = 0
        return big


def test_published_tiles_leave_seams_and_ours_do_not() -> None:
    image = LoadedImage(pixels=np.full((100, 70, 3), 128, np.uint8))
    upscaler = Upscaler(Bordered(), "cpu", "float32")
    smooth, average = (
        upscaler.upscale_image(image, UpscaleOptions(tile=64, tile_blend=blend, color_fix="none")).pixels
        for blend in ("smooth", "average")
    )
    assert (smooth[8:-8, 8:-8] == 128).all()
    # Tiles of 64 start in row 0 and in row 36: a stride of 48, the last one moved inward. One of two is dark there.
    column = average[:, 12, 0]
    assert sorted(set(np.flatnonzero(column != 128) // 4)) == [0, 36, 63, 99]
    assert column[4 * 36] == column[4 * 63] == 64


def test_published_tiles_have_a_published_side(monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = Upscaler(Bicubic(), "cpu", "float32")
    monkeypatch.setattr(memory_plan, "largest_side", lambda *values: 300)
    assert upscaler.plan(900, 900, UpscaleOptions(tile_blend="average")).tile == (256, 256)
    assert upscaler.plan(900, 900, UpscaleOptions()).tile == (249, 322), "four rows as 300 would need, three columns"
    assert upscaler.plan(200, 400, UpscaleOptions(tile_blend="average")).tile == (200, 400)


@pytest.mark.parametrize("color_fix", ["wavelet", "adain"])
def test_colour_fix_removes_a_tint(color_fix: str) -> None:
    samples = photo(40, 56)
    tinted = Upscaler(Bicubic(0.04), "cpu", "float32")
    plain = np.asarray(Upscaler(Bicubic(), "cpu", "float32")(samples, color_fix="none")).astype(int)
    assert np.abs(np.asarray(tinted(samples, color_fix="none")).astype(int) - plain).max() >= 9
    assert np.abs(np.asarray(tinted(samples, color_fix=color_fix)).astype(int) - plain).max() <= 3


def test_drift_takes_back_what_a_tint_has_beyond_eight_levels() -> None:
    samples = photo(40, 56)
    plain = np.asarray(Upscaler(Bicubic(), "cpu", "float32")(samples, color_fix="none")).astype(int)
    faint, strong = (Upscaler(Bicubic(tint), "cpu", "float32") for tint in (0.02, 0.06))
    assert np.array_equal(faint(samples, color_fix="drift"), faint(samples, color_fix="none"))
    left = np.asarray(strong(samples, color_fix="drift")).astype(int) - plain
    red, _, blue = np.median(left, axis=(0, 1))
    assert 6 <= red <= 8
    assert -8 <= blue <= -6
    tinted = np.asarray(strong(samples, color_fix="none")).astype(int) - plain
    assert np.median(tinted[..., 0]) >= 14


def test_colours_are_corrected_as_the_model_asks() -> None:
    samples = photo(40, 56)
    upscaler = Upscaler(Bicubic(0.06), "cpu", "float32")
    images = [LoadedImage(pixels=samples)] * 2
    for wanted in ("none", "wavelet", "drift", "adain"):
        upscaler.generator.color_fix = wanted  # type: ignore[assignment]
        expected = np.asarray(upscaler(samples, color_fix=wanted))  # type: ignore[arg-type]
        assert np.array_equal(upscaler(samples), expected)
        for image in upscaler.upscale_images(images, UpscaleOptions(tile_batch=2)):
            assert np.array_equal(image.pixels, expected)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("bicubic", "drift"),
        ("d3sr-tiny", "drift"),
        ("d3sr-tiny-fidelity", "drift"),
        ("random:resshift-micro", "wavelet"),
    ],
)
def test_models_know_the_correction_that_suits_them(name: str, wanted: str) -> None:
    assert Upscaler.from_pretrained(name, "cpu", "float32").resolved(None).color_fix == wanted


def test_scale_one_gives_the_image_back() -> None:
    samples = photo(40, 56)
    back = np.asarray(Upscaler(Bicubic(), "cpu", "float32")(samples, scale=1))
    assert np.abs(back.astype(int) - samples).mean() < 1


def test_wide_gamut_keeps_its_space_and_colours(upscaler: Upscaler) -> None:
    saturated = np.empty((24, 24, 3), np.uint8)
    saturated[:] = (10, 250, 20)  # outside sRGB
    for dtype, step in ((np.uint8, 1), (np.uint16, 257)):
        image = LoadedImage(pixels=saturated.astype(dtype) * dtype(step), icc=matrix_icc(DISPLAY_P3, SRGB_CURVE))
        for color_fix, levels in (("wavelet", 1), ("auto", 9)):  # eight levels of drift stay
            options = UpscaleOptions(color_fix=color_fix)  # type: ignore[arg-type]
            result = Upscaler(Bicubic(), "cpu", "float32").upscale_image(image, options)
            assert result.icc == image.icc
            assert np.abs(result.pixels.astype(int) - image.pixels[0, 0].astype(int)).max() <= levels * step


def test_profiles_of_tables_work_as_those_of_a_matrix(upscaler: Upscaler) -> None:
    samples = photo(20, 24)
    tables, matrix = (
        upscaler.upscale_image(LoadedImage(pixels=samples, icc=icc), UpscaleOptions(color_fix="none")).pixels
        for icc in (table_icc(ADOBE_RGB), matrix_icc(ADOBE_RGB, GAMMA_22))
    )
    plain = upscaler.upscale_image(LoadedImage(pixels=samples), UpscaleOptions(color_fix="none")).pixels
    assert np.abs(tables.astype(int) - matrix).mean() < 1.5
    assert not np.array_equal(matrix, plain)


def test_srgb_profile_changes_nothing(upscaler: Upscaler) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    samples = photo(20, 20)
    with_profile = upscaler.upscale_image(LoadedImage(pixels=samples, icc=srgb))
    assert np.array_equal(with_profile.pixels, upscaler.upscale_image(LoadedImage(pixels=samples)).pixels)


def test_gray_stays_gray_and_sixteen_bits_stay(upscaler: Upscaler) -> None:
    assert upscaler(photo(9, 12)[..., 0]).mode == "L"
    deep = photo(16, 16, dtype=np.uint16)
    fine = upscaler.upscale_image(LoadedImage(pixels=deep)).pixels
    assert fine.dtype == np.uint16
    coarse = upscaler.upscale_image(LoadedImage(pixels=(deep // 257).astype(np.uint8))).pixels
    assert np.abs(fine / 257 - coarse).max() <= 0.51
    assert len(np.unique(fine)) > 256


def test_transparency_leaves_no_fringe() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)  # black is stored where nothing is visible
    alpha = np.zeros((32, 32), np.uint8)
    pixels[8:24, 8:24], alpha[8:24, 8:24] = (250, 200, 60), 255
    result = Upscaler(Bicubic(), "cpu", "float32").upscale_image(LoadedImage(pixels=pixels, alpha=alpha))
    assert result.alpha is not None
    visible = result.pixels[result.alpha > 0].astype(int)
    assert np.abs(visible - (250, 200, 60)).max() <= 1
    assert result.alpha[64, 64] == 255
    assert result.alpha[0, 0] == 0


def test_path_pil_and_array_agree_and_metadata_stays(upscaler: Upscaler, tmp_path: Path) -> None:
    samples = photo(10, 14)
    Image.fromarray(samples).save(tmp_path / "a.png", icc_profile=b"kept")
    from_path = upscaler(tmp_path / "a.png")
    assert from_path.info["icc_profile"] == b"kept"
    for other in (samples, Image.fromarray(samples), str(tmp_path / "a.png")):
        assert np.array_equal(np.asarray(upscaler(other)), np.asarray(from_path))


def test_bytes_and_streams_are_images_and_results_keep_their_metadata_when_saved(
    upscaler: Upscaler, tmp_path: Path
) -> None:
    source, profile = tmp_path / "a.jpg", matrix_icc(DISPLAY_P3, SRGB_CURVE)
    Image.fromarray(photo(12, 16)).save(source, icc_profile=profile, dpi=(300, 300), comment=b"hello")
    data = source.read_bytes()
    results = [upscaler(given) for given in (source, str(source), data, io.BytesIO(data))]
    assert len({result.tobytes() for result in results}) == 1
    for ending in (".jpg", ".webp", ".png"):
        results[0].save(tmp_path / f"saved{ending}")
        assert read_image(tmp_path / f"saved{ending}").icc == profile
    assert upscaler.upscale_file(source, tmp_path / "new" / "b.png") == tmp_path / "new" / "b.png"
    written = read_image(tmp_path / "new" / "b.png")
    assert np.array_equal(written.pixels, np.asarray(results[0]))
    assert (written.icc, written.texts) == (profile, (("Comment", "hello"),))
    with pytest.raises(UserError, match="dict: not an image; accepted: a path, bytes"):
        upscaler({})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"'\.xyz' is no image format"):
        upscaler.upscale_file(source, tmp_path / "b.xyz")


def test_a_file_of_sixteen_bits_stays_one(upscaler: Upscaler, tmp_path: Path) -> None:
    write_image(LoadedImage(pixels=photo(12, 16).astype(np.uint16) * 257), tmp_path / "deep.png")
    assert read_image(upscaler.upscale_file(tmp_path / "deep.png", tmp_path / "b.tif")).pixels.dtype == np.uint16


@pytest.mark.parametrize("scale", [4.0, 3.0])
def test_images_of_one_size_go_through_the_network_together(scale: float) -> None:
    together = Upscaler(Nearest(), "cpu", "float32")
    images = [LoadedImage(pixels=photo(17, 23, seed)) for seed in range(5)]
    options = UpscaleOptions(scale=scale, tile_batch=3)
    made = together.upscale_images(images, options)
    assert [len(lr) for lr in together.generator.given] == [3, 2]
    for image, one in zip(images, made, strict=True):
        np.testing.assert_array_equal(
            one.pixels, Upscaler(Nearest(), "cpu", "float32").upscale_image(image, options).pixels
        )
    assert (together.images_at_once(UpscaleOptions()), together.images_at_once(options)) == (1, 3)


def test_images_that_are_no_batch_go_one_by_one() -> None:
    def sizes(images: list[LoadedImage], **options: Any) -> list[int]:
        one = Upscaler(Nearest(), "cpu", "float32")
        assert len(one.upscale_images(images, UpscaleOptions(tile_batch=4, **options))) == len(images)
        return [len(lr) for lr in one.generator.given]

    opaque = [LoadedImage(pixels=photo(20, 20, seed)) for seed in range(2)]
    assert sizes(opaque) == [2]
    assert sizes(opaque, color_fix="adain") == [1, 1]
    assert sizes([LoadedImage(pixels=one.pixels, alpha=one.pixels[..., 0]) for one in opaque]) == [1, 1]
    assert sizes([LoadedImage(pixels=photo(40, 40, seed)) for seed in range(2)], tile=16, overlap=4) == [3] * 6
    noisy = Upscaler(Noisy(), "cpu", "float32")
    assert noisy.images_at_once(UpscaleOptions(tile_batch=4)) == 1


def test_a_batch_that_fails_goes_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    class Alone(Nearest):
        def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
            if len(lr) > 1:
                raise RuntimeError("out of memory")
            return super().forward(lr)

    images = [LoadedImage(pixels=photo(20, 20, seed)) for seed in range(2)]
    made = Upscaler(Alone(), "cpu", "float32").upscale_images(images, UpscaleOptions(tile_batch=2))
    assert [one.pixels.shape for one in made] == [(80, 80, 3)] * 2


def test_seed_decides_the_noise() -> None:
    noisy = Upscaler(Noisy(), "cpu", "float32")
    samples = photo(40, 40)
    first, again, other = (np.asarray(noisy(samples, seed=seed, tile=32)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert noisy(samples, seed=10**18).size == noisy(samples, seed=-1).size  # beyond what PyTorch takes as they are


def test_weights_that_do_not_fit_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(loading, "load_generator", full)
    with pytest.raises(UserError, match="d3sr-tiny: not enough memory on cpu for its weights in float32"):
        Upscaler.from_pretrained("d3sr-tiny", "cpu", "float32")


def test_values_that_are_not_finite(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OneStepSRError, match=r"broken: values that are not finite in torch\.bfloat16; try --dtype"):
        Upscaler(Broken(), "cpu", "bfloat16", "broken")(photo(8, 8))
    monkeypatch.setattr(devices, "prefers_bfloat16", lambda: True)
    automatic = Upscaler(Broken(), "cpu", "auto", "broken")
    assert automatic.dtype == torch.bfloat16
    assert automatic(photo(8, 8)).size == (32, 32)
    assert automatic.dtype == torch.float32
    assert "repeating in float32" in caplog.text


def test_bfloat16_is_near_float32(upscaler: Upscaler) -> None:
    half = Upscaler(SmallConvolution(), "cpu", "bfloat16")
    difference = np.asarray(half(photo(20, 20))).astype(int) - np.asarray(upscaler(photo(20, 20)))
    assert np.abs(difference).max() <= 6


def test_devices_and_number_formats() -> None:
    with pytest.raises(UserError, match="device 'gpu': not available"):
        resolve_device("gpu")
    with pytest.raises(UserError, match="device 'meta': not available here"):
        resolve_device("meta")
    with pytest.raises(UserError, match="dtype 'int8': accepted: auto, float32"):
        resolve_dtype("int8", torch.device("cpu"))
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16


def test_a_gpu_that_does_not_work_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ones(*_: object, device: str) -> None:
        if broken:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    broken = False
    assert resolve_device("auto") == torch.device("cuda")
    broken = True
    assert resolve_device("auto") == torch.device("cpu")
    assert "cuda cannot be used, so the CPU computes (CUDA error: no kernel image" in caplog.text


def test_without_a_home_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(download.CACHE, raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert resolve_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    with pytest.raises(UserError, match="no home folder for the cache of weights; set ONESTEPSR_CACHE"):
        download.cache_folder()


def test_what_is_no_generator_is_refused() -> None:
    with pytest.raises(TypeError, match="a Identity is no onestepsr"):
        Upscaler(nn.Identity(), "cpu", "float32")
    assert Upscaler(Nearest(), "cpu", "float32")(photo(6, 6)).size == (24, 24)


def test_wrong_output_size_is_named() -> None:
    class Wrong(Bicubic):
        def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
            return lr

    with pytest.raises(OneStepSRError, match=r"wrong: gave \(1, 3, 6, 6\)"):
        Upscaler(Wrong(), "cpu", "float32", "wrong")(photo(6, 6))


class BlockMeans(Generator):
    """Gives every block of 4x4 input pixels its mean: the result depends on where the blocks lie."""

    lr_multiple = 4

    def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
        means = functional.avg_pool2d(lr, 4)
        return functional.interpolate(means, scale_factor=16.0, mode="nearest")


@pytest.mark.parametrize("tile", [16, 18, 21])
def test_tiles_start_at_multiples_of_the_networks_stride(tile: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (45, 37, 3), dtype=np.uint8)
    upscaler = Upscaler(BlockMeans(), device="cpu", dtype="float32")
    whole = np.asarray(upscaler(pixels, tile="off", color_fix="none"))
    assert whole.shape == (180, 148, 3)
    assert np.array_equal(np.asarray(upscaler(pixels, tile=tile, color_fix="none")), whole)


NEW_PAGES = """
import resource
import numpy as np
from onestepsr import Upscaler
upscaler = Upscaler.from_pretrained("d3sr-tiny", device="cpu", dtype="float32")
pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    upscaler(pixels)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
def test_one_image_lives_on_the_memory_of_the_one_before() -> None:
    """A tenth to a sixth of the time of small images went into new pages for memory that had just been handed back."""
    done = subprocess.run([sys.executable, "-c", NEW_PAGES], capture_output=True, text=True, check=True, timeout=600)
    first, *_, last = map(int, done.stdout.split())
    assert last < first / 4


def test_freed_memory_is_kept_for_large_work_only() -> None:
    generator = SmallConvolution()
    upscaler = Upscaler(generator, "cpu", "float32")
    area = int(module.LARGE_WORK / memory_plan.bytes_per_pixel(generator, torch.float32))
    assert not upscaler.keeps_freed_memory(area - 1)
    assert upscaler.keeps_freed_memory(area + 1)
    upscaler.device = torch.device("cuda")
    assert not upscaler.keeps_freed_memory(area + 1)

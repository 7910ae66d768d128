"""Speed from file to file: what is derived from the times, that both paths give the same image, what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from onestepsr.benchmark import ceiling, peak_memory, speed
from onestepsr.benchmark.ceiling import Ceiling, OtherWork, measure_ceiling
from onestepsr.benchmark.peak_memory import MemoryTask, measure_memory
from onestepsr.benchmark.speed import SpeedConfig, agreement, measure_speed, write_sources
from onestepsr.benchmark.speed_result import ModelSpeed, PathSpeed, Spread, StageSpeed, spread, step_ratios
from onestepsr.core.errors import OneStepSRError, UnknownModel, UserError

QUICK = {"width": 20, "height": 12, "device": "cpu", "repeats": 2, "warmup": 0, "memory": False, "ceiling_seconds": 0.0}


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceiling.CONVOLUTIONS, "cpu", ((1, 8, 8),))
    monkeypatch.setitem(ceiling.MATRICES, "cpu", (32,))


def seconds(median: float) -> Spread:
    return Spread(median=median, lower=median, upper=median, best=median, runs=1)


def path(encode: float, steps: float, whole: float) -> PathSpeed:
    stages = (
        StageSpeed(name="read", seconds=seconds(0.1)),
        StageSpeed(name="encode", seconds=seconds(encode), macs=10**12),
        StageSpeed(name="steps", seconds=seconds(steps), macs=3 * 10**12),
    )
    network = seconds(encode + steps)
    return PathSpeed(
        dtype="float32", memory_format="contiguous", tile=(8, 8), stages=stages, network=network, whole=seconds(whole)
    )


def model(steps: int, product: PathSpeed, baseline: PathSpeed | None = None) -> ModelSpeed:
    return ModelSpeed(
        model=f"m{steps}",
        steps=steps,
        output=(2000, 1000),
        batch=4,
        product=product,
        ceiling=Ceiling(convolution=8.0, matrix=16.0),
        baseline=baseline,
    )


def test_figures_follow_from_the_medians() -> None:
    found = model(1, path(1.0, 1.0, 4.0), path(5.0, 2.0, 9.0))
    assert found.product.tflops == pytest.approx(4.0)
    assert found.product.stages[1].tflops == pytest.approx(2.0)
    assert found.product.stages[0].tflops is None
    assert found.fraction_of_ceiling == pytest.approx(0.5)
    assert found.fraction_of_matrix_ceiling == pytest.approx(0.25)
    assert found.speedup_over_baseline == pytest.approx(3.5)
    assert found.images_per_second == pytest.approx(1.0)
    assert found.megapixels_per_second == pytest.approx(2.0)
    assert model(1, path(1.0, 1.0, 4.0)).speedup_over_baseline is None


def test_one_step_is_compared_with_every_number_of_steps() -> None:
    one, four, fifteen = model(1, path(1.0, 1.0, 3.0)), model(4, path(1.0, 4.0, 6.0)), model(15, path(1.0, 15.0, 18.0))
    ratios = step_ratios([fifteen, one, four])
    assert [(ratio.many.steps, ratio.network, ratio.steps, ratio.whole) for ratio in ratios] == [
        (15, 8.0, 15.0, 6.0),
        (4, 2.5, 4.0, 2.0),
    ]
    assert step_ratios([fifteen, four]) == []


def test_the_spread_is_of_quartiles() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(median=3.0, lower=2.0, upper=4.0, best=1.0, runs=5)
    assert spread([2.5]) == Spread(median=2.5, lower=2.5, upper=2.5, best=2.5, runs=1)


def test_agreement_is_the_psnr_of_all_images_together() -> None:
    zeros = np.zeros((4, 4, 3), np.uint8)
    assert agreement([zeros, zeros], [zeros, zeros + 2]) == pytest.approx(10 * math.log10(255**2 / 2))
    assert agreement([zeros], [zeros]) == speed.MOST_DECIBELS


@pytest.mark.parametrize("batch", [1, 2])
def test_product_and_baseline_give_the_same_image(batch: int) -> None:
    found = measure_speed("d3sr-tiny", SpeedConfig(batch=batch, dtype="bfloat16", **QUICK))
    assert (found.output, found.steps, found.batch) == ((80, 48), 1, batch)
    assert (found.product.dtype, found.product.memory_format) == ("bfloat16", "channels_last")
    assert found.baseline is not None
    assert (found.baseline.dtype, found.baseline.memory_format) == ("float32", "contiguous")
    assert found.agreement_db is not None
    assert found.agreement_db > 45.0
    names = ["read", "enlarge", "encode", "unet", "decode", "colour", "write"]
    for measured in (found.product, found.baseline):
        assert [stage.name for stage in measured.stages] == names
        assert measured.macs > 0
        assert measured.network.median < measured.whole.median
    assert found.product.macs == found.baseline.macs
    assert found.memory is None


def test_a_model_that_draws_noise_gets_the_same_in_both_paths() -> None:
    found = measure_speed("random:resshift-micro", SpeedConfig(dtype="float32", **QUICK), 2)
    assert found.steps == 2
    assert [stage.name for stage in found.product.stages if stage.macs] == ["encode", "steps", "decode"]
    assert found.agreement_db is not None
    assert found.agreement_db > 60.0


def test_tiles_are_counted_as_they_run() -> None:
    whole, cut = (
        measure_speed("random:d3sr-tiny", SpeedConfig(**{**QUICK, "width": 64, "tile": tile, "baseline": False}))
        for tile in ("off", 32)
    )
    assert (whole.product.tile, cut.product.tile) == ((QUICK["height"], 64), (QUICK["height"], 32))
    assert cut.product.macs > 1.4 * whole.product.macs
    assert cut.speedup_over_baseline is None


def test_stages_tell_tiles_of_their_own() -> None:
    config = SpeedConfig(**{**QUICK, "width": 64, "tile": 32, "baseline": False})
    found = measure_speed("random:resshift-micro", config)
    tiles = {stage.name: stage.tile for stage in found.product.stages if stage.tile is not None}
    assert tiles == dict.fromkeys(("encode", "steps", "decode"), (QUICK["height"], 32))


def test_a_baseline_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "free_memory", lambda device: 1e6)
    said: list[str] = []
    found = measure_speed("random:d3sr-tiny", SpeedConfig(**{**QUICK, "tile": 32}), announce=said.append)
    assert found.baseline is None
    assert any("no baseline" in line for line in said)


def test_a_network_without_operations_has_no_throughput() -> None:
    found = measure_speed("bicubic", SpeedConfig(**QUICK))
    assert (found.product.tflops, found.fraction_of_ceiling) == (None, None)


@pytest.mark.parametrize(
    "wrong",
    [{"width": 0}, {"batch": 0}, {"repeats": 0}, {"warmup": -1}, {"file_format": "gif"}, {"batch": 2, "tile": 64}],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"accepted|single images"):
        SpeedConfig(**wrong)


def test_steps_that_a_model_does_not_take_and_models_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="steps"):
        measure_speed("random:d3sr-tiny", SpeedConfig(**QUICK), 15)
    with pytest.raises(UnknownModel):
        measure_speed("random:no-such", SpeedConfig(**QUICK))


def test_sources_differ_within_a_batch_and_not_between_runs(tmp_path: Path) -> None:
    config = SpeedConfig(width=24, height=16, batch=2, file_format="png")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, again = write_sources(tmp_path / "a", config), write_sources(tmp_path / "b", config)
    assert Image.open(first[0]).size == (24, 16)
    assert [source.read_bytes() for source in first] == [source.read_bytes() for source in again]
    assert first[0].read_bytes() != first[1].read_bytes()


def test_the_ceiling_is_the_best_of_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_fastest", lambda run, device, seconds, least: run().numel() / 1e12)
    shapes = ((1, 4, 8), (1, 8, 8))
    found = ceiling.convolution_speed(torch.device("cpu"), torch.float32, shapes)
    assert found == pytest.approx(2 * 9 * 8)  # operations per number put out of the wider one
    assert ceiling.matrix_speed(torch.device("cpu"), torch.float32, (4, 16)) == pytest.approx(32)
    monkeypatch.undo()
    measured = measure_ceiling(torch.device("cpu"), torch.float32, seconds=0.0)
    assert min(measured.convolution, measured.matrix) > 0.0


def test_memory_is_measured_in_an_interpreter_of_its_own(tmp_path: Path) -> None:
    source = write_sources(tmp_path, SpeedConfig(width=300, height=200))[0]
    task = MemoryTask(
        model="bicubic",
        source=str(source),
        target=str(tmp_path / "large.jpg"),
        device="cpu",
        dtype="float32",
        tile="off",
    )
    use = measure_memory(task)
    assert Image.open(task.target).size == (1200, 800)
    assert use.own > 1200 * 800 * 3 * 4  # at least the image as floats
    assert use.interpreter <= use.loaded <= use.peak
    assert use.device_peak is None


def test_where_the_system_tells_no_memory_none_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "resident_memory", dict)  # Windows
    said: list[str] = []
    found = measure_speed("bicubic", SpeedConfig(**QUICK | {"memory": True, "repeats": 1}), announce=said.append)
    assert found.memory is None
    assert any("does not tell" in line for line in said)


def test_a_failing_interpreter_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "MODULE", "onestepsr.no_such_module")
    task = MemoryTask(model="m", source="a", target="b", device="cpu", dtype="float32", tile="off")
    with pytest.raises(OneStepSRError, match=r"memory of m failed: .*no_such_module") as caught:
        measure_memory(task)
    assert "\n" not in str(caught.value)


def test_other_work_is_what_this_process_did_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"_busy_seconds": iter([10.0, 16.0]), "_own_seconds": iter([1.0, 3.0]), "perf_counter": iter([0.0, 2.0])}
    for name, values in clocks.items():
        owner = ceiling.time if name == "perf_counter" else ceiling
        monkeypatch.setattr(owner, name, lambda values=values: next(values))
    assert OtherWork().cores() == pytest.approx((6.0 - 2.0) / 2.0)


def test_where_nothing_tells_other_work_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_busy_seconds", lambda: None)
    assert OtherWork().cores() is None

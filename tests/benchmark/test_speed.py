"""Speed from file to file: what is derived from the times, that both paths give the same image, what is refused."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from onestepsr.benchmark import probes, speed
from onestepsr.benchmark.counting import count_stages, wrapped
from onestepsr.benchmark.probes import measure_memory
from onestepsr.benchmark.speed import SpeedConfig, Stopwatch, agreement, measure_speed, spread, write_sources
from onestepsr.benchmark.speed_report import comparison_table, step_ratios
from onestepsr.core.errors import OneStepSRError, UnknownModel, UserError
from onestepsr.imaging.read import LoadedImage
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.loading import load_generator

QUICK = {"width": 20, "height": 12, "device": "cpu", "repeats": 2, "warmup": 0, "memory": False, "ceiling_seconds": 0.0}


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probes.CONVOLUTIONS, "cpu", ((1, 8, 8),))
    monkeypatch.setitem(probes.MATRICES, "cpu", (32,))


def path(encode: float, steps: float, whole: float) -> dict[str, object]:
    stages = [{"name": "encode", "median": encode}, {"name": "steps", "median": steps}]
    return {"stages": stages, "network": {"median": encode + steps}, "whole": {"median": whole}}


def model(steps: int, product: dict[str, object]) -> dict[str, object]:
    return {"model": f"m{steps}", "steps": steps, "product": product}


def test_one_step_is_compared_with_every_number_of_steps() -> None:
    one, four, fifteen = model(1, path(1.0, 1.0, 3.0)), model(4, path(1.0, 4.0, 6.0)), model(15, path(1.0, 15.0, 18.0))
    ratios = step_ratios([fifteen, one, four])
    figures = ("over_steps", "network", "steps_alone", "file_to_file")
    assert [tuple(ratio[name] for name in figures) for ratio in ratios] == [(15, 8.0, 15.0, 6.0), (4, 2.5, 4.0, 2.0)]
    assert step_ratios([fifteen, four]) == []


def test_several_models_stand_side_by_side() -> None:
    measured = {"megapixels_per_second": 1.5, "memory_bytes": {"own": 2e6}}
    one = model(1, path(0.0, 0.1, 0.5)) | measured
    four = model(4, path(0.0, 0.4, 2.0)) | measured | {"memory_bytes": None}
    table = comparison_table({"models": [one, four]})
    assert table.columns[-1] == "ratio to m1"
    assert table.rows == (("m1", "0.5", "1.5", "2", "1.00"), ("m4, 4 steps", "2", "1.5", "", "4.00"))


def test_the_spread_is_of_quartiles() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "lower": 2.0, "upper": 4.0, "best": 1.0, "runs": 5}
    assert spread([2.5]) == {"median": 2.5, "lower": 2.5, "upper": 2.5, "best": 2.5, "runs": 1}


def test_agreement_is_the_psnr_of_all_images_together() -> None:
    zeros = np.zeros((4, 4, 3), np.uint8)
    assert agreement([zeros, zeros], [zeros, zeros + 2]) == pytest.approx(10 * math.log10(255**2 / 2))
    assert agreement([zeros], [zeros]) == speed.MOST_DECIBELS


@pytest.mark.parametrize("batch", [1, 2])
def test_product_and_baseline_give_the_same_image(batch: int) -> None:
    found = measure_speed("d3sr-tiny", SpeedConfig(batch=batch, dtype="bfloat16", **QUICK))
    product, baseline = found["product"], found["baseline"]
    assert (found["output"], found["steps"], found["batch"]) == ([80, 48], 1, batch)
    assert (product["dtype"], product["memory_format"]) == ("bfloat16", "channels_last")
    assert (baseline["dtype"], baseline["memory_format"]) == ("float32", "contiguous")
    assert found["agreement_db"] > 45.0
    for measured in (product, baseline):
        names = ["read", "enlarge", "encode", "unet", "decode", "colour", "write"]
        assert [stage["name"] for stage in measured["stages"]] == names
        assert measured["network"]["median"] < measured["whole"]["median"]
        counted = [stage for stage in measured["stages"] if stage["macs"]]
        seconds = sum(stage["median"] for stage in counted)
        assert measured["macs"] == sum(stage["macs"] for stage in counted) > 0
        assert measured["tflops"] == pytest.approx(2 * measured["macs"] / seconds / 1e12)
    assert product["macs"] == baseline["macs"]
    assert found["memory_bytes"] is None
    whole, ceiling = product["whole"]["median"], found["ceiling_tflops"]
    assert found["images_per_second"] == pytest.approx(batch / whole)
    assert found["megapixels_per_second"] == pytest.approx(batch * 80 * 48 / whole / 1e6)
    assert found["fraction_of_ceiling"] == pytest.approx(product["tflops"] / ceiling["convolution"])
    assert found["fraction_of_matrix_ceiling"] == pytest.approx(product["tflops"] / ceiling["matrix"])
    ratio = baseline["network"]["median"] / product["network"]["median"]
    assert found["speedup_over_baseline"] == pytest.approx(ratio)


def test_a_model_that_draws_noise_gets_the_same_in_both_paths() -> None:
    found = measure_speed("random:resshift-micro", SpeedConfig(dtype="float32", **QUICK), 2)
    assert found["steps"] == 2
    assert [stage["name"] for stage in found["product"]["stages"] if stage["macs"]] == ["encode", "steps", "decode"]
    assert found["agreement_db"] > 60.0


def test_tiles_are_counted_as_they_run() -> None:
    whole, cut = (
        measure_speed("random:d3sr-tiny", SpeedConfig(**{**QUICK, "width": 64, "tile": tile, "baseline": False}))
        for tile in ("off", 32)
    )
    assert (whole["product"]["tile"], cut["product"]["tile"]) == ([QUICK["height"], 64], [QUICK["height"], 32])
    assert cut["product"]["macs"] > 1.4 * whole["product"]["macs"]
    assert cut["speedup_over_baseline"] is None


def test_stages_tell_tiles_of_their_own() -> None:
    config = SpeedConfig(**{**QUICK, "width": 64, "tile": 32, "baseline": False})
    found = measure_speed("random:resshift-micro", config)
    tiles = {stage["name"]: stage["tile"] for stage in found["product"]["stages"] if "tile" in stage}
    assert tiles == {key: [QUICK["height"], 32] for key in ("encode", "steps", "decode")}


def test_a_baseline_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "free_memory", lambda device: 1e6)
    said: list[str] = []
    found = measure_speed("random:d3sr-tiny", SpeedConfig(**{**QUICK, "tile": 32}), announce=said.append)
    assert found["baseline"] is None
    assert any("no baseline" in line for line in said)


def test_a_network_without_operations_has_no_throughput() -> None:
    found = measure_speed("bicubic", SpeedConfig(**QUICK))
    assert (found["tflops"], found["fraction_of_ceiling"]) == (None, None)


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
    cpu = torch.device("cpu")
    monkeypatch.setattr(probes, "_fastest", lambda run, device, seconds: run().numel() / 1e12)
    found = probes.convolution_speed(cpu, torch.float32, ((1, 4, 8), (1, 8, 8)))
    assert found == pytest.approx(2 * 9 * 8)  # operations per output value of the wider one
    assert probes.matrix_speed(cpu, torch.float32, (4, 16)) == pytest.approx(32)
    monkeypatch.undo()
    assert min(probes.measure_ceiling(cpu, torch.float32, seconds=0.0).values()) > 0.0


def test_memory_is_measured_in_an_interpreter_of_its_own(tmp_path: Path) -> None:
    source, target = write_sources(tmp_path, SpeedConfig(width=300, height=200))[0], tmp_path / "large.jpg"
    use = measure_memory("bicubic", str(source), str(target), device="cpu", dtype="float32", tile="off")
    assert Image.open(target).size == (1200, 800)
    assert use["own"] == use["peak"] - use["interpreter"] > 1200 * 800 * 3 * 4  # at least the image as floats
    assert use["interpreter"] <= use["loaded"] <= use["peak"]
    assert use["device_peak"] is None


def test_where_the_system_tells_no_memory_none_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "resident_memory", dict)  # Windows
    said: list[str] = []
    found = measure_speed("bicubic", SpeedConfig(**QUICK | {"memory": True, "repeats": 1}), announce=said.append)
    assert found["memory_bytes"] is None
    assert any("does not tell" in line for line in said)


def test_a_failing_interpreter_is_one_line() -> None:
    with pytest.raises(OneStepSRError, match=r"memory of no-such failed: .*no-such") as caught:
        measure_memory("no-such", "a", "b")
    assert "\n" not in str(caught.value)


def test_other_work_is_what_this_process_did_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    before = probes.other_work()
    if before is None:
        pytest.skip("only Linux tells the work of other processes")
    own = os.times()
    monkeypatch.setattr(os, "times", lambda: (own[0] + 20.0, own[1] + 10.0, *own[2:]))
    assert probes.other_work() == pytest.approx(before - 30.0, abs=10.0)


def test_where_nothing_tells_other_work_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert probes.other_work() is None


# ---- stopwatch ----


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed(OneStepLatentGenerator):
    """Stages that take 1, 2 and 4 seconds, and half a second around them."""

    scale = 1

    def __init__(self, clock: Clock) -> None:
        nn.Module.__init__(self)  # it has no networks
        self.clock = clock

    def _take(self, seconds: float, x: Tensor) -> Tensor:
        self.clock.now += seconds
        return x

    def encode(self, x: Tensor) -> Tensor:
        return self._take(1.0, x)

    def step(self, x: Tensor) -> Tensor:
        return self._take(2.0, x)

    def decode(self, x: Tensor) -> Tensor:
        return self._take(4.0, x)

    def forward(self, x: Tensor, **conditions: object) -> Tensor:
        return self._take(0.5, self.decode(self.step(self.encode(x))))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


def test_every_second_lands_in_its_stage(clock: Clock) -> None:
    watch, generator = Stopwatch(torch.device("cpu")), Timed(clock)
    with watch.watching(generator):
        for side in (2, 3):
            generator(torch.zeros(1, 3, side, side))
    assert watch.read() == {"network": 15.0, "encode": 2.0, "unet": 4.0, "decode": 8.0}
    assert watch.calls == [("forward", ((1, 3, 2, 2),)), ("forward", ((1, 3, 3, 3),))]
    assert watch.read() == {}


def test_stages_with_tiles_of_their_own_are_the_network_together() -> None:
    generator = load_generator("random:resshift-micro")
    upscaler, watch = Upscaler(generator, "cpu", "float32"), Stopwatch(torch.device("cpu"))
    image = LoadedImage(pixels=np.zeros((40, 64, 3), np.uint8))
    with watch.section("upscale"), watch.watching(generator):
        upscaler.upscale_image(image, UpscaleOptions(tile=48, tile_norms="tile"))
    assert [name for name, _ in watch.calls] == [*["encode_lr"] * 2, *["restore_latent"] * 2, *["decode"] * 2]
    seconds = watch.read()
    assert sum(seconds[stage] for stage in ("encode", "steps", "decode")) <= seconds["network"] <= seconds["upscale"]
    tiles = count_stages(generator, [("forward", ((1, 3, 40, 48),))] * 2)
    assert count_stages(generator, watch.calls) == tiles


def test_a_watched_generator_is_as_before_afterwards(clock: Clock) -> None:
    watch, generator = Stopwatch(torch.device("cpu")), Timed(clock)
    before = dict(vars(generator))
    with watch.watching(generator):
        assert "forward" in vars(generator)
    assert vars(generator) == before
    with pytest.raises(AttributeError), wrapped(generator, {"encode": lambda m: m, "no_such": lambda m: m}):
        pass
    assert vars(generator) == before


def test_on_cuda_the_devices_clock_is_read_and_only_sections_of_the_host_wait(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            assert stream == "stream"
            self.milliseconds = clock.now * 7.0

        def elapsed_time(self, end: Event) -> float:
            return end.milliseconds - self.milliseconds

    waits: list[float] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(clock.now))
    watch, generator = Stopwatch(torch.device("cuda")), Timed(clock)
    with watch.section("upscale"), watch.watching(generator):
        generator(torch.zeros(1, 3, 2, 2))
    assert waits == [7.5]
    seconds = watch.read()
    assert seconds.pop("upscale") == 7.5
    assert seconds == pytest.approx({"network": 0.0525, "encode": 0.007, "unet": 0.014, "decode": 0.028})

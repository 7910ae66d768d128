"""Stages timed and counted where they run: every second and every operation lands in its stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onestepsr.benchmark import stages as module
from onestepsr.benchmark.networks import measure
from onestepsr.benchmark.stages import Call, Stopwatch, count_stages, stages_of, without_contents, wrapped
from onestepsr.imaging.read import LoadedImage
from onestepsr.inference.compiling import compile_networks
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
from onestepsr.models.generators import LatentGenerator
from onestepsr.models.loading import load_generator

CPU = torch.device("cpu")


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed(LatentGenerator):
    """Stages that take 1, 2 and 4 seconds, and half a second around them."""

    scale = 1

    def __init__(self, clock: Clock) -> None:
        nn.Module.__init__(self)
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

    def forward(self, x: Tensor) -> Tensor:
        return self._take(0.5, self.decode(self.step(self.encode(x))))


def evaluation(*shape: int) -> Call:
    return "forward", (shape,)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_every_second_lands_in_its_stage(clock: Clock) -> None:
    watch, generator = Stopwatch(CPU), Timed(clock)
    with watch.watching(generator):
        for side in (2, 3):
            generator(torch.zeros(1, 3, side, side))
    assert watch.read() == {"network": 15.0, "encode": 2.0, "unet": 4.0, "decode": 8.0}
    assert watch.calls == [evaluation(1, 3, 2, 2), evaluation(1, 3, 3, 3)]
    assert watch.read() == {}


def test_stages_with_tiles_of_their_own_are_the_network_together() -> None:
    generator = load_generator("random:resshift-micro")
    upscaler, watch = Upscaler(generator, "cpu", "float32"), Stopwatch(CPU)
    image = LoadedImage(pixels=np.zeros((40, 64, 3), np.uint8))
    with watch.section("upscale"), watch.watching(generator):
        upscaler.upscale_image(image, UpscaleOptions(tile=48, tile_norms="tile"))
    assert [name for name, _ in watch.calls] == [*["encode_lr"] * 2, *["restore_latent"] * 2, *["decode"] * 2]
    seconds = watch.read()
    assert sum(seconds[stage] for stage in ("encode", "steps", "decode")) <= seconds["network"] <= seconds["upscale"]
    tiles = count_stages(generator, [evaluation(1, 3, 40, 48)] * 2)
    assert count_stages(generator, watch.calls) == tiles


def test_a_watched_generator_is_as_before_afterwards(clock: Clock) -> None:
    watch, generator = Stopwatch(CPU), Timed(clock)
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


def test_operations_are_those_of_the_complexity_command() -> None:
    generator = load_generator("random:d3sr-tiny", dtype=torch.bfloat16)
    expected = {stage.name: stage.cost.macs for stage in measure("random:d3sr-tiny", 128).stages}
    assert count_stages(generator, [evaluation(1, 3, 32, 32)]) == expected
    mixed = count_stages(generator, [evaluation(n, 3, 32, 32) for n in (1, 1, 2)])
    assert mixed == {stage: 4 * macs for stage, macs in expected.items()}
    assert all(parameter.device == CPU for parameter in generator.parameters())
    assert not set(vars(generator)) & {"forward", *stages_of(generator)}


def test_every_step_of_a_sampler_counts() -> None:
    one, four = (
        count_stages(load_generator("random:resshift-micro", steps=steps), [evaluation(1, 3, 16, 16)])
        for steps in (1, 4)
    )
    assert list(one) == ["encode", "steps", "decode"]
    assert four == {**one, "steps": 4 * one["steps"]}


def test_a_network_without_stages_counts_nothing() -> None:
    assert count_stages(load_generator("bicubic"), [evaluation(1, 3, 16, 16)]) == {}


def test_a_copy_without_contents_leaves_the_original() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    network[1].shared = network[0].weight
    empty = without_contents(network)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    assert empty[1].shared is empty[0].weight
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"cpu"}


def test_a_compiled_generator_is_counted_by_a_plain_copy() -> None:
    generator = load_generator("random:resshift-micro")
    compile_networks(generator)
    macs = count_stages(generator, [evaluation(1, 3, 16, 16)])
    assert min(macs.values()) > 0
    assert "encode" not in vars(without_contents(generator).autoencoder)
    assert "encode" in vars(generator.autoencoder)

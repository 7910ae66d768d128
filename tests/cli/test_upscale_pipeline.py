"""Reading ahead and writing behind: the same files as one after the other, within limits, and stoppable."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onestepsr.cli.upscale import pipeline
from onestepsr.cli.upscale.jobs import Job, Naming, plan_jobs
from onestepsr.cli.upscale.pipeline import AHEAD, MemoryBudget, Pipeline, Result
from onestepsr.core.errors import OneStepSRError
from onestepsr.core.files import remove_leftovers
from onestepsr.imaging import read, write
from onestepsr.imaging.read import LoadedImage
from onestepsr.inference.options import UpscaleOptions

SIZE = UpscaleOptions(scale=2)
TINY = LoadedImage(pixels=np.zeros((1, 2, 3), np.uint8))


class Enlarger:
    """Repeats pixels; ``before`` is called with the number of every image."""

    last_plan = None

    def __init__(self, before: Callable[[int], None] = lambda number: None) -> None:
        self.before, self.done = before, 0

    def upscale_image(self, image: LoadedImage, options: UpscaleOptions, tell: object = None) -> LoadedImage:
        self.done += 1
        self.before(self.done - 1)
        return LoadedImage(pixels=image.pixels.repeat(2, axis=0).repeat(2, axis=1))


def results_of(upscaler: object, jobs: list[Job], group: int = 32) -> list[Result]:
    groups = [jobs[start : start + group] for start in range(0, len(jobs), group)]
    with closing(Pipeline(upscaler, SIZE).run(groups)) as results:
        return list(results)


def put(folder: Path, number: int, size: tuple[int, int] = (3, 2)) -> list[Job]:
    folder.mkdir(exist_ok=True)
    for index in range(number):
        Image.new("RGB", size, (index, 0, 0)).save(folder / f"{index:05d}.png")
    return plan_jobs([str(folder)], Naming(out=None, file_format="keep", suffix="_x2"), False)


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Images from nowhere to nowhere; how many were read and written."""
    count = {"read": 0, "written": 0}

    def write(*_: object, **__: object) -> None:
        count["written"] += 1

    def read(_: Path) -> LoadedImage:
        count["read"] += 1
        return TINY

    monkeypatch.setattr(read, "read_picture", read)
    monkeypatch.setattr(write, "write_picture", write)
    return count


def made_up(number: int) -> list[Job]:
    return [Job(Path(f"in/{index}.png"), Path(f"out/{index}.png")) for index in range(number)]


def test_results_come_in_order_and_files_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = put(tmp_path / "in", 20)
    jobs[3].source.write_bytes(b"nonsense")
    jobs[7].target.mkdir(parents=True)  # cannot be written
    real = write.write_image

    def sometimes_slow(image: LoadedImage, path: Path, **options: bool) -> None:
        time.sleep(0.02 if path in (jobs[0].target, jobs[10].target) else 0.0)
        real(image, path, **options)

    monkeypatch.setattr(write, "write_picture", sometimes_slow)

    def refuse_the_fifth(number: int) -> None:
        if number == 4:
            raise OneStepSRError("no")

    results = results_of(Enlarger(refuse_the_fifth), jobs, group=6)
    assert [result.input for result in results] == [str(job.source) for job in jobs]
    failed = {place: result.error for place, result in enumerate(results) if result.status == "failed"}
    assert list(failed) == [3, 5, 7]
    assert "not an image" in str(failed[3])
    assert failed[5] == "no"
    assert "cannot be written" in str(failed[7])
    for place in set(range(20)) - set(failed):
        with Image.open(jobs[place].target) as written:
            assert (written.size, written.getpixel((0, 0))) == ((6, 4), (place, 0, 0))
        assert (results[place].input_size, results[place].output_size) == ((3, 2), (6, 4))
    assert not [name for name in os.listdir(jobs[0].target.parent) if name.startswith(".")]


def test_reading_and_writing_overlap_the_network(no_files: dict[str, int]) -> None:
    """While the first image is enlarged, others are read; while the last is enlarged, all others are written."""

    def wait_for(number: int) -> None:
        if number == 0:
            reach(lambda: no_files["read"] == AHEAD)
        if number == 19:
            reach(lambda: no_files["written"] == 19)

    assert len(results_of(Enlarger(wait_for), made_up(20))) == 20


def reach(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_ten_thousand_images_keep_to_the_limits(no_files: dict[str, int]) -> None:
    most, upscaler = 0, Enlarger()

    def look(number: int) -> None:
        nonlocal most
        most = max(most, no_files["read"] - no_files["written"])

    upscaler.before = look
    results = results_of(upscaler, made_up(10_000))
    assert [Path(result.input).stem for result in results] == [str(number) for number in range(10_000)]
    assert {result.status for result in results} == {"written"}
    assert most <= AHEAD


def test_large_images_follow_each_other(no_files: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MemoryBudget", lambda: MemoryBudget(size=TINY.pixels.nbytes))
    seen: list[int] = []
    results_of(Enlarger(lambda number: seen.append(no_files["read"] - no_files["written"])), made_up(9))
    assert seen == [1] * 9


def test_an_interrupt_stops_reading_and_leaves_no_thread(no_files: dict[str, int]) -> None:
    def interrupt(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        results_of(Enlarger(interrupt), made_up(1000))
    assert set(threading.enumerate()) <= before
    assert no_files["read"] <= 3 + AHEAD
    assert no_files["written"] <= 3


@pytest.mark.parametrize("place", ["read_picture", "write_picture", "upscale"])
def test_a_defect_ends_the_run_wherever_it_happens(
    no_files: dict[str, int], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    upscaler = Enlarger(broken if place == "upscale" else lambda number: None)
    if place != "upscale":
        monkeypatch.setattr(read if place == "read_picture" else write, place, broken)
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        results_of(upscaler, made_up(50))
    assert set(threading.enumerate()) <= before


def test_lack_of_memory_costs_one_image(no_files: dict[str, int]) -> None:
    def much(number: int) -> None:
        if number == 1:
            raise MemoryError

    results = results_of(Enlarger(much), made_up(3))
    assert [result.status for result in results] == ["written", "failed", "written"]
    assert results[1].error == "in/1.png: not enough memory; try --tile 64"


def test_folders_are_listed_a_few_times_however_many_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done for each image must not look through a folder, or a large folder takes its square in time."""
    jobs = put(tmp_path / "in", 60)
    listed: list[object] = []
    for name in ("scandir", "listdir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *materialize, real=real: listed.append(materialize) or real(*materialize))
    assert len(plan_jobs([str(tmp_path / "in")], Naming(out=None, file_format="keep", suffix="_x2"), False)) == 60
    results_of(Enlarger(), jobs)
    remove_leftovers(*(job.target for job in jobs))
    assert 1 <= len(listed) <= 4


def test_groups_are_taken_as_they_are_needed(no_files: dict[str, int]) -> None:
    taken = 0

    def groups() -> Iterator[list[Job]]:
        nonlocal taken
        for job in made_up(100):
            taken += 1
            yield [job]

    with closing(Pipeline(Enlarger(), SIZE).run(groups())) as results:
        next(results)
        assert taken <= 3 * AHEAD

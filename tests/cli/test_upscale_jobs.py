"""Jobs of the upscale command, run as a whole: the same files as one after the other, in order, errors apart."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from onestepsr.cli.upscale.jobs import Job, Naming, Result, plan_jobs, upscale_jobs
from onestepsr.core.errors import OneStepSRError
from onestepsr.core.files import remove_leftovers
from onestepsr.imaging import write
from onestepsr.imaging.read import LoadedImage
from onestepsr.inference.options import UpscaleOptions


class Enlarger:
    """Repeats pixels; ``before`` is called with the number of every image."""

    last_plan = None

    def __init__(self, before: Callable[[int], None] = lambda number: None) -> None:
        self.before, self.done = before, 0

    def upscale_image(self, image: LoadedImage, options: UpscaleOptions, tell: object = None) -> LoadedImage:
        self.done += 1
        self.before(self.done - 1)
        return LoadedImage(pixels=image.pixels.repeat(2, axis=0).repeat(2, axis=1))


def results_of(upscaler: object, jobs: list[Job]) -> list[Result]:
    return list(upscale_jobs(jobs, upscaler, UpscaleOptions(scale=2)))  # type: ignore[arg-type]


def put(folder: Path, number: int, size: tuple[int, int] = (3, 2)) -> list[Job]:
    folder.mkdir(exist_ok=True)
    for index in range(number):
        Image.new("RGB", size, (index, 0, 0)).save(folder / f"{index:05d}.png")
    return plan_jobs([str(folder)], Naming(out=None, file_format="keep", suffix="_x2"), False).jobs


def test_results_come_in_order_and_files_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = put(tmp_path / "in", 20)
    jobs[3].source.write_bytes(b"nonsense")
    jobs[7].target.mkdir(parents=True)  # cannot be written
    real = write.write_image

    def sometimes_slow(image: LoadedImage, path: Path, **options: bool) -> None:
        time.sleep(0.02 if path in (jobs[0].target, jobs[10].target) else 0.0)
        real(image, path, **options)

    monkeypatch.setattr(write, "write_image", sometimes_slow)

    def refuse_some(number: int) -> None:
        if number == 4:
            raise OneStepSRError("no")
        if number == 7:
            raise TypeError("an integer is required")  # such as codecs raise on what they do not expect

    results = results_of(Enlarger(refuse_some), jobs)
    assert [result.input for result in results] == [str(job.source) for job in jobs]
    failed = {index: result.error for index, result in enumerate(results) if result.status == "failed"}
    assert list(failed) == [3, 5, 7, 8]
    assert "not an image" in str(failed[3])
    assert failed[5] == f"{jobs[5].source}: no"
    assert "cannot be written" in str(failed[7])
    assert failed[8] == f"{jobs[8].source}: TypeError: an integer is required"
    for index in set(range(20)) - set(failed):
        with Image.open(jobs[index].target) as written:
            assert (written.size, written.getpixel((0, 0))) == ((6, 4), (index, 0, 0))
        assert (results[index].input_size, results[index].output_size) == ((3, 2), (6, 4))
    assert not [name for name in os.listdir(jobs[0].target.parent) if name.startswith(".")]


def test_lack_of_memory_costs_one_image(tmp_path: Path) -> None:
    def much(number: int) -> None:
        if number == 1:
            raise MemoryError

    jobs = put(tmp_path / "in", 3)
    results = results_of(Enlarger(much), jobs)
    assert [result.status for result in results] == ["written", "failed", "written"]
    assert results[1].error == f"{jobs[1].source}: not enough memory; try --tile 64"


def test_folders_are_listed_a_few_times_however_many_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work for each image must not look through a folder, or a large folder takes its square in time."""
    jobs = put(tmp_path / "in", 60)
    listed: list[object] = []
    for name in ("scandir", "listdir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *where, real=real: listed.append(where) or real(*where))
    assert len(plan_jobs([str(tmp_path / "in")], Naming(out=None, file_format="keep", suffix="_x2"), False).jobs) == 60
    results_of(Enlarger(), jobs)
    remove_leftovers(*(job.target for job in jobs))
    assert 1 <= len(listed) <= 4

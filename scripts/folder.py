"""A folder of small photos through the product's own pipeline, against the time that the network alone takes for them.

    python scripts/folder.py [PHOTO_DIR] [--photos 200] [--size 128] [--counts 10,100,1000] [--workers 2] [--json F]

The photos are crops of those in PHOTO_DIR, or made up, and are written as JPEG into a temporary folder. In one process:
`upscale_picture` of images in memory, warm (median); the whole folder from listing it to the last file written; the
same one after the other; and folders of several sizes. `--workers` adds the folder through several processes, the time
they take to start included. Rounds of all of them take turns, so that other work on the machine hits each alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from onestepsr.cli.upscale.workers import enlarge_in_processes
from PIL import Image

from onestepsr.benchmark.ceiling import OtherWork
from onestepsr.cli.upscale.jobs import Job, Naming, existing, plan_jobs
from onestepsr.cli.upscale.pipeline import Pipeline
from onestepsr.cli.upscale.prompts import Setup
from onestepsr.core.files import remove_leftovers
from onestepsr.core.machine import cores, describe_machine
from onestepsr.imaging.read import read_image
from onestepsr.imaging.write import check_writable, write_image
from onestepsr.inference.options import UpscaleOptions
from onestepsr.inference.upscaler import Upscaler

WARM_UP, SINGLES = 3, 20


def made_up(rng: np.random.Generator, side: int) -> Image.Image:
    """Soft shapes of several sizes with some grain: about as many bytes in a JPEG as a photo of this size."""
    fields = np.zeros((side, side, 3), np.float32)
    for cells in (2, 5, 12, 40):
        coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        resized = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        fields += np.asarray(resized, np.float32) / (4 if cells < 40 else 8)
    fields += rng.normal(0, 4, fields.shape)
    return Image.fromarray(fields.clip(0, 255).astype(np.uint8))


def crop(rng: np.random.Generator, paths: list[Path], side: int) -> Image.Image:
    """A random square of a random photo that is large enough."""
    with Image.open(paths[int(rng.integers(len(paths)))]) as photo:
        left, top = (int(rng.integers(max(1, length - side + 1))) for length in photo.size)
        return photo.convert("RGB").crop((left, top, left + side, top + side))


def make_photos(folder: Path, count: int, side: int, sources: list[Path]) -> list[Path]:
    """Write ``count`` JPEG files of side x side pixels, the same ones at every call."""
    rng, made = np.random.default_rng(0), []
    folder.mkdir()
    for number in range(count):
        image = crop(rng, sources, side) if sources else made_up(rng, side)
        made.append(folder / f"{number:06d}.jpg")
        image.save(made[-1], quality=90)
    return made


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured with."""

    upscaler: Upscaler
    setup: Setup
    place: Path
    """A folder to write in."""

    def plan(self, folder: Path) -> list[Job]:
        """What the command does before any work."""
        naming = Naming(out=self.place / "out", file_format="keep", suffix="")
        jobs = plan_jobs([str(folder)], naming, False)
        existing(jobs, False, False)
        check_writable(jobs[0].target)
        remove_leftovers(*(job.target for job in jobs))
        return jobs

    def clear(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.place / "out", ignore_errors=True)

    def pipelined(self, folder: Path) -> None:
        """The folder as ``upscale`` does it."""
        with closing(Pipeline(self.upscaler, self.setup.options).run([self.plan(folder)])) as results:
            require({result.status for result in results} == {"written"})

    def one_after_the_other(self, folder: Path) -> None:
        """The folder without any overlap."""
        for job in self.plan(folder):
            enlarged = self.upscaler.upscale_image(read_image(job.source), self.setup.options)
            write_image(enlarged, job.target, sweep=False)

    def in_processes(self, folder: Path, processes: int) -> None:
        """The folder as ``upscale --workers`` does it."""
        with closing(enlarge_in_processes(self.plan(folder), self.setup, processes)) as results:
            require({result.status for _, result in results} == {"written"})

    def singles(self, photos: list[Path]) -> list[Spent]:
        """Time of ``upscale_picture`` for images in memory, each by itself."""
        images = [read_image(path) for path in photos[: WARM_UP + SINGLES]]
        return [spent(partial(self.upscaler.upscale_image, each, self.setup.options)) for each in images][WARM_UP:]


def require(condition: bool) -> None:
    """Stop unless all images were written."""
    if not condition:
        raise SystemExit("some images were not written")


class Spent(NamedTuple):
    """What a call took."""

    seconds: float
    """By the clock."""
    processor: float
    """Of all cores, for this process: what remains comparable while other work runs."""


def spent(run: Callable[[], Any]) -> Spent:
    """Time of one call."""
    begun, used = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Spent(time.perf_counter() - begun, time.process_time() - used)


def median(values: list[Spent]) -> Spent:
    """Of either time by itself."""
    return Spent(*(statistics.median(column) for column in zip(*values, strict=True)))


def folder_of(place: Path, photos: list[Path], count: int) -> Path:
    """A folder of ``count`` links to the photos, over and over."""
    folder = place / f"{count}"
    folder.mkdir()
    for number in range(count):
        os.link(photos[number % len(photos)], folder / f"{number:06d}.jpg")
    return folder


def measure(bench: Bench, photos: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of everything, and the medians."""
    folder, count = photos[0].parent, len(photos)
    singles: list[Spent] = []
    ways: dict[str, Callable[[], None]] = {
        "pipeline": lambda: bench.pipelined(folder),
        "one after the other": lambda: bench.one_after_the_other(folder),
    }
    if options.workers > 1:
        ways[f"{options.workers} processes"] = lambda: bench.in_processes(folder, options.workers)
    times: dict[str, list[Spent]] = {way: [] for way in ways}
    bench.singles(photos)
    for _ in range(options.rounds):
        for way, run in ways.items():
            singles += bench.singles(photos)
            bench.clear()
            times[way].append(spent(run))
    single, totals = median(singles), {way: median(values) for way, values in times.items()}
    return {
        "single_image_s": single.seconds,
        "single_image_quartiles_s": statistics.quantiles([each.seconds for each in singles], n=4),
        "single_image_processor_s": single.processor,
        "folder_s": {way: total.seconds for way, total in totals.items()},
        "folder_processor_s": {way: total.processor for way, total in totals.items()},
        "ratio": {way: total.seconds / (count * single.seconds) for way, total in totals.items()},
        "processor_ratio": {way: total.processor / (count * single.processor) for way, total in totals.items()},
    }


def measure_counts(bench: Bench, photos: list[Path], counts: list[int]) -> dict[str, Spent]:
    """Time per image for folders of several sizes, through the pipeline."""
    found = {}
    for count in counts:
        folder = folder_of(bench.place, photos, count)
        bench.clear()
        found[str(count)] = Spent(*(total / count for total in spent(partial(bench.pipelined, folder))))
    return found


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="?", metavar="PHOTO_DIR")
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--counts", default="10,100,1000", help="sizes of folders, or nothing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--model", default="d3sr-tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sources = plan_photos(options.sources)
    setup = Setup(model=options.model, options=UpscaleOptions(), device=options.device, dtype=options.dtype)
    upscaler, _ = setup.load()
    other = OtherWork()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        photos = make_photos(place / "photos", options.photos, options.size, sources)
        bench = Bench(upscaler=upscaler, setup=setup, place=place)
        found = measure(bench, photos, options)
        per_image = measure_counts(bench, photos, [int(count) for count in options.counts.split(",") if count])
    report = {
        "schema": 1,
        "machine": describe_machine(["torch"]),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cores_busy_with_other_work": other.cores(),
        "model": options.model,
        "device": str(upscaler.device),
        "dtype": str(upscaler.dtype).removeprefix("torch."),
        "photos": options.photos,
        "size": options.size,
        **found,
        "seconds_per_image": {count: each.seconds for count, each in per_image.items()},
        "processor_seconds_per_image": {count: each.processor for count, each in per_image.items()},
    }
    show(report)
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def plan_photos(folder: Path | None) -> list[Path]:
    """The photos to cut from; none if they are to be made up."""
    if folder is None:
        return []
    return [job.source for job in plan_jobs([str(folder)], Naming(out=None, file_format="keep", suffix="_"), True)]


def show(report: dict[str, Any]) -> None:
    """The table."""
    print(f"{'':24} {'clock':>12} {'processor':>12}   x images x one image, by either")
    print(row("one image, network path", report["single_image_s"], report["single_image_processor_s"]))
    for way, total in report["folder_s"].items():
        ratios = f"   {report['ratio'][way]:.3f} {report['processor_ratio'][way]:.3f}"
        print(row(way, total, report["folder_processor_s"][way]) + ratios)
    for count, each in report["seconds_per_image"].items():
        print(row(f"an image of {count}", each, report["processor_seconds_per_image"][count]))
    print(f"busy with other work: {report['cores_busy_with_other_work']} cores")


def row(name: str, clock: float, processor: float) -> str:
    """Seconds as milliseconds."""
    return f"{name:24} {clock * 1e3:9.1f} ms {processor * 1e3:9.1f} ms"


if __name__ == "__main__":
    main()

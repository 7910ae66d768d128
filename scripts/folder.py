"""Time of a folder of small photos through the pipeline of ``upscale``, beside that of the network alone for them.

    python scripts/folder.py [PHOTO_DIR] [--photos 200] [--size 128] [--counts 10,100,1000] [--json FILE]

The photos are crops of those in PHOTO_DIR, or synthetic, and are written as JPEG into a temporary folder. Measured are
`upscale_image` of images in memory, warm (median); the whole folder from listing it to the last file written; the same
one image after the other; and folders of several sizes. Rounds of all take turns, so that other work on the machine
disturbs each alike.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from onestepsr.benchmark.probes import other_work, wait
from onestepsr.benchmark.speed import SpeedConfig, write_sources
from onestepsr.cli.upscale.jobs import Job, Naming, plan_jobs, upscale_jobs
from onestepsr.core.machine import cores, describe_machine
from onestepsr.data.photos import find_images
from onestepsr.imaging.read import read_image
from onestepsr.imaging.write import write_image
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler

WARM_UP, SINGLES = 3, 20


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="?", metavar="PHOTO_DIR")
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--counts", default="10,100,1000", help="sizes of folders, or nothing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="d3sr-tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(Upscaler.from_pretrained(options.model, options.device, options.dtype))
    begun, before = time.perf_counter(), other_work()
    with tempfile.TemporaryDirectory() as temporary:
        photos = make_photos(Path(temporary) / "photos", options)
        found = measure(bench, photos, options.rounds)
        counts = [int(count) for count in options.counts.split(",") if count]
        per_image = {str(count): bench.per_image(photos, count) for count in counts}
    after, elapsed = other_work(), time.perf_counter() - begun
    report = {
        "schema": 1,
        "machine": describe_machine(["torch"]),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cores_busy_with_other_work": None if before is None or after is None else (after - before) / elapsed,
        "model": options.model,
        "device": str(bench.upscaler.device),
        "dtype": str(bench.upscaler.dtype).removeprefix("torch."),
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


def make_photos(folder: Path, options: argparse.Namespace) -> list[Path]:
    """Write JPEG files, the same ones at every call: random squares of photos, or synthetic images."""
    folder.mkdir()
    if options.sources is None:
        return write_sources(folder, SpeedConfig(width=options.size, height=options.size, batch=options.photos))
    rng, sources, side = np.random.default_rng(0), find_images(options.sources), options.size
    made = [folder / f"{number:06d}.jpg" for number in range(options.photos)]
    for path in made:
        with Image.open(sources[int(rng.integers(len(sources)))]) as photo:
            left, top = (int(rng.integers(max(1, length - side + 1))) for length in photo.size)
            photo.convert("RGB").crop((left, top, left + side, top + side)).save(path, quality=90)
    return made


class Spent(NamedTuple):
    """Time of a call."""

    seconds: float
    """By the clock."""
    processor: float
    """Of all cores, for this process: it remains comparable while other work runs."""


def median(values: list[Spent]) -> Spent:
    """Median of either time by itself."""
    return Spent(*(statistics.median(column) for column in zip(*values, strict=True)))


class Bench:
    """An upscaler, and ways of giving it the photos of a folder."""

    def __init__(self, upscaler: Upscaler) -> None:
        self.upscaler = upscaler

    def pipelined(self, folder: Path) -> None:
        """Enlarge the folder as ``upscale`` does."""
        with closing(upscale_jobs(jobs_of(folder), self.upscaler, UpscaleOptions())) as results:
            if {result.status for result in results} != {"written"}:
                raise SystemExit("some images were not written")

    def one_after_the_other(self, folder: Path) -> None:
        """Enlarge the folder without any overlap."""
        for job in jobs_of(folder):
            write_image(self.upscaler.upscale_image(read_image(job.source)), job.target, sweep=False)

    def singles(self, photos: list[Path]) -> list[Spent]:
        """Time of ``upscale_image`` for images in memory, each by itself."""
        images = [read_image(path) for path in photos[: WARM_UP + SINGLES]]
        return [self.spent(partial(self.upscaler.upscale_image, image)) for image in images][WARM_UP:]

    def per_image(self, photos: list[Path], count: int) -> Spent:
        """Time per image of a folder of ``count`` links to the photos, over and over, through the pipeline."""
        folder = photos[0].parent.parent / f"{count}"
        folder.mkdir()
        for number in range(count):
            os.link(photos[number % len(photos)], folder / f"{number:06d}.jpg")
        return Spent(*(total / count for total in self.spent(partial(self.pipelined, folder))))

    def spent(self, run: Callable[[], Any]) -> Spent:
        """Time of one call."""
        begun, used = time.perf_counter(), time.process_time()
        run()
        wait(self.upscaler.device)
        return Spent(time.perf_counter() - begun, time.process_time() - used)


def jobs_of(folder: Path) -> list[Job]:
    """Jobs of ``upscale`` for a folder; results of an earlier run are removed."""
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    return plan_jobs([str(folder)], Naming(out=out, file_format="keep", suffix=""), False)


def measure(bench: Bench, photos: list[Path], rounds: int) -> dict[str, Any]:
    """Rounds of everything, and the medians."""
    folder, count = photos[0].parent, len(photos)
    ways = {"pipeline": bench.pipelined, "one after the other": bench.one_after_the_other}
    singles: list[Spent] = []
    times: dict[str, list[Spent]] = {way: [] for way in ways}
    bench.singles(photos)
    for _ in range(rounds):
        for way, run in ways.items():
            singles += bench.singles(photos)
            times[way].append(bench.spent(partial(run, folder)))
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


def show(report: dict[str, Any]) -> None:
    """Print the table."""
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

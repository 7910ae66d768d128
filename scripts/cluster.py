"""The batch command on a Ray cluster of this machine: with a node lost in the middle, and beside a single process.

    python scripts/cluster.py lose PHOTOS [--count 60]
    python scripts/cluster.py measure PHOTOS [--count 2000]

Both cut squares out of the photos below a folder, enlarge them by 'onestepsr upscale' and by 'onestepsr batch', and
compare: every output equal to the byte, none missing, one row for each in the manifest; exit code 1 if not. 'lose' has
two nodes of one core (ray.cluster_utils) and kills one when a third of the outputs are there. 'measure' prints images
per second between the first and the last output, and the memory of all processes over time (proportional set size, so
that shared pages count once).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from PIL import Image
from pyarrow import parquet

from onestepsr.batch.manifest import MANIFEST, PARTS
from onestepsr.data.photos import find_images

UPSCALE = ("upscale", "--engine", "torch")
"""The single process, in the engine that the batch command takes."""
EVERY_S = 2.0
"""Seconds between two looks at memory and outputs."""
SHARES = (0.1, 0.25, 0.5, 0.75, 0.95)
"""Parts of a run at which its memory is shown."""


def cut(photos: Path, folder: Path, count: int, side: int) -> None:
    """Write ``count`` squares as JPEG, one photo after the other, each time from another place."""
    folder.mkdir(parents=True)
    paths = find_images(photos)
    for number in range(count):
        turn, index = divmod(number, len(paths))
        with Image.open(paths[index]) as image:
            left, top = (37 * turn % (length - side + 1) for length in image.size)
            square = image.convert("RGB").crop((left, top, left + side, top + side))
        square.save(folder / f"{number:06d}.jpg", quality=90)


def outputs(folder: Path) -> dict[str, Path]:
    """Finished images by name."""
    found = folder.glob("*.jpg")
    return {path.name: path for path in found if not path.name.startswith(".")}


@dataclass(kw_only=True)
class Run:
    """One command: its time in all, and the memory of all its processes, in MB, at seconds since its start."""

    seconds: float = 0.0
    memory: list[tuple[float, float]] = field(default_factory=list)
    """From the first output to the last."""
    rate: float = 0.0
    """Images per second between the first and the last output."""

    def row(self, name: str) -> str:
        """Its line of the table."""
        first, last = self.memory[0][0], self.memory[-1][0]
        shown = (min(self.memory, key=lambda one: abs(one[0] - first - share * (last - first)))[1] for share in SHARES)
        most = max(size for _, size in self.memory)
        cells = [f"{self.rate:.2f}", f"{self.seconds:.0f}", *(f"{size:.0f}" for size in shown), f"{most:.0f}"]
        return f"| {' | '.join([name, *cells])} |"


def timed(words: list[str], out: Path, *, threads: int | None, look: Callable[[int], None] = lambda count: None) -> Run:
    """Run a command of onestepsr to its end; ``look`` is called with the number of outputs again and again."""
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    started, run, total = time.monotonic(), Run(), len(outputs(out.parent / "in"))
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "onestepsr", *words], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            count = len(outputs(out))
            if count > 0 and (count < total or not run.memory):  # afterwards Ray's processes end one by one
                run.memory.append((time.monotonic() - started, used(process.pid)))
            look(count)
            time.sleep(EVERY_S)
        run.seconds = time.monotonic() - started
        if process.returncode != 0:
            log.seek(0)
            raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}\n{log.read().decode()[-3000:]}")
    times = sorted(path.stat().st_mtime for path in outputs(out).values())
    run.rate = (len(times) - 1) / max(times[-1] - times[0], 1e-9)
    return run


def used(pid: int) -> float:
    """Memory of a process and all below it, in MB."""
    total = 0
    with suppress(psutil.Error):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.Error):  # it may have ended just now
                total += process.memory_full_info().pss
    return total / 1e6


def compared(expected: Path, made: Path) -> bool:
    """Print whether two folders are equal to the byte, and whether the manifest has every image once."""
    wanted, found = outputs(expected), outputs(made)
    equal = sum(name in found and found[name].read_bytes() == path.read_bytes() for name, path in wanted.items())
    rows = parquet.read_table(made / MANIFEST).to_pylist()
    inputs = {row["input"] for row in rows}
    done = sum(row["status"] in ("written", "found") for row in rows)
    left = [path.name for path in (made / PARTS).iterdir() if path.name != "job.json"]
    print(f"{equal} of {len(wanted)} outputs equal to the byte, {len(found) - len(wanted)} beyond them")
    print(f"manifest: {len(rows)} rows, {len(inputs)} inputs, {done} done, {len(left)} parts left over")
    return equal == len(wanted) == len(found) == len(rows) == len(inputs) == done and not left


def lose(folder: Path, expected: Path) -> bool:
    """Two nodes, of which one is killed."""
    os.environ.update(RAY_worker_niceness="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    from ray.cluster_utils import Cluster

    count = len(outputs(folder / "in"))
    one: Mapping[str, object] = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=dict(one))
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100_000_000)]

    def look(made: int) -> None:
        if nodes and made >= count // 3:
            print(f"{made} of {count} outputs: one of two nodes is killed", flush=True)
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    words = ["batch", str(folder / "in"), str(folder / "out"), "--images-per-task", "4", "--address", cluster.address]
    try:
        run = timed(words, folder / "out", threads=1, look=look)
    finally:
        cluster.shutdown()
    print(f"{run.seconds:.0f} s with the start of Python and Ray on a driver")
    return not nodes and compared(expected, folder / "out")


def measure(folder: Path, expected: Path, single: Run) -> bool:
    """A cluster of this machine's cores against the single process."""
    run = timed(["batch", str(folder / "in"), str(folder / "out")], folder / "out", threads=1)
    whole = timed([*UPSCALE, str(folder / "in"), "-o", str(folder / "all")], folder / "all", threads=None)
    columns = ["command", "images/s", "seconds in all", *(f"MB at {share:.0%}" for share in SHARES), "most MB"]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    print(single.row("onestepsr upscale, one thread"))
    print(whole.row("onestepsr upscale, all cores"))
    print(run.row("onestepsr batch"))
    best = max(single.rate, whole.rate)
    print(f"batch has {run.rate / best:.0%} of the faster single process")
    return compared(expected, folder / "out")


def main() -> None:
    """Cut photos, make the outputs to compare with, and do the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("lose", "measure"))
    parser.add_argument("photos", type=Path, help="folder of photos")
    parser.add_argument("--count", type=int, help="squares; 60 for lose, 2000 for measure")
    parser.add_argument("--side", type=int, default=64)
    arguments = parser.parse_args()
    count = arguments.count or (60 if arguments.part == "lose" else 2000)
    with tempfile.TemporaryDirectory(prefix="onestepsr-cluster-") as name:
        folder = Path(name)
        cut(arguments.photos, folder / "in", count, arguments.side)
        single = timed([*UPSCALE, str(folder / "in"), "-o", str(folder / "single")], folder / "single", threads=1)
        own = (folder, folder / "single")
        fine = lose(*own) if arguments.part == "lose" else measure(*own, single)
    raise SystemExit(0 if fine else 1)


if __name__ == "__main__":
    main()

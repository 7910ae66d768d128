"""Load and chaos for onestepsr serve: many clients, kill -9, malformed uploads, generated requests.

python scripts/serve_load.py load --clients 64 --seconds 180
python scripts/serve_load.py kill --jobs 20 --kills 3
python scripts/serve_load.py fuzz --uploads 1000
python scripts/serve_load.py schema --examples 50        (needs schemathesis)

Each starts a server of its own on a free port, says what it saw as JSON, and exits with 1 if a promise was broken. load
compares each answer with what the library makes of the same photo, and the throughput with that of the model by itself,
measured in this process in turns with the server: while one is measured the other is idle. The time of the processor is
compared as well, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
REFUSALS = (429, 503)
PATIENCE = 300.0


@contextmanager
def server(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Address and process of a server on ``folder`` that is ready."""
    command = [sys.executable, "-m", "onestepsr", "serve", "--port", "0", "--data-dir", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = "http://" + process.stdout.readline().partition("http://")[2].partition("/")[0]
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if requests.get(f"{address}/readyz", timeout=10).status_code == 200:
                    break
            except requests.ConnectionError:
                pass
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit("the server did not become ready")
            time.sleep(0.1)
        yield address, process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
        process.stdout.close()


def small_photos(count: int, side: int) -> list[bytes]:
    """Different crops of the example photos, as JPEG."""
    rng, found = random.Random(0), []
    sources = [Image.open(path).convert("RGB") for path in sorted(EXAMPLES.glob("*.jpg"))]
    for number in range(count):
        source = sources[number % len(sources)]
        left, top = rng.randrange(max(1, source.width - side)), rng.randrange(max(1, source.height - side))
        stream = io.BytesIO()
        source.crop((left, top, left + side, top + side)).save(stream, "jpeg", quality=90)
        found.append(stream.getvalue())
    return found


# ---- many clients ----


def bare_run(upscaler: Any, images: list[Any], seconds: float) -> tuple[int, float, float]:
    """Images, seconds and processor seconds of the model by itself: decoded photos in, samples out."""
    done, started, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        upscaler.upscale_image(images[done % len(images)])
        done += 1
    return done, time.perf_counter() - started, time.process_time() - used


def processor_seconds(pid: int) -> float:
    """Processor seconds of a process and of the children it has."""
    import psutil

    process = psutil.Process(pid)
    return sum(sum(each.cpu_times()[:2]) for each in [process, *process.children(recursive=True)])


def load(
    *, clients: int, seconds: float, side: int, model: str, rounds: int = 5, bare_seconds: float = 8.0
) -> dict[str, Any]:
    """``clients`` that each send their own photo again and again; between the rounds the model by itself."""
    from onestepsr.imaging.read import read_image
    from onestepsr.imaging.write import encode_image
    from onestepsr.inference.upscaler import Upscaler

    photos = small_photos(clients, side)
    images = [read_image(photo) for photo in photos]
    upscaler = Upscaler.from_pretrained(model)
    expected = [encode_image(upscaler.upscale_image(image), "jpeg") for image in images]
    assert len(set(expected)) == clients
    statuses: Counter[str] = Counter()
    times: list[float] = []
    memory: list[float] = []
    lock = threading.Lock()

    def client(number: int, address: str, end: float) -> None:
        session = requests.Session()
        while time.perf_counter() < end:
            started = time.perf_counter()
            try:
                answer = session.post(f"{address}/v1/upscale", data=photos[number], timeout=PATIENCE)
                kind = str(answer.status_code)
                if answer.status_code == 200 and answer.content != expected[number]:
                    kind = "another image"
            except requests.RequestException as error:
                kind = f"lost ({type(error).__name__})"
            with lock:
                statuses[kind] += 1
                if kind == "200":
                    times.append(time.perf_counter() - started)
            if kind in map(str, REFUSALS):
                time.sleep(float(answer.headers["retry-after"]))

    def resident(pid: int) -> float:
        import psutil

        return psutil.Process(pid).memory_info().rss / 1e6

    served, bare = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), "--model", model) as (address, process):
        for number in range(rounds):
            for index, value in enumerate(bare_run(upscaler, images, bare_seconds)):
                bare[index] += value
            started, used, before = time.perf_counter(), processor_seconds(process.pid), statuses["200"]
            end = started + seconds / rounds
            threads = [threading.Thread(target=client, args=(each, address, end)) for each in range(clients)]
            for thread in threads:
                thread.start()
            while any(
                thread.is_alive() for thread in threads
            ):  # until the last answer: the server is busy all the time
                time.sleep(min(1.0, seconds / 20))
                if number > 0 or rounds == 1:  # the first round warms up
                    memory.append(resident(process.pid))
            served[0] += statuses["200"] - before
            served[1] += time.perf_counter() - started
            served[2] += processor_seconds(process.pid) - used
        left = [path.name for path in (Path(folder) / "files").iterdir()]
    ordered = sorted(times)
    rates = served[0] / served[1], bare[0] / bare[1]
    costs = served[2] / max(1.0, served[0]), bare[2] / max(1.0, bare[0])
    return {
        "clients": clients,
        "seconds": round(served[1], 1),
        "answers": dict(statuses),
        "images_per_second": round(rates[0], 2),
        "bare_images_per_second": round(rates[1], 2),
        "ratio": round(rates[0] / rates[1], 3),
        "processor_ms_per_image": [round(1000 * cost, 1) for cost in costs],
        "p50_s": round(statistics.median(ordered), 3) if ordered else None,
        "p95_s": round(ordered[int(0.95 * len(ordered))], 3) if ordered else None,
        "resident_mb": [round(min(memory)), round(max(memory))],
        "leftover_files": left,
        "broken": sorted(set(statuses) - {"200", *map(str, REFUSALS)}) + left,
    }


# ---- kill -9 ----


def kill(jobs: int, kills: int, side: int, model: str) -> dict[str, Any]:
    """Kill the server ``kills`` times while ``jobs`` are queued; all are finished in the end, each once."""
    from onestepsr.imaging.read import read_image
    from onestepsr.imaging.write import encode_image
    from onestepsr.inference.upscaler import Upscaler

    photos = small_photos(jobs, side)
    rng, ids, done_when_killed = random.Random(0), [], []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        for attempt in range(kills):
            with server(data, "--model", model) as (address, process):
                if attempt == 0:
                    for photo in photos:
                        ids.append(requests.post(f"{address}/v1/jobs", data=photo, timeout=PATIENCE).json()["id"])
                time.sleep(rng.uniform(0.1, 1.0))
                states = [requests.get(f"{address}/v1/jobs/{job}", timeout=PATIENCE).json()["state"] for job in ids]
                done_when_killed.append(states.count("done"))
                process.kill()
        with server(data, "--model", model) as (address, process):
            results = []
            for job in ids:
                while requests.get(f"{address}/v1/jobs/{job}", timeout=PATIENCE).json()["state"] in (
                    "queued",
                    "running",
                ):
                    time.sleep(0.05)
                results.append(requests.get(f"{address}/v1/jobs/{job}/result", timeout=PATIENCE))
            files = sorted(path.name for path in (data / "files").iterdir())
    upscaler = Upscaler.from_pretrained(model)
    expected = [encode_image(upscaler.upscale_image(read_image(photo)), "jpeg") for photo in photos]
    wrong = [ids[n] for n, result in enumerate(results) if result.content != expected[n]]
    surplus = sorted(set(files) ^ {f"{job}.{kind}" for job in ids for kind in ("in", "out")})
    return {
        "jobs": jobs,
        "done_when_killed": done_when_killed,
        "finished": sum(result.status_code == 200 for result in results),
        "equal_to_the_library": jobs - len(wrong),
        "broken": wrong + surplus,
    }


# ---- malformed uploads ----


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with next to no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + _chunk(b"IEND", b"")
    )


def malformed(rng: random.Random, seeds: list[bytes]) -> tuple[bytes, str, str]:
    """Content, file name and kind of an upload that is wrong somewhere."""
    seed = bytearray(rng.choice(seeds))
    kind = rng.choice(("truncated", "flipped", "bomb", "type", "name", "glued"))
    name = "a.jpg"
    if kind == "truncated":
        seed = seed[: rng.randrange(len(seed))]
    elif kind == "flipped":
        for _ in range(rng.randrange(1, 40)):
            seed[rng.randrange(len(seed))] = rng.randrange(256)
    elif kind == "bomb":
        side = rng.choice((5_001, 30_000, 100_000, 2_000_000_000))
        canvas = b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0"
        gif = (
            b"GIF89a"
            + struct.pack("<HH", 65535, 65535)
            + b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x44\1\0;"
        )
        seed = bytearray(rng.choice((png_bomb(side, side), canvas, gif, png_bomb(1, side))))
    elif kind == "type":
        texts = (
            b"<svg onload=alert(1)>",
            b"PK\x03\x04" + rng.randbytes(99),
            b"MZ" + rng.randbytes(99),
            b"",
            b"\0" * 999,
        )
        seed = bytearray(rng.choice(texts))
    elif kind == "name":
        name = rng.choice(
            (
                "../../../etc/passwd",
                "..\\..\\boot.ini",
                "/dev/null",
                "a\x00.png",
                "😀" * 300,
                "'; DROP TABLE jobs;--",
                "",
            )
        )
    else:
        seed = seed + rng.choice(seeds)
    return bytes(seed), name, kind


def fuzz(uploads: int, model: str, seed: int = 0) -> dict[str, Any]:
    """Uploads that are wrong in many ways: no 5xx, no file left."""
    rng, statuses, broken = random.Random(seed), Counter(), []
    seeds = small_photos(6, 24)
    for kind in ("png", "webp", "tiff", "bmp", "gif", "avif"):
        stream = io.BytesIO()
        Image.open(io.BytesIO(seeds[0])).save(stream, kind)
        seeds.append(stream.getvalue())
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), "--model", model) as (address, process):
        session = requests.Session()
        for number in range(uploads):
            data, name, kind = malformed(rng, seeds)
            path = f"{address}/v1/upscale"
            try:
                if rng.random() < 0.5:
                    answer = session.post(path, files={"image": (name, data)}, data={"scale": "1"}, timeout=PATIENCE)
                else:
                    answer = session.post(path, params={"scale": 1, "name": name}, data=data, timeout=PATIENCE)
            except requests.RequestException as error:
                broken.append(f"upload {number} ({kind}): {type(error).__name__}")
                continue
            statuses[answer.status_code] += 1
            if answer.status_code >= 500:
                broken.append(f"upload {number} ({kind}): {answer.status_code} {answer.text[:200]}")
        left = [path.name for path in (Path(folder) / "files").iterdir()]
        alive = process.poll() is None and session.get(f"{address}/readyz", timeout=PATIENCE).status_code == 200
    answers = {str(status): count for status, count in sorted(statuses.items())}
    broken += left if alive else [*left, "the server has ended"]
    return {"uploads": uploads, "answers": answers, "leftover_files": left, "broken": broken}


# ---- requests generated from the OpenAPI document ----


def schema(examples: int, model: str, seed: int = 1) -> dict[str, Any]:
    """Let schemathesis look for server errors and answers that the document does not describe."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), "--model", model) as (address, process):
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        command = ["st", "run", f"{address}/v1/openapi.json", "--checks", checks, "--max-examples", str(examples)]
        program = str(Path(sys.executable).parent / command[0])
        options = ["--phases", "examples,coverage,fuzzing", "--seed", str(seed), "--no-color"]
        done = subprocess.run(
            [program, *command[1:], *options], capture_output=True, text=True, check=False, cwd=folder
        )
        alive = process.poll() is None
    tail = done.stdout.strip().splitlines()
    broken = [] if done.returncode == 0 and alive else tail[-60:] + done.stderr.splitlines()[-5:]
    return {"summary": tail[-12:], "broken": broken}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs: dict[str, Callable[..., dict[str, Any]]] = {"load": load, "kill": kill, "fuzz": fuzz, "schema": schema}
    for name, run in runs.items():
        command = commands.add_parser(name, help=run.__doc__)
        command.add_argument("--model", default="d3sr-tiny")
        if name == "load":
            command.add_argument("--clients", type=int, default=64)
            command.add_argument("--seconds", type=float, default=180.0)
            command.add_argument("--rounds", type=int, default=5)
            command.add_argument("--bare-seconds", type=float, default=8.0, help="of the model by itself in each round")
        if name in ("load", "kill"):
            command.add_argument("--side", type=int, default=64, help="pixels of the photos")
        if name == "kill":
            command.add_argument("--jobs", type=int, default=20)
            command.add_argument("--kills", type=int, default=3)
        if name == "fuzz":
            command.add_argument("--uploads", type=int, default=1000)
        if name == "schema":
            command.add_argument("--examples", type=int, default=50)
    given = vars(parser.parse_args())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = runs[given.pop("command")](**given)
    print(json.dumps(found, indent=1))
    sys.exit(1 if found["broken"] else 0)


if __name__ == "__main__":
    main()

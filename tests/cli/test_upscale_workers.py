"""Several processes: every picture is answered for, also when a process dies, and none outlives the run."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from onestepsr.cli.upscale import workers
from onestepsr.cli.upscale.jobs import Job
from onestepsr.cli.upscale.pipeline import AHEAD, Result
from onestepsr.cli.upscale.prompts import GROUP, PromptChoice, Setup
from onestepsr.cli.upscale.workers import Duty, Task, enlarge_in_processes
from onestepsr.core.errors import MissingExtra, UserError

if TYPE_CHECKING:  # every process that is started here imports this file
    from onestepsr.inference.options import UpscaleOptions

SETUP = Setup(model="none", options=None)


def obey(connection: Connection, duty: Duty) -> None:
    """Answers what it is sent; the file name may say that it dies, fails or takes its time."""
    for group in iter(connection.recv, None):
        for job in group:
            if job.source.stem == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if job.source.stem == "fails":
                connection.send(RuntimeError("a defect"))
            if job.source.stem == "waits":
                time.sleep(60)
            connection.send(Result(input=str(job.source), output=str(len(group)), status="written"))


def refuse(connection: Connection, duty: Duty) -> None:
    from onestepsr.cli.upscale import workers

    connection.send(workers._portable(MissingExtra("This model", "prompts")))


def jobs(folder: Path, number: int, **named: int) -> list[Job]:
    stems = {place: stem for stem, place in named.items()}
    return [Job(Path(f"{stems.get(each, each)}.png"), folder / f"{each}.png") for each in range(number)]


def results_of(planned: list[Job], task: Task = obey, processes: int = 2, setup: Setup = SETUP) -> dict[int, Result]:
    with closing(enlarge_in_processes(planned, setup, processes, task)) as results:
        return dict(results)


def test_every_picture_is_answered_for_in_its_place(tmp_path: Path) -> None:
    planned = jobs(tmp_path, 50)
    results = results_of(planned)
    assert [results[place].input for place in range(50)] == [str(job.source) for job in planned]
    grouped = results_of(planned, setup=Setup(model="none", options=None, prompts=PromptChoice(text="a cat")))
    assert sorted(int(result.output) for result in grouped.values()) == [50 - GROUP] * (50 - GROUP) + [GROUP] * GROUP


def test_a_process_that_dies_costs_only_the_pictures_it_had(tmp_path: Path) -> None:
    planned = jobs(tmp_path, 60, dies=5)
    results = results_of(planned)
    failed = [place for place, result in results.items() if result.status == "failed"]
    assert sorted(results) == list(range(60))
    assert 5 in failed
    assert len(failed) <= AHEAD
    assert str(results[5].error).startswith("dies.png: the process that had it ended with code -9")


def test_when_all_processes_are_dead_the_rest_is_reported(tmp_path: Path) -> None:
    results = results_of([Job(Path("dies.png"), tmp_path / f"{each}.png") for each in range(30)])
    assert len(results) == 30
    assert {result.status for result in results.values()} == {"failed"}
    assert "every process has ended" in str(results[29].error)


def test_an_error_that_is_not_one_pictures_own_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        results_of(jobs(tmp_path, 40, fails=3))
    with pytest.raises(UserError, match=r"pip install 'onestepsr\[prompts\]'"):
        results_of(jobs(tmp_path, 4), refuse)
    assert multiprocessing.active_children() == []


def test_breaking_off_ends_the_processes_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with closing(enlarge_in_processes(jobs(tmp_path, 40, waits=2), SETUP, 2, obey)) as results:
        next(results)
    assert multiprocessing.active_children() == []
    assert time.monotonic() - started < 45


def test_processes_share_the_memory_that_is_free() -> None:
    import torch

    from onestepsr.cli.upscale.workers import with_share_of_memory
    from onestepsr.core.machine import free_memory
    from onestepsr.inference.options import UpscaleOptions

    device = torch.device("cpu")
    given = with_share_of_memory(UpscaleOptions(), device, 4).memory
    assert given is not None
    assert 4 * given < free_memory(device) / 1e9
    for options in (UpscaleOptions(tile=64), UpscaleOptions(tile="off")):
        assert with_share_of_memory(options, device, 4) == options
    assert with_share_of_memory(UpscaleOptions(memory=1.5, tile=64), device, 4).memory == 0.375


@pytest.mark.parametrize(("pictures", "processes"), [(1, 0), (2, 2), (12, 5)])
def test_a_limit_is_shared_by_the_processes_that_are_started(
    pictures: int, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onestepsr.cli.main import app
    from onestepsr.cli.upscale import command as upscale
    from onestepsr.cli.upscale import workers
    from onestepsr.cli.upscale.pipeline import result_of

    started: list[tuple[int, float | None]] = []

    def in_one(jobs: list[Job], setup: Setup, number: int = 0) -> Iterator[tuple[int, Result]]:
        started.append((number, setup.options.memory))
        yield from ((place, result_of(job, "skipped")) for place, job in enumerate(jobs))

    class Alone:
        def __init__(self, upscaler: None, options: UpscaleOptions, *others: object) -> None:
            self.options = options

        def run(self, groups: list[list[Job]]) -> Iterator[Result]:
            return (result for _, result in in_one(groups[0], Setup(model="none", options=self.options)))

    monkeypatch.setattr(upscale, "Pipeline", Alone)
    monkeypatch.setattr(Setup, "load", lambda self: (None, None))
    monkeypatch.setattr(workers, "enlarge_in_processes", in_one)
    for number in range(pictures):
        (tmp_path / f"{number}.png").touch()
    words = ["upscale", str(tmp_path), "-o", str(tmp_path / "out"), "--workers", "5", "--memory", "3"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert started == [(processes, 3.0)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import numpy as np
    from PIL import Image

    (tmp_path / "in").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (5, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"in/{number:02d}.png")
    (tmp_path / "in/05.png").write_bytes(b"nonsense")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_and_report_are_those_of_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from onestepsr.cli.main import app

    monkeypatch.chdir(folder)
    # The share of each process is then what this one has, and the same bytes are to be expected.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reports = []
    for count in ("1", "2"):
        words = ["upscale", "in", "-o", count, "--workers", count, "--device", "cpu", "--json"]
        outcome = CliRunner().invoke(app, words)
        assert isinstance(outcome.exception, SystemExit), outcome.exception
        assert outcome.exit_code == 1
        assert outcome.stderr.splitlines()[-1] == "1 of 12 pictures failed"
        results = json.loads(outcome.stdout)["results"]
        assert "in/05.png: not a picture" in results[5]["error"]
        reports.append([{**each, "seconds": 0, "output": Path(each["output"]).name} for each in results])
    torch.set_num_threads(threads)
    assert reports[0] == reports[1]
    assert files(folder / "1") == files(folder / "2")
    assert len(files(folder / "2")) == 11


def test_an_interrupt_ends_all_processes_and_leaves_whole_files(folder: Path) -> None:
    for number in range(12, 400):
        os.link(folder / "in/00.png", folder / f"in/{number}.png")
    command = [sys.executable, "-m", "onestepsr", "upscale", "in", "-o", "out", "--device", "cpu", "--workers", "2"]
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # else a job in the background hands down "ignore"
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, usual)
    while process.poll() is None and not (folder / "out/00.png").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # ends when the last process has closed its stderr
    assert process.returncode == 130
    assert errors == "interrupted\n"
    written = files(folder / "out")
    assert 1 <= len(written) < 399
    assert not [name for name in written if name.startswith(".")]
    assert all(content.endswith(b"IEND\xaeB`\x82") for content in written.values())


def test_interrupts_are_left_to_the_process_that_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, object] = {}
    levels = (logging.getLogger().level, logging.getLogger("onestepsr").level)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    ours, theirs = multiprocessing.Pipe()
    monkeypatch.setattr(workers, "_enlarge", lambda connection, duty: None)
    workers.work(theirs, Duty(setup=SETUP, processes=1, levels=levels))
    ours.close()
    assert handlers[signal.SIGINT] is signal.SIG_IGN
    assert callable(handlers[signal.SIGTERM])

"""One process holds a lock, the others wait or are told."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onestepsr.core.errors import UserError
from onestepsr.core.files import locked
from onestepsr.train import run

HOLDER = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process has the lock; it leaves when its input ends."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_a_lock_is_free_refused_and_free_again(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, wait=False) as mine:
        assert mine
    with held(path), locked(path, wait=False) as mine:
        assert not mine
    with locked(path, wait=True) as mine:
        assert mine


def test_waiting_is_told_and_ends_when_the_other_process_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"
    with held(path) as process:
        killer = threading.Timer(0.3, process.kill)
        killer.start()
        with locked(path, wait=True, waiting="somebody else") as mine:
            assert mine
            assert process.wait(timeout=10) != 0
        assert caplog.messages == ["somebody else"]
        killer.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked there")
def test_a_forked_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path: Path) -> None:
    """Workers of a killed training live on for seconds, and --resume must not wait for them."""
    path = tmp_path / "lock"
    holder = (
        "import os, sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire()\n"
        "if os.fork() == 0: print(flush=True); time.sleep(5); os._exit(0)\n"  # what runs at a fork is over then
        "time.sleep(30)"
    )
    with subprocess.Popen([sys.executable, "-c", holder, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.kill()
        process.wait()
        with locked(path, wait=False) as mine:
            assert mine


def test_what_cannot_be_locked_is_no_obstacle(tmp_path: Path) -> None:
    with locked(tmp_path / "nowhere" / "lock", wait=True) as mine:
        assert mine


def test_a_folder_has_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run in a folder ends before it touches the files there."""

    class Planned:
        class run:  # noqa: N801
            out = tmp_path

    monkeypatch.setattr(run, "write_text", lambda path, text: pytest.fail("nothing is written"))
    with held(tmp_path / run.LOCK), pytest.raises(UserError, match="another process trains there"):
        run.execute(Planned)  # type: ignore[arg-type]

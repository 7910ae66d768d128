"""One process holds a lock, the others wait or are told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onestepsr.core.errors import UserError
from onestepsr.core.files import locked
from onestepsr.train import run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks there")
HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process has the lock; it leaves when its input ends."""
    command = [sys.executable, "-S", "-c", HOLDER, str(path)]
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


def test_waiting_ends_when_the_other_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held(path) as process:
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"])
        with locked(path, wait=True) as mine:
            assert mine
            assert process.wait(timeout=10) != 0
        killer.wait(timeout=10)


def test_what_cannot_be_locked_is_no_obstacle(tmp_path: Path) -> None:
    with locked(tmp_path / "nowhere" / "lock", wait=True) as mine:
        assert mine


def test_a_folder_has_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is begun beside a run at work ends before it touches its files."""

    class Planned:
        class run:  # noqa: N801
            out = tmp_path

    monkeypatch.setattr(run, "_write_config", lambda run: pytest.fail("nothing is written"))
    with held(tmp_path / run.LOCK), pytest.raises(UserError, match="another process trains there"):
        run.execute(Planned)  # type: ignore[arg-type]

"""Jobs of the server: a bounded queue on disk that outlives the process, and the one thread that runs the network.

The queue is one SQLite table beside the images. huey's SQLite storage does not serve: it takes a task off the disk when
a worker begins it, so that what a killed worker had in hand is lost, is not fair between clients, and has no place for
the state of a task that a client may look up.

A job is *queued*, *running*, then *done*, *failed* or *cancelled*. The upload and the result lie in files named by the
job's id. A job counts as done when its row says so, after its result was renamed into place: a server that is killed
in between makes the same file again when it is back.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import secrets
import sqlite3
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onestepsr.core.errors import OneStepSRError, UserError, first_line
from onestepsr.core.files import PARTIAL_PREFIX, replacing

if TYPE_CHECKING:
    from onestepsr.imaging.image import LoadedImage
    from onestepsr.inference.engines import Engine
    from onestepsr.inference.upscaler import Upscaler

logger = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "failed", "cancelled"]
FINISHED = ("done", "failed", "cancelled")
MOST_ATTEMPTS = 5
"""Times that a job is begun; one during which the server has died this often is failed, since it may be the cause."""
MOST_MODELS = 2
"""Models that are kept in memory: the ones used last."""
KEPT_DECODED = 32_000_000
"""Bytes of decoded images of jobs that wait."""
OWN_NAME = re.compile(r"[A-Za-z0-9_-]{24}\.(in|out)")
"""Names of uploads and results."""
DISK_FULL = "the server's disk is full"


class QueueFull(OneStepSRError):
    """No further job is taken at present."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which it is worth trying again."""


class Cancelled(OneStepSRError):
    """The job at hand is no longer wanted."""


class Unreadable(UserError):
    """The upload of a job is no image that can be read."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image on its way; times are seconds since 1970."""

    id: str
    """Unguessable: whoever knows it may see the job."""
    client: str
    name: str
    """File name that the client gave, for display and for the name of the download; never a path here."""
    options: Mapping[str, Any]
    """Options as the API has checked them, with ``model`` and ``format``."""
    state: State
    created: float
    width: int
    height: int
    started: float | None = None
    finished: float | None = None
    attempts: int = 0
    seconds: float | None = None
    output_width: int | None = None
    output_height: int | None = None
    nbytes: int | None = None
    error_code: str | None = None
    error: str | None = None
    awaited: bool = False
    """True if a client waits for the answer on its connection; of no use to anyone once that is gone."""

    @property
    def pixels(self) -> int:
        """Pixels of the input."""
        return self.width * self.height


_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE, client TEXT NOT NULL, turn INTEGER NOT NULL, name TEXT NOT NULL, options TEXT NOT NULL,
  state TEXT NOT NULL, created REAL NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL,
  started REAL, finished REAL, attempts INTEGER NOT NULL DEFAULT 0, seconds REAL,
  output_width INTEGER, output_height INTEGER, nbytes INTEGER, error_code TEXT, error TEXT,
  awaited INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS waiting ON jobs (state, turn, number);
"""
_FIELDS = tuple(Job.__dataclass_fields__)


class Queue:
    """The jobs in one folder. Methods are safe in threads; a folder belongs to one process at a time."""

    def __init__(self, folder: Path, *, most_queued: int = 256, keep_seconds: float = 86_400.0) -> None:
        """Opens or makes ``folder``; what was running when the last process ended is queued again."""
        self.folder, self.most_queued, self.keep_seconds = folder, most_queued, keep_seconds
        self.files = folder / "files"
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        try:
            # Private where they are made here; a folder that is there already keeps its mode.
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.files.mkdir(exist_ok=True, mode=0o700)
            table = folder / "jobs.sqlite3"
            table.touch(mode=0o600)
            self._base = sqlite3.connect(table, check_same_thread=False, isolation_level=None)
            self._base.row_factory = sqlite3.Row
            # With NORMAL an accepted job survives the end of the process; a power failure may cost the last ones.
            self._base.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA busy_timeout=5000;")
            self._base.executescript(_TABLE)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{folder}: cannot be used as data folder ({error})") from error
        self._recover()
        row = self._base.execute("SELECT COALESCE(MAX(turn), 0) FROM jobs WHERE started IS NOT NULL").fetchone()
        self._turn = int(row[0])
        self._rate = 0.0
        """Seconds per input pixel, as a moving average; 0 before the first job."""

    def close(self) -> None:
        """Close the table."""
        with self._lock:
            self._base.close()

    def upload(self, job_id: str) -> Path:
        """The file that holds the input of a job."""
        return self.files / f"{job_id}.in"

    def result(self, job_id: str) -> Path:
        """The file that holds, or will hold, the output of a job."""
        return self.files / f"{job_id}.out"

    # ---- clients ----

    def add(
        self,
        *,
        client: str,
        name: str,
        options: Mapping[str, Any],
        size: tuple[int, int],
        data: bytes,
        awaited: bool,
        offer: Callable[[str], None] = lambda job_id: None,
    ) -> Job:
        """Accept a job on ``data``, whose image is of ``size``; from the return on it is on disk.

        ``offer`` is called with its id before it can be taken. Raises QueueFull, OSError or sqlite3.Error; nothing is
        left then.
        """
        self.require_room(client)
        job_id = secrets.token_urlsafe(18)
        upload = self.upload(job_id)
        try:
            with replacing(upload) as partial:
                partial.write_bytes(data)
            with self._lock:
                self.require_room(client)
                # Start-time fair queuing: a client's next job comes one turn after its last one, and not before the
                # turn that is being served now.
                last = self._one("SELECT MAX(turn) FROM jobs WHERE client=? AND state='queued'", client)
                turn = max(self._turn, last or 0) + 1
                offer(job_id)
                self._base.execute(
                    "INSERT INTO jobs (id, client, turn, name, options, state, created, width, height, awaited) "
                    "VALUES (?, ?, ?, ?, ?, 'queued', ?, ?, ?, ?)",
                    (job_id, client, turn, name, json.dumps(options), time.time(), *size, awaited),
                )
                self._arrived.notify()
                job = self.get(job_id)
                assert job is not None
                return job
        except BaseException:
            upload.unlink(missing_ok=True)
            raise

    def require_room(self, client: str) -> None:
        """Raise QueueFull if the queue is full, or this client's half of it."""
        with self._lock:
            queued = self.queued
            own = self._one("SELECT COUNT(*) FROM jobs WHERE state='queued' AND client=?", client) or 0
        if queued >= self.most_queued:
            raise QueueFull(f"{queued} images are waiting, the most that are taken", self._retry_after(queued))
        if own >= max(1, self.most_queued // 2):
            raise QueueFull(f"{own} images of yours are waiting, the most for one client", self._retry_after(own))

    def get(self, job_id: str) -> Job | None:
        """The job of this id, if there is one."""
        with self._lock:
            row = self._base.execute("SELECT * FROM jobs WHERE id=?", (job_id,)).fetchone()
        return None if row is None else _job(row)

    def ahead(self, job: Job) -> tuple[int, float | None]:
        """Jobs before this queued one, and about how many seconds they take; None while nothing is known."""
        with self._lock:
            row = self._base.execute(
                "SELECT COUNT(*), COALESCE(SUM(width * height), 0) FROM jobs, "
                "(SELECT turn AS t, number AS n FROM jobs WHERE id=?) WHERE state='running' OR "
                "(state='queued' AND (turn, number) < (t, n))",
                (job.id,),
            ).fetchone()
        return int(row[0]), row[1] * self._rate if self._rate else None

    def expected_seconds(self, pixels: int) -> float | None:
        """About how long an input of so many pixels takes; None while nothing is known."""
        return pixels * self._rate if self._rate else None

    @property
    def queued(self) -> int:
        """Jobs that wait."""
        return self._one("SELECT COUNT(*) FROM jobs WHERE state='queued'") or 0

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that is not finished; the job, if there is one."""
        with self._lock:
            self._base.execute(
                "UPDATE jobs SET state='cancelled', finished=?, error_code='cancelled', error='cancelled' "
                "WHERE id=? AND state IN ('queued', 'running')",
                (time.time(), job_id),
            )
            return self.get(job_id)

    def delete(self, job_id: str) -> bool:
        """Remove a job with its files, and stop it first; False if there is none."""
        with self._lock:
            found = self._base.execute("DELETE FROM jobs WHERE id=?", (job_id,)).rowcount == 1
        for path in (self.upload(job_id), self.result(job_id)):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        return found

    def expire(self) -> int:
        """Delete what was finished longer ago than results are kept; the number of jobs."""
        with self._lock:
            rows = self._base.execute(
                "SELECT id FROM jobs WHERE state IN ('done', 'failed', 'cancelled') AND finished < ?",
                (time.time() - self.keep_seconds,),
            ).fetchall()
        return sum(self.delete(row["id"]) for row in rows)

    # ---- the worker ----

    def take(self, timeout: float) -> Job | None:
        """The next job, now running: of the client whose turn it is. None if there is none within ``timeout``."""
        with self._lock:
            query = "SELECT * FROM jobs WHERE state='queued' ORDER BY turn, number LIMIT 1"
            row = self._base.execute(query).fetchone()
            if row is None:
                self._arrived.wait(timeout)
                row = self._base.execute(query).fetchone()
            if row is None:
                return None
            self._base.execute(
                "UPDATE jobs SET state='running', started=?, attempts=attempts+1 WHERE id=?", (time.time(), row["id"])
            )
            self._turn = row["turn"]
            return self.get(row["id"])

    def finish(self, job: Job, *, size: tuple[int, int], nbytes: int, seconds: float) -> bool:
        """Note that the result is in its file; False, and no file, if the job is no longer wanted."""
        with self._lock:
            wanted = self._base.execute(
                "UPDATE jobs SET state='done', finished=?, seconds=?, output_width=?, output_height=?, nbytes=? "
                "WHERE id=? AND state='running'",
                (time.time(), round(seconds, 3), *size, nbytes, job.id),
            ).rowcount
            rate = seconds / max(1, job.pixels)
            self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate
        if not wanted:
            self.result(job.id).unlink(missing_ok=True)
        return bool(wanted)

    def fail(self, job: Job, code: str, message: str) -> None:
        """Note that there is no result, and why."""
        with self._lock:
            self._base.execute(
                "UPDATE jobs SET state='failed', finished=?, error_code=?, error=? WHERE id=? AND state='running'",
                (time.time(), code, message, job.id),
            )

    def put_back(self, job: Job) -> None:
        """Queue a running job again, as if it had not been begun."""
        with self._lock:
            self._base.execute(
                "UPDATE jobs SET state='queued', started=NULL, attempts=attempts-1 WHERE id=? AND state='running'",
                (job.id,),
            )

    def is_wanted(self, job: Job) -> bool:
        """True while nobody has cancelled the job."""
        return bool(self._one("SELECT COUNT(*) FROM jobs WHERE id=? AND state='running'", job.id))

    # ---- inside ----

    def _recover(self) -> None:
        """Queue again what was running, drop what nobody can fetch any more, and remove files of no job."""
        with self._lock:
            self._base.execute("DELETE FROM jobs WHERE awaited=1")
            self._base.execute(
                "UPDATE jobs SET state='failed', finished=?, error_code='crash', "
                "error='the server ended each time it worked on this image' WHERE state='running' AND attempts>=?",
                (time.time(), MOST_ATTEMPTS),
            )
            self._base.execute("UPDATE jobs SET state='queued' WHERE state='running'")
            known = {row["id"] for row in self._base.execute("SELECT id FROM jobs")}
        for path in self.files.iterdir():
            abandoned = OWN_NAME.fullmatch(path.name) is not None and path.stem not in known
            if abandoned or path.name.startswith(PARTIAL_PREFIX):  # others are not ours
                with suppress(OSError):
                    path.unlink()

    def _one(self, query: str, *values: Any) -> Any:
        with self._lock:
            return self._base.execute(query, values).fetchone()[0]

    def _retry_after(self, jobs: int) -> int:
        """About the time of a few jobs, at least a second and at most ten minutes."""
        average = self._one("SELECT COALESCE(AVG(width * height), 0) FROM jobs WHERE state='queued'")
        return min(600, max(1, round(float(average) * self._rate * min(jobs, 8))))


def _job(row: sqlite3.Row) -> Job:
    values = {name: row[name] for name in _FIELDS}
    return Job(**{**values, "options": json.loads(row["options"]), "awaited": bool(row["awaited"])})


# ---- the worker ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Progress:
    """State of the job that runs; ``started`` is of the monotonic clock."""

    job: Job
    started: float
    done: int = 0
    total: int = 0
    """Tiles; 0 before the plan is made."""


class Worker(threading.Thread):
    """Runs one job after the other: decoding in a child process, the network on this thread, encoding on another one.

    The image that comes out is the one that ``onestepsr upscale`` writes: the same reader, upscaler and writer.
    """

    def __init__(
        self,
        queue: Queue,
        models: Mapping[str, str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        engine: Engine = "auto",
        memory: float | None = None,
        limits: Mapping[str, Any] | None = None,
        most_seconds: float = 3600.0,
        changed: Callable[[str], None] = lambda job_id: None,
    ) -> None:
        """``models`` are aliases or files by the name that clients use; the first one is loaded at once. ``memory``: as
        of ``UpscaleOptions``. ``changed`` is called with the id of a job that has come further, from other threads."""
        super().__init__(name="upscaling", daemon=True)
        self._queue, self._models, self._device, self._dtype, self._engine = queue, models, device, dtype, engine
        self._memory, self._limits, self._most_seconds, self.changed = memory, limits, most_seconds, changed
        self._loaded: OrderedDict[tuple[str, float | None], Upscaler] = OrderedDict()
        self._running: dict[str, Progress] = {}
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self.ready = threading.Event()
        """Set once the first model is in memory."""
        self.failure: str | None = None
        """Reason for which nothing can be done at present."""
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encoding")
        self._room = threading.Semaphore(2)  # enlarged images in memory, beside the one in the network
        self._decoded: OrderedDict[str, LoadedImage] = OrderedDict()
        self.recent: deque[float] = deque(maxlen=1000)
        """Seconds of the last jobs, taken off by whoever counts them."""

    def progress(self, job_id: str) -> Progress | None:
        """State of a job that runs."""
        return self._running.get(job_id)

    def offer(self, job_id: str, image: LoadedImage) -> None:
        """Keep a small image that was decoded when it came, so that it need not be decoded once more."""
        with self._lock:
            self._decoded[job_id] = image
            while sum(each.pixels.nbytes for each in self._decoded.values()) > KEPT_DECODED:
                self._decoded.popitem(last=False)

    def stop(self, timeout: float = 10.0) -> None:
        """End after the tile at hand; its job goes back into the queue with the next start."""
        self._ending.set()
        self.join(timeout)
        self._encoding.shutdown(wait=True)

    def run(self) -> None:
        """Work until stopped."""
        first = next(iter(self._models))
        try:
            self._upscaler(first, None)
            self.ready.set()
        except Exception as error:  # whatever it is, the server says so instead of ending
            logger.exception("%s", first)
            self.failure = f"{first} cannot be loaded: {first_line(error)}"
            return
        while not self._ending.is_set():
            try:
                job = self._queue.take(timeout=0.5)
                if self.failure is not None:
                    logger.warning("the data folder can be written again")
                self.failure = None
            except sqlite3.Error as error:  # the disk is full, or has become read-only: jobs wait
                if self.failure is None:
                    logger.error("the queue cannot be written: %s", error)
                self.failure = f"the queue cannot be written ({error})"
                self._ending.wait(1.0)
                continue
            if job is not None:
                self._do(job)

    def _do(self, job: Job) -> None:
        from onestepsr.inference.options import UpscaleOptions

        started = time.monotonic()
        self._running[job.id] = progress = Progress(job=job, started=started)
        self.changed(job.id)

        def advance(done: int, total: int) -> None:
            progress.done, progress.total = done, total
            self.changed(job.id)
            if self._ending.is_set() or not self._queue.is_wanted(job):
                raise Cancelled(job.id)
            if time.monotonic() - started > self._most_seconds:
                raise UserError(f"takes longer than the {self._most_seconds:g} seconds that one image may take")

        def attempt() -> None:
            with self._lock:
                image = self._decoded.pop(job.id, None)
            if image is None:
                try:
                    image = read_upload(self._queue.upload(job.id).read_bytes(), job.name, self._limits)
                except UserError as error:
                    raise Unreadable(str(error)) from error
            options = dict(job.options)
            if options.pop("strip_metadata"):
                image = image.without_metadata()
            file_format = options.pop("format")
            upscaler = self._upscaler(options.pop("model"), options.pop("fidelity"))
            made = upscaler.upscale_image(image, UpscaleOptions(**options, memory=self._memory), advance)
            del image
            self._room.acquire()
            if self._ending.is_set():  # nothing is encoded any more: the job is done with the next start
                self._room.release()
                raise Cancelled(job.id)
            self._encoding.submit(self._guarded, job, lambda: self._write(job, made, file_format, started), True)

        if not self._guarded(job, attempt):
            self._end(job)

    def _write(self, job: Job, made: LoadedImage, file_format: str, started: float) -> None:
        from onestepsr.imaging.write import encode_image

        content = encode_image(made, file_format)
        with replacing(self._queue.result(job.id)) as partial:
            partial.write_bytes(content)
        seconds = time.monotonic() - started
        self._queue.finish(job, size=(made.width, made.height), nbytes=len(content), seconds=seconds)
        self.recent.append(seconds)

    def _guarded(self, job: Job, attempt: Callable[[], None], last: bool = False) -> bool:
        """Do a part of a job; what goes wrong becomes the job's error. False if it did."""
        code = None
        try:
            attempt()
        except Cancelled:
            code = "cancelled"
            with suppress(sqlite3.Error):
                self._queue.put_back(job)  # if it is the server that ends
        except MemoryError:
            code, message = "memory", "not enough memory on the server for this image"
        except (OSError, sqlite3.Error) as error:
            code, message = "storage", storage_reason(error)
        except OneStepSRError as error:
            code, message = "image" if isinstance(error, Unreadable) else "enlargement", str(error)
        except Exception as error:  # a defect of ours: the server goes on
            logger.exception("job %s", job.id)
            code, message = "internal", f"the server failed on this image ({type(error).__name__})"
        if code not in (None, "cancelled"):
            logger.warning("%s: %s", job.name, message)
            with suppress(sqlite3.Error):  # the job runs again with the next start, if nothing can be noted
                self._queue.fail(job, code, message)
        if last:
            self._room.release()
            self._end(job)
        return code is None

    def _end(self, job: Job) -> None:
        self._running.pop(job.id, None)
        self.changed(job.id)

    def _upscaler(self, name: str, fidelity: float | None) -> Upscaler:
        """The model of this name, loaded if it is not among the last ones."""
        from onestepsr.inference.upscaler import Upscaler

        key = (name, fidelity)
        if key not in self._loaded:
            while len(self._loaded) >= MOST_MODELS:
                self._loaded.popitem(last=False)
            loaded = Upscaler.from_pretrained(
                self._models[name], self._device, self._dtype, fidelity=fidelity, engine=self._engine
            )
            loaded.name = name  # in messages, where the path of a file concerns nobody
            self._loaded[key] = loaded
            logger.info("%s on %s in %s by %s", name, loaded.device, loaded.dtype, loaded.engine)
        self._loaded.move_to_end(key)
        return self._loaded[key]


def read_upload(data: bytes, name: str, limits: Mapping[str, Any] | None) -> LoadedImage:
    """The image in ``data``, decoded in a child process; ``limits`` are fields of its ``DecodingLimits``."""
    from onestepsr.imaging.child import DecodingLimits, read_image_in_child  # here: PyTorch takes seconds to load

    return read_image_in_child(data, name, DecodingLimits(**limits or {}))


def storage_reason(error: OSError | sqlite3.Error) -> str:
    """Reason in plain words for a failure to write."""
    if is_full(error):
        return DISK_FULL
    return f"the server cannot write its data ({getattr(error, 'strerror', None) or first_line(error)})"


def is_full(error: OSError | sqlite3.Error) -> bool:
    """True if there is no room on the disk, or no more of a quota."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "full" in str(error)

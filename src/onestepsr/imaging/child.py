"""Decoding in a child process with limits of time and memory, for images that strangers send.

Limits that a file's header can break are checked before anything is decoded (:mod:`onestepsr.imaging.formats`). What is
left are decoders that take long, take much, or crash: here that ends a child, which does nothing else, and not the
server. A child starts in about half a second (PyTorch is not loaded) and then decodes one image after another; several
threads may read at once, each with a child of its own.

What a child sends back is JSON and bare samples, never a pickle: taking over the decoder does not give the parent away.
"""

from __future__ import annotations

import atexit
import base64
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from onestepsr.core.errors import TooLarge, UserError
from onestepsr.imaging.formats import MAX_PIXELS
from onestepsr.imaging.image import LoadedImage, Samples

logger = logging.getLogger(__name__)

_IDLE_KEPT = 4
"""Most children that wait for a further image."""
_START_SECONDS = 60.0
_MAX_HEADER = 2**28
_SPARE_SECONDS = 5
"""Seconds beyond its time after which a child whose parent was killed ends by itself."""


@dataclass(frozen=True, kw_only=True)
class DecodingLimits:
    """Limits on the decoding of one image."""

    pixels: int = MAX_PIXELS
    """Most pixels, by the header."""
    seconds: float = 30.0
    """Longest time that decoding may take, with the bytes sent to the child and the samples received from it."""
    memory: int = 4 * 2**30
    """Most bytes that a child may take beyond what it holds after its start; not enforced on Windows and macOS."""

    def __post_init__(self) -> None:
        if min(self.pixels, self.seconds, self.memory) <= 0:
            raise ValueError("limits of decoding must be positive")


DEFAULT_LIMITS = DecodingLimits()


def read_image_in_child(data: bytes, name: str = "<bytes>", limits: DecodingLimits = DEFAULT_LIMITS) -> LoadedImage:
    """As :func:`onestepsr.imaging.read.read_image`, decoded in a child process within ``limits``.

    Messages and warnings call the image ``name``. Raises :class:`UserError` for what is no readable image, takes longer
    or more memory than the limits, or makes the decoder crash. Safe in threads.
    """
    child = _children.take()
    image: LoadedImage | None = None
    try:
        image = child.read(data, name, limits)
    finally:
        if child.is_good:
            _children.give_back(child)
        else:
            child.end()
    return image


# ---- In the parent ----


class _Child:
    """A process that decodes; not good any more once an image was not answered in full."""

    def __init__(self) -> None:
        # -P and no inherited folder: a file in the folder of uploads must not be taken for a module.
        paths = [str(Path(__file__).parents[2]), *(path for path in sys.path if path)]
        command = [sys.executable, "-P", "-c", f"from {__name__} import serve_parent; serve_parent()"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where C libraries write without the name of a file
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        self._started = False
        self.is_good = True

    def read(self, data: bytes, name: str, limits: DecodingLimits) -> LoadedImage:
        self.is_good, stopped = False, threading.Event()

        def stop() -> None:
            stopped.set()
            self._process.kill()

        if not self._started:
            self._wait_for_start()
        timer = threading.Timer(limits.seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            request = {"name": name, "size": len(data), **dataclasses.asdict(limits)}
            _send(self._to, request, data)
            answer = _receive(self._from)
            image = None if "error" in answer else _image(answer, self._from)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            timer.cancel()
            self.end()
            if stopped.is_set():
                raise UserError(f"{name}: not decoded within {limits.seconds:g} seconds, given up") from error
            raise UserError(
                f"{name}: its decoder crashed (exit code {self._process.returncode}); the file is damaged, or made to "
                f"do so, or takes more than {limits.memory / 1e6:,.0f} MB of memory"
            ) from error
        finally:
            timer.cancel()
        self.is_good = not stopped.is_set()
        for level, message in answer.get("log", []):
            logger.log(int(level), "%s", message)
        if image is None:
            raise (TooLarge if answer.get("too_large") else UserError)(str(answer["error"]))
        return image

    @property
    def is_alive(self) -> bool:
        """False for one that has been killed while it waited."""
        return self._process.poll() is None

    def end(self) -> None:
        self.is_good = False
        self._process.kill()
        for stream in (self._to, self._from):
            with suppress(OSError):
                stream.close()
        self._process.wait()

    def _wait_for_start(self) -> None:
        timer = threading.Timer(_START_SECONDS, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            _receive(self._from)
        except (OSError, EOFError, ValueError) as error:
            self.end()
            raise RuntimeError(f"no process for decoding could be started ({self._process.returncode})") from error
        finally:
            timer.cancel()
        self._started = True

    @property
    def _to(self) -> BinaryIO:
        assert self._process.stdin is not None
        return self._process.stdin  # type: ignore[return-value]

    @property
    def _from(self) -> BinaryIO:
        assert self._process.stdout is not None
        return self._process.stdout  # type: ignore[return-value]


class _Children:
    """Children that wait for an image."""

    def __init__(self) -> None:
        self._idle: list[_Child] = []
        self._lock = threading.Lock()

    def take(self) -> _Child:
        with self._lock:
            while self._idle:
                child = self._idle.pop()
                if child.is_alive:
                    return child
                child.end()
        return _Child()

    def give_back(self, child: _Child) -> None:
        with self._lock:
            if len(self._idle) < _IDLE_KEPT:
                self._idle.append(child)
                return
        child.end()

    def end(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    def forget(self) -> None:
        """In a fork of this process: the children belong to the process that was forked."""
        self.__init__()  # type: ignore[misc]


_children = _Children()
atexit.register(_children.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_children.forget)


def _image(answer: dict[str, Any], source: BinaryIO) -> LoadedImage:
    fields = dict(answer["fields"])
    for key in _BYTES:
        fields[key] = None if fields[key] is None else base64.b64decode(fields[key])
    fields["texts"] = tuple(tuple(text) for text in fields["texts"])
    for key in ("cicp", "dpi"):
        fields[key] = None if fields[key] is None else tuple(fields[key])
    for key, shape, kind in answer["samples"]:
        if kind not in ("uint8", "uint16") or key not in ("pixels", "alpha"):
            raise ValueError("no samples")
        samples: Samples = np.empty(shape, kind)
        _fill(source, memoryview(samples.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
        fields[key] = samples
    return LoadedImage(**fields)


# ---- Between both: a length, JSON, and bare bytes ----

_BYTES = ("icc", "exif", "xmp", "iptc")


def _send(stream: BinaryIO, header: dict[str, Any], *bodies: Any) -> None:
    text = json.dumps(header).encode()
    stream.write(len(text).to_bytes(8, "little") + text)
    for body in bodies:
        stream.write(body)
    stream.flush()


def _receive(stream: BinaryIO) -> dict[str, Any]:
    size = int.from_bytes(_exactly(stream, 8), "little")
    if size > _MAX_HEADER:
        raise ValueError("no header")
    header = json.loads(_exactly(stream, size))
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header


def _exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise EOFError
    return content


def _fill(stream: BinaryIO, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = stream.readinto(target[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        done += count


# ---- In the child ----


def serve_parent() -> None:
    """Main function of a child: decode what comes on stdin until it ends."""
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent decides
    records = _Records()
    logging.getLogger().addHandler(records)
    logging.getLogger("onestepsr").setLevel(logging.INFO)
    from onestepsr.imaging.read import read_image

    _send(target, {})  # ready
    while True:
        try:
            request = _receive(source)
            data = _exactly(source, request["size"])
        except EOFError:
            return
        _limit(request["seconds"], request["memory"])
        records.lines.clear()
        try:
            image = read_image(data, request["name"], request["pixels"])
        except UserError as error:
            answer: dict[str, Any] = {"error": str(error), "too_large": isinstance(error, TooLarge)}
            bodies: list[Samples] = []
        except MemoryError:
            most = f"{request['memory'] / 1e6:,.0f} MB"
            answer, bodies = {"error": f"{request['name']}: takes more than {most} of memory to decode"}, []
        else:
            answer, bodies = _answer(image)
        del data
        _send(target, {**answer, "log": records.lines}, *(np.ascontiguousarray(body).data for body in bodies))
        if hasattr(signal, "alarm"):
            signal.alarm(0)


def _answer(image: LoadedImage) -> tuple[dict[str, Any], list[Samples]]:
    fields = {field.name: getattr(image, field.name) for field in dataclasses.fields(image)}
    samples = {key: fields.pop(key) for key in ("pixels", "alpha")}
    present = {key: each for key, each in samples.items() if each is not None}
    for key in _BYTES:
        fields[key] = None if fields[key] is None else base64.b64encode(fields[key]).decode()
    described = [[key, list(each.shape), each.dtype.name] for key, each in present.items()]
    return {"fields": fields, "samples": described}, list(present.values())


class _Records(logging.Handler):
    """Log records of the image that is being read, for the parent to log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        if record.name.startswith("onestepsr"):
            self.lines.append((record.levelno, record.getMessage()))


def _limit(seconds: float, memory: int) -> None:
    """Limit this process from now on, where the system can; the parent limits the time in any case."""
    if hasattr(signal, "alarm"):
        signal.alarm(int(seconds) + _SPARE_SECONDS)
    with suppress(ImportError, OSError, ValueError, IndexError):  # not Linux, or an administrator's limit is lower
        import resource

        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (held + memory, hard))

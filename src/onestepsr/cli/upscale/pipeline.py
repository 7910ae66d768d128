"""Images through one upscaler: while one is enlarged, the next are being read and the last are being written.

Reading and writing have threads of their own, the network stays on the caller's. Files, bytes and order are those of
one image after the other.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onestepsr.cli.upscale.jobs import Job
from onestepsr.cli.upscale.prompts import PreparedPrompt, Prompts, prompted
from onestepsr.core.errors import OneStepSRError

if TYPE_CHECKING:
    from rich.progress import Progress

    from onestepsr.imaging.read import LoadedImage
    from onestepsr.inference.options import UpscaleOptions
    from onestepsr.inference.upscaler import Upscaler
import sys
from typing import TYPE_CHECKING

from onestepsr.cli.upscale.jobs import FORMATS, STREAM, Naming, existing, target_file
from onestepsr.cli.upscale.prompts import Setup
from onestepsr.core.errors import UserError

if TYPE_CHECKING:
    from onestepsr.imaging.read import LoadedImage


AHEAD = 8
"""Images in memory at most: those read ahead, the one that is enlarged and those that wait to be written."""
AHEAD_BYTES = 256_000_000
"""No further image is read while those in memory, inputs and outputs, take as much as this: small ones overlap, very
large ones follow each other and need hardly more memory than one alone."""
WRITERS = 4
"""Images that are encoded at the same time at most. PNG takes longer than a small network on a GPU does."""
PATIENCE = 5.0
"""Seconds that a run which is broken off waits for the image that is just being read."""


@dataclass(kw_only=True)
class Result:
    """What became of one input; sizes are (width, height)."""

    input: str
    output: str
    status: Literal["written", "skipped", "failed"]
    input_size: tuple[int, int] | None = None
    output_size: tuple[int, int] | None = None
    seconds: float = 0.0
    """Reading, enlarging and writing of this image, without the time it waited for others."""
    error: str | None = None
    prompt: str | None = None
    plan: dict[str, Any] | None = None
    """How it went through the network: tiles, dtype, expected memory."""


def result_of(job: Job, status: Literal["skipped", "failed"], error: str | None = None) -> Result:
    """The result of a job that wrote nothing (yet)."""
    return Result(input=str(job.source), output=str(job.target), status=status, error=error)


class MemoryBudget:
    """What may be in memory at once. An image enters before it is read and leaves when it is written."""

    def __init__(self, images: int = AHEAD, size: int = AHEAD_BYTES) -> None:
        self._limits = (images, size)
        self._images = self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def enter(self) -> bool:
        """Wait until there is room for one more image; False when the run is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room())
            self._images += 1
            return not self._closed

    def hold(self, size: int) -> None:
        """Count the bytes of an image that has entered, once they are known."""
        with self._changed:
            self._bytes += size

    def leave(self, size: int) -> None:
        """Give back the place of an image and the bytes that were counted for it."""
        with self._changed:
            self._images -= 1
            self._bytes -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_room(self) -> bool:
        images, size = self._limits
        return self._images < images and self._bytes < size


@dataclass(kw_only=True)
class _Item:
    """An image on its way."""

    job: Job
    result: Result
    group: Sequence[Path]
    """All sources of the group that begins with this image; empty for the others of a group."""
    image: LoadedImage | None = None
    """What was read; None when that failed, and once it is enlarged."""
    size: tuple[int, int] = (0, 0)
    """Width and height of the output."""
    held: int = 0
    """Bytes of input and output."""


class Pipeline:
    """Enlarges images of files into files with one upscaler, for one run."""

    def __init__(
        self,
        upscaler: Upscaler,
        options: UpscaleOptions,
        prompts: Prompts | None = None,
        progress: Progress | None = None,
    ) -> None:
        """``progress`` gets a bar for the tiles of every image."""
        self._upscaler, self._options, self._prompts, self._progress = upscaler, options, prompts, progress
        self._prepared: Iterator[PreparedPrompt] = iter(())
        self._room = MemoryBudget()
        self._read_items: queue.SimpleQueue[_Item | BaseException | None] = queue.SimpleQueue()

    def run(self, groups: Iterable[Sequence[Job]]) -> Generator[Result, None, None]:
        """Results in the order of the jobs; close the iterator to break off.

        ``groups`` is read on another thread. Prompts are made for a whole group before its first image is enlarged. A
        image that cannot be read, enlarged or written is a failed result. Breaking off drops what is not being
        written yet.
        """
        reader = threading.Thread(target=self._read_all, args=(groups,), name="reading", daemon=True)
        writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="writing")
        reader.start()
        try:
            yield from self._enlarge_all(writers)
        finally:
            self._room.close()
            writers.shutdown(cancel_futures=True)
            reader.join(PATIENCE)

    def _read_all(self, groups: Iterable[Sequence[Job]]) -> None:
        try:
            for group in groups:
                for number, job in enumerate(group):
                    if not self._room.enter():
                        return
                    self._read_items.put(self._read(job, [] if number else [each.source for each in group]))
            self._read_items.put(None)
        except BaseException as error:  # noqa: BLE001  (a defect: raised where the results are awaited)
            self._read_items.put(error)

    def _read(self, job: Job, group: Sequence[Path]) -> _Item:
        from onestepsr.imaging.read import read_image
        from onestepsr.imaging.write import check_size, format_of
        from onestepsr.inference.options import target_size

        item = _Item(job=job, result=result_of(job, "failed"), group=group)
        with _measured(item):
            image = read_image(job.source)
            item.result.input_size = (image.width, image.height)
            item.size = target_size(image.width, image.height, self._options)
            check_size(format_of(job.target), *item.size, str(job.target))
            item.image, item.held = image, _bytes(image, item.size)
        self._room.hold(item.held)
        return item

    def _next(self) -> _Item | None:
        item = self._read_items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _enlarge_all(self, writers: ThreadPoolExecutor) -> Iterator[Result]:
        results: deque[Future[Result]] = deque()
        for item in iter(self._next, None):
            results.append(writers.submit(self._write, item, self._enlarged(item)))
            while results and results[0].done():
                yield results.popleft().result()
        while results:
            yield results.popleft().result()

    def _enlarged(self, item: _Item) -> LoadedImage | None:
        prompt = self._prompt(item)
        item.result.prompt = prompt.text
        image, item.image = item.image, None
        if prompt.error is not None:
            item.result.error = str(prompt.error)
        elif image is not None:
            with _measured(item), self._tiles(item.job) as tell:
                enlarged = self._upscaler.upscale_image(image, prompt.applied_to(self._options), tell)
                plan = self._upscaler.last_plan
                item.result.plan = None if plan is None else plan.as_json()
                return enlarged
        return None

    def _prompt(self, item: _Item) -> PreparedPrompt:
        if item.group:
            self._prepared = prompted(item.group, self._prompts)
        return next(self._prepared)

    @contextmanager
    def _tiles(self, job: Job) -> Iterator[Callable[[int, int], None] | None]:
        progress = self._progress
        if progress is None:
            yield None
            return
        task = progress.add_task(job.source.name, total=None)
        try:
            yield lambda done, total: progress.update(task, completed=done, total=total)
        finally:
            progress.remove_task(task)

    def _write(self, item: _Item, enlarged: LoadedImage | None) -> Result:
        from onestepsr.imaging.write import write_image

        result = item.result
        try:
            if enlarged is not None:
                with _measured(item):
                    write_image(enlarged, item.job.target, sweep=False)
                    result.output_size, result.status = item.size, "written"
        finally:
            self._room.leave(item.held)
        result.seconds = round(result.seconds, 3)
        return result


@contextmanager
def _measured(item: _Item) -> Iterator[None]:
    """Add what happens inside to the image's seconds; an error that concerns this image alone goes to its
    result."""
    import torch

    started = time.perf_counter()
    try:
        yield
    except (OneStepSRError, MemoryError, torch.OutOfMemoryError) as error:
        own = isinstance(error, OneStepSRError)
        item.result.error = str(error) if own else f"{item.job.source}: not enough memory; try --tile 64"
    finally:
        item.result.seconds += time.perf_counter() - started


def _bytes(image: LoadedImage, size: tuple[int, int]) -> int:
    """Bytes of an image and of what it will be enlarged to."""
    samples: list[Any] = [image.pixels] if image.alpha is None else [image.pixels, image.alpha]
    own = sum(int(part.nbytes) for part in samples)
    return own + own * size[0] * size[1] // (image.width * image.height)


# ``onestepsr upscale -`` and ``-o -``: one image from stdin or to stdout --------------------------------------------


def upscale_stream(
    setup: Setup, source: str, *, out: str | None, file_format: str, skip_existing: bool, overwrite: bool
) -> Result:
    """Read one image to its end and write it enlarged; what became of it.

    ``source`` is a file name, or "-" for stdin; ``out`` a file name, or "-" or None for stdout. Raises UserError for
    what is no image, and for a file that exists unless it is to be skipped or replaced.
    """
    from onestepsr.imaging.write import check_size, check_writable, encode_image, write_image
    from onestepsr.inference.upscaler import target_size

    target = None if out is None or out == STREAM else _target(out, file_format)
    result = Result(input=source, output=out or STREAM, status="skipped")
    if existing([] if target is None else [Job(Path(source), target)], skip_existing, overwrite):
        return result
    if target is not None:
        check_writable(target)
    upscaler, prompts = setup.load()
    started = time.perf_counter()
    image, options = _read(source), setup.options
    wanted = _format(image.format, target, file_format)
    size = target_size(image.width, image.height, options)
    check_size(wanted, *size, "output" if target is None else str(target))
    if prompts is not None:
        prompt = prompts.of_image(Path("stdin" if source == STREAM else source), image)
        result.prompt, options = prompt.text, prompt.applied_to(options)
    enlarged = upscaler.upscale_image(image, options)
    if target is not None:
        write_image(enlarged, target)
    else:
        sys.stdout.buffer.write(encode_image(enlarged, wanted))
        sys.stdout.buffer.flush()
    plan, result.status = upscaler.last_plan, "written"
    result.plan = None if plan is None else plan.as_json()
    result.input_size, result.output_size = (image.width, image.height), size
    result.seconds = round(time.perf_counter() - started, 3)
    return result


def _target(out: str, file_format: str) -> Path:
    return target_file(Naming(out=Path(out), file_format=file_format, suffix=""))


def _read(source: str) -> LoadedImage:
    from onestepsr.imaging.read import read_image

    return _read_stdin() if source == STREAM else read_image(Path(source))


def _read_stdin() -> LoadedImage:
    from onestepsr.imaging.read import MAX_BYTES, read_image

    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"<stdin>: more than the limit of {MAX_BYTES:,} bytes")
    return read_image(data, "<stdin>")


def _format(own: str | None, target: Path | None, file_format: str) -> str:
    from onestepsr.imaging.write import format_of

    if target is not None:
        return format_of(target)
    return (own or "png") if file_format == "keep" else format_of(Path("a" + FORMATS[file_format]))

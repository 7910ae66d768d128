"""The service behind the routes: from a request to an inspected image, to a job, and to its answer.

The event loop only moves bytes. The queue's table, decoding and the network run on threads
(:mod:`onestepsr.serve.jobs`); a coroutine that waits for a job is woken when the job has changed.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from onestepsr.core.errors import TooLarge, UserError, did_you_mean
from onestepsr.imaging.formats import FORMATS, format_named, identify, kept_format
from onestepsr.serve.guard import Metrics, Refusal
from onestepsr.serve.jobs import FINISHED, Job, Queue, QueueFull, Worker, read_upload
from onestepsr.weights.catalog import BICUBIC, DEFAULT_MODEL, get_model, list_models

if TYPE_CHECKING:
    from onestepsr.inference.engines import Engine

UPLOAD_SECONDS = 120.0
"""Longest time in which an upload has to arrive."""
MOST_HELD = 2**29
"""Bytes of uploads in memory, of all clients together."""
DRAINED = 2**25
"""Bytes of a refused upload that are still read, so that the client sees the answer and no broken connection."""
OUTPUT_FACTOR = 16
"""Most pixels of an output, as a multiple of the limit for inputs."""
KEEP = "keep"


# ---- settings and options ----


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything about a server that its options decide."""

    data_dir: Path
    models: Sequence[str] = (DEFAULT_MODEL,)
    """Aliases or files that clients may choose; the first one is the default."""
    token: str | None = None
    hosts: Sequence[str] | None = ()
    """Names besides this machine's own under which the server is asked for; None: any."""
    behind_proxy: bool = False
    """Take clients' addresses from the last entry of X-Forwarded-For, which the proxy itself has written."""
    max_pixels: int = 25_000_000
    max_bytes: int = 64_000_000
    max_queue: int = 256
    max_seconds: float = 3600.0
    decode_seconds: float = 30.0
    decode_memory: int = 2**31
    keep_hours: float = 24.0
    device: str = "auto"
    dtype: str = "auto"
    engine: Engine = "auto"
    memory: float | None = None


class Options(BaseModel):
    """Options of one image, as those of ``onestepsr upscale``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(default=None, max_length=200, description="One of /v1/models; default: the first.")
    scale: float = Field(default=4.0, ge=1, le=8, description="Output side / input side.")
    width: int | None = Field(default=None, ge=1, le=1_000_000, description="Output width in pixels, instead of scale.")
    height: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Output height; one alone keeps the aspect."
    )
    tile: Literal["auto", "off"] | Annotated[int, Field(ge=16, le=100_000)] = Field(
        default="auto", description="Tile side in input pixels."
    )
    tile_blend: Literal["smooth", "average"] = "smooth"
    color_fix: Literal["auto", "wavelet", "drift", "adain", "none"] = Field(
        default="auto", description="Colours from the input; auto is what suits the model."
    )
    alpha: Literal["bicubic", "network"] = Field(default="bicubic", description="Enlargement of transparency.")
    seed: int | None = Field(default=None, ge=0, lt=2**32, description="For models that draw noise.")
    fidelity: float | None = Field(default=None, ge=0, le=1, description="0 (crisp) to 1 (faithful), where offered.")
    format: str = Field(default=KEEP, max_length=20, description="keep, or jpg, png, webp, tif, bmp, avif, heic, jxl.")
    strip_metadata: bool = Field(default=False, description="Leave out EXIF, XMP, IPTC and texts.")


class Watchers:
    """Wakes coroutines that wait for a change of a job; :meth:`notify` may be called on any thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: dict[str, set[asyncio.Event]] = {}

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake coroutines of this loop."""
        self._loop = loop

    def notify(self, job_id: str) -> None:
        """Wake whoever watches the job."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._wake, job_id)

    def wake_all(self) -> None:
        """Wake everyone; on the loop's own thread."""
        for job_id in list(self._events):
            self._wake(job_id)

    @contextmanager
    def watching(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set at each change of the job; whoever waits clears it."""
        event = asyncio.Event()
        self._events.setdefault(job_id, set()).add(event)
        try:
            yield event
        finally:
            self._events[job_id].discard(event)
            if not self._events[job_id]:
                del self._events[job_id]

    def _wake(self, job_id: str) -> None:
        for event in self._events.get(job_id, ()):
            event.set()


# ---- the service ----


class Service:
    """Uploads, checks, jobs and answers, which the routes of all dialects share."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.queue = Queue(settings.data_dir, most_queued=settings.max_queue, keep_seconds=3600.0 * settings.keep_hours)
        self.limits = {
            "pixels": settings.max_pixels,
            "seconds": settings.decode_seconds,
            "memory": settings.decode_memory,
        }
        self.watchers, self.metrics = Watchers(), Metrics()
        paths: dict[str, str] = {}
        for given in settings.models:
            name = Path(given).name if Path(given).is_file() else given
            if paths.setdefault(name, given) != given:
                raise UserError(f"{paths[name]} and {given}: clients could not tell them apart; rename one")
        self.models = [described(name, path) for name, path in paths.items()]
        self.worker = Worker(
            self.queue,
            paths,
            device=settings.device,
            dtype=settings.dtype,
            engine=settings.engine,
            memory=settings.memory,
            limits=self.limits,
            most_seconds=settings.max_seconds,
            changed=self.watchers.notify,
        )
        self.ending = False
        self._held = 0
        self._doors = asyncio.Semaphore(2)
        """Images that are decoded at once to see what they are."""

    def client_of(self, request: Request) -> str:
        """Name under which a client has its turn: its address."""
        if self.settings.behind_proxy:
            # The proxy adds its entry at the end; those before it are what the client claims.
            last = ",".join(request.headers.getlist("x-forwarded-for")).rpartition(",")[2].strip()
            if last:
                return last[:100]
        return request.client.host if request.client is not None else "?"

    def end(self) -> None:
        """Answer whoever waits for a job, since the server ends; on the loop's own thread."""
        self.ending = True
        self.watchers.wake_all()

    # ---- uploads ----

    async def upload(self, request: Request) -> tuple[bytes, str, dict[str, str]]:
        """Content, file name and form fields of a request with an image in its body."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Before anything is read: there is no use in an upload that cannot be taken.
        await run_in_threadpool(self.queue.require_room, self.client_of(request))

        async def limited(hold: Callable[[int], None]) -> AsyncIterator[bytes]:
            async for block in self.body(request, self.settings.max_bytes):
                hold(len(block))
                yield block

        with self.holding() as hold:
            if kind != "multipart/form-data":
                data = b"".join([block async for block in limited(hold)])
                return data, request.query_params.get("name", "image"), {}
            if "boundary=" not in request.headers.get("content-type", ""):
                raise Refusal(422, "form", "multipart/form-data without a boundary")
            try:
                form = await MultiPartParser(
                    request.headers,
                    limited(hold),  # type: ignore[arg-type]
                    max_files=1,
                    max_fields=30,
                    max_part_size=10_000,
                ).parse()
            except (MultiPartException, ValueError, KeyError, UnicodeDecodeError) as error:
                raise Refusal(422, "form", f"damaged form ({str(error)[:100]})") from error
            try:
                files = [(key, value) for key, value in form.multi_items() if isinstance(value, UploadFile)]
                if len(files) != 1 or files[0][0] != "image":
                    raise Refusal(422, "form", "the form needs one file, in the field 'image'")
                data = await files[0][1].read()
                fields = {key: value for key, value in form.multi_items() if isinstance(value, str)}
                return data, files[0][1].filename or "image", fields
            finally:
                await form.close()

    @contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Counts bytes of uploads that are in memory until the block ends; Refusal where they are too many."""
        held = 0

        def hold(nbytes: int) -> None:
            nonlocal held
            held += nbytes
            self._held += nbytes
            if nbytes > 0 and self._held > MOST_HELD:
                raise Refusal(503, "busy", "too many uploads at once", {"retry-after": "5"})

        try:
            yield hold
        finally:
            self._held -= held

    async def body(self, request: Request, most: int) -> AsyncIterator[bytes]:
        """The blocks of a request's body; Refusal if they are more than ``most`` bytes or arrive too slowly."""
        stated = request.headers.get("content-length", "")
        total, too_large = 0, stated.isdecimal() and int(stated) > most
        stream = request.stream().__aiter__()
        deadline = asyncio.get_running_loop().time() + UPLOAD_SECONDS
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    block = await anext(stream)
            except StopAsyncIteration:
                break
            except TimeoutError:
                message = f"the upload took longer than {UPLOAD_SECONDS:g} seconds"
                raise Refusal(408, "slow", message, {"connection": "close"}) from None
            total += len(block)
            too_large = too_large or total > most
            if not too_large:
                yield block
            elif total > DRAINED:
                break
        if too_large:
            message = f"the file is larger than the limit of {most:,} bytes"
            raise Refusal(413, "bytes", message, {"connection": "close"})

    # ---- jobs ----

    async def inspect(self, data: bytes, name: str) -> Inspected:
        """Size and format of an image; Refusal if it is none, or too large. It is decoded once in a child process, so
        that what is accepted can be done."""
        try:
            identify(data)
        except UserError as error:
            raise Refusal(415, "type", str(error)) from error
        self._held += len(data)  # while it waits
        try:
            async with self._doors:
                return await run_in_threadpool(self._inspect, data, name)
        except TooLarge as error:
            raise Refusal(413, "pixels", str(error)) from error
        except UserError as error:
            raise Refusal(422, "image", str(error).removeprefix(f"{name}: ")) from error
        except MemoryError as error:
            raise Refusal(413, "memory", "not enough memory on the server for this image") from error
        finally:
            self._held -= len(data)

    def _inspect(self, data: bytes, name: str) -> Inspected:
        image = read_upload(data, name, self.limits)
        return Inspected(width=image.width, height=image.height, kept_format=kept_format(image.format), image=image)

    async def accept(
        self, request: Request, data: bytes, name: str, inspected: Inspected, options: Options, *, awaited: bool
    ) -> Job:
        """Put an inspected image into the queue."""
        if self.worker.failure is not None and not self.worker.is_alive():
            raise Refusal(503, "busy", self.worker.failure, {"retry-after": "60"})
        values = await run_in_threadpool(self._checked, inspected, options)
        try:
            job = await run_in_threadpool(
                self.queue.add,
                client=self.client_of(request),
                name=name,
                options=values,
                size=(inspected.width, inspected.height),
                data=data,
                awaited=awaited,
                offer=lambda job_id: self.worker.offer(job_id, inspected.image),
            )
        except QueueFull:
            self.metrics.jobs.labels("refused").inc()
            raise
        self.metrics.jobs.labels("accepted").inc()
        return job

    def _checked(self, inspected: Inspected, options: Options) -> dict[str, Any]:
        """Options as the worker takes them."""
        from onestepsr.imaging.write import check_size
        from onestepsr.inference.options import UpscaleOptions, target_size

        values = options.model_dump()
        models = {each["name"]: each for each in self.models}
        values["model"] = model = options.model or next(iter(models))
        if model not in models:
            raise Refusal(422, "option", f"model '{model}' is not offered here; {did_you_mean(model, models)}")
        if options.fidelity is not None and not models[model]["fidelity"]:
            raise Refusal(422, "option", f"model '{model}' has no control of fidelity")
        if "scale" in options.model_fields_set and (options.width, options.height) != (None, None):
            raise Refusal(422, "option", "scale: width and height exclude it")
        try:
            values["format"] = inspected.kept_format if options.format == KEEP else format_named(options.format)
            taken = {key: values[key] for key in UpscaleOptions.__dataclass_fields__ if key in values}
            size = target_size(inspected.width, inspected.height, UpscaleOptions(**taken))
            check_size(values["format"], *size, "output")
        except UserError as error:
            raise Refusal(422, "option", str(error)) from error
        most = OUTPUT_FACTOR * self.settings.max_pixels
        if size[0] * size[1] > most:
            message = f"the result would have {size[0]} x {size[1]} pixels, the limit is {most:,}"
            raise Refusal(413, "pixels", message)
        return values

    async def finished(self, job: Job, request: Request, seconds: float | None) -> Job:
        """The job once it is finished; it is dropped if the client leaves, or after ``seconds``."""
        deadline = None if seconds is None else time.monotonic() + seconds
        with self.watchers.watching(job.id) as changed:
            changed.set()  # it may be finished already
            while True:
                if changed.is_set():
                    changed.clear()
                    now = await run_in_threadpool(self.queue.get, job.id)
                    if now is None or now.state in FINISHED:
                        return now or job
                late = deadline is not None and time.monotonic() > deadline
                if self.ending or late or await request.is_disconnected():
                    await run_in_threadpool(self.queue.delete, job.id)
                    reason = "the server is ending" if self.ending else "this takes longer than can be waited for"
                    raise Refusal(503, "busy", reason, {"retry-after": "30"})
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), 2.0)

    async def content(self, job: Job) -> bytes:
        """The result of a finished job that its client waited for, which is deleted; Refusal if it failed."""

        def taken() -> bytes:
            try:
                return self.queue.result(job.id).read_bytes() if job.state == "done" else b""
            finally:
                self.queue.delete(job.id)

        content = await run_in_threadpool(taken)
        if job.state != "done":
            raise failure(job)
        return content

    def shown(self, job: Job) -> dict[str, Any]:
        """A job as JSON."""
        progress = self.worker.progress(job.id)
        ahead, wait = self.queue.ahead(job) if job.state == "queued" else (None, None)
        own, left = self.queue.expected_seconds(job.pixels), None
        if job.state == "queued" and own is not None and wait is not None:
            left = wait + own
        elif job.state == "running" and progress is not None:
            spent = time.monotonic() - progress.started
            by_tiles = spent / progress.done * (progress.total - progress.done) if progress.done else None
            left = by_tiles if by_tiles is not None else None if own is None else max(0.0, own - spent)
        chosen = job.options["format"]
        output = {"width": job.output_width, "height": job.output_height, "bytes": job.nbytes}
        return {
            "id": job.id,
            "state": job.state,
            "name": job.name,
            "options": job.options,
            "input": {"width": job.width, "height": job.height},
            "output": {**output, "format": chosen, "name": result_name(job)} if job.state == "done" else None,
            "ahead": ahead,
            "tiles": {"done": progress.done, "total": progress.total} if progress and progress.total else None,
            "seconds_left": None if left is None else round(left, 1),
            "seconds": job.seconds,
            "error": None if job.error is None else {"code": job.error_code, "message": job.error},
            "links": {"self": f"/v1/jobs/{job.id}", "result": f"/v1/jobs/{job.id}/result"},
        }


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """An image that can be read."""

    width: int
    height: int
    kept_format: str
    """Format of the result where the client chooses none: that of the input, or PNG where that is only read."""
    image: Any = field(repr=False, compare=False)
    """The image itself."""


def described(name: str, path: str) -> dict[str, Any]:
    """A model as JSON."""
    if Path(path).is_file():
        return {"name": name, "summary": "", "licence": "", "scale": 4, "fidelity": False}
    spec = get_model(name)
    return {
        "name": spec.id,
        "summary": spec.summary,
        "licence": spec.licence,
        "scale": spec.scale,
        "fidelity": bool(spec.faithful),
    }


def models_here() -> list[str]:
    """Upscalers whose weights are on this machine and that need no text about the image, the default one first."""
    specs = [spec for spec in list_models("upscaler") if spec.id != BICUBIC and not spec.needs_prompt]
    here = [spec.id for spec in specs if spec.bundled or (len(spec.files) == 1 and spec.is_here)]
    return sorted(here, key=lambda name: name != DEFAULT_MODEL)


def failure(job: Job) -> Refusal:
    """The answer for a job without a result."""
    status = {"image": 422, "enlargement": 422, "memory": 413, "storage": 507, "cancelled": 410}.get(
        job.error_code or "", 500
    )
    return Refusal(status, job.error_code or "internal", job.error or "failed")


def display_name(name: str) -> str:
    """The last part of a client's file name, without what a screen or another system could take amiss."""
    last = re.split(r"[\\/]", name)[-1]
    clean = "".join(c for c in last if c.isprintable() and c not in '<>:"|?*').strip(" .")
    return clean[-120:] or "image"


def result_name(job: Job) -> str:
    """File name of a result, as the command line calls it beside its input."""
    options = job.options
    if options["width"] is None and options["height"] is None:
        suffix = f"_x{options['scale']:g}"
    else:
        suffix = "".join(f"{key[0]}{options[key]}" for key in ("width", "height") if options[key] is not None)
        suffix = f"_{suffix}"
    given = FORMATS[options["format"]]
    own = Path(job.name).suffix
    return Path(job.name).stem + suffix + (own if own.lower() in given.endings else given.endings[0])

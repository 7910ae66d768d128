"""The server's routes: the page, the API under ``/v1``, and what guards both.

The event loop only moves bytes. The queue's table, decoding and the network run on threads
(:mod:`onestepsr.serve.jobs`); a coroutine that waits for a job is woken when the job has changed. Nothing here asks
anything of another machine.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import json
import logging
import re
import secrets
import socket
import sqlite3
import time
import zipfile
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onestepsr import __version__
from onestepsr.core.errors import OneStepSRError, TooLarge, UserError, did_you_mean
from onestepsr.imaging.formats import FORMATS, format_named, identify, kept_format
from onestepsr.serve.jobs import FINISHED, Job, Queue, QueueFull, Worker, is_full, read_upload, storage_reason
from onestepsr.weights.catalog import BICUBIC, DEFAULT_MODEL, get_model, list_models

if TYPE_CHECKING:
    from onestepsr.inference.engines import Engine

logger = logging.getLogger(__name__)

ANSWERED_AT_ONCE = 512 * 512
"""Most pixels of an input that ``/v1/upscale`` answers with the image itself instead of a job."""
PATIENCE_SECONDS = 120.0
"""Longest time that such an answer may be waited for."""
UPLOAD_SECONDS = 120.0
"""Longest time in which an upload has to arrive."""
MOST_HELD = 2**29
"""Bytes of uploads in memory, of all clients together."""
DRAINED = 2**25
"""Bytes of a refused upload that are still read, so that the client sees the answer and no broken connection."""
OUTPUT_FACTOR = 16
"""Most pixels of an output, as a multiple of the limit for inputs."""
KEEP = "keep"
MEDIA_TYPES = {
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "tiff": "image/tiff",
    "bmp": "image/bmp",
    "avif": "image/avif",
    "heif": "image/heic",
    "jxl": "image/jxl",
    "gif": "image/gif",
}
ID = re.compile(r"[A-Za-z0-9_-]{24}")


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
    color_fix: Literal["wavelet", "adain", "none"] = Field(default="wavelet", description="Colours from the input.")
    alpha: Literal["bicubic", "network"] = Field(default="bicubic", description="Enlargement of transparency.")
    seed: int | None = Field(default=None, ge=0, lt=2**32, description="For models that draw noise.")
    fidelity: float | None = Field(default=None, ge=0, le=1, description="0 (crisp) to 1 (faithful), where offered.")
    format: str = Field(default=KEEP, max_length=20, description="keep, or jpg, png, webp, tif, bmp, avif, heic, jxl.")
    strip_metadata: bool = Field(default=False, description="Leave out EXIF, XMP, IPTC and texts.")


class Refusal(HTTPException):
    """An answer other than the one that was asked for: a status, a code for programs and a sentence for people."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code


def refusal_body(code: str, message: str) -> dict[str, Any]:
    """The JSON of every refusal."""
    return {"error": {"code": code, "message": message}}


# ---- the guard: who may ask, and what every answer carries ----


PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": PAGE_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
_OPEN = ("/healthz", "/readyz")  # and the page with its files: it asks for the token
_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")  # clients may invent others: no figures for those
_LOCAL_NAMES = ("localhost",)


class Guard:
    """Checks Host, Origin and token of every request, counts it, and adds security headers to its answer.

    A page of another site that has its own name resolve to this machine (DNS rebinding) is known by that name in Host;
    one that posts across sites, by its Origin. Addresses are let through: they are nobody's name.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: Sequence[str] | None, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._token = None if token is None else token.encode()
        names = (*_LOCAL_NAMES, socket.gethostname().lower())
        self._hosts = None if hosts is None else {*names, *(name.lower().rstrip(".") for name in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        try:
            if refusal is not None:
                await refusal(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if route != "other" and scope["method"] in _METHODS else ""
            self._metrics.requests.labels(method, route, str(status)).inc()

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if not self._is_ours(host):
            message = f"this server is not called '{host[:200]}'; start it with --allow-host NAME to let it be"
            return JSONResponse(refusal_body("host", message), 403)
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            foreign = origin is not None and origin.partition("://")[2].lower() != host.lower()
            if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
                return JSONResponse(refusal_body("origin", "requests of other sites are not answered"), 403)
        if self._token is None or path in _OPEN or path == "/" or path.startswith("/page/"):
            return None
        if not secrets.compare_digest(_given_token(headers), self._token):
            answer = refusal_body("token", "the token is missing or wrong")
            return JSONResponse(answer, 401, {"www-authenticate": 'Bearer realm="onestepsr"'})
        return None

    def _is_ours(self, host: str) -> bool:
        if self._hosts is None:
            return True
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0].rstrip(".")
        with suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return name in self._hosts


def _given_token(headers: Headers) -> bytes:
    """The token of a request: a bearer's, or the password of basic authentication, which older clients send."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip().encode("latin-1")  # the bytes that were sent
    if kind.lower() == "basic":
        with suppress(ValueError):
            return b64decode(value.strip(), validate=True).partition(b":")[2]
    return b""


@dataclass(kw_only=True)
class Metrics:
    """Figures for Prometheus."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: Counter = field(init=False)
    jobs: Counter = field(init=False)
    seconds: Histogram = field(init=False)
    queued: Gauge = field(init=False)

    def __post_init__(self) -> None:
        own: dict[str, Any] = {"namespace": "onestepsr", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered", ["method", "route", "status"], **own)
        self.jobs = Counter("jobs", "Jobs accepted and refused", ["outcome"], **own)
        buckets = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)
        self.seconds = Histogram("job_seconds", "Seconds of a job, without waiting", buckets=buckets, **own)
        self.queued = Gauge("queue_jobs", "Jobs that wait", **own)
        ProcessCollector(registry=self.registry)


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


# ---- the service: from a request to a job and to its answer ----


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
    """Upscalers whose weights are on this machine, the default one first."""
    specs = [spec for spec in list_models("upscaler") if spec.id != BICUBIC]
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


# ---- routes ----


def create_app(settings: Settings) -> FastAPI:
    """The server as an ASGI application; its worker runs from startup to shutdown."""
    from onestepsr.serve import a1111

    service = Service(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.watchers.bind(asyncio.get_running_loop())
        service.worker.start()
        cleaning = asyncio.create_task(_clean(service))
        try:
            yield
        finally:
            service.end()
            cleaning.cancel()
            await run_in_threadpool(service.worker.stop)
            service.queue.close()

    app = FastAPI(
        title="onestepsr",
        version=__version__,
        summary="Super-resolution of photos on this machine",
        openapi_url="/v1/openapi.json",
        docs_url=None,  # their pages load scripts from other sites
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    _add_handlers(app)
    _add_page(app)
    _add_status(app, service)
    _add_jobs(app, service)
    a1111.add_routes(app, service)
    app.add_middleware(Guard, token=settings.token, hosts=settings.hosts, metrics=service.metrics)
    return app


async def _clean(service: Service) -> None:
    """Delete what has expired, every minute."""
    while True:
        with suppress(OSError, sqlite3.Error):
            await run_in_threadpool(service.queue.expire)
        await asyncio.sleep(60)


def _add_handlers(app: FastAPI) -> None:
    """Every error as the same JSON."""
    Handler = Callable[[Request, Any], Awaitable[Response]]

    def handler(answer: Callable[[Any], tuple[int, str, str, Mapping[str, str]]]) -> Handler:
        async def handle(request: Request, error: Any) -> Response:
            status, code, message, headers = answer(error)
            return JSONResponse(refusal_body(code, message), status, dict(headers))

        return handle

    def storage(error: OSError | sqlite3.Error) -> tuple[int, str, str, Mapping[str, str]]:
        logger.error("storage: %s", error)
        return 507 if is_full(error) else 500, "storage", storage_reason(error), {}

    def internal(error: Exception) -> tuple[int, str, str, Mapping[str, str]]:
        return 500, "internal", "the server failed; its log says more", {}

    def full(error: QueueFull) -> tuple[int, str, str, Mapping[str, str]]:
        return 429, "full", str(error), {"retry-after": str(error.retry_after)}

    def invalid(error: RequestValidationError | ValidationError) -> tuple[int, str, str, Mapping[str, str]]:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("query", "body", "path"))
        return 422, "option", f"{where}: {first['msg']}"[:500], {}

    app.exception_handler(Refusal)(handler(lambda e: (e.status_code, e.code, e.detail, e.headers or {})))
    app.exception_handler(StarletteHTTPException)(
        handler(lambda e: (e.status_code, "request", str(e.detail), e.headers or {}))
    )
    app.exception_handler(RequestValidationError)(handler(invalid))
    app.exception_handler(ValidationError)(handler(invalid))
    app.exception_handler(QueueFull)(handler(full))
    app.exception_handler(OneStepSRError)(handler(lambda e: (422, "option", str(e), {})))
    app.exception_handler(OSError)(handler(storage))
    app.exception_handler(sqlite3.Error)(handler(storage))
    app.exception_handler(Exception)(handler(internal))


def _add_page(app: FastAPI) -> None:
    package = resources.files("onestepsr")
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    files = [*(package / "serve" / "page").iterdir(), *(package / "assets").iterdir()]
    page = {file.name: file.read_bytes() for file in files if Path(file.name).suffix in types}

    def answer(name: str) -> Response:
        if name not in page:
            raise Refusal(404, "unknown", "there is no such page")
        media = f"{types[Path(name).suffix]}; charset=utf-8"
        return Response(page[name], media_type=media, headers={"cache-control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return answer("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return answer(name)


def _add_status(app: FastAPI, service: Service) -> None:
    settings = service.settings

    @app.get("/healthz", summary="The server answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="The model is loaded and the queue can be written", responses={503: {}})
    async def ready() -> JSONResponse:
        reason = service.worker.failure or (None if service.worker.ready.is_set() else "the model is being loaded")
        return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    def metrics() -> Response:
        service.metrics.queued.set(service.queue.queued)
        while service.worker.recent:
            service.metrics.seconds.observe(service.worker.recent.popleft())
        return Response(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", summary="Models that can be chosen, the default one first")
    async def models() -> list[dict[str, Any]]:
        return service.models

    @app.get("/v1/server", summary="Version, limits and formats")
    def server() -> dict[str, Any]:
        formats = [
            {"name": entry.name, "format": entry.endings[0][1:], "endings": entry.endings}
            for entry in FORMATS.values()
            if entry.write_bits and _is_installed(entry.package)
        ]
        return {
            "version": __version__,
            "max_pixels": settings.max_pixels,
            "max_bytes": settings.max_bytes,
            "max_queue": settings.max_queue,
            "keep_hours": settings.keep_hours,
            "answered_at_once": ANSWERED_AT_ONCE,
            "queued": service.queue.queued,
            "formats": formats,
        }


def _is_installed(package: str | None) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return package is None or bool(version(package))
    except PackageNotFoundError:
        return False


_FORM = {
    "type": "object",
    "required": ["image"],
    "properties": {
        "image": {"type": "string", "format": "binary", "description": "The file."},
        **Options.model_json_schema()["properties"],
    },
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _FORM},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_ERROR = {
    "description": "The reason",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["code", "message"],
                        "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
                    }
                },
            }
        }
    },
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return dict.fromkeys((*statuses, 500), _ERROR)


_UPLOAD_ERRORS = _errors(408, 413, 415, 422, 429, 503, 507)
_IMAGE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The image", "content": {media: {} for media in MEDIA_TYPES.values()}}
}


class OptionsAndName(Options):
    """Options in the address, for bodies that are the file itself."""

    name: str = Field(default="image", max_length=1000, description="File name, where the body is the file itself.")


class Selection(BaseModel):
    """Jobs whose results go into an archive."""

    ids: list[Annotated[str, Field(max_length=100)]] = Field(min_length=1, max_length=1000)


def _add_jobs(app: FastAPI, service: Service) -> None:
    queue = service.queue

    async def submitted(request: Request, given: OptionsAndName, awaited: bool | None) -> Job:
        data, name, fields = await service.upload(request)
        options = Options.model_validate({**given.model_dump(exclude_unset=True, exclude={"name"}), **fields})
        name = display_name(name)
        inspected = await service.inspect(data, name)
        if awaited is None:
            awaited = inspected.width * inspected.height <= ANSWERED_AT_ONCE
        return await service.accept(request, data, name, inspected, options, awaited=awaited)

    @app.post(
        "/v1/upscale",
        summary="Enlarge an image: the result at once for a small one, a job for a larger one",
        response_class=Response,
        responses={**_IMAGE, 202: {"description": "A job", "content": {"application/json": {}}}, **_UPLOAD_ERRORS},
        openapi_extra=_BODY,
    )
    async def upscale(request: Request, options: Annotated[OptionsAndName, Query()]) -> Response:
        job = await submitted(request, options, None)
        if not job.awaited:
            return JSONResponse(service.shown(job), 202, {"location": f"/v1/jobs/{job.id}"})
        done = await service.finished(job, request, PATIENCE_SECONDS)
        return Response(await service.content(done), headers=_file_headers(done), media_type=_media(done))

    @app.post(
        "/v1/jobs",
        summary="Enlarge an image as a job",
        status_code=202,
        responses=_UPLOAD_ERRORS,
        openapi_extra=_BODY,
    )
    async def submit(
        request: Request, response: Response, options: Annotated[OptionsAndName, Query()]
    ) -> dict[str, Any]:
        job = await submitted(request, options, awaited=False)
        response.headers["location"] = f"/v1/jobs/{job.id}"
        return service.shown(job)

    def found(job_id: str) -> Job:
        job = queue.get(job_id) if ID.fullmatch(job_id) else None
        if job is None:
            raise Refusal(404, "unknown", "there is no such job, or its result has expired")
        return job

    @app.get("/v1/jobs/{job_id}", summary="State of a job", responses=_errors(404))
    def state(job_id: str) -> dict[str, Any]:
        return service.shown(found(job_id))

    @app.get(
        "/v1/jobs/{job_id}/events",
        summary="States of a job as server-sent events, until it is finished",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}, **_errors(404)},
    )
    async def events(job_id: str) -> StreamingResponse:
        await run_in_threadpool(found, job_id)
        return StreamingResponse(_events(service, job_id), media_type="text/event-stream")

    @app.get(
        "/v1/jobs/{job_id}/result",
        summary="The enlarged image",
        response_class=Response,
        responses={**_IMAGE, **_errors(404, 409, 410, 413, 422, 507)},
    )
    def result(job_id: str) -> Response:
        job = found(job_id)
        if job.state in ("queued", "running"):
            raise Refusal(409, "unfinished", f"the job is {job.state}", {"retry-after": "1"})
        if job.state != "done":
            raise failure(job)
        return _file(queue.result(job.id), _file_headers(job), _media(job))

    @app.get(
        "/v1/jobs/{job_id}/input",
        summary="The image that was sent",
        response_class=Response,
        responses={**_IMAGE, **_errors(404)},
    )
    def original(job_id: str) -> Response:
        job = found(job_id)
        path = queue.upload(job.id)
        with path.open("rb") as file:
            media = MEDIA_TYPES[identify(file.read(1024))]
        return _file(path, _image_headers(job.name), media)

    @app.post("/v1/jobs/{job_id}/cancel", summary="Stop a job", responses=_errors(404))
    def cancel(job_id: str) -> dict[str, Any]:
        found(job_id)
        job = queue.cancel(job_id)
        service.watchers.notify(job_id)
        if job is None:
            raise Refusal(404, "unknown", "there is no such job")
        return service.shown(job)

    @app.delete("/v1/jobs/{job_id}", summary="Stop a job and delete its files", status_code=204, responses=_errors(404))
    def delete(job_id: str) -> Response:
        found(job_id)
        queue.delete(job_id)
        service.watchers.notify(job_id)
        return Response(status_code=204)

    @app.post(
        "/v1/archive",
        summary="Results of several jobs in one ZIP",
        response_class=Response,
        responses={200: {"content": {"application/zip": {}}}, **_errors(400, 404, 422)},
    )
    def archive(selection: Selection) -> Response:
        jobs = [found(job_id) for job_id in dict.fromkeys(selection.ids)]
        if any(job.state != "done" for job in jobs):
            raise Refusal(422, "unfinished", "some of these jobs have no result")
        headers = {"content-disposition": 'attachment; filename="onestepsr.zip"'}
        entries = [(name, queue.result(job.id)) for name, job in zip(_distinct(jobs), jobs, strict=True)]
        return StreamingResponse(_zipped(entries), media_type="application/zip", headers=headers)


async def _events(service: Service, job_id: str) -> AsyncIterator[str]:
    with service.watchers.watching(job_id) as changed:
        while not service.ending:
            changed.clear()
            job = await run_in_threadpool(service.queue.get, job_id)
            if job is None:
                yield "event: deleted\ndata: {}\n\n"
                return
            shown = await run_in_threadpool(service.shown, job)
            yield f"event: {job.state}\ndata: {json.dumps(shown)}\n\n"
            if job.state in FINISHED:
                return
            await asyncio.sleep(0.1)  # tiles of a fast machine are not worth an event each
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), 2.0)


def _media(job: Job) -> str:
    return MEDIA_TYPES[job.options["format"]]


def _file_headers(job: Job) -> dict[str, str]:
    return {**_image_headers(result_name(job)), "x-onestepsr-seconds": f"{job.seconds or 0:.3f}"}


def _image_headers(name: str) -> dict[str, str]:
    """Headers with which no browser takes a file for a page of this server, whatever is in it."""
    from urllib.parse import quote

    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    named = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
    return {"content-disposition": named, "content-security-policy": "default-src 'none'; sandbox"}


def _file(path: Path, headers: Mapping[str, str], media: str) -> Response:
    """A file in blocks, whose length is known beforehand."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise Refusal(404, "unknown", "there is no such job, or its result has expired") from None
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)

    def blocks() -> Iterator[bytes]:
        with stream:
            while block := stream.read(2**18):
                yield block

    return StreamingResponse(blocks(), media_type=media, headers={**headers, "content-length": str(size)})


def _distinct(jobs: Sequence[Job]) -> list[str]:
    """Names of results, with a number where two are equal; systems that do not tell upper from lower case included."""
    names: list[str] = []
    taken: set[str] = set()
    for job in jobs:
        name, number = result_name(job), 2
        while name.casefold() in taken:
            stem = Path(result_name(job))
            name, number = f"{stem.stem}-{number}{stem.suffix}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


class _Sink(io.RawIOBase):
    """A stream that keeps blocks until they are sent: a ZIP is written to it without seeking, and needs no memory."""

    def __init__(self) -> None:
        self.blocks: list[bytes] = []

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """Keep ``data``."""
        self.blocks.append(bytes(data))
        return len(data)


def _zipped(entries: Sequence[tuple[str, Path]]) -> Iterator[bytes]:
    sink = _Sink()

    def new() -> Iterator[bytes]:
        blocks, sink.blocks = sink.blocks, []
        yield from blocks

    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name, path in entries:
            info = zipfile.ZipInfo(name, time.localtime()[:6])
            with suppress(FileNotFoundError), path.open("rb") as source:
                info.file_size = path.stat().st_size  # decides on ZIP64
                with archive.open(info, "w") as target:
                    while block := source.read(2**18):
                        target.write(block)
                        yield from new()
            yield from new()
    yield from new()

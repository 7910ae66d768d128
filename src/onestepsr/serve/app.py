"""The server's routes: the page and the API under ``/v1``. Nothing here asks anything of another machine."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import sqlite3
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from onestepsr import __version__
from onestepsr.core.errors import OneStepSRError
from onestepsr.imaging.formats import FORMATS, identify
from onestepsr.serve import a1111
from onestepsr.serve.guard import UPLOAD_ERRORS, Guard, Refusal, errors, refusal_body
from onestepsr.serve.jobs import FINISHED, Job, QueueFull, is_full, storage_reason
from onestepsr.serve.service import Options, Service, Settings, display_name, failure, result_name

logger = logging.getLogger(__name__)

ANSWERED_AT_ONCE = 512 * 512
"""Most pixels of an input that ``/v1/upscale`` answers with the image itself instead of a job."""
PATIENCE_SECONDS = 120.0
"""Longest time that such an answer may be waited for."""
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


def create_app(settings: Settings) -> FastAPI:
    """The server as an ASGI application; its worker runs from startup to shutdown."""
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
        responses={**_IMAGE, 202: {"description": "A job", "content": {"application/json": {}}}, **UPLOAD_ERRORS},
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
        responses=UPLOAD_ERRORS,
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

    @app.get("/v1/jobs/{job_id}", summary="State of a job", responses=errors(404))
    def state(job_id: str) -> dict[str, Any]:
        return service.shown(found(job_id))

    @app.get(
        "/v1/jobs/{job_id}/events",
        summary="States of a job as server-sent events, until it is finished",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}, **errors(404)},
    )
    async def events(job_id: str) -> StreamingResponse:
        await run_in_threadpool(found, job_id)
        return StreamingResponse(_events(service, job_id), media_type="text/event-stream")

    @app.get(
        "/v1/jobs/{job_id}/result",
        summary="The enlarged image",
        response_class=Response,
        responses={**_IMAGE, **errors(404, 409, 410, 413, 422, 507)},
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
        responses={**_IMAGE, **errors(404)},
    )
    def original(job_id: str) -> Response:
        job = found(job_id)
        path = queue.upload(job.id)
        with path.open("rb") as file:
            media = MEDIA_TYPES[identify(file.read(1024))]
        return _file(path, _image_headers(job.name), media)

    @app.post("/v1/jobs/{job_id}/cancel", summary="Stop a job", responses=errors(404))
    def cancel(job_id: str) -> dict[str, Any]:
        found(job_id)
        job = queue.cancel(job_id)
        service.watchers.notify(job_id)
        if job is None:
            raise Refusal(404, "unknown", "there is no such job")
        return service.shown(job)

    @app.delete("/v1/jobs/{job_id}", summary="Stop a job and delete its files", status_code=204, responses=errors(404))
    def delete(job_id: str) -> Response:
        found(job_id)
        queue.delete(job_id)
        service.watchers.notify(job_id)
        return Response(status_code=204)

    @app.post(
        "/v1/archive",
        summary="Results of several jobs in one ZIP",
        response_class=Response,
        responses={200: {"content": {"application/zip": {}}}, **errors(400, 404, 422)},
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

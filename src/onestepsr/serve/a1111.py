"""The dialect of AUTOMATIC1111's web UI for upscaling, so that clients written for it work unchanged.

Fields are those of its ``/sdapi/v1/extra-*`` calls. They are synchronous: an answer comes when its images are done,
as PNG with the metadata of the input. Face restoration and a second upscaler are not offered, and refused.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from onestepsr.core.errors import did_you_mean
from onestepsr.serve.guard import UPLOAD_ERRORS, Refusal
from onestepsr.serve.jobs import Job
from onestepsr.serve.service import Inspected, Options, Service, display_name

NONE = ("", "none")
KNOWN_NAMES = {"r-esrgan 4x+": "realesrgan-x4plus", "r-esrgan 4x+ anime6b": "realesrgan-x4plus-anime"}
"""Names in that web UI, in lower case, of models that exist here under another one."""
MOST_IMAGES = 64


class Extras(BaseModel):
    """Options of an upscaling call; others that clients send are left aside."""

    model_config = ConfigDict(allow_inf_nan=False)

    resize_mode: Literal[0, 1] = Field(default=0, description="0: by upscaling_resize; 1: to a width and height.")
    upscaling_resize: float = Field(default=2.0, ge=1, le=8)
    upscaling_resize_w: int = Field(default=512, ge=1, le=1_000_000)
    upscaling_resize_h: int = Field(default=512, ge=1, le=1_000_000)
    upscaling_crop: bool = Field(default=True, description="With resize_mode 1: crop to exactly that width and height.")
    upscaler_1: str = Field(default="None", max_length=200, description="Of /sdapi/v1/upscalers; None is the first.")
    upscaler_2: str = Field(default="None", max_length=200)
    extras_upscaler_2_visibility: float = 0.0
    gfpgan_visibility: float = 0.0
    codeformer_visibility: float = 0.0


class SingleImage(Extras):
    """One image in base64, with or without a ``data:`` prefix."""

    image: str


class BatchFile(BaseModel):
    """An image of a batch."""

    data: str
    name: str = "image"


class BatchImages(Extras):
    """Several images."""

    image_list: Annotated[list[BatchFile], Field(alias="imageList", min_length=1, max_length=MOST_IMAGES)]


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the calls to ``app``."""

    async def parsed(request: Request, model: type[BaseModel]) -> Any:
        await run_in_threadpool(service.queue.require_room, service.client_of(request))
        most = service.settings.max_bytes * 4 // 3 + 2**20
        blocks = []
        with service.holding() as hold:
            async for block in service.body(request, most):
                hold(len(block))
                blocks.append(block)
            return await run_in_threadpool(model.model_validate_json, b"".join(blocks))

    def body_of(model: type[BaseModel]) -> dict[str, Any]:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)
        if model is BatchImages:
            schema["properties"]["imageList"]["items"] = BatchFile.model_json_schema()
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @app.post(
        "/sdapi/v1/extra-single-image",
        summary="Enlarge one image (A1111)",
        responses=UPLOAD_ERRORS,
        openapi_extra=body_of(SingleImage),
    )
    async def single(request: Request) -> dict[str, str]:
        wanted = await parsed(request, SingleImage)
        waiting, wanted.image = [wanted.image], ""
        job = await _accepted(service, request, wanted, waiting.pop(), "image.png")
        return {"html_info": "", "image": await _enlarged(service, request, wanted, job)}

    @app.post(
        "/sdapi/v1/extra-batch-images",
        summary="Enlarge several images (A1111)",
        responses=UPLOAD_ERRORS,
        openapi_extra=body_of(BatchImages),
    )
    async def batch(request: Request) -> dict[str, Any]:
        wanted = await parsed(request, BatchImages)
        images = []
        with service.holding() as hold:
            hold(sum(len(file.data) for file in wanted.image_list))
            while wanted.image_list:
                hold(-len(wanted.image_list[0].data))
                name = wanted.image_list[0].name
                job = await _accepted(service, request, wanted, wanted.image_list.pop(0).data, name)
                images.append(await _enlarged(service, request, wanted, job))
        return {"html_info": "", "images": images}

    @app.get("/sdapi/v1/upscalers", summary="Models (A1111)")
    async def upscalers() -> list[dict[str, Any]]:
        nothing = {"model_path": None, "model_url": None}
        return [{"name": m["name"], "model_name": m["name"], **nothing, "scale": m["scale"]} for m in service.models]


async def _accepted(service: Service, request: Request, wanted: Extras, encoded: str, name: str) -> Job:
    """A job on an image in base64. Nothing of what was sent is held in memory when this returns."""
    data = await run_in_threadpool(_decoded, encoded, service.settings.max_bytes)
    del encoded
    name = display_name(name)
    inspected = await service.inspect(data, name)
    options = _options(service, wanted, inspected)
    return await service.accept(request, data, name, inspected, options, awaited=True)


async def _enlarged(service: Service, request: Request, wanted: Extras, job: Job) -> str:
    """The enlarged image of a job, as PNG in base64."""
    done = await service.finished(job, request, None)
    content = await service.content(done)
    return await run_in_threadpool(_answer, content, done, wanted)


def _decoded(encoded: str, most_bytes: int) -> bytes:
    if encoded.startswith(("http://", "https://")):
        raise Refusal(422, "option", "image: an address; this server asks no other one, send the image itself")
    if encoded.startswith("data:"):
        encoded = encoded.partition(",")[2]
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(422, "option", "image: not base64") from error
    if len(data) > most_bytes:
        raise Refusal(413, "bytes", f"the file is larger than the limit of {most_bytes:,} bytes")
    return data


def _options(service: Service, wanted: Extras, inspected: Inspected) -> Options:
    second = wanted.upscaler_2.lower() not in NONE and wanted.extras_upscaler_2_visibility > 0
    if second or wanted.gfpgan_visibility > 0 or wanted.codeformer_visibility > 0:
        raise Refusal(422, "option", "upscaler_2, gfpgan and codeformer are not offered here; leave them at 0")
    offered = [model["name"] for model in service.models]
    names = {name.lower(): name for name in offered}
    key = wanted.upscaler_1.lower()
    model = offered[0] if key in NONE else names.get(KNOWN_NAMES.get(key, key))
    if model is None:
        known = did_you_mean(wanted.upscaler_1, offered)
        raise Refusal(422, "option", f"upscaler_1 '{wanted.upscaler_1}' is not offered here; {known}")
    if wanted.resize_mode == 0:
        return Options(model=model, scale=wanted.upscaling_resize, format="png")
    across, down = wanted.upscaling_resize_w, wanted.upscaling_resize_h
    factor = max(across / inspected.width, down / inspected.height)
    width, height = round(factor * inspected.width), round(factor * inspected.height)
    return Options(model=model, format="png", width=width, height=height)  # refused beyond 1 to 8 times


def _answer(content: bytes, job: Job, wanted: Extras) -> str:
    if wanted.resize_mode == 1 and wanted.upscaling_crop:
        content = _cropped(content, wanted.upscaling_resize_w, wanted.upscaling_resize_h)
    return base64.b64encode(content).decode()


def _cropped(content: bytes, width: int, height: int) -> bytes:
    """The centre of our own PNG."""
    from dataclasses import replace

    from onestepsr.imaging.read import read_image
    from onestepsr.imaging.write import encode_image

    image = read_image(content)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    part = (slice(top, top + height), slice(left, left + width))
    alpha = None if image.alpha is None else image.alpha[part]
    return encode_image(replace(image, pixels=image.pixels[part], alpha=alpha), "png")

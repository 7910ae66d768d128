"""The API as programs use it: the command line's bytes, jobs from beginning to end, refusals in plain words."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import requests
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("fastapi")

from serving import EXAMPLES, Client, events, server_process, serving, write_weights

from onestepsr.cli.main import app as command_line
from onestepsr.core.errors import UserError
from onestepsr.inference.options import SCALE_RANGE, UpscaleOptions
from onestepsr.serve.app import _zipped
from onestepsr.serve.jobs import MOST_MODELS, Worker
from onestepsr.serve.service import Options, Service, Settings, display_name, models_here
from onestepsr.weights.catalog import ModelSpec


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def settings(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        data_dir=tmp_path_factory.mktemp("data"), models=[str(weights)], max_pixels=120_000, max_bytes=1_000_000
    )


@pytest.fixture(scope="module")
def both(settings: Settings) -> Iterator[tuple[Client, Service]]:
    with serving(settings) as (client, service):
        client.wait_ready()
        yield client, service


@pytest.fixture
def client(both: tuple[Client, Service]) -> Client:
    return both[0]


@pytest.fixture
def service(both: tuple[Client, Service]) -> Service:
    return both[1]


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG of 40 x 30 with a profile-free EXIF note."""
    path = tmp_path_factory.mktemp("photo") / "père & fils.jpg"
    exif = Image.Exif()
    exif[0x010E] = "a note"
    with Image.open(EXAMPLES / "cat.jpg") as image:
        image.resize((40, 30)).save(path, exif=exif, quality=95)
    return path


def by_command(source: Path, target: Path, weights: Path, *options: str) -> bytes:
    arguments = ["upscale", str(source), "-o", str(target), "--model", str(weights), "--overwrite", *options]
    done = CliRunner().invoke(command_line, arguments)
    assert done.exit_code == 0, done.output
    return target.read_bytes()


def reason(answer: requests.Response) -> tuple[int, str, str]:
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["message"]


def files_of(service: Service) -> list[str]:
    return sorted(path.name for path in service.queue.files.iterdir())


# ---- the same bytes as the command line ----


@pytest.mark.parametrize(
    ("name", "ending", "given", "options"),
    [
        ("cat.jpg", ".jpg", {}, []),
        ("rocket_rotated.jpg", ".jpg", {"scale": "2"}, ["--scale", "2"]),
        ("cameraman_gray.jpg", ".webp", {"format": "webp"}, []),
        ("flower_cutout.png", ".png", {"width": "300"}, ["--width", "300"]),
        ("cat.jpg", ".png", {"format": "png", "strip_metadata": "true"}, ["--strip-metadata"]),
        ("coffee.jpg", ".tif", {"format": "tif", "tile": "64"}, ["--tile", "64"]),
    ],
)
def test_the_bytes_are_those_of_the_command(
    name: str, ending: str, given: dict[str, str], options: list[str], *, client: Client, weights: Path, tmp_path: Path
) -> None:
    expected = by_command(EXAMPLES / name, tmp_path / f"out{ending}", weights, *options)
    answer = client.upscale(EXAMPLES / name, **given)
    assert answer.status_code == 200, answer.text
    assert answer.content == expected


def test_options_in_the_address_and_the_file_as_the_body(
    client: Client, photo: Path, weights: Path, tmp_path: Path
) -> None:
    answer = client.post("/v1/upscale?format=png&name=x.jpg&height=60", data=photo.read_bytes())
    assert answer.content == by_command(photo, tmp_path / "out.png", weights, "--height", "60")
    assert answer.headers["content-type"] == "image/png"
    assert 'filename="x_h60.png"' in answer.headers["content-disposition"]


def test_a_job_from_beginning_to_end(
    client: Client, service: Service, photo: Path, weights: Path, tmp_path: Path
) -> None:
    job = client.submit(photo, tile="16")
    assert job["state"] in ("queued", "running")
    assert job["input"] == {"width": 40, "height": 30}
    seen = events(client.get(f"/v1/jobs/{job['id']}/events"))
    assert seen[-1][0] == "done"
    done = client.wait(job["id"])
    assert done["output"]["width"], done["output"]["height"] == (160, 120)
    result = client.get(done["links"]["result"])
    assert result.content == by_command(photo, tmp_path / "o.jpg", weights, "--tile", "16")
    assert len(result.content) == done["output"]["bytes"] == int(result.headers["content-length"])
    assert "p%C3%A8re%20%26%20fils_x4.jpg" in result.headers["content-disposition"]
    assert client.get(f"/v1/jobs/{job['id']}/input").content == photo.read_bytes()
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert reason(client.get(done["links"]["result"]))[:2] == (404, "unknown")
    assert files_of(service) == []


def test_larger_images_become_jobs_by_themselves(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onestepsr.serve.app.ANSWERED_AT_ONCE", 30_000)
    answer = client.upscale(EXAMPLES / "hopper.jpg", scale="1")
    assert answer.status_code == 202
    job_id = answer.json()["id"]
    assert answer.headers["location"] == f"/v1/jobs/{job_id}"
    assert client.wait(job_id)["state"] == "done"
    client.delete(f"/v1/jobs/{job_id}")


def test_progress_tells_tiles_and_a_job_can_be_cancelled_between_them(
    client: Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.worker, "changed", lambda job_id: (service.watchers.notify(job_id), time.sleep(0.1)))
    job = client.submit(EXAMPLES / "hopper.jpg", tile="16")
    with client.get(f"/v1/jobs/{job['id']}/events", stream=True) as stream:
        for line in stream.iter_lines():
            if line.startswith(b"data: ") and (json.loads(line[6:]).get("tiles") or {}).get("done", 0) >= 2:
                break
    assert reason(client.get(f"/v1/jobs/{job['id']}/result"))[:2] == (409, "unfinished")
    shown = client.get(f"/v1/jobs/{job['id']}").json()
    assert shown["tiles"]["total"] > 20
    assert shown["seconds_left"] > 0
    assert client.post(f"/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    assert reason(client.get(f"/v1/jobs/{job['id']}/result"))[:2] == (410, "cancelled")
    deadline = time.monotonic() + 20
    while service.worker.progress(job["id"]) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    client.delete(f"/v1/jobs/{job['id']}")
    assert files_of(service) == []


def test_several_results_in_one_archive(client: Client, photo: Path) -> None:
    ids = [client.submit(photo, scale=scale)["id"] for scale in ("2", "2", "3")]
    results = [client.get(client.wait(job_id)["links"]["result"]).content for job_id in ids]
    answer = client.post("/v1/archive", json={"ids": ids})
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["père & fils_x2.jpg", "père & fils_x2-2.jpg", "père & fils_x3.jpg"]
        assert [archive.read(name) for name in archive.namelist()] == results
    assert reason(client.post("/v1/archive", json={"ids": ["0" * 24]}))[:2] == (404, "unknown")
    for job_id in ids:
        client.delete(f"/v1/jobs/{job_id}")


# ---- refusals ----


def png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "png")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "status", "code", "words"),
    [
        (b"hello, this is no image", 415, "type", "accepted: JPEG, PNG"),
        (b"%PDF-1.7 ...", 415, "type", "PDF is not supported"),
        (b"", 415, "type", "not an image"),
        (png(400, 301), 413, "pixels", "claims 400 x 301"),
        (png(20, 20)[:400], 422, "image", "truncated or damaged PNG"),
        (b"\0" * 1_000_001, 413, "bytes", "limit of 1,000,000"),
    ],
)
def test_what_is_no_acceptable_image(
    data: bytes, status: int, code: str, words: str, *, client: Client, service: Service
) -> None:
    for path in ("/v1/upscale", "/v1/jobs"):
        found = reason(client.post(path, data=data))
        assert found[:2] == (status, code)
        assert words in found[2]
        assert reason(client.post(path, files={"image": ("a.png", data)}))[:2] == (status, code)
    assert files_of(service) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": "9"}, "scale: Input should be less than or equal to 8"),
        ({"scale": "nan"}, "scale:"),
        ({"scale": "4", "width": "80"}, "width and height exclude it"),
        ({"width": "10000"}, "width 10000: the input has 40"),
        ({"format": "exe"}, "'exe' is no image format"),
        ({"color_fix": "x"}, "color_fix: Input should be"),
        ({"model": "other"}, "model 'other' is not offered here"),
        ({"fidelity": "0.5"}, "no control of fidelity"),
        ({"tile": "3"}, "tile"),
        ({"colour": "x"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_options_that_are_wrong(options: dict[str, str], words: str, client: Client, photo: Path) -> None:
    found = reason(client.upscale(photo, **options))
    assert found[:2] == (422, "option")
    assert words in found[2]
    assert reason(client.post("/v1/jobs", params=options, data=photo.read_bytes()))[:2] == (422, "option")


def test_forms_without_the_file(client: Client) -> None:
    assert reason(client.post("/v1/jobs", files={"photo": ("a", b"x")}))[:2] == (422, "form")
    assert reason(client.post("/v1/jobs", json={"image": "x"}))[:2] == (415, "type")
    kind = {"content-type": "multipart/form-data"}
    assert reason(client.post("/v1/jobs", data=b"x", headers=kind))[:2] == (422, "form")


def test_addresses_that_are_not_there(client: Client) -> None:
    assert reason(client.get("/v1/jobs/short"))[:2] == (404, "unknown")
    assert reason(client.get("/v1/jobs/" + "x" * 24))[:2] == (404, "unknown")
    assert reason(client.get("/nothing"))[0] == 404
    assert reason(client.get("/v1/upscale"))[0] == 405


def test_a_full_queue_says_when_to_come_back(weights: Path, photo: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", models=[str(weights)], max_queue=2)
    with serving(settings) as (client, service):
        client.wait_ready()
        service.worker.changed = lambda job_id: time.sleep(0.3)
        accepted = [client.submit(photo, tile="16")]
        answers = []
        for _ in range(6):
            answers.append(client.post("/v1/jobs?tile=16", data=photo.read_bytes()))
        refused = [answer for answer in answers if answer.status_code != 202]
        assert refused
        for answer in refused:
            assert reason(answer)[:2] == (429, "full")
            assert int(answer.headers["retry-after"]) >= 1
        service.worker.changed = lambda job_id: None
        accepted += [answer.json() for answer in answers if answer.status_code == 202]
        assert {client.wait(job["id"])["state"] for job in accepted} == {"done"}


def test_names_of_clients_never_become_paths(client: Client, service: Service, photo: Path) -> None:
    for name in ("../../etc/passwd.png", "..\\..\\a.jpg", "/abs.jpg", "a\0b.jpg", "CON<>:.jpg", ".", "x" * 3000):
        answer = client.post("/v1/upscale", params={"name": name[:1000]}, data=photo.read_bytes())
        assert answer.status_code == 200
        assert not any(c in answer.headers["content-disposition"].partition("filename*")[0] for c in "/\\<")
    assert files_of(service) == []
    assert display_name("../../x/ y\u202e.jpg ") == "y.jpg"
    assert display_name("..") == "image"


# ---- safety ----


def test_headers_of_every_answer(client: Client) -> None:
    for path in ("/", "/page/app.js", "/v1/models", "/nothing", "/healthz"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_other_names_and_other_sites_are_refused(client: Client, photo: Path) -> None:
    for host in ("evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        assert reason(client.get("/v1/models", headers={"host": host}))[:2] == (403, "host")
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:7860", "192.168.1.7:7860"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200
    data = photo.read_bytes()
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost"):
        assert reason(client.post("/v1/jobs", data=data, headers={"origin": origin}))[:2] == (403, "origin")
    site = {"sec-fetch-site": "cross-site"}
    assert reason(client.post("/v1/upscale", data=data, headers=site))[:2] == (403, "origin")
    assert client.post("/v1/upscale", data=data, headers={"origin": client.address}).status_code == 200


def test_a_token_guards_everything_but_the_page(settings: Settings, photo: Path, tmp_path: Path) -> None:
    guarded = replace(settings, data_dir=tmp_path, token="s3cret-é")
    with serving(guarded) as (client, _):
        for path in ("/v1/models", "/v1/server", "/metrics", "/v1/openapi.json", "/sdapi/v1/upscalers"):
            assert reason(client.get(path))[:2] == (401, "token")
        assert reason(client.post("/v1/jobs", data=photo.read_bytes()))[:2] == (401, "token")
        for path in ("/", "/page/app.js", "/healthz"):
            assert client.get(path).status_code == 200
        for given in ("Bearer wrong", "Bearer ", "Basic !!", "Basic " + base64.b64encode(b"u:wrong").decode()):
            assert client.get("/v1/models", headers={"authorization": given}).status_code == 401
        token = "s3cret-é".encode()
        basic = b"Basic " + base64.b64encode(b"anyone:" + token)
        for value in (b"Bearer " + token, basic):
            assert client.get("/v1/models", headers={"authorization": value}).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "give --token SECRET"),
        (["--host", "example.org"], "give --token SECRET"),
        (["--token", " "], "--token: empty"),
        (["--host", "0.0.0.0", "--token", " "], "--token: empty"),
        (["--token", "é"], "--token: only printable ASCII"),
        (["--model", "no-such-model"], "unknown model 'no-such-model'"),
        (["--model", "sd21-base"], "is a backbone, no upscaler"),
        (["--engine", "tensorrt"], "--engine tensorrt: accepted: auto, torch, onnxruntime, openvino"),
    ],
)
def test_starts_that_are_refused(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(command_line, ["serve", "--port", "0", "--data-dir", str(tmp_path), *arguments])
    assert words in str(done.exception)


def test_a_port_and_a_folder_that_are_taken(weights: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = ["--port", str(other.getsockname()[1]), "--data-dir", str(tmp_path / "a"), "--model", str(weights)]
        done = CliRunner().invoke(command_line, ["serve", *taken])
    assert "cannot be listened on" in str(done.exception)
    from onestepsr.core.files import locked

    (tmp_path / "b").mkdir()
    with locked(tmp_path / "b" / "lock", wait=False):
        arguments = ["--port", "0", "--data-dir", str(tmp_path / "b"), "--model", str(weights)]
        done = CliRunner().invoke(command_line, ["serve", *arguments])
    assert "another server uses it" in str(done.exception)


# ---- what else is told ----


def test_models_limits_and_figures(client: Client, weights: Path, photo: Path) -> None:
    assert [model["name"] for model in client.get("/v1/models").json()] == [weights.name]
    server = client.get("/v1/server").json()
    assert server["max_pixels"] == 120_000
    assert "JPEG" in [entry["name"] for entry in server["formats"]]
    client.upscale(photo)
    text = client.get("/metrics").text
    assert 'onestepsr_requests_total{method="POST",route="/v1/upscale",status="200"}' in text
    assert "onestepsr_job_seconds_count" in text
    assert "onestepsr_queue_jobs 0.0" in text
    assert client.get("/v1/openapi.json").json()["info"]["title"] == "onestepsr"


def test_options_are_those_of_the_library() -> None:
    fields = UpscaleOptions.__dataclass_fields__
    values = Options().model_dump()
    for name in ("scale", "width", "height", "tile", "tile_blend", "color_fix", "alpha", "seed"):
        assert values[name] == fields[name].default
    from onestepsr.inference import options

    schema = Options.model_json_schema()["properties"]
    assert schema["color_fix"]["enum"] == list(get_args(options.ColorFix))
    assert schema["alpha"]["enum"] == list(get_args(options.Alpha))
    assert schema["tile_blend"]["enum"] == list(get_args(options.TileBlend))
    assert (schema["scale"]["minimum"], schema["scale"]["maximum"]) == SCALE_RANGE


def test_few_models_are_kept_in_memory(weights: Path, service: Service) -> None:
    names = [str(number) for number in range(MOST_MODELS + 1)]
    worker = Worker(service.queue, dict.fromkeys(names, str(weights)))
    first = [worker._upscaler(name, None) for name in names]
    assert len(worker._loaded) == MOST_MODELS
    assert worker._upscaler(names[-1], None) is first[-1]
    assert worker._upscaler(names[0], None) is not first[0]


def test_models_run_in_the_engine_of_the_server(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path / "cache"))
    assert Worker(service.queue, {"b": "bicubic"})._upscaler("b", None).engine == "torch"  # nothing is measured
    worker = Worker(service.queue, {"b": "bicubic"}, engine="onnxruntime")
    assert worker._upscaler("b", None).engine == "onnxruntime"


# ---- the dialect of A1111 ----


def in_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def extras(client: Client, path: Path, **fields: Any) -> requests.Response:
    """A call with all fields that clients send."""
    usual = {
        "resize_mode": 0,
        "show_extras_results": True,
        "gfpgan_visibility": 0,
        "codeformer_visibility": 0,
        "codeformer_weight": 0,
        "upscaling_resize": 4,
        "upscaling_crop": True,
        "upscaler_1": "None",
        "upscaler_2": "None",
        "extras_upscaler_2_visibility": 0,
        "upscale_first": False,
        "image": in_base64(path),
    }
    return client.post("/sdapi/v1/extra-single-image", json={**usual, **fields})


def test_an_a1111_client_gets_the_commands_png(client: Client, photo: Path, weights: Path, tmp_path: Path) -> None:
    expected = by_command(photo, tmp_path / "out.png", weights)
    answer = extras(client, photo).json()
    assert answer["html_info"] == ""
    assert base64.b64decode(answer["image"]) == expected
    named = extras(client, photo, image=f"data:image/jpeg;base64,{in_base64(photo)}", upscaler_1=weights.name)
    assert base64.b64decode(named.json()["image"]) == expected
    assert [m["name"] for m in client.get("/sdapi/v1/upscalers").json()] == [weights.name]


def test_a1111_sizes_with_and_without_cropping(client: Client, photo: Path) -> None:
    size = {"resize_mode": 1, "upscaling_resize_w": 100, "upscaling_resize_h": 90}
    cut, whole = (extras(client, photo, **size, upscaling_crop=crop).json()["image"] for crop in (True, False))
    first, second = (Image.open(io.BytesIO(base64.b64decode(image))) for image in (cut, whole))
    assert first.size == (100, 90)
    assert second.size == (120, 90)
    assert np.array_equal(np.asarray(first), np.asarray(second)[:, 10:110])


def test_a1111_batches(client: Client, photo: Path) -> None:
    files = [{"data": in_base64(path), "name": path.name} for path in (photo, EXAMPLES / "coffee.jpg")]
    answer = client.post("/sdapi/v1/extra-batch-images", json={"imageList": files, "upscaling_resize": 2})
    sizes = [Image.open(io.BytesIO(base64.b64decode(image))).size for image in answer.json()["images"]]
    with Image.open(EXAMPLES / "coffee.jpg") as second:
        assert sizes == [(80, 60), (2 * second.width, 2 * second.height)]


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"image": "http://example.org/a.png"}, 422, "asks no other one"),
        ({"image": "%%%"}, 422, "not base64"),
        ({"image": base64.b64encode(b"text").decode()}, 415, "not an image"),
        ({"upscaler_1": "Lanczos"}, 422, "upscaler_1 'Lanczos' is not offered here"),
        ({"gfpgan_visibility": 1}, 422, "not offered"),
        ({"upscaling_resize": 0.5}, 422, "upscaling_resize"),
        ({"resize_mode": 1, "upscaling_resize_w": 4, "upscaling_resize_h": 10_000}, 422, "accepted: 40 to 320"),
        ({"image": 3}, 422, "image"),
    ],
)
def test_a1111_refusals(fields: dict[str, Any], status: int, words: str, client: Client, photo: Path) -> None:
    found = reason(extras(client, photo, **fields))
    assert found[0] == status
    assert words in found[2]


# ---- under attack ----


def test_malformed_uploads_are_answered_and_leave_nothing(client: Client, service: Service, photo: Path) -> None:
    rng = random.Random(0)
    good = photo.read_bytes()
    for number in range(40):
        data = bytearray(good[: rng.randrange(len(good))] if number % 2 else good)
        for _ in range(rng.randrange(1, 30)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        answer = client.post("/v1/upscale?scale=1", data=bytes(data))
        assert answer.status_code in (200, 413, 415, 422), answer.text
    assert files_of(service) == []
    assert client.get("/readyz").status_code == 200


def test_a_client_that_leaves_is_not_served(client: Client, service: Service, photo: Path) -> None:
    body = photo.read_bytes()
    for part in (body, body[:20]):
        with socket.create_connection(client.address.removeprefix("http://").split(":")) as raw:  # type: ignore[arg-type]
            head = f"POST /v1/upscale HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + part)
    deadline = time.monotonic() + 30
    while files_of(service):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert client.upscale(photo).status_code == 200


# ---- when the process, or the disk, ends ----


def test_killed_with_twenty_jobs_and_started_again(weights: Path, tmp_path: Path) -> None:
    options = ("--model", str(weights))
    photos = []
    for number in range(20):
        photos.append(tmp_path / f"{number}.png")
        with Image.open(EXAMPLES / "hopper.jpg") as image:
            image.resize((200 + number, 160)).save(photos[-1])
    with server_process(tmp_path / "data", *options) as (client, process):
        jobs = [client.submit(path, tile="32") for path in photos]
        states = [client.get(f"/v1/jobs/{job['id']}").json()["state"] for job in jobs[-3:]]
        process.kill()
    assert "done" not in states[1:], "the server was faster than the test"
    with server_process(tmp_path / "data", *options) as (client, process):
        done = [client.wait(job["id"]) for job in jobs]
        assert {job["state"] for job in done} == {"done"}
        results = [client.get(job["links"]["result"]).content for job in done]
        names = [path.name for path in (tmp_path / "data" / "files").iterdir()]
    assert process.returncode == 0
    assert sorted(names) == sorted(f"{job['id']}.{kind}" for job in jobs for kind in ("in", "out"))
    for number in (0, 19):
        path = tmp_path / f"{number}_x4.png"
        assert results[number] == by_command(photos[number], path, weights, "--tile", "32")


@pytest.mark.skipif(sys.platform != "linux", reason="folders are made unchangeable as on Linux")
def test_a_read_only_folder(weights: Path, photo: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", models=[str(weights)])
    with serving(settings) as (client, service):
        client.wait_ready()
        if subprocess.run(["chattr", "+i", str(service.queue.files)], check=False, capture_output=True).returncode:
            pytest.skip("this user may not make a folder unchangeable")
        try:
            found = reason(client.post("/v1/jobs", data=photo.read_bytes()))
            assert found[:2] == (500, "storage")
            assert "cannot write its data" in found[2]
            assert client.get("/v1/models").status_code == 200
        finally:
            subprocess.run(["chattr", "-i", str(service.queue.files)], check=True)
        assert client.upscale(photo).status_code == 200


@pytest.mark.skipif(sys.platform != "linux", reason="file systems of a fixed size are made as on Linux")
def test_a_full_disk(weights: Path, photo: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        with serving(Settings(data_dir=disk, models=[str(weights)])) as (client, _):
            client.wait_ready()
            (disk / "filler").write_bytes(b"x" * 800_000)
            free = shutil.disk_usage(disk).free
            (disk / "filler2").write_bytes(b"x" * free)
            found = reason(client.post("/v1/jobs", data=photo.read_bytes()))
            assert found[:2] == (507, "storage")
            assert "disk is full" in found[2]
            (disk / "filler").unlink()
            (disk / "filler2").unlink()
            assert client.upscale(photo).status_code == 200
            assert client.get("/readyz").status_code == 200
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.parametrize(("behind_proxy", "expected"), [(True, "10.0.0.9"), (False, "127.0.0.1")])
def test_a_client_cannot_choose_its_address(
    behind_proxy: bool, expected: str, settings: Settings, tmp_path: Path
) -> None:
    from starlette.requests import Request

    service = Service(replace(settings, data_dir=tmp_path, behind_proxy=behind_proxy))
    headers = [(b"x-forwarded-for", b"1.2.3.4"), (b"x-forwarded-for", b"5.6.7.8, 10.0.0.9")]
    request = Request({"type": "http", "headers": headers, "client": ("127.0.0.1", 1)})
    assert service.client_of(request) == expected


def test_files_as_models(settings: Settings, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(weights, tmp_path / folder / "m.safetensors")
    monkeypatch.chdir(tmp_path / "a")
    service = Service(replace(settings, data_dir=tmp_path / "data", models=["m.safetensors"]))
    assert [model["name"] for model in service.models] == ["m.safetensors"]
    both = [str(tmp_path / folder / "m.safetensors") for folder in ("a", "b")]
    with pytest.raises(UserError, match="tell them apart"):
        Service(replace(settings, data_dir=tmp_path / "other", models=both))


def test_invented_methods_are_no_labels(client: Client) -> None:
    client.request("FOOBAR", "/v1/models")
    assert "FOOBAR" not in client.get("/metrics").text


def test_large_results_fit_into_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(1000))
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 500)
    content = b"".join(_zipped([("large", path)]))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.read("large") == bytes(1000)


def test_uploads_in_memory_are_bounded_in_every_dialect(
    client: Client, service: Service, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onestepsr.serve.service.MOST_HELD", 100)
    image = base64.b64encode(photo.read_bytes()).decode()
    for answer in (
        client.post("/v1/jobs", data=photo.read_bytes()),
        client.post("/sdapi/v1/extra-single-image", json={"image": image}),
    ):
        assert reason(answer)[:2] == (503, "busy")
    assert service._held == 0


def test_only_models_that_need_no_text_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelSpec, "is_here", True)  # everything has been downloaded
    offered = models_here()
    assert offered[0] == "d3sr-tiny"
    assert "realesrgan-x4plus" in offered
    assert "seesr" not in offered

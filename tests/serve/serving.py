"""A server in this process or in one of its own, over a network of a few thousand parameters."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import torch
import uvicorn

from onestepsr.core.config import to_mapping
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyConfig
from onestepsr.serve.app import create_app
from onestepsr.serve.service import Service, Settings
from onestepsr.weights.files import save_model

SMALL = TinyConfig(
    encoder_width=8, decoder_width=8, widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16
)
EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENCE = 120.0


def write_weights(folder: Path) -> Path:
    """The weights of a small generator."""
    torch.manual_seed(0)
    config = TinyGeneratorConfig(model=SMALL, timestep=120)
    path = folder / "small.safetensors"
    state = tiny_generator(config).state_dict()
    save_model(path, architecture="tiny-latent-diffusion", config=to_mapping(config), state_dict=state)
    return path


class Client(requests.Session):
    """Requests to one server, by paths."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address
        self.trust_env = False

    def request(self, method: str, url: str, *rest: Any, **options: Any) -> requests.Response:  # type: ignore[override]
        options.setdefault("timeout", PATIENCE)
        return super().request(method, self.address + url, *rest, **options)

    def upscale(self, path: Path, **options: Any) -> requests.Response:
        return self.post("/v1/upscale", files={"image": (path.name, path.read_bytes())}, data=options)

    def submit(self, path: Path, **options: Any) -> dict[str, Any]:
        answer = self.post("/v1/jobs", files={"image": (path.name, path.read_bytes())}, data=options)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def wait(self, job_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while (job := self.get(f"/v1/jobs/{job_id}").json())["state"] in ("queued", "running"):
            assert time.monotonic() < deadline, job
            time.sleep(0.02)
        return job

    def wait_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline, self.get("/readyz").text
            time.sleep(0.05)


@contextmanager
def serving(settings: Settings) -> Iterator[tuple[Client, Service]]:
    """A server in a thread of this process."""
    app = create_app(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", server_header=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        while not server.started:
            time.sleep(0.01)
        yield client, app.state.service
    finally:
        client.close()
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def server_process(folder: Path, *options: str) -> Iterator[tuple[Client, subprocess.Popen[str]]]:
    """``onestepsr serve`` in a process of its own, ended at the end unless it has ended before."""
    command = [sys.executable, "-m", "onestepsr", "serve", "--port", "0", "--data-dir", str(folder), *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.partition("http://")[2].partition("/")[0]
        assert address, line
        with Client(f"http://{address}") as client:
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    client.get("/healthz")
                    break
                except requests.ConnectionError:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
            yield client, process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
        process.stdout.close()


def events(answer: requests.Response) -> list[tuple[str, Any]]:
    """The server-sent events of a stream that has ended."""
    blocks = [block for block in answer.text.split("\n\n") if block.startswith("event:")]
    lines = [block.split("\n", 1) for block in blocks]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in lines]

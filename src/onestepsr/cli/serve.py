"""``onestepsr serve``: a web page and an HTTP API on this machine."""

from __future__ import annotations

import ipaddress
import logging
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from onestepsr.core.errors import MissingExtra, UserError, error_context

if TYPE_CHECKING:
    from onestepsr.inference.engines import Engine

logger = logging.getLogger(__name__)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


def serve(
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need --token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 chooses a free one.")] = 7860,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model alias or file; repeat it to offer several. Default: all that are on this machine."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="ONESTEPSR_TOKEN", show_envvar=False, help="Secret that clients must send; also ONESTEPSR_TOKEN."
        ),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let anyone who reaches the host use it.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name under which this server is asked for; repeat it; * is any.")
    ] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="Take clients' addresses from the last entry of X-Forwarded-For.")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of the queue, uploads and results.")] = Path(
        "~/.local/share/onestepsr/serve"
    ),
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of an input.")] = 25_000_000,
    max_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of an upload.")] = 64_000_000,
    max_queue: Annotated[int, typer.Option(min=1, help="Most images that wait.")] = 256,
    max_seconds: Annotated[float, typer.Option(min=1, help="Longest time for one image, in the network.")] = 3600.0,
    keep_hours: Annotated[float, typer.Option(min=0.01, help="Hours that results are kept.")] = 24.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    engine: Annotated[
        str, typer.Option(help="auto (what doctor measured, else torch), torch; or onnxruntime, openvino: a CPU.")
    ] = "auto",
    memory: Annotated[
        float | None, typer.Option(help="Most GB for weights, feature maps and the image that is enlarged.")
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log every request and decision.")] = False,
) -> None:
    """Serve a web page and an HTTP API for enlarging images, on this machine only unless told otherwise.

    Images stay in --data-dir until they expire; nothing is sent anywhere. The API is described at /v1/openapi.json.
    """
    if token is not None:
        token = token.strip()
        if not token:
            raise UserError("--token: empty")
        if not (token.isascii() and token.isprintable()):
            raise UserError("--token: only printable ASCII characters, since it is sent in a header")
    if not (token or no_auth or is_loopback(host)):
        raise UserError(f"--host {host}: others could use this server; give --token SECRET, or --no-auth if they may")
    try:
        import uvicorn

        from onestepsr.serve.app import create_app
        from onestepsr.serve.service import Settings, models_here
    except ImportError as error:
        raise MissingExtra("onestepsr serve", "serve") from error
    if engine != "auto":
        from onestepsr.inference.engines import ENGINES  # loads PyTorch, which is else left to the thread that computes

        if engine not in ENGINES:
            raise UserError(f"--engine {engine}: accepted: {', '.join(ENGINES)}")
    from onestepsr.core.files import at_home, locked
    from onestepsr.weights.catalog import require_upscaler, resolve

    for name in model or ():
        with error_context("--model"):
            require_upscaler(name)
            resolve(name)  # downloads it now, if need be: nothing is asked of the network later
    folder = at_home(data_dir)
    settings = Settings(
        data_dir=folder,
        models=model or models_here(),
        token=token,
        hosts=None if allow_host and "*" in allow_host else allow_host or (),
        behind_proxy=behind_proxy,
        max_pixels=max_pixels,
        max_bytes=max_bytes,
        max_queue=max_queue,
        max_seconds=max_seconds,
        keep_hours=keep_hours,
        device=device,
        dtype=dtype,
        engine=cast("Engine", engine),
        memory=memory,
    )
    logging.getLogger("onestepsr").setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"--data-dir {folder}: cannot be made ({error.strerror})") from error
    with locked(folder / "lock", wait=False) as held:
        if not held:
            raise UserError(f"--data-dir {folder}: another server uses it")
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family, backlog=2048)
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: cannot be listened on ({error.strerror})") from error
        application = create_app(settings)

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                application.state.service.end()  # before connections are waited for, so that clients get an answer
                await super().shutdown(sockets)

        config = uvicorn.Config(
            application,
            log_level="info" if verbose else "warning",
            access_log=verbose,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=1000,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=5,
            ws="none",
        )
        name = f"[{host}]" if ":" in host else host
        typer.echo(f"onestepsr is at http://{name}:{listener.getsockname()[1]}/ (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):  # uvicorn ends in good order, and then sends the signal once more
            Server(config).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"

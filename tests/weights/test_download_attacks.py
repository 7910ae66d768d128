"""Servers that drip, lie or never end: each is given up in one line, and the command goes on to the next place."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from weight_mirror import BODY, SHA, SIZE, Route, download_of

from onestepsr.core.errors import MissingWeights
from onestepsr.weights import download
from onestepsr.weights.download import Download, download_file

OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % SIZE


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[float]]]:
    """Address of a server that treats each connection as ``answer`` does, and the times of its connections."""
    listener, times = socket.create_server(("127.0.0.1", 0)), list[float]()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            answer(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                times.append(time.monotonic())
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/net.bin", times


def wanted(url: str) -> Download:
    return Download(model="net", file="net.bin", urls=(url,), sha256=SHA, bytes=SIZE)


def drip(connection: socket.socket, *parts: bytes, pause: float = 0.02) -> None:
    for part in parts:
        connection.sendall(part)
    while True:
        connection.sendall(b"x")
        time.sleep(pause)


def for_ever(connection: socket.socket, part: bytes, pause: float = 0.0) -> None:
    while True:
        connection.sendall(part)
        time.sleep(pause)


def steadily(connection: socket.socket) -> None:
    connection.sendall(OK + LENGTH)
    for_ever(connection, bytes(2 * download.BLOCK), 0.2)


SLOW = {
    "a byte now and then": lambda connection: drip(connection, OK + LENGTH),
    "an endless line of the header": lambda connection: drip(connection, OK + b"X-Long: "),
    "100 Continue for ever": lambda connection: for_ever(connection, b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
    "nothing at all": lambda connection: time.sleep(5),
}


@pytest.mark.parametrize("attack", SLOW)
def test_a_server_that_holds_the_connection_is_given_up(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "STALL", 0.5)
    begun = time.monotonic()
    with (
        answering(SLOW[attack]) as (url, _),
        pytest.raises(MissingWeights, match=r"sends less than 131\.1 kB/s") as error,
    ):
        download_file(wanted(url))
    assert time.monotonic() - begun < 4
    assert "\n" not in str(error.value)
    assert not wanted(url).path.exists()


def test_a_download_has_a_longest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "LONGEST", 0.9)
    with answering(steadily) as (url, _), pytest.raises(MissingWeights, match=r"took longer than 0\.00025 hours"):
        download_file(wanted(url))


def test_a_server_that_cuts_every_hundred_bytes_is_asked_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(connection: socket.socket) -> None:
        connection.sendall(OK + LENGTH + bytes(100))

    with answering(cut) as (url, times), pytest.raises(MissingWeights):
        download_file(wanted(url))
    assert len(times) <= download.VAIN + 1


@pytest.mark.parametrize("length", ["-5", "1e9", "\xb2", "", "0x10", "9" * 5000, "5, 6", "+7", "1 048 576"])
def test_an_odd_length_is_one_line(length: str) -> None:
    def lie(connection: socket.socket) -> None:
        connection.sendall(OK + b"Content-Length: " + length.encode("latin-1") + b"\r\n\r\n" + BODY)

    with answering(lie) as (url, _), pytest.raises(MissingWeights, match=r"(Content-Length|Header|header)") as error:
        download_file(wanted(url))
    assert len(str(error.value)) < 900
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 799 What\r\nContent-Length: 0\r\n\r\n", "HTTP 799"),
        (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n", "file"),
        (b"\0\xff\xfe no HTTP at all\r\n\r\n", "."),
        (OK + b"X-A: 1\r\n" * 200 + LENGTH, "headers"),
        (OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(30 * SIZE)), "more than 1,048,576 bytes"),
    ],
)
def test_other_lies_are_one_line(answer: bytes, reason: str) -> None:
    with answering(lambda connection: connection.sendall(answer)) as (url, _):
        with pytest.raises(MissingWeights, match=reason) as error:
            download_file(wanted(url))
        assert "\n" not in str(error.value)
        assert not wanted(url).path.exists()


def test_after_a_slow_server_the_next_one_is_asked(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "STALL", 0.5)
    server.routes["/net.bin"] = Route(BODY)
    good = download_of(server, "/net.bin")
    with answering(SLOW["a byte now and then"]) as (url, _):
        path = download_file(Download(model="net", file="net.bin", urls=(url, *good.urls), sha256=SHA, bytes=SIZE))
    assert path.read_bytes() == BODY


def test_a_hub_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "STALL", 0.3)
    with answering(SLOW["an endless line of the header"]) as (url, _):
        hub = url.replace("/net.bin", "/owner/name/resolve/main/net.bin")
        with pytest.raises(MissingWeights, match="sends less than"):
            download_file(wanted(hub))


def test_a_dead_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "")
    for url in ("https://example.org/net.bin", "https://huggingface.co/owner/name/resolve/main/net.bin"):
        with pytest.raises(
            MissingWeights, match=rf"the proxy 127\.0\.0\.1:{port} of the environment: .*refused"
        ) as error:
            download_file(wanted(url))
        assert "secret" not in str(error.value)

"""Weights that come from elsewhere: only whole, right files appear in the cache; mirrors, offline, two processes."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from weight_mirror import BODY, OTHER, SHA, SIZE, TiledRun, download_of, present, running

from onestepsr.core.errors import UserError
from onestepsr.weights import download
from onestepsr.weights.download import Download, Source, check, download_file


def test_what_comes_is_checked_kept_and_not_asked_for_again(server, caplog):
    server.routes["/net.bin"] = TiledRun(BODY)
    download = download_of(server, "/net.bin", notice="licence Nice (http://nice): be nice")
    assert download.state == "not downloaded"
    path = download_file(download)
    assert path == download.path
    assert path.read_bytes() == BODY
    assert present(download) == ["net.bin", "net.bin.sha256"]
    assert (path.parent / "net.bin.sha256").read_text() == f"{SHA}  net.bin\n"
    assert download.state == "cached"
    assert download_file(download) == path
    assert server.asked == [("/net.bin", "")]
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "net: licence Nice (http://nice): be nice"
    ]


def test_all_dead_is_one_line_with_what_was_tried_and_three_ways_out(server, unused_port):
    server.routes["/wrong"] = TiledRun(OTHER)
    download = download_of(server, "/gone", "/wrong", alternative="give the path of a folder instead of 'net'")
    dead = Source(url=f"http://127.0.0.1:{unused_port}/net.bin", sha256=SHA, bytes=SIZE)
    download = Download(**{**vars(download), "sources": (*download.sources, dead)})
    with pytest.raises(UserError) as caught:
        download_file(download)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "net.bin (1.0 MB) is not in",
        "HTTP 404 Not Found",
        "checksum",
        f"127.0.0.1:{unused_port}: Connection refused",
        "(1) run 'onestepsr models download net'",
        f"copy the file into {download.path.parent}",
        "(2) give the path of a folder instead of 'net'",
        "(3) set ONESTEPSR_MIRROR to a folder or an address that holds net/net.bin",
    ):
        assert part in message
    assert present(download) == []


@pytest.fixture
def unused_port():
    with running() as mirror:
        port = mirror.server_port
    return port


def test_nothing_shows_under_the_name_before_it_is_whole(server):
    hold = threading.Event()
    server.routes["/net.bin"] = TiledRun(BODY, hold=hold)
    download = download_of(server, "/net.bin")
    worker = threading.Thread(target=download_file, args=(download,))
    worker.start()
    assert server.halfway.wait(10)
    assert present(download) == [".net.bin.part"]
    assert download.state == "not downloaded"
    hold.set()
    worker.join(10)
    assert present(download) == ["net.bin", "net.bin.sha256"]


def process(server, path="/net.bin"):
    """Another process that obtains the file."""
    code = (
        "from onestepsr.weights.download import Download, Source, obtain\n"
        f"source = Source(url={server.url(path)!r}, sha256={SHA!r}, bytes={SIZE})\n"
        "obtain(Download(model='net', file='net.bin', sources=(source,)))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def test_of_two_processes_one_downloads(server):
    hold = threading.Event()
    server.routes["/net.bin"] = TiledRun(BODY, hold=hold)
    first = process(server)
    assert server.halfway.wait(30)
    second = process(server)
    try:
        line = second.stderr.readline()
        assert "another process is downloading it" in line
    finally:
        hold.set()
    assert [first.wait(30), second.wait(30)] == [0, 0]
    assert len(server.asked) == 1
    assert download_of(server, "/net.bin").path.read_bytes() == BODY
    second.stderr.close()
    first.stderr.close()


def test_a_killed_process_leaves_nothing_visible_and_no_lock(server):
    hold = threading.Event()
    server.routes["/net.bin"] = TiledRun(BODY, hold=hold)
    download = download_of(server, "/net.bin")
    killed = process(server)
    assert server.halfway.wait(30)
    part = download.path.with_name(".net.bin.part")
    while not part.exists() or part.stat().st_size == 0:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait(30)
    killed.stderr.close()
    hold.set()
    assert present(download) == [".net.bin.part"]
    assert download_file(download).read_bytes() == BODY
    assert server.asked[-1][1].startswith("bytes=")


@pytest.mark.parametrize("place", ["net/net.bin", "net.bin"])
def test_a_mirror_of_the_environment_is_asked_first(server, tmp_path, monkeypatch, place):
    server.routes |= {f"/base/{place}": TiledRun(BODY), "/net.bin": TiledRun(BODY)}
    download = download_of(server, "/net.bin")
    monkeypatch.setenv(download.MIRROR, server.url("/base/"))
    download_file(download)
    assert server.asked[-1] == (f"/base/{place}", "")
    asked = len(server.asked)
    download.path.unlink()
    folder = tmp_path / "mirror"
    (folder / place).parent.mkdir(parents=True)
    (folder / place).write_bytes(BODY)
    monkeypatch.setenv(download.MIRROR, str(folder))
    monkeypatch.setenv(download.OFFLINE, "1")  # a folder needs no network
    assert download_file(download).read_bytes() == BODY
    assert len(server.asked) == asked


def test_a_mirror_with_the_wrong_file_or_none_falls_to_the_sources(server, tmp_path, monkeypatch):
    server.routes["/net.bin"] = TiledRun(BODY)
    (tmp_path / "net.bin").write_bytes(OTHER)
    monkeypatch.setenv(download.MIRROR, str(tmp_path))
    assert download_file(download_of(server, "/net.bin")).read_bytes() == BODY


@pytest.mark.parametrize("mirror", ["file:///mirror", "http://mirror:port/", "http://[mirror/", "https:///mirror"])
def test_an_impossible_mirror_is_named(server, monkeypatch, mirror):
    monkeypatch.setenv(download.MIRROR, mirror)
    with pytest.raises(UserError, match=rf"ONESTEPSR_MIRROR: '{re.escape(mirror)}' is neither"):
        download_file(download_of(server, "/net.bin"))


def test_offline_asks_nobody(server, monkeypatch, caplog):
    server.routes["/net.bin"] = TiledRun(BODY)
    monkeypatch.setenv(download.OFFLINE, "1")
    monkeypatch.setenv(download.MIRROR, server.url("/"))
    with pytest.raises(UserError, match=r"ONESTEPSR_OFFLINE is set.*Three ways"):
        download_file(download_of(server, "/net.bin", notice="licence"))
    assert server.asked == []
    assert caplog.records == []
    monkeypatch.setenv(download.OFFLINE, "0")
    assert download_file(download_of(server, "/net.bin")).read_bytes() == BODY


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(download.CACHE, str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*ONESTEPSR_CACHE names another"):
        download_file(download_of(server, "/net.bin"))


def test_a_file_copied_into_the_cache_is_hashed_once(server, monkeypatch):
    download = download_of(server, "/net.bin")
    download.path.parent.mkdir(parents=True)
    download.path.write_bytes(BODY)
    assert download_file(download) == download.path
    assert server.asked == []
    hashed = []
    monkeypatch.setattr(download, "file_sha256", lambda path, *_: hashed.append(path) or SHA)
    download_file(download)
    assert hashed == []
    assert check(download, thorough=True) == SHA
    os.utime(download.path, (time.time() + 60, time.time() + 60))
    download_file(download)
    assert hashed == [download.path] * 2


@pytest.mark.parametrize(("content", "what"), [(OTHER, "checksum"), (BODY[:-5], "1,048,571 bytes instead of")])
def test_a_damaged_file_is_an_error_until_it_may_be_replaced(server, content, what):
    server.routes["/net.bin"] = TiledRun(BODY)
    download = download_of(server, "/net.bin")
    download.path.parent.mkdir(parents=True)
    download.path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{what}.*'onestepsr models download net' fetches it again"):
        download_file(download)
    assert download.path.read_bytes() == content
    assert download_file(download, replace=True).read_bytes() == BODY
    assert download_file(download).read_bytes() == BODY


def test_without_a_checksum_the_first_file_is_remembered(server):
    server.routes["/net.bin"] = TiledRun(BODY)
    download = download_of(server, "/net.bin", sha256="", size=None)
    download_file(download)
    assert check(download) == SHA
    download.path.write_bytes(OTHER)
    os.utime(download.path, (time.time() + 60, time.time() + 60))
    with pytest.raises(UserError, match="checksum"):
        check(download)
    download.path.unlink()
    server.routes["/net.bin"] = TiledRun(OTHER)
    with pytest.raises(UserError, match="checksum"):
        download_file(download)


def test_checking_what_is_not_there_says_what_fetches_it(server):
    with pytest.raises(UserError, match="'onestepsr models download net' fetches it"):
        check(download_of(server, "/net.bin"))


@pytest.mark.parametrize(
    ("values", "error"),
    [({"url": "file:///x"}, "neither http nor https"), ({"sha256": "AB"}, "64 lower-case"), ({"bytes": 0}, "positive")],
)
def test_sources_are_validated(values, error):
    with pytest.raises(ValueError, match=error):
        Source(**{"url": "https://x/y", **values})


def test_mirrors_must_agree():
    for found in ((), (Source(url="https://x/y", bytes=1), Source(url="https://x/y", bytes=2))):
        with pytest.raises(ValueError, match="agree"):
            Download(model="net", file="net.bin", sources=found)


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv(download.CACHE)
    assert download.cache_folder() == Path.home() / ".cache" / "onestepsr"


def test_sizes_for_people():
    assert [download.human_bytes(n) for n in (None, 7, 7_289, 553_433_881, 5_214_604_494)] == [
        "unknown size",
        "7 bytes",
        "7.3 kB",
        "553.4 MB",
        "5.2 GB",
    ]

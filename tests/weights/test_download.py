"""Downloads: only whole, right files appear in the cache; broken servers, mirrors, offline, several processes."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from weight_mirror import BODY, OTHER, SHA, SIZE, Route, download_of, present, running

from onestepsr.core.errors import DamagedWeights, MissingWeights, UserError
from onestepsr.weights import download
from onestepsr.weights.download import Download, Source, check, download_all, download_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_what_comes_is_checked_kept_and_not_asked_for_again(server, caplog):
    server.routes["/net.bin"] = Route(BODY)
    wanted = download_of(server, "/net.bin", notice="licence Nice (http://nice): be nice")
    path = download_file(wanted)
    assert path == wanted.path
    assert path.read_bytes() == BODY
    assert present(wanted) == ["net.bin", "net.bin.sha256"]
    assert (path.parent / "net.bin.sha256").read_text() == f"{SHA}  net.bin\n"
    assert download_file(wanted) == path
    assert server.asked == [("/net.bin", "")]
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "net: licence Nice (http://nice): be nice"
    ]


def test_the_terms_of_a_model_of_several_files_are_logged_once(server, caplog):
    server.routes |= {"/a": Route(BODY), "/b": Route(BODY)}
    wanted = [download_of(server, f"/{name}", file=name, notice="licence Nice") for name in "ab"]
    assert [path.name for path in download_all(wanted)] == ["a", "b"]
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == ["net: licence Nice"]


def test_a_file_comes_from_the_hub_by_its_own_client(server):
    path = "/owner/name/resolve/main/folder/net.bin"
    server.routes[path] = Route(BODY, commit=COMMIT)
    wanted = download_of(server, path)
    assert download_file(wanted).read_bytes() == BODY
    assert present(wanted) == ["net.bin", "net.bin.sha256"]
    assert server.asked == [(path, "")]


def test_a_hub_without_the_file_or_with_another_falls_to_the_next_mirror(server):
    base = "/owner/name/resolve/main"
    server.routes |= {f"{base}/wrong": Route(OTHER, commit=COMMIT), "/net.bin": Route(BODY)}
    wanted = download_of(server, f"{base}/gone", f"{base}/wrong", "/net.bin")
    assert download_file(wanted).read_bytes() == BODY
    assert present(wanted) == ["net.bin", "net.bin.sha256"]
    wanted.path.unlink()
    with pytest.raises(MissingWeights, match=r"HTTP 404 Not Found.*checksum"):
        download_file(download_of(server, f"{base}/gone", f"{base}/wrong"))


def test_a_dead_hub_is_passed_over_at_once(server):
    with running() as gone:
        dead = gone.url("/owner/name/resolve/main/net.bin")
    server.routes["/net.bin"] = Route(BODY)
    wanted = download_of(server, "/net.bin")
    begun = time.monotonic()
    assert download_file(Download(**{**vars(wanted), "urls": (dead, *wanted.urls)})).read_bytes() == BODY
    assert time.monotonic() - begun < 10, "its client alone would try for half a minute"


def test_a_further_kind_of_address_is_one_entry(monkeypatch):
    kind = Source(r"here:.+", lambda url, part, size: part.write_bytes(url.encode()) and None)
    monkeypatch.setattr(download, "SOURCES", (*download.SOURCES, kind))
    path = download_file(Download(model="net", file="net.bin", urls=("here:text",), bytes=9))
    assert path.read_bytes() == b"here:text"


# ---- servers that behave badly --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        Route(OTHER),
        Route(BODY + b"more"),
        Route(BODY[:-1]),
        Route(BODY + b"more", length=False),
        Route(BODY[:-1], length=False),
        Route(BODY, status=503),
        Route(b"<html>log in</html>"),
        Route(b""),
        Route(status=302, location="/bad"),
        Route(status=302, location="file:///etc/passwd"),
    ],
    ids=[
        "altered",
        "longer",
        "shorter",
        "longer-unannounced",
        "shorter-unannounced",
        "503",
        "page",
        "empty",
        "loop",
        "redirect-to-a-file",
    ],
)
def test_what_is_wrong_falls_to_the_next_mirror_and_leaves_nothing(server, bad):
    server.routes |= {"/bad": bad, "/net.bin": Route(BODY)}
    wanted = download_of(server, "/bad")
    with pytest.raises(MissingWeights):
        download_file(wanted)
    assert present(wanted) == []
    assert download_file(download_of(server, "/bad", "/net.bin")).read_bytes() == BODY
    assert present(wanted) == ["net.bin", "net.bin.sha256"]


def test_all_dead_is_one_line_with_what_was_tried_and_three_ways_out(server):
    with running() as gone:
        dead = gone.url("/net.bin?token=secret")
    server.routes["/wrong"] = Route(OTHER)
    other = "give the path of a folder instead of 'net'"
    wanted = download_of(server, "/gone", "/wrong", alternative=other)
    wanted = Download(**{**vars(wanted), "urls": (*wanted.urls, dead)})
    with pytest.raises(MissingWeights) as caught:
        download_file(wanted)
    message = str(caught.value)
    assert "\n" not in message
    assert "secret" not in message
    for part in (
        "net.bin (1.0 MB) is not in",
        "HTTP 404 Not Found",
        "checksum",
        f"127.0.0.1:{gone.server_port}: Connection refused",
        "(1) run 'onestepsr models download net'",
        f"copy the file into {wanted.path.parent}",
        "(2) give the path of a folder instead of 'net'",
        "(3) set ONESTEPSR_MIRROR to a folder or an address that holds net/net.bin",
    ):
        assert part in message
    assert present(wanted) == []


def range_after(count):
    """The request that follows ``count`` bytes: whole blocks of them were written."""
    return f"bytes={count - count % download.BLOCK}-"


def test_a_cut_connection_is_taken_up_where_it_ended(server):
    server.routes |= {"/net.bin": Route(BODY, cuts=[300_000, 700_000]), "/a": Route(status=302, location="/net.bin")}
    assert download_file(download_of(server, "/a")).read_bytes() == BODY
    assert server.asked[1::2] == [("/net.bin", asked) for asked in ("", range_after(300_000), range_after(700_000))]


def test_a_later_call_and_another_mirror_go_on_from_what_is_there(server):
    server.routes["/bad"] = Route(BODY, cuts=[400_000, 400_000])
    wanted = download_of(server, "/bad")
    with pytest.raises(MissingWeights, match=r"127\.0\.0\.1"):
        download_file(wanted)
    assert present(wanted) == [".net.bin.part"]
    server.routes["/good"] = Route(BODY)
    assert download_file(download_of(server, "/good")).read_bytes() == BODY
    assert server.asked[-1] == ("/good", range_after(400_000))
    assert present(wanted) == ["net.bin", "net.bin.sha256"]


def test_a_server_that_ignores_ranges_sends_the_whole_again(server):
    server.routes["/net.bin"] = Route(BODY, ranges=False, cuts=[500_000])
    assert download_file(download_of(server, "/net.bin")).read_bytes() == BODY
    server.routes["/cut"] = Route(BODY, ranges=False, cuts=[500_000] * 9)
    wanted = download_of(server, "/cut", file="other.bin")
    with pytest.raises(MissingWeights):
        download_file(wanted)
    assert [asked for _, asked in server.asked] == ["", range_after(500_000)] * 2


def test_wrong_bytes_left_by_an_earlier_call_are_not_built_upon(server):
    server.routes["/net.bin"] = Route(BODY)
    wanted = download_of(server, "/net.bin")
    wanted.path.parent.mkdir(parents=True)
    part = wanted.path.with_name(".net.bin.part")
    for junk in (b"junk" * 1000, OTHER, BODY + b"junk"):
        part.write_bytes(junk)
        assert download_file(wanted).read_bytes() == BODY
        assert not part.exists()
        wanted.path.unlink()
    part.write_bytes(BODY)  # whole, but the process died before it could rename it
    asked = len(server.asked)
    assert download_file(wanted).read_bytes() == BODY
    assert len(server.asked) == asked


def test_without_a_checksum_an_earlier_call_is_not_continued(server):
    server.routes["/net.bin"] = Route(BODY)
    wanted = download_of(server, "/net.bin", sha256="", bytes=None)
    wanted.path.parent.mkdir(parents=True)
    wanted.path.with_name(".net.bin.part").write_bytes(OTHER[:1000])
    assert download_file(wanted).read_bytes() == BODY
    assert server.asked == [("/net.bin", "")]


def test_a_silent_server_falls_to_the_next_mirror(server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.routes |= {"/slow": Route(BODY, pause=3.0, ranges=False), "/net.bin": Route(BODY)}
    begun = time.monotonic()
    assert download_file(download_of(server, "/slow", "/net.bin")).read_bytes() == BODY
    assert time.monotonic() - begun < 2.5


def test_a_file_of_unknown_size_has_a_limit(server, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    server.routes["/net.bin"] = Route(BODY)
    with pytest.raises(MissingWeights, match="more than 1,000 bytes"):
        download_file(download_of(server, "/net.bin", bytes=None))


def test_a_full_disk_is_told_before_the_download(server, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _path: SimpleNamespace(free=SIZE))
    wanted = download_of(server, "/net.bin")
    with pytest.raises(UserError, match=r"1\.0 MB needed, 1\.0 MB free"):
        download_file(wanted)
    assert server.asked == []


# ---- processes ------------------------------------------------------------------------------------------------------


def test_nothing_shows_under_the_name_before_it_is_whole(server):
    hold = threading.Event()
    server.routes["/net.bin"] = Route(BODY, hold=hold)
    wanted = download_of(server, "/net.bin")
    worker = threading.Thread(target=download_file, args=(wanted,))
    worker.start()
    assert server.halfway.wait(10)
    assert not wanted.path.exists()
    hold.set()
    worker.join(10)
    assert present(wanted) == ["net.bin", "net.bin.sha256"]


def process(server, path="/net.bin"):
    """Another process that downloads the file."""
    code = (
        "from onestepsr.weights.download import Download, download_file\n"
        f"download_file(Download(model='net', file='net.bin', urls=({server.url(path)!r},), "
        f"sha256={SHA!r}, bytes={SIZE}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def test_of_two_processes_one_downloads(server):
    hold = threading.Event()
    server.routes["/net.bin"] = Route(BODY, hold=hold)
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


@pytest.mark.parametrize("path", ["/net.bin", "/owner/name/resolve/main/net.bin"])
def test_a_killed_process_leaves_nothing_visible_and_no_lock(server, path):
    hold = threading.Event()
    server.routes[path] = Route(BODY, hold=hold, commit=COMMIT)
    wanted = download_of(server, path)
    killed = process(server, path)
    assert server.halfway.wait(30)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.wait(30)
    killed.stderr.close()
    hold.set()
    assert all(name.startswith(".net.bin.part") for name in present(wanted))
    assert download_file(wanted).read_bytes() == BODY
    assert present(wanted) == ["net.bin", "net.bin.sha256"]


# ---- the mirror of the environment, offline -------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["net/net.bin", "net.bin"])
def test_a_mirror_of_the_environment_is_asked_first(server, tmp_path, monkeypatch, place):
    server.routes |= {f"/base/{place}": Route(BODY), "/net.bin": Route(BODY)}
    wanted = download_of(server, "/net.bin")
    monkeypatch.setenv(download.MIRROR, server.url("/base/"))
    download_file(wanted)
    assert server.asked[-1] == (f"/base/{place}", "")
    asked = len(server.asked)
    wanted.path.unlink()
    folder = tmp_path / "mirror"
    (folder / place).parent.mkdir(parents=True)
    (folder / place).write_bytes(BODY)
    monkeypatch.setenv(download.MIRROR, str(folder))
    monkeypatch.setenv(download.OFFLINE, "1")  # a folder needs no network
    assert download_file(wanted).read_bytes() == BODY
    assert len(server.asked) == asked


def test_a_mirror_with_the_wrong_file_or_none_falls_to_the_sources(server, tmp_path, monkeypatch):
    server.routes["/net.bin"] = Route(BODY)
    (tmp_path / "net.bin").write_bytes(OTHER)
    monkeypatch.setenv(download.MIRROR, str(tmp_path))
    assert download_file(download_of(server, "/net.bin")).read_bytes() == BODY


@pytest.mark.parametrize("mirror", ["file:///mirror", "http://mirror:port/", "http://[mirror/", "https:///mirror"])
def test_an_impossible_mirror_is_named(server, monkeypatch, mirror):
    monkeypatch.setenv(download.MIRROR, mirror)
    with pytest.raises(UserError, match=rf"ONESTEPSR_MIRROR: '{re.escape(mirror)}' is neither"):
        download_file(download_of(server, "/net.bin"))


@pytest.mark.parametrize("path", ["/net.bin", "/owner/name/resolve/main/net.bin"])
def test_offline_asks_nobody(server, monkeypatch, caplog, path):
    server.routes[path] = Route(BODY, commit=COMMIT)
    monkeypatch.setenv(download.OFFLINE, "1")
    monkeypatch.setenv(download.MIRROR, server.url("/"))
    with pytest.raises(MissingWeights, match=r"ONESTEPSR_OFFLINE is set.*Three ways"):
        download_file(download_of(server, path, notice="licence"))
    assert server.asked == []
    assert caplog.records == []
    assert not download_of(server, path).path.parent.exists(), "nothing is left behind where nothing can come"
    monkeypatch.setenv(download.OFFLINE, "0")
    assert download_file(download_of(server, path)).read_bytes() == BODY


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(download.CACHE, str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*ONESTEPSR_CACHE names another"):
        download_file(download_of(server, "/net.bin"))


def test_a_file_copied_into_the_cache_is_hashed_once(server, monkeypatch):
    wanted = download_of(server, "/net.bin")
    wanted.path.parent.mkdir(parents=True)
    wanted.path.write_bytes(BODY)
    assert download_file(wanted) == wanted.path
    assert server.asked == []
    hashed = []
    monkeypatch.setattr(download, "file_sha256", lambda path, *_: hashed.append(path) or SHA)
    download_file(wanted)
    assert hashed == []
    assert check(wanted, thorough=True) == SHA
    os.utime(wanted.path, (time.time() + 60, time.time() + 60))
    download_file(wanted)
    assert hashed == [wanted.path] * 2


@pytest.mark.parametrize(("content", "what"), [(OTHER, "checksum"), (BODY[:-5], "1,048,571 bytes instead of")])
def test_a_damaged_file_is_an_error_until_it_may_be_replaced(server, content, what):
    server.routes["/net.bin"] = Route(BODY)
    wanted = download_of(server, "/net.bin")
    wanted.path.parent.mkdir(parents=True)
    wanted.path.write_bytes(content)
    with pytest.raises(DamagedWeights, match=rf"{what}.*'onestepsr models download net' fetches it again"):
        download_file(wanted)
    assert wanted.path.read_bytes() == content
    assert download_file(wanted, replace=True).read_bytes() == BODY
    assert download_file(wanted).read_bytes() == BODY


def test_without_a_checksum_the_first_file_is_remembered(server):
    server.routes["/net.bin"] = Route(BODY)
    wanted = download_of(server, "/net.bin", sha256="", bytes=None)
    download_file(wanted)
    assert check(wanted) == SHA
    wanted.path.write_bytes(OTHER)
    os.utime(wanted.path, (time.time() + 60, time.time() + 60))
    with pytest.raises(DamagedWeights, match="checksum"):
        check(wanted)
    wanted.path.unlink()
    server.routes["/net.bin"] = Route(OTHER)
    with pytest.raises(MissingWeights, match="checksum"):
        download_file(wanted)


def test_checking_what_is_not_there_says_what_fetches_it(server):
    with pytest.raises(MissingWeights, match="'onestepsr models download net' fetches it"):
        check(download_of(server, "/net.bin"))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"urls": ("file:///x",)}, "neither http nor https"),
        ({"urls": ()}, "has none"),
        ({"sha256": "AB"}, "64 lower-case"),
        ({"bytes": 0}, "positive"),
    ],
)
def test_downloads_are_validated(values, error):
    with pytest.raises(ValueError, match=error):
        Download(**{"model": "net", "file": "net.bin", "urls": ("https://x/y",), **values})


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

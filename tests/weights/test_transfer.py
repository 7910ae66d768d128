"""Servers that behave badly: what they send is continued, refused or asked for elsewhere."""

import time
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request

import pytest
from weight_mirror import BODY, OTHER, SIZE, TiledRun, download_of, present

from onestepsr.core.errors import UserError
from onestepsr.weights import download
from onestepsr.weights.download import download_file


def test_a_cut_connection_is_taken_up_where_it_ended(server):
    server.routes["/net.bin"] = TiledRun(BODY, cuts=[300_000, 700_000])
    assert download_file(download_of(server, "/net.bin")).read_bytes() == BODY
    assert server.asked == [("/net.bin", ""), ("/net.bin", "bytes=300000-"), ("/net.bin", "bytes=700000-")]


def test_a_later_call_and_another_mirror_go_on_from_what_is_there(server):
    server.routes["/bad/net.bin"] = TiledRun(BODY, cuts=[400_000, 400_000])
    download = download_of(server, "/bad/net.bin")
    with pytest.raises(UserError, match="connection cut after 400,000 bytes"):
        download_file(download)
    assert present(download) == [".net.bin.part"]
    server.routes["/good/net.bin"] = TiledRun(BODY)
    assert download_file(download_of(server, "/good/net.bin")).read_bytes() == BODY
    assert server.asked[-1] == ("/good/net.bin", "bytes=400000-")
    assert present(download) == ["net.bin", "net.bin.sha256"]


def test_a_server_that_ignores_ranges_sends_the_whole_again(server):
    server.routes["/net.bin"] = TiledRun(BODY, ranges=False, cuts=[500_000])
    assert download_file(download_of(server, "/net.bin")).read_bytes() == BODY
    assert [asked for _, asked in server.asked] == ["", "bytes=500000-"]


def test_a_server_that_always_cuts_at_the_same_place_is_given_up(server):
    server.routes["/net.bin"] = TiledRun(BODY, ranges=False, cuts=[500_000] * 9)
    with pytest.raises(UserError, match="connection cut"):
        download_file(download_of(server, "/net.bin"))
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "bad",
    [
        TiledRun(OTHER),
        TiledRun(BODY + b"more"),
        TiledRun(BODY[:-1]),
        TiledRun(BODY + b"more", length=False),
        TiledRun(BODY[:-1], length=False),
        TiledRun(BODY, status=503),
        TiledRun(b"<html>log in</html>"),
        TiledRun(b""),
    ],
    ids=["altered", "longer", "shorter", "longer-unannounced", "shorter-unannounced", "503", "page", "empty"],
)
def test_what_is_wrong_falls_to_the_next_mirror(server, bad):
    server.routes |= {"/bad": bad, "/net.bin": TiledRun(BODY)}
    download = download_of(server, "/bad", "/net.bin")
    assert download_file(download).read_bytes() == BODY
    assert present(download) == ["net.bin", "net.bin.sha256"]


def test_a_wrong_size_is_seen_before_the_body_is_read(server):
    server.routes["/net.bin"] = TiledRun(BODY + b"more")
    with pytest.raises(UserError, match="1,048,580 bytes instead of 1,048,576"):
        download_file(download_of(server, "/net.bin"))


def test_wrong_bytes_left_by_an_earlier_call_are_not_built_upon(server):
    server.routes["/net.bin"] = TiledRun(BODY)
    download = download_of(server, "/net.bin")
    download.path.parent.mkdir(parents=True)
    for junk in (b"junk" * 1000, OTHER, BODY + b"junk"):
        part = download.path.with_name(".net.bin.part")
        part.write_bytes(junk)
        assert download_file(download).read_bytes() == BODY
        assert not part.exists()
        download.path.unlink()
    part.write_bytes(BODY)  # whole, but the process died before it could rename it
    asked = len(server.asked)
    assert download_file(download).read_bytes() == BODY
    assert len(server.asked) == asked


def test_another_range_than_asked_for_is_refused(server):
    server.routes["/net.bin"] = TiledRun(BODY, cuts=[300_000], content_range=f"bytes 0-{SIZE - 1}/{SIZE}")
    with pytest.raises(UserError, match="another range than asked for"):
        download_file(download_of(server, "/net.bin"))


def test_redirects_are_followed_a_few_times(server):
    server.routes |= {"/net.bin": TiledRun(BODY), "/a": TiledRun(status=302, location="/b")}
    server.routes["/b"] = TiledRun(status=308, location=server.url("/net.bin"))
    server.routes["/net.bin"].cuts = [300_000]
    assert download_file(download_of(server, "/a")).read_bytes() == BODY
    assert server.asked[-3:] == [(path, "bytes=300000-") for path in ("/a", "/b", "/net.bin")]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/net.bin", "/loop"])
def test_redirects_elsewhere_or_in_circles_are_refused(server, target):
    server.routes["/loop"] = TiledRun(status=302, location=target)
    with pytest.raises(UserError, match="HTTP 302"):
        download_file(download_of(server, "/loop"))


def test_a_redirect_from_https_to_http_is_refused():
    with pytest.raises(HTTPError, match="refused"):
        download._Redirects().redirect_request(Request("https://a/b"), None, 302, "Found", {}, "http://a/b")


def test_a_silent_server_falls_to_the_next_mirror(server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.routes |= {"/slow": TiledRun(BODY, pause=3.0, ranges=False), "/net.bin": TiledRun(BODY)}
    begun = time.monotonic()
    assert download_file(download_of(server, "/slow", "/net.bin")).read_bytes() == BODY
    assert time.monotonic() - begun < 2.5


def test_a_file_of_unknown_size_has_a_limit(server, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    server.routes |= {"/announced": TiledRun(BODY), "/streamed": TiledRun(BODY, length=False)}
    with pytest.raises(UserError, match=r"larger than.*sends more than 1,000 bytes"):
        download_file(download_of(server, "/announced", "/streamed", size=None))


def test_a_full_disk_is_told_before_the_download(server, monkeypatch):
    server.routes["/net.bin"] = TiledRun(BODY)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _path: SimpleNamespace(free=SIZE))
    wanted = download_of(server, "/net.bin")
    with pytest.raises(UserError, match=r"needed, 0\.0 GB free"):
        download_file(wanted)
    assert present(wanted) == []


def test_without_a_checksum_nothing_is_continued(server):
    server.routes["/net.bin"] = TiledRun(BODY, cuts=[300_000])
    download = download_of(server, "/net.bin", sha256="", size=None)
    with pytest.raises(UserError, match="connection cut"):
        download_file(download)
    assert download_file(download).read_bytes() == BODY
    assert [asked for _, asked in server.asked] == ["", ""]

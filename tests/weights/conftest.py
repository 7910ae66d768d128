"""Downloads in tests: an empty cache, no mirror and no proxy; a server that can be told to misbehave."""

import pytest
from weight_mirror import running

from onestepsr.weights import download

PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
ENVIRONMENT = (download.MIRROR, download.OFFLINE, "HF_HUB_OFFLINE", *PROXIES)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(download.CACHE, str(tmp_path / "cache"))


@pytest.fixture
def server():
    with running() as mirror:
        yield mirror

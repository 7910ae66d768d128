"""An empty cache, no mirror and no proxy."""

import pytest

from onestepsr.weights import download


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    for name in (download.MIRROR, download.OFFLINE, "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(download.CACHE, str(tmp_path / "cache"))

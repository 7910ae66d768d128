"""An empty cache, no network, and a small text encoder, made once."""

import pytest
from small_text_model import write_text_encoder

from onestepsr.weights import download


@pytest.fixture(autouse=True)
def _no_network(tmp_path, monkeypatch):
    monkeypatch.setenv(download.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(download.OFFLINE, "1")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    return write_text_encoder(tmp_path_factory.mktemp("text") / "sd")

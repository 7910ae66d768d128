"""The server's page in a real browser: a photo dropped, its progress, the slider, the download; and what goes wrong."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_browser
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("fastapi")

from serving import EXAMPLES, Client, serving, write_weights

from onestepsr.cli.main import app as command_line
from onestepsr.serve.service import Service, Settings

PATH = find_browser()
pytestmark = pytest.mark.skipif(PATH is None, reason="no Chromium here; ONESTEPSR_TEST_BROWSER may name one")
MEMORY = 0.2
"""Gigabytes with which an example takes several tiles."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Service]]:
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"), models=[str(weights)], memory=MEMORY, max_bytes=2_000_000
    )
    with serving(settings) as (client, service):
        client.wait_ready()
        yield client, service


class Page(Browser):
    """The server's page, and what a person does with it."""

    def visit(self, address: str, downloads: Path) -> None:
        self.downloads = downloads
        self.call("DOM.enable")
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        self.open(address)
        self.run("sessionStorage.clear(); localStorage.clear()")
        self.requests.clear()
        self.messages.clear()
        self.open(address)
        self.until("document.body.dataset.ready === 'true'")

    def until(self, expression: str, seconds: float = 60) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := self.run(expression)):
            assert time.monotonic() < deadline, (expression, self.run("document.body.innerText"))
            time.sleep(0.05)
        return value

    def drop(self, *paths: Path) -> None:
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        box = self.run("document.getElementById('drop').getBoundingClientRect().toJSON()")
        place = {"x": box["x"] + 20, "y": box["y"] + 20}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, data=data, **place)

    def choose(self, *paths: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#files")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def click(self, name: str) -> None:
        self.run(f"document.getElementById({json.dumps(name)}).click()")

    def text(self, name: str) -> str:
        return str(self.run(f"document.getElementById({json.dumps(name)}).textContent"))

    def downloaded(self, name: str) -> Path:
        path, deadline = self.downloads / name, time.monotonic() + 30
        while not path.is_file():
            assert time.monotonic() < deadline, list(self.downloads.iterdir())
            time.sleep(0.05)
        return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert PATH is not None
    page = Page(PATH, tmp_path_factory.mktemp("profile"), 1280, 900)
    yield page
    page.close()


@pytest.fixture
def page(shared: Page, server: tuple[Client, Service], tmp_path: Path) -> Iterator[Page]:
    shared.visit(server[0].address + "/", tmp_path)
    yield shared
    home = server[0].address + "/"
    assert [url for url in shared.requests if not url.startswith((home, "blob:" + home, "data:"))] == []
    assert shared.blocked == []


def test_a_photo_from_drop_to_download(
    page: Page, server: tuple[Client, Service], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = server[1]
    monkeypatch.setattr(service.worker, "changed", lambda job_id: (service.watchers.notify(job_id), time.sleep(0.15)))
    photo = EXAMPLES / "hopper.jpg"
    page.run(
        "window.seen = []; new MutationObserver(() => { const s = document.querySelector('.item .state span');"
        " const b = document.querySelector('.item progress'); if (s) window.seen.push([s.textContent, b.value]); })"
        ".observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true })"
    )
    page.drop(photo)
    page.until("document.querySelector('.item.done') !== null")
    seen = page.run("window.seen")
    tiles = [text for text, _ in seen if text.startswith("Tile ")]
    assert len(set(tiles)) >= 2, seen
    assert any("left" in text for text in tiles)
    assert any(0 < value < 1 for _, value in seen)
    with Image.open(photo) as image:
        width, height = image.size
    assert page.text("facts").startswith(f"{width} × {height} → {4 * width} × {4 * height}")

    page.until("document.getElementById('after').naturalWidth > 0")
    assert page.run("document.getElementById('after').naturalWidth") == 4 * width
    clip = "getComputedStyle(document.querySelector('.layer.left')).clipPath"
    assert page.run(clip) == "inset(0px 50% 0px 0px)"
    page.run("document.getElementById('split').focus()")
    for _ in range(10):
        page.press("ArrowLeft")
    assert page.run(clip) == "inset(0px 60% 0px 0px)"
    assert page.run("document.getElementById('split').getAttribute('aria-valuetext')") == "40 % before, the rest after"
    box = page.run("document.getElementById('stage').getBoundingClientRect().toJSON()")
    middle = box["y"] + box["height"] / 2
    page.drag((box["x"] + 0.4 * box["width"], middle), (box["x"] + 0.8 * box["width"], middle))
    assert float(page.run("document.getElementById('split').value")) == pytest.approx(80, abs=1)
    page.click("zoom-exact")
    assert page.text("zoom-now") == "100 %"

    page.click("download")
    saved = page.downloaded("hopper_x4.jpg")
    expected = tmp_path / "by-command.jpg"
    arguments = ["upscale", str(photo), "-o", str(expected), "--model", str(weights), "--memory", str(MEMORY)]
    assert CliRunner().invoke(command_line, arguments).exit_code == 0
    assert saved.read_bytes() == expected.read_bytes()
    with Image.open(saved) as image:
        assert image.size == (4 * width, 4 * height)
    assert page.messages == []


def test_files_that_cannot_be_enlarged_say_why(page: Page, tmp_path: Path) -> None:
    broken = {
        "broken.jpg": (EXAMPLES / "cat.jpg").read_bytes()[:1500],
        "notes.txt": b"no image at all",
        "huge.png": b"x" * 2_000_001,
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
    page.choose(*(tmp_path / name for name in broken))
    page.until("document.querySelectorAll('.item.failed').length === 3")
    words = {
        "broken.jpg": ("This photo is damaged", "runcated"),
        "notes.txt": ("This is no photo that can be read", "Not an image"),
        "huge.png": ("This file is too large", "The file has 2.0 MB"),
    }
    for number, (title, reason) in enumerate(words.values()):
        page.run(f"document.querySelectorAll('.item')[{number}].click()")
        assert page.text("cover-title") == title
        assert reason in page.text("cover-text")
        assert page.run("getComputedStyle(document.getElementById('cover')).display") == "grid"
    page.click("clear")
    assert page.run("document.body.classList.contains('empty')")


def test_many_photos_with_settings_as_one_archive_and_again_after_a_reload(
    page: Page, server: tuple[Client, Service], tmp_path: Path
) -> None:
    others = set(server[1].queue.files.iterdir())
    page.run("document.querySelector('#scale input[value=\"2\"]').click()")
    page.run(
        "const f = document.getElementById('format'); f.value = 'webp';"
        "f.dispatchEvent(new Event('change', { bubbles: true }))"
    )
    names = ["cat", "coffee", "hopper", "pavilion", "astronaut"]
    page.choose(*(EXAMPLES / f"{name}.jpg" for name in names))
    page.until("document.querySelectorAll('.item.done').length === 5")
    assert page.text("list-title") == "5 of 5 ready"
    page.click("download-all")
    with zipfile.ZipFile(page.downloaded("onestepsr.zip")) as archive:
        assert sorted(archive.namelist()) == sorted(f"{name}_x2.webp" for name in names)
    page.open(page.run("location.href"))
    page.until("document.querySelectorAll('.item.done').length === 5")
    page.until("document.getElementById('after').naturalWidth > 0")
    assert page.run("document.querySelector('#scale input:checked').value") == "2"
    page.click("redo")  # known to the page no more: may be done again
    page.until("document.querySelectorAll('.item.done').length === 5")
    page.click("clear")
    deadline = time.monotonic() + 20
    while set(server[1].queue.files.iterdir()) - others:  # removed with the photos
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_pasted_image_and_a_waiting_one_that_is_cancelled(page: Page, server: tuple[Client, Service]) -> None:
    page.run(
        "new Promise(done => { const c = document.createElement('canvas'); c.width = c.height = 24; c.toBlob(blob => {"
        " const data = new DataTransfer(); data.items.add(new File([blob], 'shot.png', { type: 'image/png' }));"
        " dispatchEvent(new ClipboardEvent('paste', { clipboardData: data, cancelable: true })); done(); }); })"
    )
    page.until("document.querySelector('.item.done') !== null")
    assert page.text("title") == "shot.png"
    page.run("document.querySelector('.remove').click()")
    assert page.run("document.body.classList.contains('empty')")


def test_light_dark_phone_and_names_for_a_screen_reader(page: Page) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    first = page.run(colour)
    page.click("theme")
    second = page.run(colour)
    assert second != first
    page.open(page.run("location.href"))
    assert page.run(colour) == second
    page.until("document.body.dataset.ready === 'true'")
    page.choose(EXAMPLES / "cat.jpg")
    page.until("document.querySelector('.item.done') !== null")
    page.run("document.getElementById('more').open = true")
    page.choose(EXAMPLES / "hopper.jpg")  # so that every button is there
    page.until("document.querySelectorAll('.item.done').length === 2")
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    try:
        assert page.run("document.documentElement.scrollWidth") <= 360
        wide = "[...document.querySelectorAll('.card')].filter(c => c.getBoundingClientRect().right > 352).length"
        assert page.run(wide) == 0
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "slider", "combobox", "checkbox", "radio", "textbox")
    controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(controls) > 15
    assert [node for node in controls if not node.get("name", {}).get("value")] == []
    page.call("Accessibility.disable")


def test_a_server_with_a_token_asks_for_it(shared: Page, weights: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", models=[str(weights)], token="abc")
    with serving(settings) as (client, _):
        shared.open(client.address + "/")
        shared.until("document.getElementById('ask').open")
        shared.run("document.getElementById('token').value = 'wrong'")
        shared.run("document.querySelector('#ask button').click()")
        shared.until("document.getElementById('ask').open")
        shared.run("document.getElementById('token').value = 'abc'")
        shared.run("document.querySelector('#ask button').click()")
        shared.until("document.body.dataset.ready === 'true'")
        shared.choose(EXAMPLES / "cat.jpg")
        shared.until("document.querySelector('.item.done') !== null")
        shared.until("document.getElementById('after').naturalWidth > 0")

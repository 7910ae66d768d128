"""The report in a real browser: it sorts, slides, zooms, and asks for nothing but its own files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_browser

from evaluation_results import make_result, write_images
from onestepsr.evaluate.comparison import compare
from onestepsr.evaluate.report import write_report
from onestepsr.evaluate.result import Files
from onestepsr.evaluate.tables import beside

PATH = find_browser()
pytestmark = pytest.mark.skipif(PATH is None, reason="no Chromium here; ONESTEPSR_TEST_BROWSER may name one")
VALUES = {"b": 21.0, "p10": 30.0, "p2": 9.5, "<i>x": 25.0}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    write_images(root, list(VALUES), side=64)
    results = []
    for number in range(2):
        folders = Files(lr=str(root / "lr"), sr=str(root / f"sr{number}"), hr=str(root / "hr"))
        psnr = {name: value + number * index for index, (name, value) in enumerate(VALUES.items())}
        results.append(make_result(f"method {number}", psnr, folders=folders))
    write_report(root / "out", compare(results), published=beside(results, "osediff/realsr"))
    return root / "out"


@pytest.fixture(scope="module")
def shared(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PATH is not None
    browser = Browser(PATH, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(shared: Browser, report: Path) -> Browser:
    """The page just opened."""
    shared.requests.clear()
    shared.messages.clear()
    shared.blocked.clear()
    shared.open((report / "index.html").as_uri())
    return shared


def column(browser: Browser, number: int) -> Any:
    return browser.run(f"[...document.querySelectorAll('#all tbody tr')].map(row => row.cells[{number}].textContent)")


def test_no_request_leaves_the_page(browser: Browser, report: Path) -> None:
    browser.run("document.querySelectorAll('details').forEach(item => { item.open = true; item.scrollIntoView(); })")
    browser.run("document.getElementById('next').click()")
    # Images that come into view are fetched late.
    browser.run("Promise.all([...document.images].map(i => i.complete || new Promise(done => i.onload = done)))")
    assert len(browser.requests) > 5
    home = report.as_uri() + "/"
    assert [url for url in browser.requests if not url.startswith((home, "data:"))] == []
    assert browser.messages == []
    assert browser.run("[...document.images].every(image => image.naturalWidth > 0)")


def test_nothing_else_could_be_loaded_or_run(browser: Browser) -> None:
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=\"https://example.org/x.png\">')")
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.blocked == [("https://example.org/x.png", "csp")]
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"window.stolen=1\">')")
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.run("window.stolen") is None


def test_the_table_sorts_numbers_and_names(browser: Browser) -> None:
    click = "document.querySelectorAll('#all thead button')[{}].click()"
    browser.run(click.format(1))
    assert column(browser, 1) == ["9.50", "21.00", "25.00", "30.00"]
    assert browser.run("document.querySelector('#all th[aria-sort]').getAttribute('aria-sort')") == "ascending"
    browser.run(click.format(1))
    assert column(browser, 1) == ["30.00", "25.00", "21.00", "9.50"]
    browser.run(click.format(0))
    assert column(browser, 0) == ["<i>x", "b", "p2", "p10"]
    assert browser.run("document.querySelectorAll('#all th[aria-sort]').length") == 1


def test_the_filter_keeps_matching_names(browser: Browser) -> None:
    browser.run("const f = document.getElementById('filter'); f.value = 'P'; f.dispatchEvent(new Event('input'))")
    assert browser.run("[...document.querySelectorAll('#all tbody tr')].filter(row => !row.hidden).length") == 2
    assert browser.run("document.getElementById('shown').textContent") == "2 of 4 images"


def test_the_slider_moves_by_keyboard_and_by_mouse(browser: Browser) -> None:
    clip = "getComputedStyle(document.querySelector('.layer.left')).clipPath"
    assert browser.run(clip) == "inset(0px 50% 0px 0px)"
    browser.run("document.getElementById('split').focus()")
    for _ in range(5):
        browser.press("ArrowRight")
    assert browser.run(clip) == "inset(0px 45% 0px 0px)"
    assert (
        browser.run("document.getElementById('split').getAttribute('aria-valuetext')") == "55 % LR, the rest method 1"
    )
    browser.run("document.getElementById('stage').scrollIntoView({block: 'center'})")
    box = browser.run("document.getElementById('stage').getBoundingClientRect().toJSON()")
    middle = box["y"] + box["height"] / 2
    browser.drag((box["x"] + 0.55 * box["width"], middle), (box["x"] + 0.2 * box["width"], middle))
    assert float(browser.run("document.getElementById('split').value")) == pytest.approx(20, abs=1)


def test_zoom_and_pan_move_every_image_alike(browser: Browser) -> None:
    browser.run("document.getElementById('stage').focus()")
    for key in ("+", "+", "ArrowRight"):
        browser.press(key)
    transforms = browser.run(
        "[...document.querySelectorAll('.stage img, .pane img')].map(i => new DOMMatrix(getComputedStyle(i).transform))"
        ".map((m, n) => [m.a, m.e / document.querySelectorAll('.stage img, .pane img')[n].clientWidth])"
    )
    assert len(transforms) == 6
    for scale, moved in transforms:
        assert scale == pytest.approx(2.25)
        assert moved == pytest.approx(-0.725, abs=1e-3)
    browser.press("0")
    assert browser.run("getComputedStyle(document.querySelector('.stage img')).transform") == "matrix(1, 0, 0, 1, 0, 0)"


def test_an_image_of_the_table_opens_in_the_viewer(browser: Browser) -> None:
    browser.run("[...document.querySelectorAll('#all button.link')].find(b => b.textContent === 'p2').click()")
    assert browser.run("document.getElementById('image-name').textContent") == "p2"
    assert browser.run("document.activeElement.id") == "stage"
    captions = browser.run("[...document.querySelectorAll('#panes figcaption')].map(c => c.textContent)")
    assert captions[0] == "LR"
    assert captions[1].startswith("method 0")
    assert "9.50" in captions[1]
    assert captions[3] == "HR"
    browser.run("const s = document.getElementById('left'); s.value = 'hr'; s.dispatchEvent(new Event('change'))")
    browser.run("document.getElementById('next').click()")
    assert browser.run("document.getElementById('left').value") == "hr"


def test_light_and_dark(browser: Browser) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    first = browser.run(colour)
    browser.run("document.getElementById('theme').click()")
    assert browser.run(colour) != first
    browser.run("document.getElementById('theme').click()")
    assert browser.run(colour) == first


def test_nothing_is_wider_than_a_phone(browser: Browser) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=True)
    try:
        assert browser.run("document.documentElement.scrollWidth") <= 400
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")

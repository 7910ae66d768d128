"""The report as text: complete, well formed, self-contained, and safe against whatever names hold."""

import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation_results import make_result, write_images
from onestepsr.core.errors import UserError
from onestepsr.evaluate.comparison import Comparison, compare
from onestepsr.evaluate.report import PAGE, ReportConfig, bin_edges, centre, choose, locate, write_report
from onestepsr.evaluate.result import Files
from onestepsr.evaluate.tables import beside

NAMES = [f"p{number}" for number in range(6)]
VOID = ("img", "input", "link", "meta")
EVIL = '"><img src=x onerror=alert(1)><script>alert(2)</script>&amp;</script><!--'


class Page(html.parser.HTMLParser):
    """Tags, attributes and identifiers of a page; refuses elements that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every element with this tag."""
        return [attributes for name, attributes in self.tags if name == tag]

    def data(self) -> dict:
        """What the script is given."""
        return json.loads(self.texts["script"][0])


def comparison_of(root: Path, names: list[str] = NAMES, methods: int = 2, side: int = 32) -> Comparison:
    write_images(root, names, methods=methods, side=side)
    results = []
    for number in range(methods):
        psnr = {name: 20.0 + index + 0.25 * number for index, name in enumerate(names)}
        niqe = {name: 6.0 - 0.5 * number + 0.1 * index for index, name in enumerate(names)}
        folders = Files(lr=str(root / "lr"), sr=str(root / f"sr{number}"), hr=str(root / "hr"))
        results.append(make_result(f"method {number}", psnr, niqe, folders=folders))
    return compare(results)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    comparison = comparison_of(root)
    published = beside(comparison.results, "osediff/realsr")
    assert write_report(root / "out", comparison, published=published) == []
    return root / "out"


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / PAGE).read_text(encoding="utf-8"))


def test_every_part_is_there(page: Page) -> None:
    sections = [attributes["id"] for attributes in page.of("section")]
    expected = ["summary", "differences", "viewer", "distributions", "extremes", "values", "published", "protocol"]
    assert sections == expected
    assert [link["href"] for link in page.of("a")] == [f"#{name}" for name in expected]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_the_script_finds_every_element_it_asks_for(page: Page, report: Path) -> None:
    script = page.texts["script"][1]
    wanted = set(re.findall(r'\$\("([a-z-]+)"\)', script))
    identifiers = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert wanted
    assert wanted <= identifiers


def test_nothing_is_asked_for_outside_the_folder(page: Page, report: Path) -> None:
    text = (report / PAGE).read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    sources = [attributes.get("src") for _, attributes in page.tags if attributes.get("src")]
    files = [path for image in page.data()["images"] for path in image["files"].values()]
    for path in [*sources, *files]:
        assert (report / path).is_file()
        assert re.fullmatch(r"images/\d{5}-(lr|hr|sr\d)\.png", path)


def test_the_policy_allows_this_script_and_style_only(page: Page) -> None:
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    for text, kind in ((page.texts["script"][1], "script"), (page.texts["style"][0], "style")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.tags for name in attributes)


def test_images_are_the_measured_pixels(page: Page, report: Path, tmp_path: Path) -> None:
    write_images(tmp_path, NAMES)
    image = page.data()["images"][2]
    assert image["name"] == "p2"
    assert (image["width"], image["height"]) == (32, 32)
    for role, folder in (("lr", "lr"), ("sr0", "sr0"), ("sr1", "sr1"), ("hr", "hr")):
        shown = np.asarray(Image.open(report / image["files"][role]))
        assert np.array_equal(shown, np.asarray(Image.open(tmp_path / folder / "p2.png")))


def test_every_value_is_in_the_table(page: Page) -> None:
    cells = [float(cell["data-value"] or "nan") for cell in page.of("td") if "data-value" in cell]
    assert len(cells) == len(NAMES) * 2 * 3
    assert cells[:3] == [20.0, 20.25, 0.25]
    assert "+0.25" in page.texts["td"]


def test_extremes_begin_with_the_worst(page: Page) -> None:
    order = [button["data-image"] for button in page.of("button") if button.get("class") == "thumb"]
    assert order[:12] == ["0", "1", "2", "3", "4", "5", "5", "4", "3", "2", "1", "0"]
    niqe = order[24:30]
    assert niqe == ["5", "4", "3", "2", "1", "0"]


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    name = EVIL.replace("/", "")
    comparison = comparison_of(tmp_path, [name, "b"])
    results = [
        make_result(f"{EVIL} {result.label}", result.values("psnr"), folders=result.folders)
        for result in comparison.results
    ]
    write_report(tmp_path / "out", compare(results))
    evil = Page((tmp_path / "out" / PAGE).read_text(encoding="utf-8"))
    assert evil.data()["images"][0]["name"] == name
    assert len(evil.of("script")) == 2
    assert not any("onerror" in attributes for _, attributes in evil.tags)
    assert name in evil.texts["button"]


def test_a_report_without_images_has_its_values(tmp_path: Path) -> None:
    write_report(tmp_path / "out", compare([make_result("x", {"a": 1.0, "b": 2.0}, folders=Files(sr="/nowhere"))]))
    empty = Page((tmp_path / "out" / PAGE).read_text(encoding="utf-8"))
    assert "viewer" not in [attributes["id"] for attributes in empty.of("section")]
    assert any("2 of 2 images cannot be looked at" in text for text in empty.texts["li"])
    assert empty.data()["images"] == []


def test_large_images_show_their_centre_on_the_lr_grid(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, ["a"], side=52)
    write_report(tmp_path / "out", comparison, config=ReportConfig(side=16))
    image = Page((tmp_path / "out" / PAGE).read_text(encoding="utf-8")).data()["images"][0]
    assert (image["width"], image["height"]) == (16, 16)
    assert image["part"] == "The centre, 16 x 16 of 52 x 52 pixels."
    shown = np.asarray(Image.open(tmp_path / "out" / image["files"]["lr"]))
    assert np.array_equal(shown, np.asarray(Image.open(tmp_path / "lr" / "a.png"))[4:8, 4:8])


def test_the_part_shown_begins_on_the_grid() -> None:
    assert centre(100, 50, 40, 4) == (28, 4, 68, 44)
    assert centre(30, 20, 40, 4) == (0, 0, 30, 20)


def test_extremes_come_first_when_there_is_a_limit(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, [f"p{number:02d}" for number in range(30)], methods=1)
    kept = choose(comparison, comparison.images, ReportConfig(extremes=2, images=5))
    assert kept == ["p00", "p01", "p02", "p28", "p29"]


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_report(out, comparison_of(tmp_path))
    (out / "images" / "mine.png").write_bytes(b"x")
    write_report(out, comparison_of(tmp_path, NAMES[:1], methods=1))
    kept = sorted(path.name for path in (out / "images").iterdir())
    assert kept == ["00000-hr.png", "00000-lr.png", "00000-sr0.png", "mine.png"]
    (out / PAGE).write_text("<html>my home page</html>")
    with pytest.raises(UserError, match="is not a report of this command"):
        write_report(out, comparison_of(tmp_path))


def test_a_damaged_image_is_told_and_the_others_shown(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path)
    (tmp_path / "sr1" / "p3.png").write_bytes(b"no image")
    problems = write_report(tmp_path / "out", comparison)
    assert len(problems) == 1
    assert "p3.png" in problems[0]
    found = Page((tmp_path / "out" / PAGE).read_text(encoding="utf-8"))
    assert [image["name"] for image in found.data()["images"]] == ["p0", "p1", "p2", "p4", "p5"]


def test_recorded_files_cannot_lead_out_of_their_folder(tmp_path: Path) -> None:
    write_images(tmp_path, ["a", "b"], methods=1)
    result = make_result("x", {"a": 1.0, "b": 2.0}, folders=Files(sr=str(tmp_path / "sr0")))
    recorded = {"a": Files(sr="../hr/a.png"), "b": Files(sr="b.png")}
    object.__setattr__(result, "files", recorded)
    assert locate(compare([result])) == {"b": {"sr0": tmp_path / "sr0" / "b.png"}}
    object.__setattr__(result, "files", {"a": Files(sr=str(tmp_path / "hr" / "a.png"))})
    assert locate(compare([result])) == {}


def test_histograms_hold_every_image(page: Page) -> None:
    counts = [text for text in page.texts["title"] if re.fullmatch(r"[\d.]+ to [\d.]+: \d+", text)]
    assert sum(int(text.rpartition(" ")[2]) for text in counts) == len(NAMES) * 2 * 2
    assert "mean 22.50" in page.texts["title"]
    assert "mean 22.75" in page.texts["title"]


@pytest.mark.parametrize("flat", [[0.0, 0.0], [1e9, 1e9], [5.0]])
def test_equal_values_have_bins_around_them(flat: list[float], tmp_path: Path) -> None:
    edges = bin_edges(flat, 24)
    assert edges == sorted(set(edges))
    assert edges[0] < flat[0] < edges[-1]
    values = {f"p{number}": value for number, value in enumerate(flat)}
    write_report(tmp_path, compare([make_result("x", values)]))
    Page((tmp_path / PAGE).read_text(encoding="utf-8"))


def test_control_characters_and_lone_surrogates_do_not_reach_the_page(tmp_path: Path) -> None:
    write_report(tmp_path, compare([make_result("a\x00b", {"x\udc80": 1.0, "y": 2.0})]))
    text = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "Evaluation of a\ufffdb" in text
    assert "\x00" not in text


@pytest.mark.parametrize("setting", [{"images": -1}, {"side": 8}, {"extremes": 0}, {"bins": 0}])
def test_settings_out_of_range_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is"):
        ReportConfig(**setting)

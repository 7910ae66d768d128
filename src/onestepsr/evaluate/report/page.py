"""The report: one page and a folder of images. The page carries its style and script and may load nothing else.

A content security policy allows the one script and the one style sheet by their checksums and images beside the page;
whatever a file name or label holds, it can neither run nor call anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onestepsr import __version__
from onestepsr.core.errors import UserError
from onestepsr.evaluate.comparison import Comparison
from onestepsr.evaluate.report import sections
from onestepsr.evaluate.report.images import View, choose, locate, roles, write_views
from onestepsr.evaluate.report.plots import Markup, data_block, element, join
from onestepsr.evaluate.result import now
from onestepsr.evaluate.tables import Grid, decimals_of, difference_grid, heading, method_grid, write_texts

PAGE = "index.html"
GENERATOR = "onestepsr evaluation report"
MAX_PAGE_START = 4096
HERE = Path(__file__).parent
TITLES = {
    "summary": "Summary",
    "differences": "Paired differences",
    "viewer": "Images",
    "distributions": "Distributions",
    "extremes": "Worst and best",
    "values": "All values",
    "published": "Beside published numbers",
    "protocol": "How it was measured",
}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What a report holds."""

    pictures: int = 200
    """At most so many images can be looked at: the extremes of every metric first. Values of all are in the table."""
    side: int = 1024
    """Larger images are represented by their centre of this width and height, in pixels of the output."""
    extremes: int = 10
    """How many of the worst and of the best images are listed for each metric and method."""
    bins: int = 24
    """Bins of the histograms."""

    def __post_init__(self) -> None:
        for name, low, high in (("pictures", 0, 99_999), ("side", 16, 16_384), ("extremes", 1, 1000), ("bins", 1, 500)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} to {high}")


def write_report(
    folder: Path,
    comparison: Comparison,
    *,
    config: ReportConfig | None = None,
    published: Sequence[Grid] = (),
    track: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> list[str]:
    """Write the report of one or more methods into ``folder`` and return one line for each image that failed.

    ``published`` are tables of papers to show as well; ``track`` may show progress over the images. An earlier report
    in the folder is replaced; UserError if its ``index.html`` is something else, or if writing fails.
    """
    config = config or ReportConfig()
    page = folder / PAGE
    refuse_foreign(page)
    located = locate(comparison)
    available = [name for name in comparison.pictures if name in located]
    names = choose(comparison, available, config.extremes, config.pictures)
    views, problems = write_views(folder, track(names) if names else (), located, config.side)
    write_texts({page: render(comparison, views, config, published, problems)})
    return problems


def refuse_foreign(page: Path) -> None:
    """UserError if ``page`` exists and is no report of ours."""
    if not page.exists():
        return
    try:
        with page.open("rb") as handle:
            start = handle.read(MAX_PAGE_START)
    except OSError as error:
        raise UserError(f"{page}: cannot be read ({error.strerror})") from error
    if GENERATOR.encode() not in start:
        raise UserError(f"{page} exists and is not a report of this command: choose another folder for --report")


def render(
    comparison: Comparison,
    views: Sequence[View],
    config: ReportConfig,
    published: Sequence[Grid] = (),
    problems: Sequence[str] = (),
) -> str:
    """The page as text."""
    numbered = {view.name: (number, view) for number, view in enumerate(views)}
    style, script = (HERE.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    title = " and ".join(comparison.labels) if len(comparison.labels) < 4 else f"{len(comparison.labels)} methods"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        element("meta", name="generator", content=GENERATOR),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        # Without it a browser asks the server, if there is one, for an icon.
        element("link", rel="icon", href="data:,"),
        element("title", f"Evaluation of {title}"),
        element("style", Markup(style)),
    )
    parts = {name: part for name, part in _parts(comparison, numbered, config, published).items() if part}
    titles = {name: TITLES[name] for name in parts}
    lines = [*comparison.warnings, *problems, *_left_out(comparison, numbered)]
    written = [sections.section(name, TITLES[name], part) for name, part in parts.items()]
    body = element(
        "body",
        _header(comparison, title, titles),
        element("main", sections.warnings(lines), *written),
        data_block("data", _data(comparison, views)),
        element("script", Markup(script)),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _parts(
    comparison: Comparison, views: Mapping[str, tuple[int, View]], config: ReportConfig, published: Sequence[Grid]
) -> dict[str, Markup]:
    """The sections by name, in order; empty where there is nothing to show."""
    several = len(comparison.results) > 1
    papers = [join(element("h3", grid.title), sections.grid_table(grid, grid.title)) for grid in published]
    note = f"Mean over the {'common ' if several else ''}images ± half width of its 95 % interval (Student's t)."
    means = sections.grid_table(method_grid(comparison), "Means")
    return {
        "summary": join(means, element("p", note, class_="note")),
        "differences": sections.grid_table(difference_grid(comparison), "Paired differences") if several else Markup(),
        "viewer": sections.viewer(roles(comparison)) if views else Markup(),
        "distributions": sections.distributions(comparison, config.bins),
        "extremes": sections.extremes(comparison, views, config.extremes),
        "values": sections.all_images(comparison, views),
        "published": join(*papers),
        "protocol": join(*map(sections.protocol, comparison.results)),
    }


def _header(comparison: Comparison, title: str, titles: Mapping[str, str]) -> Markup:
    count = len(comparison.pictures)
    made = f"{count} {'image' if count == 1 else 'pictures'}; written by onestepsr {__version__}, {now()}"
    return join(
        element(
            "header",
            element("div", element("h1", f"Evaluation of {title}"), element("p", made, class_="faint")),
            element("button", "light / dark", type="button", id="theme"),
        ),
        element("nav", *(element("a", text, href=f"#{name}") for name, text in titles.items()), aria_label="Sections"),
        element(
            "noscript", element("p", "Without JavaScript the tables are all here; sorting and the viewer are not.")
        ),
    )


def _left_out(comparison: Comparison, views: Mapping[str, tuple[int, View]]) -> list[str]:
    missing = len(comparison.pictures) - len(views)
    if not missing:
        return []
    reason = "its files were not found where they were measured, or there are too many"
    return [
        f"{missing} of {len(comparison.pictures)} images cannot be looked at here ({reason}); their values are below"
    ]


def _data(comparison: Comparison, views: Sequence[View]) -> dict[str, Any]:
    """What the script needs: roles, and the images with their files and values as text."""
    shown = roles(comparison)
    methods = {f"sr{number}": number for number in range(len(comparison.results))}
    return {
        "roles": [{"key": key, "label": label, "method": methods.get(key)} for key, label in shown.items()],
        "pictures": [_image_data(comparison, view) for view in views],
    }


def _image_data(comparison: Comparison, view: View) -> dict[str, Any]:
    values = [
        [
            f"{heading(record)} {result.images[view.name][metric]:.{decimals_of(comparison, metric)}f}"
            for metric, record in comparison.metrics.items()
            if metric in result.images.get(view.name, {})
        ]
        for result in comparison.results
    ]
    width, height = view.whole
    part = (view.width, view.height) != view.whole
    text = f"The centre, {view.width} x {view.height} of {width} x {height} pixels." if part else ""
    return {
        "name": view.name,
        "width": view.width,
        "height": view.height,
        "part": text,
        "files": view.files,
        "values": values,
    }


def _policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    rules = (
        "default-src 'none'",
        "img-src 'self' file: data:",
        f"style-src 'sha256-{hashes[0]}'",
        f"script-src 'sha256-{hashes[1]}'",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return "; ".join(rules)

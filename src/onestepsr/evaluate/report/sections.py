"""The sections of the page, each a function from a comparison to HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onestepsr.evaluate.comparison import Comparison
from onestepsr.evaluate.report.images import View, ranking
from onestepsr.evaluate.report.plots import Attribute, Markup, element, histograms, join
from onestepsr.evaluate.result import EvaluationResult
from onestepsr.evaluate.tables import NOTHING, Grid, decimals_of, heading

SCROLLS: dict[str, Attribute] = {"class_": "scroll", "tabindex": 0, "role": "region"}
"""A table that scrolls in its own frame can be reached, and so scrolled, with the keyboard."""


def section(name: str, title: str, content: Markup) -> Markup:
    """A titled part of the page."""
    return element("section", element("h2", title), content, id=name)


def warnings(lines: Sequence[str]) -> Markup:
    """What to know before any number is read."""
    if not lines:
        return Markup()
    items = join(*(element("li", line) for line in lines))
    return element(
        "div", element("strong", "Read the numbers with care"), element("ul", items), class_="warning", role="note"
    )


def grid_table(grid: Grid, label: str) -> Markup:
    """A table of text cells with its notes."""
    columns = [element("th", text, scope="col", class_=_word(i < grid.words)) for i, text in enumerate(grid.columns)]
    rows = [element("tr", *_grid_cells(grid, number, row)) for number, row in enumerate(grid.rows)]
    table = element("table", element("thead", element("tr", *columns)), element("tbody", *rows))
    notes = [element("p", note, class_="note") for note in grid.notes]
    return join(element("div", table, aria_label=label, **SCROLLS), *notes)


def distributions(comparison: Comparison, bins: int) -> Markup:
    """A plot for each metric that has a value per image, over the common images."""
    plots = []
    for metric, record in comparison.metrics.items():
        common = comparison.common(metric)
        having = {result.label: own for result in comparison.results if (own := result.values(metric))}
        values = {label: [own[name] for name in common] for label, own in having.items()} if common else {}
        if values:
            rows = zip(comparison.labels, comparison.summaries, strict=True)
            summaries = {label: row[metric] for label, row in rows if metric in row}
            places = decimals_of(comparison, metric)
            plot = histograms(record.title, values, summaries, bins=bins, places=places)
            plots.append(element("figure", element("h3", heading(record)), plot))
    note = "Images per value, on the same scale for all methods. Line: mean; band: its 95 % interval."
    return join(element("p", note, class_="note"), element("div", *plots, class_="plots")) if plots else Markup()


def extremes(comparison: Comparison, views: Mapping[str, tuple[int, View]], count: int) -> Markup:
    """The worst and best images of every metric and method."""
    blocks = []
    for metric, record in comparison.metrics.items():
        for method, label in enumerate(comparison.labels):
            order = ranking(comparison, metric, method)
            if len(order) < 2:
                continue
            values, places = comparison.results[method].values(metric), decimals_of(comparison, metric)
            lists = [("worst", order[:count]), ("best", order[::-1][:count])]
            texts = [(title, {name: f"{values[name]:.{places}f}" for name in names}) for title, names in lists]
            parts = [_thumbnails(title, row, f"sr{method}", views) for title, row in texts]
            blocks.append(element("details", element("summary", f"{heading(record)}, {label}"), *parts))
    return join(*blocks)


def all_images(comparison: Comparison, views: Mapping[str, tuple[int, View]]) -> Markup:
    """The sortable table of every value; with two methods, their difference too."""
    metrics = [metric for metric in comparison.metrics if any(result.values(metric) for result in comparison.results)]
    columns = ["picture"]
    for metric in metrics:
        title = heading(comparison.metrics[metric])
        columns += [f"{title} {label}" if len(comparison.labels) > 1 else title for label in comparison.labels]
        columns += [f"{title} difference"] if len(comparison.labels) == 2 else []
    heads = [
        element("th", element("button", text, type="button"), scope="col", class_=_word(index == 0))
        for index, text in enumerate(columns)
    ]
    rows = [_image_row(comparison, metrics, name, views.get(name)) for name in comparison.pictures]
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows))
    search = element("input", type="search", id="filter", placeholder="part of a name")
    count = element("span", f"{len(rows)} images", id="shown", class_="faint", aria_live="polite")
    bar = element("div", element("label", "Show ", search), count, class_="bar")
    return join(bar, element("div", table, id="all", aria_label="All images", **SCROLLS))


def viewer(roles: Mapping[str, str]) -> Markup:
    """The stage with its slider, the controls and the place of the panes; the script fills them."""
    options = [element("option", label, value=role) for role, label in roles.items()]
    selects = [element("label", f"{side} ", element("select", *options, id=side.lower())) for side in ("Left", "Right")]
    buttons = [
        element("button", text, type="button", id=name, aria_label=label)
        for name, text, label in (
            ("previous", "‹", "Previous image"),
            ("next", "›", "Next image"),
            ("zoom-out", "−", "Zoom out"),
            ("zoom-in", "+", "Zoom in"),
            ("zoom-fit", "fit", "Whole image"),
            ("zoom-exact", "100 %", "One pixel for one pixel"),
        )
    ]
    pixels = element("label", element("input", type="checkbox", id="pixels", checked=True), " show pixels")
    name = element("span", "", id="image-name", aria_live="polite")
    number = element("span", "", id="image-number", class_="faint")
    zoom = element("span", "", id="zoom-now", class_="faint")
    slider = element(
        "input", type="range", id="split", min=0, max=100, step=1, value=50, aria_label="Where the left image ends"
    )
    return join(
        element("div", name, number, *buttons[:2], class_="bar"),
        element("div", *selects, *buttons[2:], zoom, pixels, class_="bar"),
        _stage(),
        slider,
        element("p", "", id="image-part", class_="note"),
        element("div", "", id="panes", class_="panes"),
        element("p", VIEWER_HELP, class_="note"),
    )


VIEWER_HELP = (
    "Drag the line, or move it with the arrow keys on the slider below the image. With the image focused: + and - "
    "zoom, 0 shows the whole, arrows move, Page Up and Page Down change the image. Ctrl and the wheel, or a double "
    "click, zoom at the pointer. LR is shown with its own pixels, enlarged."
)


def protocol(result: EvaluationResult) -> Markup:
    """How one result was measured, on what, and what could not be."""
    own = result.protocol
    model = result.model
    settings = {"protocol": own.name, **{key: str(value) for key, value in own.settings.items()}}
    if model is not None:
        settings["model"] = f"{model.name} {model.sha256[:12] if model.sha256 else ''}".strip()
        settings |= {f"model {key}": str(value) for key, value in model.options.items()}
    settings |= {record.title: record.variant for record in own.metrics.values() if record.variant}
    settings |= {"measured": result.date, "with": f"onestepsr {result.onestepsr}"}
    settings |= {key: str(value) for key, value in result.machine.items()}
    settings |= {f"{key}, seconds": f"{value:.1f}" for key, value in result.seconds.items()}
    settings |= {f"not measured: {name}": reason for name, reason in result.unavailable.items()}
    settings |= {f"failed: {name}": reason for name, reason in result.failed.items()}
    rows = [join(element("dt", key), element("dd", value)) for key, value in settings.items() if value]
    return join(element("h3", result.label), element("dl", *rows))


def _stage() -> Markup:
    layers = [
        element("div", element("img", alt="", draggable="false"), class_=f"layer {side}") for side in ("right", "left")
    ]
    tags = [element("span", "", class_=f"tag {side}") for side in ("left", "right")]
    handle = element("div", "", class_="handle")
    label = "Comparison of two images; keys: plus, minus, 0, arrows, page up and down"
    return element(
        "div", *layers, handle, *tags, id="stage", class_="stage", tabindex=0, role="group", aria_label=label
    )


def _grid_cells(grid: Grid, number: int, row: Sequence[str]) -> list[Markup]:
    cells = []
    for index, text in enumerate(row):
        classes = [_word(index < grid.words), "best" if (number, index) in grid.best else None]
        classes.append(text if text in ("better", "worse") else None)
        cells.append(element("td", text, class_=" ".join(filter(None, classes)) or None))
    return cells


def _thumbnails(title: str, values: Mapping[str, str], role: str, views: Mapping[str, tuple[int, View]]) -> Markup:
    items = []
    for name, value in values.items():
        text = join(element("b", value), name)
        number, view = views.get(name, (None, None))
        path = view.files.get(role) if view else None
        if number is None or path is None:
            items.append(element("li", text, class_="thumb"))
        else:
            image = element("img", src=path, alt="", loading="lazy")
            items.append(
                element("li", element("button", image, text, type="button", class_="thumb", data_image=number))
            )
    return join(element("h3", title), element("ol", *items, class_="thumbs"))


def _image_row(comparison: Comparison, metrics: Sequence[str], name: str, found: tuple[int, View] | None) -> Markup:
    number = found[0] if found else None
    link = name if found is None else element("button", name, type="button", class_="link", data_image=number)
    cells = [element("td", link, class_="word")]
    for metric in metrics:
        places = decimals_of(comparison, metric)
        values = [result.images.get(name, {}).get(metric) for result in comparison.results]
        cells += [_number(value, f"{value:.{places}f}" if value is not None else "") for value in values]
        if len(values) == 2:
            first, second = values
            known = first is not None and second is not None
            change = second - first if first is not None and second is not None else None
            cells.append(_number(change, f"{change:+.{places}f}" if known else ""))
    return element("tr", *cells, data_image=number)


def _number(value: float | None, text: str) -> Markup:
    return element("td", NOTHING) if value is None else element("td", text, data_value=repr(value))


def _word(yes: bool) -> str | None:
    return "word" if yes else None

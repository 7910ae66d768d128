"""The HTML report: one page and a folder of images. The page carries its style and script and may load nothing else.

A content security policy allows the one script and the one style sheet by their checksums, and images beside the page.
No file name or label can run as a script or load anything. ``templates/report.html`` is the page;
this module prepares its numbers, plots and images.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from onestepsr import __version__
from onestepsr.core.errors import UserError
from onestepsr.core.files import replacing, write_text
from onestepsr.core.tables import NOTHING, Grid, safe_text
from onestepsr.evaluate.comparison import Comparison
from onestepsr.evaluate.result import EvaluationResult, Files, now
from onestepsr.evaluate.tables import decimals_of, difference_grid, heading, method_grid

if TYPE_CHECKING:
    from onestepsr.imaging.read import Samples

PAGE = "index.html"
FOLDER = "images"
GENERATOR = "onestepsr evaluation report"
MAX_PAGE_START = 4096
TEMPLATES = Path(__file__).parent / "templates"
PAGE_PARTS = ((Path(__file__).parents[1] / "assets", "compare"), (TEMPLATES, "report"))
"""Style and script of the page: the slider, which the server's page has as well, and the report's own."""

_OURS = re.compile(r"\d{5}-(lr|hr|sr\d+)\.png")
_COMPRESSION = 4


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Limits on the content of a report."""

    images: int = 200
    """Number of images that can be looked at: the extremes of every metric first. Values of all are in the table."""
    side: int = 1024
    """Larger images are represented by their centre of this width and height, in pixels of the output."""
    extremes: int = 10
    """Number of the worst and of the best images that are listed for each metric and method."""
    bins: int = 24
    """Bins of the histograms."""

    def __post_init__(self) -> None:
        for name, low, high in (("images", 0, 99_999), ("side", 16, 16_384), ("extremes", 1, 1000), ("bins", 1, 500)):
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
    refuse_foreign(folder / PAGE)
    located = locate(comparison)
    names = choose(comparison, [name for name in comparison.images if name in located], config)
    views, problems = write_views(folder / FOLDER, track(names) if names else (), located, config.side)
    write_text(folder / PAGE, render(comparison, views, config, published, problems))
    return problems


def refuse_foreign(page: Path) -> None:
    """Raise UserError if ``page`` exists and was not written by this command."""
    if not page.exists():
        return
    try:
        with page.open("rb") as handle:
            start = handle.read(MAX_PAGE_START)
    except OSError as error:
        raise UserError(f"{page}: cannot be read ({error.strerror})") from error
    if GENERATOR.encode() not in start:
        raise UserError(f"{page} exists and is not a report of this command: choose another folder for --report")


# ---- images: found where the evaluation had them, written as PNG that any browser shows alike ----
#
# Pixels are those that were measured (orientation applied, colour profiles and transparency left aside); nothing else
# of a file goes into the report, neither its name nor its metadata. A large image is represented by its centre,
# because a reduced one would hide the details to compare.


@dataclass(frozen=True, kw_only=True)
class View:
    """One image of the report."""

    number: int
    """Its number in the viewer."""
    files: dict[str, str]
    """By role (``lr``, ``hr``, ``sr0``, ``sr1``, ...) the path in the report."""
    width: int
    """Width of the part shown, in pixels of the output."""
    height: int
    whole: tuple[int, int]
    """Width and height of the whole image; more than is shown if only the centre is."""


def locate(comparison: Comparison) -> dict[str, dict[str, Path]]:
    """By image and role, the files that exist; images without any super-resolved file are left out."""
    found: dict[str, dict[str, Path]] = {}
    for number, result in enumerate(comparison.results):
        recorded = (("lr", result.folders.lr), (f"sr{number}", result.folders.sr), ("hr", result.folders.hr))
        for role, folder in recorded:
            for name, path in _files(result, role, folder).items():
                found.setdefault(name, {}).setdefault(role, path)
    return {name: files for name, files in found.items() if any(role.startswith("sr") for role in files)}


def _files(result: EvaluationResult, role: str, folder: str | None) -> dict[str, Path]:
    if folder is None:
        return {}
    root = Path(folder)
    if root.is_file():
        return dict.fromkeys(list(result.images)[:1], root)
    recorded = {name: getattr(result.files.get(name, Files()), role[:2]) for name in result.images}
    if not any(recorded.values()):
        return _by_name(root, result)
    # A file of results may come from somebody else: nothing outside the folder it names is shown.
    inside = {name: Path(own) for name, own in recorded.items() if own and ".." not in Path(own).parts}
    return {name: root / own for name, own in inside.items() if not own.is_absolute() and (root / own).is_file()}


def _by_name(root: Path, result: EvaluationResult) -> dict[str, Path]:
    from onestepsr.data.photos import find_images

    named = {p.relative_to(root).with_suffix("").as_posix(): p for p in (find_images(root) if root.is_dir() else ())}
    return {name: named[name] for name in result.images if name in named}


def choose(comparison: Comparison, names: Sequence[str], config: ReportConfig) -> list[str]:
    """Select the images to show: worst and best of every metric and method first, then others in order."""
    methods = range(len(comparison.results))
    ranked = [ranking(comparison, metric, method) for metric in comparison.metrics for method in methods]
    wanted: dict[str, None] = {}
    for rank in range(config.extremes):
        for order in ranked:
            wanted.update(dict.fromkeys([*order[rank : rank + 1], *order[-1 - rank :][:1]]))
    available = set(names)
    first = [name for name in wanted if name in available][: config.images]
    kept = set([*first, *(name for name in names if name not in wanted)][: config.images])
    return [name for name in names if name in kept]


def ranking(comparison: Comparison, metric: str, method: int) -> list[str]:
    """Images of one method from the worst to the best value of ``metric``."""
    values = comparison.results[method].values(metric)
    return sorted(values, key=lambda name: values[name], reverse=not comparison.metrics[metric].higher_is_better)


def write_views(
    target: Path, names: Iterable[str], located: Mapping[str, Mapping[str, Path]], side: int
) -> tuple[dict[str, View], list[str]]:
    """Write the images called ``names``, at most ``side`` pixels wide and high; also one line for each that fails.

    Files of an earlier report in the same folder that are no longer used are removed.
    """
    views: dict[str, View] = {}
    problems = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            try:
                views[name] = _write_view(target, len(views), located[name], side)
            except UserError as error:
                problems.append(str(error))
        used = {Path(path).name for view in views.values() for path in view.files.values()}
        for path in target.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in used:
                path.unlink()
    except OSError as error:
        raise UserError(f"{target}: images of the report cannot be written ({error.strerror})") from error
    return views, problems


def _write_view(target: Path, number: int, files: Mapping[str, Path], side: int) -> View:
    from PIL import Image

    from onestepsr.data.photos import read_pixels

    pixels: dict[str, Samples] = {role: read_pixels(path) for role, path in files.items()}
    height, width = next(pixels[role] for role in sorted(pixels, reverse=True) if role != "lr").shape[:2]
    # The part shown begins at the border of an LR pixel.
    factor = max(1, round(width / pixels["lr"].shape[1])) if "lr" in pixels else 1
    box = centre(width, height, side, factor)
    written = {}
    for role, samples in pixels.items():
        scale_x, scale_y = samples.shape[1] / width, samples.shape[0] / height
        left, right = round(box[0] * scale_x), max(1, round(box[2] * scale_x))
        top, bottom = round(box[1] * scale_y), max(1, round(box[3] * scale_y))
        path = target / f"{number:05d}-{role}.png"
        with replacing(path) as partial:
            part = Image.fromarray(samples[top:bottom, left:right])
            part.save(partial, format="PNG", compress_level=_COMPRESSION)
        written[role] = f"{FOLDER}/{path.name}"
    return View(number=number, files=written, width=box[2] - box[0], height=box[3] - box[1], whole=(width, height))


def centre(width: int, height: int, side: int, multiple: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part shown; its corner lies on a multiple of ``multiple``."""
    left, top = (max(0, length - side) // 2 // multiple * multiple for length in (width, height))
    return left, top, min(width, left + side), min(height, top + side)


# ---- page ----


def render(
    comparison: Comparison,
    views: Mapping[str, View],
    config: ReportConfig,
    published: Sequence[Grid] = (),
    problems: Sequence[str] = (),
) -> str:
    """The page as text; ``views`` are the images that can be looked at, by name."""
    labels, several = comparison.labels, len(comparison.results) > 1
    style, script = (
        "".join(folder.joinpath(f"{name}.{ending}").read_text(encoding="utf-8") for folder, name in PAGE_PARTS)
        for ending in ("css", "js")
    )
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    own = f"style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
    decimals = {metric: decimals_of(comparison, metric) for metric in comparison.metrics}
    roles = {"lr": "LR", **{f"sr{number}": label for number, label in enumerate(labels)}, "hr": "HR"}
    lines = [*comparison.warnings, *problems]
    if missing := len(comparison.images) - len(views):
        reason = "its files were not found where they were measured, or there are too many"
        count = f"{missing} of {len(comparison.images)}"
        lines.append(f"{count} images cannot be looked at here ({reason}); their values are below")

    def number(metric: str, value: float | None, sign: str = "") -> str:
        return NOTHING if value is None else f"{value:{sign}.{decimals[metric]}f}"

    # Escapes every value; control characters of names are replaced first.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: safe_text(value) if type(value) is str else value,
    )
    page = environment.get_template("report.html").render(
        title=" and ".join(labels) if len(labels) < 4 else f"{len(labels)} methods",
        generator=GENERATOR,
        version=__version__,
        date=now(),
        policy=f"default-src 'none'; img-src 'self' file: data:; {own}; base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        comparison=comparison,
        per_image={m: r for m, r in comparison.metrics.items() if any(each.values(m) for each in comparison.results)},
        number=number,
        heading=heading,
        ranking=ranking,
        warnings=lines,
        means=method_grid(comparison),
        differences=difference_grid(comparison) if several else None,
        roles=roles,
        views=views,
        plots=[plot for metric in comparison.metrics if (plot := _plot(comparison, metric, config.bins))],
        extremes=config.extremes,
        published=published,
        data={
            "roles": [
                {"key": key, "label": label, "method": int(key[2:]) if key.startswith("sr") else None}
                for key, label in roles.items()
            ],
            "images": [_image_data(comparison, name, view, number) for name, view in views.items()],
        },
    )
    return page.strip() + "\n"


def _image_data(
    comparison: Comparison, name: str, view: View, number: Callable[[str, float | None], str]
) -> dict[str, Any]:
    """One image for the script of the viewer."""
    values = [
        [f"{heading(record)} {number(key, own[key])}" for key, record in comparison.metrics.items() if key in own]
        for own in (result.images.get(name, {}) for result in comparison.results)
    ]
    part = f"The centre, {view.width} x {view.height} of {view.whole[0]} x {view.whole[1]} pixels."
    shown = {"name": name, "width": view.width, "height": view.height, "files": view.files, "values": values}
    return {**shown, "part": "" if (view.width, view.height) == view.whole else part}


def _plot(comparison: Comparison, metric: str, bins: int) -> dict[str, Any] | None:
    """Histograms of a metric over the common images, one for each method that has it; positions are shares of 1."""
    common = comparison.common(metric)
    if not common:
        return None
    decimals, record = decimals_of(comparison, metric), comparison.metrics[metric]
    pairs = zip(comparison.results, comparison.summaries, strict=True)
    having = [(result, summaries[metric]) for result, summaries in pairs if result.values(metric)]
    columns = [[result.images[name][metric] for name in common] for result, _ in having]
    edges = bin_edges([value for column in columns for value in column], bins)
    counts = [np.histogram(column, edges)[0].tolist() for column in columns]
    tallest = max(max(each) for each in counts)

    def share(value: float) -> float:
        return min(1.0, max(0.0, (value - edges[0]) / (edges[-1] - edges[0])))

    rows = []
    for (result, summary), own in zip(having, counts, strict=True):
        mean, half = summary.mean, summary.interval95
        texts = [f"{low:.{decimals}f} to {high:.{decimals}f}" for low, high in pairwise(edges)]
        bars = [(k / bins, count / tallest, f"{texts[k]}: {count}") for k, count in enumerate(own) if count]
        band = None if half is None else (share(mean - half), share(mean + half))
        marks = {"mean": (share(mean), f"mean {mean:.{decimals}f}"), "band": band}
        rows.append({"label": result.label, "count": len(common), "bars": bars, **marks})
    ticks = [(k / 4, f"{edges[0] + k / 4 * (edges[-1] - edges[0]):.{decimals}f}") for k in range(5)]
    return {"title": record.title, "heading": heading(record), "rows": rows, "ticks": ticks, "bins": bins}


def bin_edges(values: Sequence[float], bins: int) -> list[float]:
    """Borders of the bins; equal values get bins of width 0.1 or a millionth of their size around them."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = max(0.05 * bins, 1e-6 * abs(low))
        low, high = low - room, high + room
    return [float(edge) for edge in np.linspace(low, high, bins + 1)]

"""Distributions of a metric as inline SVG: one histogram for each method, over the same bins."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onestepsr.evaluate.result import safe_text
from onestepsr.evaluate.statistics import Summary

# HTML put together from elements. Text is escaped unless it is markup already, so that no name c ----------------------

VOID = frozenset({"img", "input", "link", "meta"})
Attribute = str | int | float | bool | None


class Markup(str):
    """Text that is HTML and stays as it is."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: Attribute) -> Markup:
    """One element. ``class_`` stands for class and ``_`` inside a name for ``-``; None and False leave one out."""
    written = "".join(map(_attribute, attributes, attributes.values()))
    if tag in VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: str) -> Markup:
    """Children one after the other, plain text escaped."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def escape(text: str) -> Markup:
    """``text`` as HTML, safe between tags and in quoted attributes."""
    return Markup(html.escape(safe_text(text), quote=True))


def data_block(name: str, content: Any) -> Markup:
    """JSON in an element that is not run; nothing in it can end the element."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    written = name.rstrip("_").replace("_", "-")
    return f" {written}" if value is True else f' {written}="{escape(str(value))}"'


WIDTH, ROW, GAP, AXIS = 420, 64, 22, 26
"""Sizes of a plot in its own units: width, height of a histogram, room above it for its name, and of the axis."""
TICKS = 5
COLOURS = 6
"""Series have their colours from the style sheet, one after the other."""


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """What the histograms of one plot share."""

    edges: list[float]
    tallest: int
    """Images in the highest bar of any of them."""
    places: int
    """Decimals of numbers."""


def histograms(
    title: str, values: Mapping[str, Sequence[float]], summaries: Mapping[str, Summary], *, bins: int, places: int
) -> Markup:
    """Histograms of ``values`` by method, one below the other; a line marks the mean, a band its 95 % interval."""
    everything = np.concatenate([np.asarray(column, dtype=np.float64) for column in values.values()])
    edges = _edges(float(everything.min()), float(everything.max()), bins)
    counts = {label: np.histogram(column, edges)[0] for label, column in values.items()}
    scale = _Scale(edges=edges, tallest=max(int(column.max()) for column in counts.values()), places=places)
    rows = [
        _row(number, label, counts[label].tolist(), summaries.get(label), scale) for number, label in enumerate(values)
    ]
    height = len(rows) * (ROW + GAP) + AXIS
    described = ", ".join(f"{label}: {len(column)} images" for label, column in values.items())
    return element(
        "svg",
        element("title", f"{title}; {described}"),
        *rows,
        _axis(edges, height - AXIS, places),
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        class_="plot",
    )


def _edges(low: float, high: float, bins: int) -> list[float]:
    """Borders of the bins; equal values get bins of width 0.1 or a millionth of their size around them."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = max(0.05 * bins, 1e-6 * abs(low))
        low, high = low - room, high + room
    return [float(edge) for edge in np.linspace(low, high, bins + 1)]


def _place(value: float, edges: Sequence[float]) -> float:
    share = (value - edges[0]) / (edges[-1] - edges[0])
    return round(min(1.0, max(0.0, share)) * WIDTH, 2)


def _row(number: int, label: str, counts: Sequence[int], summary: Summary | None, scale: _Scale) -> Markup:
    edges, places, top = scale.edges, scale.places, number * (ROW + GAP) + GAP
    bars = [
        element(
            "rect",
            element("title", f"{edges[i]:.{places}f} to {edges[i + 1]:.{places}f}: {count}"),
            x=round(WIDTH * i / len(counts) + 1, 2),
            y=round(top + ROW * (1 - count / scale.tallest), 2),
            width=round(WIDTH / len(counts) - 2, 2),
            height=round(ROW * count / scale.tallest, 2),
        )
        for i, count in enumerate(counts)
        if count
    ]
    marks = _mean_mark(summary, edges, top, places) if summary else Markup()
    name = element("text", label, x=0, y=top - 7, class_="name")
    floor = element("line", x1=0, x2=WIDTH, y1=top + ROW, y2=top + ROW, class_="axis")
    return element("g", name, join(*bars), floor, marks, class_=f"series series-{number % COLOURS}")


def _mean_mark(summary: Summary, edges: Sequence[float], top: int, places: int) -> Markup:
    x = _place(summary.mean, edges)
    parts = []
    if summary.interval95 is not None:
        low, high = (_place(summary.mean + sign * summary.interval95, edges) for sign in (-1, 1))
        band = {"x": low, "width": round(max(high - low, 1), 2), "y": top, "height": ROW}
        parts.append(element("rect", class_="interval", **band))
    line = element("line", element("title", f"mean {summary.mean:.{places}f}"), x1=x, x2=x, y1=top, y2=top + ROW)
    return element("g", *parts, line, class_="mean")


def _axis(edges: Sequence[float], top: int, places: int) -> Markup:
    labels = []
    for tick in range(TICKS):
        share = tick / (TICKS - 1)
        anchor = "start" if tick == 0 else "end" if tick == TICKS - 1 else "middle"
        value = edges[0] + share * (edges[-1] - edges[0])
        text = f"{value:.{places}f}"
        labels.append(element("text", text, x=round(WIDTH * share, 2), y=top + 18, text_anchor=anchor, class_="tick"))
    return join(*labels)

"""HTML put together from elements. Text is escaped unless it is markup already, so that no name can become a tag."""

from __future__ import annotations

import html
import json
from typing import Any

from onestepsr.evaluate.result import safe_text

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

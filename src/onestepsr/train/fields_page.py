"""The fields of recipes for people: as text for a terminal, and as the page ``docs/recipes.md``."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Sequence

from onestepsr.benchmark.tables import Table
from onestepsr.data.config import DataConfig
from onestepsr.methods.base import get_method, method_names
from onestepsr.methods.catalog import load_methods
from onestepsr.train.config import TrainConfig
from onestepsr.train.fields import ANY, REQUIRED, SUPPLIED, RecipeField, on_one_line, recipe_fields
from onestepsr.train.recipes import RunConfig, ValidationConfig

COMMAND = "onestepsr train --fields"
"""What prints the page."""
SHARED = {"": RunConfig, "data": DataConfig, "train": TrainConfig, "validation": ValidationConfig}
"""Sections of every recipe by the group that they describe."""
WIDTH = 96
"""Columns of the text in a terminal."""
WIDEST_VALUE = 24
"""Columns reserved for values; longer ones push the type to the right."""
INTRODUCTION = f"""\
# Fields of a recipe

Made by `{COMMAND} > docs/recipes.md` from the classes that a recipe is read into. The same for one method in the
terminal: `onestepsr train METHOD --fields`, and with `--recipe NAME` the values of that recipe.

Every name is an override as it stands, `onestepsr train d3sr --recipe d3sr-tiny train.optimizer.lr=1e-4`, and a path
through the YAML file: `train: {{optimizer: {{lr: 1e-4}}}}`. Beside these fields, `extends: RECIPE` takes over from
another recipe what the file does not say, but for `out` ([runs](training.md#a-run-is-a-recipe-plus-overrides)).

What stands before the first `config` holds for every method."""


def as_text(fields: Sequence[RecipeField]) -> str:
    """Name, value and type of each field in columns, and below them what it means."""
    unused = ["Values in parentheses: what fields begin with in groups that the recipe does not use.", ""]
    lines = [] if all(field.in_use for field in fields) else unused
    width = max(len(field.path) for field in fields)
    for field in fields:
        value = field.value if field.in_use or not field.value else f"({field.value})"
        lines.append(f"{field.path:{width}}  {value:{WIDEST_VALUE}}  {field.kind}")
        indent = " " * 4
        lines += textwrap.wrap(
            field.meaning, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    return "\n".join(lines) + "\n"


def as_markdown() -> str:
    """The page with the fields of all methods, those that they share once."""
    load_methods()
    blocks = [INTRODUCTION]
    shared = recipe_fields(method_names()[0])
    for group, cls in SHARED.items():
        blocks += _sections(f"`{group}`" if group else "Every recipe", cls, _below(group, shared))
    for method in method_names():
        blocks += _sections(f"`config` of {method}", get_method(method).config, _below("config", recipe_fields(method)))
    return "\n\n".join(blocks) + "\n"


def _below(group: str, fields: Sequence[RecipeField]) -> list[RecipeField]:
    """The fields in a group; for none those that are in no group."""
    return [field for field in fields if (field.path.startswith(f"{group}.") if group else "." not in field.path)]


def _sections(title: str, cls: type, fields: Sequence[RecipeField]) -> Iterator[str]:
    """One table, and one more for each of several groups that may stand in the same place."""
    places = tuple({field.path.removesuffix("*") for field in fields if field.path.endswith(ANY)})
    notes = {title: on_one_line(inspect.getdoc(cls) or "")}
    rows: dict[str, list[RecipeField]] = {title: []}
    name = title
    for field in fields:
        if field.path.endswith(ANY):
            name = f"`{field.path.removesuffix(ANY)}`, group {len(rows)}"
            notes[name], rows[name] = field.meaning, []
            continue
        name = name if field.path.startswith(places) else title
        rows[name].append(field)
    for heading, own in rows.items():
        yield _section(heading, notes[heading], own)


def _section(title: str, note: str, fields: Sequence[RecipeField]) -> str:
    rows = ((f"`{field.path}`", field.kind, _code(field.value), field.meaning) for field in fields)
    cells = tuple(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)
    columns = ("field", "type", "default", "meaning")
    return Table(title=title, columns=columns, rows=cells, note=note, words=len(columns)).markdown()


def _code(value: str) -> str:
    return value if value in ("", REQUIRED, *SUPPLIED.values()) else f"`{value}`"

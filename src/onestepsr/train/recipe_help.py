"""The fields that a recipe can have, read from the dataclasses that it becomes.

What a field means is the string that stands below it in the source: there is no second description to keep true.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from onestepsr.benchmark.tables import Table
from onestepsr.core.config import to_mapping
from onestepsr.data.config import DataConfig
from onestepsr.methods.base import get_method, method_names
from onestepsr.train.recipes import RunConfig, TrainConfig, ValidationConfig, load_methods

Shown = Literal["defaults", "recipe", "unused"]
"""What the values of a group are: defaults, those of a recipe, or what the recipe would have if it used the group."""
ANY = ".*"
"""Ends the path of an entry that introduces one of several groups which may stand in the same place."""
REQUIRED = "required"
SUPPLIED = {"method": "METHOD", "out": "runs/RECIPE"}
"""What the command fills in where a recipe says nothing."""
REPEATED = {"train.optimizers": "train.optimizer", "validation.data": "data"}
"""Groups with the fields of another group, which are listed again only with the values of a recipe that has them."""
WORDS: dict[Any, tuple[str, str]] = {
    int: ("integer", "integers"),
    float: ("number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "truth values"),
    Path: ("path", "paths"),
    type(None): ("null", "null"),
}
"""Types as a reader of YAML would say them, one value and several."""


@dataclass(frozen=True, kw_only=True)
class RecipeField:
    """One field, as an override names it."""

    path: str
    """Its name with those of the groups around it, such as ``train.optimizer.lr``."""
    kind: str
    """Its type, in words."""
    value: str
    """Its value or default as YAML, or :data:`REQUIRED`; empty for a group whose fields follow."""
    meaning: str
    """What the source says about it, on one line."""
    in_use: bool = True
    """False for a field of a group that the recipe leaves out: the value is then what the group would begin with."""


def recipe_fields(method: str, run: RunConfig | None = None) -> list[RecipeField]:
    """Every field of a recipe for ``method``: with the values of ``run``, a run of that method, or with defaults."""
    load_methods()
    shown: Shown = "defaults" if run is None else "recipe"
    return list(fields_of(RunConfig, values=run, shown=shown, settings=get_method(method).config))


def fields_of(
    cls: type[Any], where: str = "", *, values: Any = None, shown: Shown = "defaults", settings: Any = Any
) -> Iterator[RecipeField]:
    """The fields of a dataclass and of the groups below it.

    ``where`` is the path of the group; ``values`` is an instance whose values are shown instead of the defaults of
    ``cls``, and ``shown`` says whose instance that is. ``settings`` is the type of a field that may hold anything, such
    as the settings of a method.
    """
    meanings = field_meanings(cls)  # type: ignore[arg-type]  # a class can be hashed
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = f"{where}.{field.name}" if where else field.name
        hint = settings if hints[field.name] is Any else hints[field.name]
        value = _default(field) if values is None else getattr(values, field.name)
        yield RecipeField(
            path=path,
            kind=_kind(hint) + (f", with the fields of `{REPEATED[path]}`" if path in REPEATED else ""),
            value=_missing(path, hint) if value is dataclasses.MISSING else _shown(value),
            meaning=meanings.get(field.name, ""),
            in_use=shown != "unused",
        )
        yield from _fields_below(path, hint, value, shown)


@cache
def field_meanings(cls: type[Any]) -> dict[str, str]:
    """The strings below the fields of a dataclass and of those that it inherits from, on one line each."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, following in pairwise(definition.body):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                meanings[statement.target.id] = on_one_line(str(following.value.value))
    return meanings


def on_one_line(text: str) -> str:
    """A docstring without its line breaks, with code as Markdown marks it."""
    return " ".join(text.split()).replace("``", "`")


def _fields_below(path: str, hint: Any, value: Any, shown: Shown) -> Iterator[RecipeField]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if dataclasses.is_dataclass(item):
                yield from fields_of(type(item), f"{path}.{name}", values=item, shown=shown)
    groups = _groups(hint)
    for group in groups:
        own = value if isinstance(value, group) else None
        if own is None and path in REPEATED:
            continue
        below: Shown = "unused" if own is None and shown == "recipe" else shown
        if len(groups) > 1:
            meaning = on_one_line(inspect.getdoc(group) or "")
            in_use = below != "unused"
            yield RecipeField(path=path + ANY, kind="one such group", value="", meaning=meaning, in_use=in_use)
        yield from fields_of(group, path, values=own, shown=below)


def _groups(hint: Any) -> list[type[Any]]:
    """The dataclasses of which a value of this type may be one."""
    if get_origin(hint) in (Union, types.UnionType):
        return [group for choice in get_args(hint) for group in _groups(choice)]
    return [hint] if dataclasses.is_dataclass(hint) and isinstance(hint, type) else []


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _missing(path: str, hint: Any) -> str:
    """What stands for the default of a field that has none."""
    return "" if _groups(hint) else SUPPLIED.get(path, REQUIRED)


def _shown(value: Any) -> str:
    parts = list(value.values()) if isinstance(value, Mapping) else [value]
    return "" if any(map(dataclasses.is_dataclass, parts)) else _as_yaml(value)


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(to_mapping(value), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _kind(hint: Any, several: bool = False) -> str:
    """A type in words; for ``several`` values of it in the plural."""
    *before, last = dict.fromkeys(_kinds(hint, several))
    return f"{', '.join(before)} or {last}" if before else last


def _kinds(hint: Any, several: bool) -> list[str]:
    """What a value may be, one entry for each possibility."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return [str(argument) for argument in arguments]
    if origin in (Union, types.UnionType):
        return [kind for argument in arguments for kind in _kinds(argument, several)]
    if origin in (dict, Mapping):
        return [f"{_kind(arguments[1], several=True)} by name"]
    if origin is tuple and Ellipsis not in arguments:
        return [f"list of {len(arguments)} {_kind(arguments[0], several=True)}"]
    if origin in (tuple, list):
        return [f"list of {_kind(arguments[0], several=True)}"]
    return [WORDS.get(hint, ("group", "groups"))[several]]


# The fields of recipes for people: as text for a terminal, and as the page ``docs/recipes.md`` ------------------------

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

"""The fields that a recipe can have, read from the dataclasses that it becomes.

The meaning of a field is the string below it in the source: there is no second description to keep true.
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

from onestepsr.core.config import to_mapping
from onestepsr.data.datasets import DataConfig
from onestepsr.methods.base import get_method, method_names
from onestepsr.train.recipes import RunConfig, TrainConfig, ValidationConfig, load_methods

REQUIRED = "required"
SUPPLIED = {"method": "METHOD", "out": "runs/RECIPE"}
"""Values that the command fills in where a recipe gives none."""
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
"""Types in words for a reader of YAML, one value and several."""


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
    """Its description in the source, on one line."""


# ---- Collecting fields -----------------------------------------------------------------------------------------------


def recipe_fields(method: str, run: RunConfig | None = None) -> list[RecipeField]:
    """Every field of a recipe for ``method`` with its default, or those that ``run``, a run of that method, uses, with
    their values."""
    load_methods()
    return list(fields_of(RunConfig, values=run, recipe=run is not None, settings=get_method(method).config))


def fields_of(
    cls: type[Any], where: str = "", *, values: Any = None, recipe: bool = False, settings: Any = Any
) -> Iterator[RecipeField]:
    """The fields of a dataclass and of the groups below it.

    ``where`` is the path of the group; ``values`` is an instance whose values are shown instead of the defaults of
    ``cls``. Of a ``recipe``, groups that it leaves out are not listed; otherwise all that may stand in a place are, and
    an entry introduces each. ``settings`` is the type of a field that may hold anything, such as the settings
    of a method.
    """
    meanings, hints = field_meanings(cls), get_type_hints(cls)  # type: ignore[arg-type]  # a class can be hashed
    for field in dataclasses.fields(cls):
        path = f"{where}.{field.name}" if where else field.name
        hint = settings if hints[field.name] is Any else hints[field.name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value, groups = default if values is None else getattr(values, field.name), _groups(hint)
        missing = "" if groups else SUPPLIED.get(path, REQUIRED)
        yield RecipeField(
            path=path,
            kind=_kind(hint) + (f", with the fields of `{REPEATED[path]}`" if path in REPEATED else ""),
            value=missing if value is dataclasses.MISSING else _shown(value),
            meaning=meanings.get(field.name, ""),
        )
        for name, item in value.items() if isinstance(value, Mapping) else ():
            if dataclasses.is_dataclass(item):
                yield from fields_of(type(item), f"{path}.{name}", values=item, recipe=recipe)
        for group in groups:
            own = value if isinstance(value, group) else None
            if own is None and (recipe or path in REPEATED):
                continue
            if len(groups) > 1 and not recipe:
                yield RecipeField(path=path, kind="one such group", value="", meaning=_on_one_line(str(group.__doc__)))
            yield from fields_of(group, path, values=own, recipe=recipe)


@cache
def field_meanings(cls: type[Any]) -> dict[str, str]:
    """The strings below the fields of a dataclass and of those that it inherits from, on one line each."""
    meanings: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, below in pairwise(definition.body):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and is_text:
                meanings[ast.unparse(statement.target)] = _on_one_line(str(ast.literal_eval(ast.unparse(below))))
    return meanings


def _on_one_line(text: str) -> str:
    """A docstring without its line breaks, with code as Markdown marks it."""
    return " ".join(text.split()).replace("``", "`")


def _groups(hint: Any) -> list[type[Any]]:
    """The dataclasses of which a value of this type may be one."""
    if get_origin(hint) in (Union, types.UnionType):
        return [group for choice in get_args(hint) for group in _groups(choice)]
    return [hint] if dataclasses.is_dataclass(hint) and isinstance(hint, type) else []


def _shown(value: Any) -> str:
    """The value as YAML on one line; nothing for groups."""
    if any(map(dataclasses.is_dataclass, value.values() if isinstance(value, Mapping) else [value])):
        return ""
    text = yaml.safe_dump(to_mapping(value), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _kind(hint: Any, several: bool = False) -> str:
    """A type in words; for ``several`` values of it in the plural."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Literal, Union, types.UnionType):
        choices = [each for a in arguments for each in (get_args(a) if get_origin(a) is Literal else (a,))]
        kinds = [str(each) if isinstance(each, (str, int)) else _kind(each, several) for each in choices]
        *before, last = dict.fromkeys(kinds)
        return f"{', '.join(before)} or {last}" if before else last
    if origin in (dict, Mapping):
        return f"{_kind(arguments[1], several=True)} by name"
    if origin in (tuple, list):
        count = f"{len(arguments)} " if origin is tuple and Ellipsis not in arguments else ""
        return f"list of {count}{_kind(arguments[0], several=True)}"
    return WORDS.get(hint, ("group", "groups"))[several]


# ---- Text for a terminal, and the page ``docs/recipes.md`` -----------------------------------------------------------

COMMAND = "onestepsr train --fields"
"""The command that prints the page."""
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

What stands before the first `config` holds for every method.
"""


def as_text(fields: Sequence[RecipeField]) -> str:
    """Name, value and type of each field in columns, and below them its meaning."""
    text, width = "", max(len(field.path) for field in fields)
    for field in fields:
        text += f"{field.path:{width}}  {field.value:{WIDEST_VALUE}}  {field.kind}\n"
        meaning = textwrap.wrap(field.meaning, WIDTH - 4, break_on_hyphens=False)
        text += "".join(f"    {line}\n" for line in meaning)
    return text


def as_markdown() -> str:
    """The page with the fields of all methods, those that they share once."""
    load_methods()
    page, shared = INTRODUCTION, recipe_fields(method_names()[0])
    for group, cls in SHARED.items():
        below = [field for field in shared if (field.path.startswith(f"{group}.") if group else "." not in field.path)]
        page += _section(f"`{group}`" if group else "Every recipe", cls, below)
    for method in method_names():
        below = [field for field in recipe_fields(method) if field.path.startswith("config.")]
        page += _section(f"`config` of {method}", get_method(method).config, below)
    return page


def _section(title: str, cls: type, fields: Sequence[RecipeField]) -> str:
    """A table under a heading."""
    section = f"\n## {title}\n\n{_on_one_line(str(cls.__doc__))}\n"
    section += "\n| field | type | default | meaning |\n| --- | --- | --- | --- |\n"
    for field in fields:
        value = field.value if field.value in ("", REQUIRED, *SUPPLIED.values()) else f"`{field.value}`"
        cells = (f"`{field.path}`", field.kind, value, field.meaning)
        section += f"| {' | '.join(text.replace('|', chr(92) + '|') for text in cells)} |\n"
    return section

"""Strict configuration: frozen dataclasses to and from plain mappings, YAML and JSON.

A misspelt key is an error that suggests the near name, a value of the wrong type is an error that names the field;
nothing is ignored and nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import reprlib
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.core.files import at_home, read_text

T = TypeVar("T")
MAX_CONFIG_BYTES = 1_000_000
MAX_YAML_BYTES = 300_000
"""Packaged recipes and suites have a few kB."""
MAX_NODES = 50_000
"""Most values and keys of a YAML text, those that aliases repeat counted each time."""
MAX_DEPTH = 40
MAX_DIGITS = 300
YAML_WORDS = {False: ("no", "off", "false"), True: ("yes", "on", "true")}
"""Words that YAML 1.1 reads as a truth value without quotes: ``mixed_precision: no`` means the word."""


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass ``cls`` from ``values``; ``where`` is the dotted path shown in errors.

    Settings left out have their defaults, in groups too: of a group given in part, the other settings are those of the
    field's default.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where or cls.__name__}: expected a mapping, got {_shown(values)}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"unknown setting '{_join(where, str(key)[:100])}': {did_you_mean(str(key), fields)}")
    arguments = {
        key: _convert(_completed(value, fields[key], hints[key]), hints[key], _join(where, key))
        for key, value in values.items()
    }
    try:
        return cls(**arguments)
    except TypeError as error:
        raise UserError(f"{where or cls.__name__}: {error}") from error
    except ValueError as error:
        raise UserError(f"{where + ': ' if where else ''}{error}") from error


def to_mapping(config: Any) -> Any:
    """The inverse of :func:`from_mapping`: plain dicts, lists and scalars that JSON and YAML can hold."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_mapping(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_mapping(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_mapping(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    return config


def read_mapping(path: Path) -> dict[str, Any]:
    """Read one YAML or JSON file whose top level is a mapping."""
    language = "JSON" if path.suffix == ".json" else "YAML"
    text = read_text(path, MAX_CONFIG_BYTES if language == "JSON" else MAX_YAML_BYTES, "file of settings")
    try:
        values = json.loads(text) if language == "JSON" else parse_yaml(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid {language} ({_on_one_line(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping at the top level")
    return values


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` on top: mappings are merged key by key, everything else is replaced whole."""
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        nested = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = merged(below, value) if nested else value  # type: ignore[arg-type]
    return result


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with ``key.path=value`` overrides applied; values are read as YAML scalars or lists."""
    result: dict[str, Any] = to_mapping(values)  # a copy down to the last group
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override '{override}': expected key=value, for example train.steps=1000")
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            if node.get(parent) is None:  # absent, or a group that is null: its first setting makes it
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise UserError(f"override '{override}': '{parent}' is not a group of settings")
        try:
            node[leaf] = parse_yaml(text)
        except ValueError as error:
            shown = f"override '{override[:100]}': not valid YAML; quote text that holds any of {{}}[]:,"
            raise UserError(f"{shown} ({_on_one_line(error)})") from error
    return result


# ---- YAML within limits ----


_FASTEST: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_FASTEST):  # type: ignore[misc, valid-type]
    """YAML 1.1 without what it makes of ``1:30`` (90) and ``2001-01-01`` (a date): they are text."""


_TIME = {"tag:yaml.org,2002:timestamp"}
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(f"(?!.*:)(?:{pattern.pattern})", pattern.flags) if tag in _NUMBERS else pattern)
        for tag, pattern in resolvers
        if tag not in _TIME
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; ValueError for one that is not valid, or would take more than it shows.

    Aliases and merges may repeat each other until a few lines become billions of values, or contain themselves: the
    size and depth of the result are counted before it is made.
    """
    try:
        _check_events(_Loader(text))
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, 1)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(_on_one_line(error)) from error
    except (RecursionError, OverflowError) as error:
        raise ValueError("nested too deeply, or a number that is too large") from error


def _check_events(loader: Any) -> None:
    """Raise ValueError for a text that is too long or nested too deeply, without reading on: composing it would take
    time that grows with the square of the depth."""
    depth = count = 0
    while loader.check_event():
        event = loader.get_event()
        count += 1
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        if count > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values")


def _measure(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Values and keys that ``node`` becomes; ValueError beyond the limits. ``sizes`` holds those of nodes seen, 0 of
    those that are open."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise ValueError("an alias that contains itself")
        return sizes[id(node)]
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    sizes[id(node)] = 0
    if isinstance(node, yaml.ScalarNode):
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise ValueError(f"a number of {len(node.value):,} characters")
        size = 1
    elif isinstance(node, yaml.MappingNode):
        size = 1 + sum(_measure(each, sizes, depth + 1) for pair in node.value for each in pair)
    else:
        size = 1 + sum(_measure(each, sizes, depth + 1) for each in node.value)
    if size > MAX_NODES:
        raise ValueError(f"more than {MAX_NODES:,} values, with those that aliases repeat")
    sizes[id(node)] = size
    return size


def _shown(value: Any) -> str:
    """A value in a message: what Python writes it as, shortened."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlong = 60
_SHORT.maxlevel = 3


def _on_one_line(error: Exception) -> str:
    """The problem and its line and column, which a YAML error shows in several lines."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"{getattr(error, 'problem', error)}, line {mark.line + 1}, column {mark.column + 1}"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _completed(value: Any, field: dataclasses.Field[Any], hint: Any) -> Any:
    """A group given in part, merged with the group that is the field's default if the field takes no other kind."""
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    groups = {choice for choice in (hint, *get_args(hint)) if dataclasses.is_dataclass(choice)}
    if isinstance(value, Mapping) and groups == {type(default)}:
        return merged(to_mapping(default), value)
    return value


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if origin is Literal:
        return _convert_choice(value, arguments, where)
    if origin in (tuple, list):
        return _convert_sequence(value, origin, arguments, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, got {_shown(value)}")
        return {str(key): _convert(item, arguments[1], _join(where, str(key))) for key, item in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)
    return _convert_scalar(value, hint, where)


def _convert_choice(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    """One of ``choices``; a truth value stands for the word that YAML made it from."""
    words = YAML_WORDS.get(value, ()) if isinstance(value, bool) and value not in choices else (value,)
    for word in words:
        if word in choices:
            return word
    raise UserError(f"{where}: {_shown(value)} is not one of {', '.join(map(repr, choices))}")


def _convert_union(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    remaining = [choice for choice in choices if choice is not type(None)]
    for choice in remaining[:-1]:
        try:
            return _convert(value, choice, where)
        except UserError:
            continue
    return _convert(value, remaining[-1], where)


def _convert_sequence(value: Any, origin: type, arguments: tuple[Any, ...], where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where}: expected a list, got {_shown(value)}")
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        if len(value) != len(arguments):
            raise UserError(f"{where}: expected {len(arguments)} values, got {len(value)}")
        return tuple(_convert(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, arguments, strict=True)))
    return origin(_convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))


def _convert_scalar(value: Any, hint: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):  # a string, because YAML reads 5e-5 (no dot) as one
            number = float(value)
            if not math.isfinite(number):  # nan would pass most checks of a range
                raise UserError(f"{where}: expected a finite number, got {number}")
            return number
    if hint is Path and isinstance(value, (str, Path)):
        return at_home(Path(value))
    if hint is str and isinstance(value, str) and value.startswith("~/"):  # such as a model by its path
        return os.path.expanduser(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {_shown(value)}")

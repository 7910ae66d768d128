"""Groups of command-line options as frozen dataclasses, shared by commands that have the same options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

import typer

from onestepsr.core.errors import UserError


def refuse(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Raise UserError if one of the parameters ``names`` was written on the command line, where it would do nothing.

    That includes one that is given its default: it is refused for what it is, not for its value.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise UserError(f"{max(parameter.opts, key=len)}: {reason}")


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let parameters of a typer command be dataclasses, whose fields become its options.

    A field is written as a parameter of a command is: ``scale: Annotated[float, typer.Option(help=...)] = 4.0``.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, own in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(own.replace(annotation=hints[name]))
            continue
        types = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
            )
            for field in fields(groups[name])
        ]

    @wraps(command)
    def call(**given: Any) -> Any:
        chosen = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})  # type: ignore[operator]
            for name, group in groups.items()
        }
        return command(**given, **chosen)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {own.name: own.annotation for own in parameters}
    return call

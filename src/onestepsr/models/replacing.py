"""Layers of a network in exchange for others with the same parameters, under the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def replace_layers(network: nn.Module, replacement: Callable[[Any], nn.Module | None]) -> None:
    """Put ``replacement(layer)`` in the place of every layer below ``network`` for which it is not None."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            made = replacement(child)
            if made is not None:
                setattr(parent, name, made)


def as_kind(kind: type[Kind], plain: nn.Module) -> Kind:
    """The same layer, its parameters not copied, as ``kind``: a class below its own that has nothing to initialise."""
    made = kind.__new__(kind)
    own = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(plain).items()}
    made.__dict__.update(own)  # dicts of their own: another parameter there is none in ``plain``
    return made

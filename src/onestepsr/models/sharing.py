"""Copies of a network that share its layers: one backbone several times, each time under other adapters, held once."""

from __future__ import annotations

import copy
import re
from typing import TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def sharing_copy(network: Network, own: str = "(?!)") -> Network:
    """A copy of ``network`` whose layers (modules without children) are the same objects.

    Adapters put on either leave the other as it is, because they replace a layer in its parent. Layers whose whole name
    matches the regular expression ``own`` are copied. None of the shared layers may be trained.
    """
    leaves = ((name, module) for name, module in network.named_modules() if next(module.children(), None) is None)
    shared = {id(module): module for name, module in leaves if not re.fullmatch(own, name)}
    return copy.deepcopy(network, dict(shared))

"""A control between two models of one family: the straight line between their weights.

Two networks of which one was trained on from the other lie in one valley of the loss, and what lies between them works
as well: a model trained for faithful pictures and one trained on from it for crisp ones give every compromise between,
at the cost of one (Wang et al., "Deep network interpolation", 2019).
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from onestepsr.errors import UserError


def blend(first: nn.Module, second: nn.Module, share: float) -> nn.Module:
    """A copy of ``first`` whose weights lie the part ``share`` (0 to 1) of the way to those of ``second``.

    At 0 and 1 the weights are exactly those of one network. What is not a weight, such as counters, comes from
    ``first``. Raises UserError for a share out of range and for networks of different shapes.
    """
    if not 0.0 <= share <= 1.0:
        raise UserError(f"share between two models: {share:g}, accepted: 0 (the first) to 1 (the second)")
    ours, theirs = first.state_dict(), second.state_dict()
    different = sorted(ours.keys() ^ theirs.keys())
    different += [key for key in ours.keys() & theirs.keys() if ours[key].shape != theirs[key].shape]
    if different:
        raise UserError(f"the two models differ in shape, first at '{different[0]}'")
    blended = copy.deepcopy(first)
    mixed = {
        key: torch.lerp(value, theirs[key].to(value), share) if value.is_floating_point() else value
        for key, value in ours.items()
    }
    blended.load_state_dict(mixed)
    return blended

"""Networks filled from weights that are read one tensor at a time, so that half a network costs half the memory."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from onestepsr.errors import UserError
from onestepsr.models.tensors import LazyTensors

LISTED = 10
"""How many missing and unexpected keys a message names."""


def fill(network: nn.Module, tensors: LazyTensors, where: str, ignored: Iterable[str] = ()) -> None:
    """Give ``network``, built on the meta device, exactly ``tensors``, in its own types; raises :class:`UserError`
    otherwise.

    Keys that begin with one of ``ignored`` may be there and are not read. ``where`` names the source in messages.
    """
    expected = network.state_dict()
    unknown = sorted(key for key in tensors.keys() - expected.keys() if not key.startswith(tuple(ignored)))
    missing = sorted(expected.keys() - tensors.keys())
    if missing or unknown:
        problems = [f"no weight {_listed(missing)}"] if missing else []
        problems += [f"unexpected weight {_listed(unknown)}"] if unknown else []
        raise UserError(f"{where}: {'; '.join(problems)} ({len(missing)} missing, {len(unknown)} unexpected)")
    state = {key: _checked(tensors[key](), like, f"{where}: weight '{key}'") for key, like in expected.items()}
    network.load_state_dict(state, assign=True)


def _listed(keys: list[str]) -> str:
    """The first of the keys, quoted."""
    return ", ".join(f"'{key}'" for key in keys[:LISTED]) + (", …" if len(keys) > LISTED else "")


def _checked(value: Tensor, like: Tensor, label: str) -> Tensor:
    if value.shape != like.shape:
        raise UserError(f"{label} has shape {tuple(value.shape)}, expected {tuple(like.shape)}")
    if not value.isfinite().all():
        raise UserError(f"{label} holds values that are not finite; the file is damaged")
    return value.to(like.dtype, copy=True)  # not a window on the file, which may be replaced meanwhile

"""Foreign weight files as dictionaries of tensors: safetensors, or PyTorch's format without executing anything."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onestepsr.core.errors import UserError, first_line

MAX_BYTES = 20 * 2**30
SMALL_WEIGHTS = 2**24
"""Limit in bytes on files of channel weights of a distance; the published ones have a few kB."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that data-parallel training and ``torch.compile`` put before the keys of the network itself."""
LazyTensors = Mapping[str, Callable[[], Tensor]]
"""By key, a function that reads the tensor."""


def open_weights(path: Path, *, limit: int = MAX_BYTES) -> LazyTensors:
    """Tensors of a safetensors file or of a PyTorch pickle (read with ``weights_only=True``, mapped into memory).

    Of a training checkpoint, the dictionary under ``state_dict`` or ``model`` is taken. Raises :class:`UserError` in
    one line.
    """
    try:
        if path.stat().st_size > limit:
            raise UserError(f"{path}: larger than {limit / 2**20:,.0f} MiB")
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path}: no weights that can be read safely ({describe_read_error(error)})") from error


def describe_read_error(error: Exception) -> str:
    """The reason for which a file was refused, on one line: of a pickle, the function it would call (PyTorch's own
    message advises to load it all the same)."""
    text = str(error)
    called = re.search(r"\bGLOBAL (\S+)", text)
    if called is not None:
        return f"it would call '{called[1]}'"
    if "Weights only load failed" in text:
        return "it is no pickle of weights alone"
    return first_line(error)


def _open_safetensors(path: Path) -> LazyTensors:
    handle: Any = safe_open(path, framework="pt")  # it stays open as long as one of its readers lives
    return {key: partial(handle.get_tensor, key) for key in handle.keys()}  # noqa: SIM118


def _open_pickle(path: Path) -> LazyTensors:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    for inner in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(inner), Mapping):
            content = content[inner]
    if not isinstance(content, Mapping):
        raise ValueError(f"a {type(content).__name__}, not a dictionary")
    return {str(key): partial(materialize, value) for key, value in content.items() if isinstance(value, Tensor)}


def _is_zip(path: Path) -> bool:
    """True for PyTorch's present format, the only one that can be mapped into memory."""
    with path.open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def materialize(value: Tensor) -> Tensor:
    """A tensor in memory as a reader of :data:`LazyTensors`: ``partial(materialize, tensor)``."""
    return value


def read_tensors(path: Path, *, limit: int = MAX_BYTES) -> dict[str, Tensor]:
    """All tensors of a file that :func:`open_weights` takes, at once; a file without any is refused."""
    tensors = {key: read() for key, read in open_weights(path, limit=limit).items()}
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


def read_wanted(path: Path, wanted: Iterable[str], *, limit: int, kind: str) -> dict[str, Tensor]:
    """The tensors called ``wanted`` of a file that may hold more, such as a classifier; :class:`UserError` if one is
    missing. ``kind`` names in the message what was expected."""
    names = list(wanted)
    tensors = read_tensors(path, limit=limit)
    missing = sorted(set(names) - tensors.keys())
    if missing:
        raise UserError(f"{path}: not {kind} (missing {missing[0]})")
    return {name: tensors[name] for name in names}


def canonical_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the keys of the bare network: what lies under ``state_dict`` if that is there, without the prefixes
    of :data:`WRAPPERS`, however they are nested. Raises :class:`UserError` where two keys become one.
    """
    inner = content.get("state_dict")
    weights: Mapping[str, Any] = inner if isinstance(inner, Mapping) else content
    bare = {_without_wrappers(key): value for key, value in weights.items()}
    if len(bare) != len(weights):
        raise UserError(f"weights with and without one of the prefixes {', '.join(WRAPPERS)}: two networks in one")
    return bare


def _without_wrappers(key: str) -> str:
    while key.startswith(WRAPPERS):
        key = key.partition(".")[2]
    return key


# ---- filling networks one tensor at a time, so that loading half a file costs half the memory ------------------------

LISTED = 10
"""Most missing and unexpected keys that a message names."""


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

"""The published ``osediff.pkl`` and ``osediff_face.pkl``, and the same weights as a safetensors file of ours.

The pickle is a dictionary of two state dicts, two ranks and four lists of layer names. It is read without executing
anything, and refused if it holds anything but tensors, whole numbers, strings, lists and dictionaries. Both files hold
the same, in the same order, so that each can be made from the other.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.core.files import replacing
from onestepsr.models.osediff.adapters import LISTS, Adapters
from onestepsr.weights.foreign import describe_read_error
from onestepsr.weights.native import read_weights, save_model

ARCHITECTURE = "osediff-adapters"
"""How our file names its content: weights to add to a backbone, no network."""
MAX_BYTES = 512 * 2**20
"""Limit on either file; the published ones have about 20 MB."""
STATES = {"state_dict_unet": "unet", "state_dict_vae": "vae"}
RANKS = ("rank_unet", "rank_vae")
MAX_RANK = 4096


def looks_published(path: Path) -> bool:
    """Whether a file is a pickle with a top level like the published ones'; False for what cannot be read."""
    try:
        return path.suffix != ".safetensors" and STATES.keys() <= _load(path).keys()
    except UserError:
        return False


def read_published(path: Path) -> Adapters:
    """The content of a published pickle; raises :class:`UserError` in one line for anything else."""
    content = _load(path)
    expected = [*LISTS, *RANKS, *STATES]
    for name in expected:
        if name not in content:
            raise UserError(f"{path}: not OSEDiff's weights (no '{name}')")
    for name in content:
        if name not in expected:
            raise UserError(f"{path}: unknown entry {name!r}, OSEDiff's weights have {', '.join(expected)}")
    return Adapters(
        rank_unet=_rank(content["rank_unet"], f"{path}: rank_unet"),
        rank_vae=_rank(content["rank_vae"], f"{path}: rank_vae"),
        unet=_state(content["state_dict_unet"], f"{path}: state_dict_unet"),
        vae=_state(content["state_dict_vae"], f"{path}: state_dict_vae"),
        modules={name: _names(content[name], f"{path}: {name}") for name in LISTS},
    )


def read_any(path: Path) -> Adapters:
    """The content of either file."""
    return read_adapters(path) if path.suffix == ".safetensors" else read_published(path)


def write_published(path: Path, adapters: Adapters) -> None:
    """Write the published layout; equal content gives equal bytes."""
    content = {
        **{name: adapters.modules[name] for name in LISTS},
        "rank_unet": adapters.rank_unet,
        "rank_vae": adapters.rank_vae,
        "state_dict_unet": {key: value.clone() for key, value in adapters.unet.items()},
        "state_dict_vae": {key: value.clone() for key, value in adapters.vae.items()},
    }
    buffer = io.BytesIO()  # written to a path, the file would carry that path's name inside
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_adapters(path: Path) -> Adapters:
    """The content of a file of ours that :func:`write_adapters` has made."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB, which are no adapters of OSEDiff")
    architecture, config, tensors = read_weights(path)
    if architecture != ARCHITECTURE:
        raise UserError(
            f"{path}: holds '{architecture}', expected '{ARCHITECTURE}': a merged model has no adapters left"
        )
    order = config.get("order")
    if not isinstance(order, Mapping) or {f"{p}.{key}" for p in order for key in order[p]} != tensors.keys():
        raise UserError(f"{path}: damaged metadata (the order of the weights does not name all of them)")
    return Adapters(
        rank_unet=_rank(config.get("rank_unet"), f"{path}: rank_unet"),
        rank_vae=_rank(config.get("rank_vae"), f"{path}: rank_vae"),
        unet={key: tensors[f"unet.{key}"].clone() for key in order.get("unet", ())},
        vae={key: tensors[f"vae.{key}"].clone() for key in order.get("vae", ())},
        modules={name: _names(config.get("modules", {}).get(name), f"{path}: {name}") for name in LISTS},
    )


def write_adapters(path: Path, adapters: Adapters) -> None:
    """Write a safetensors file that holds everything the published pickle does."""
    config, state = content_of(adapters)
    save_model(path, architecture=ARCHITECTURE, config=config, state_dict=state)


def content_of(adapters: Adapters) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a file of ours with the architecture :data:`ARCHITECTURE`."""
    config: dict[str, Any] = {
        "rank_unet": adapters.rank_unet,
        "rank_vae": adapters.rank_vae,
        "modules": adapters.modules,
        "order": {"unet": list(adapters.unet), "vae": list(adapters.vae)},
    }
    state = {f"unet.{key}": value for key, value in adapters.unet.items()}
    state |= {f"vae.{key}": value for key, value in adapters.vae.items()}
    return config, state


def _load(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB, which are no weights of OSEDiff")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no weights that can be read safely ({describe_read_error(error)})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: a {type(content).__name__}, not OSEDiff's dictionary of weights")
    return content


def _rank(value: object, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise UserError(f"{where}: expected a rank from 1 to {MAX_RANK}, got {value!r:.60}")
    return value


def _names(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(type(name) is str for name in value):
        raise UserError(f"{where}: expected a list of layer names, got a {type(value).__name__}")
    return list(value)


def _state(value: object, where: str) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a dictionary of tensors, got a {type(value).__name__}")
    for key, tensor in value.items():
        if type(key) is not str or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise UserError(f"{where}: {key!r:.80} is a {type(tensor).__name__}, expected a tensor of real numbers")
        if not tensor.isfinite().all():
            raise UserError(f"{where}: '{key}' holds values that are not finite; the file is damaged")
    return {key: tensor.detach().contiguous() for key, tensor in value.items()}

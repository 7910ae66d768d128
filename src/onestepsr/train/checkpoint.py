"""Checkpoints on disk: folders of safetensors files with one JSON record, complete or absent.

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a process killed at any moment
leaves either the whole of it or something that :meth:`Checkpoints.latest` does not look at. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.train.optimization import MovingAverage

logger = logging.getLogger(__name__)

FORMAT = 1
RECORD = "state.json"
MAX_RECORD_BYTES = 4_000_000
HEADER_ALLOWANCE = 32_000_000
"""What a tensor file may be larger than its tensors: names, shapes and alignment."""
_NAME = re.compile(r"step_(\d{9})")
TensorGroups = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file (``generator.weights``) and name."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    path: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Iterations that had been finished."""
        return int(self.record["step"])

    def tensors(self, group: str, expected_bytes: int) -> dict[str, Tensor]:
        """Read one group on the CPU; a file larger than ``expected_bytes`` of tensors explains is refused."""
        path = self.path / f"{group}.safetensors"
        if group not in self.record["files"]:
            raise UserError(f"{self.path}: holds no '{group}'; the method of this run has changed")
        if path.stat().st_size > expected_bytes + HEADER_ALLOWANCE:
            raise UserError(f"{path}: {path.stat().st_size} bytes, at most {expected_bytes} were expected")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error


class Checkpoints:
    """The ``checkpoints`` folder of a run, of which the newest ``keep`` survive."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, groups: TensorGroups, record: Mapping[str, Any]) -> Path:
        """Write the checkpoint after ``step`` iterations, then drop the oldest; returns its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.remove_unfinished()
        target = self.folder / f"step_{step:09d}"
        temporary = self.folder / f".writing_{target.name}"
        temporary.mkdir()
        files = {
            group: _write_tensors(temporary / f"{group}.safetensors", tensors) for group, tensors in groups.items()
        }
        _write_record(temporary / RECORD, {**record, "format": FORMAT, "step": step, "files": files})
        _flush_folder(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _flush_folder(self.folder)
        self._drop_others(target)
        return target

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or none."""
        for path in reversed(self._paths()):
            checkpoint = _open(path)
            if checkpoint is not None:
                return checkpoint
            logger.warning("%s: incomplete, passed over", path)
        return None

    def remove_unfinished(self) -> None:
        """Delete what a killed process left under a temporary name."""
        for path in self.folder.glob(".writing_*"):
            shutil.rmtree(path, ignore_errors=True)

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))

    def _drop_others(self, newest: Path) -> None:
        paths = self._paths()
        # What has a later step was passed over for a damaged one: it must not count among the newest.
        later = [path for path in paths if path.name > newest.name]
        for path in [*later, *[path for path in paths if path not in later][: -self.keep]]:
            # Renamed first: a kill in the middle of the deletion must not leave a folder that looks like a checkpoint.
            doomed = path.with_name(f".writing_{path.name}")
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    copies: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().contiguous().cpu()
        copies[name] = copy.clone() if copy.data_ptr() in places else copy  # the format refuses shared memory
        places.add(copy.data_ptr())
    save_file(copies, path)
    _flush(path)
    return path.stat().st_size


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    _flush(path)


def _open(path: Path) -> Checkpoint | None:
    record_path = path / RECORD
    if not record_path.is_file() or record_path.stat().st_size > MAX_RECORD_BYTES:
        return None
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return None
    if record.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {record.get('format')}, this version reads {FORMAT}")
    complete = all(_size(path / f"{group}.safetensors") == size for group, size in record["files"].items())
    return Checkpoint(path, record) if complete and isinstance(record.get("step"), int) else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _flush(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name != "posix":  # folders cannot be opened elsewhere
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Everything that changes while a run trains, as groups of tensors: what a checkpoint holds ----------------------------

FINGERPRINT_VALUES = 64
"""Values taken from each frozen parameter, evenly spaced."""
NUMBERS: dict[type, torch.dtype] = {int: torch.int64, float: torch.float64, bool: torch.bool}
"""Plain numbers that an optimiser may keep, and the tensors they are stored as."""


@dataclass
class NetworkState:
    """One trainable network with its optimiser and, where kept, its moving average."""

    network: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None


def collect(states: Mapping[str, NetworkState]) -> dict[str, dict[str, Tensor]]:
    """Tensors by group: ``NAME.weights``, ``NAME.optimizer`` and ``NAME.average``."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, state in states.items():
        groups[f"{name}.weights"] = _weights(state)
        groups[f"{name}.optimizer"] = _optimizer_tensors(state)
        if state.average is not None:
            groups[f"{name}.average"] = dict(state.average.values)
    return groups


def restore(states: Mapping[str, NetworkState], checkpoint: Checkpoint) -> None:
    """Put a checkpoint's tensors back, bit for bit."""
    for name, state in states.items():
        weights = _weights(state)
        size = _bytes(weights)
        saved = checkpoint.tensors(f"{name}.weights", size)
        _check_names(checkpoint, f"{name}.weights", saved, weights)
        with torch.no_grad():
            for key, tensor in weights.items():
                tensor.copy_(saved[key])
        # At most two tensors of the parameter's size, never wider than float64, and what is small beside them.
        saved = checkpoint.tensors(f"{name}.optimizer", 4 * size)
        _restore_optimizer(state, saved, f"{checkpoint.path}: {name}.optimizer")
        if state.average is not None:
            saved = checkpoint.tensors(f"{name}.average", 2 * size)
            _check_names(checkpoint, f"{name}.average", saved, state.average.values)
            state.average.load(saved)


def fingerprints(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """A short digest of each network's frozen parameters, as they are before a run keeps them in a smaller type."""
    return {name: _fingerprint(network) for name, network in networks.items()}


def check_fingerprints(checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
    """Refuse to go on from other frozen weights than the checkpoint was trained with.

    Checkpoints of older versions know nothing of networks that are frozen as a whole, such as a teacher.
    """
    saved = checkpoint.record.get("frozen_weights", {})
    for name, digest in digests.items():
        if saved.get(name, digest) != digest:
            raise UserError(f"{checkpoint.path}: the frozen weights of '{name}' are not those this run started with")


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // FINGERPRINT_VALUES)].double().cpu()
            digest.update(name.encode() + picked.numpy().tobytes())
    return digest.hexdigest()


def _weights(state: NetworkState) -> dict[str, Tensor]:
    kept = set(state.network.state_dict(keep_vars=True))
    buffers = {name: buffer for name, buffer in state.network.named_buffers() if name in kept}
    return {**{name: parameter.detach() for name, parameter in state.parameters.items()}, **buffers}


def _optimizer_tensors(state: NetworkState) -> dict[str, Tensor]:
    """Whatever the optimiser keeps for each parameter; plain numbers become 0-dim tensors named by their type."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in state.parameters.items():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            elif type(value) in NUMBERS:
                tensors[f"{name}/{key}:{type(value).__name__}"] = torch.tensor(value, dtype=NUMBERS[type(value)])
            else:
                raise TypeError(f"{type(state.optimizer).__name__} keeps '{key}' as a {type(value).__name__}")
    return tensors


def _restore_optimizer(state: NetworkState, saved: Mapping[str, Tensor], where: str) -> None:
    state.optimizer.state.clear()
    numbers = {kind.__name__ for kind in NUMBERS}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition("/")
        if name not in state.parameters:
            raise UserError(f"{where} holds the unknown tensor '{full_name}'; the method's networks have changed")
        parameter = state.parameters[name]
        key, _, number = key.partition(":")
        if number in numbers:
            state.optimizer.state[parameter][key] = value.item()
            continue
        # What has the parameter's shape takes its memory order, as it would have in the uninterrupted run.
        if value.shape == parameter.shape:
            state.optimizer.state[parameter][key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:
            state.optimizer.state[parameter][key] = value.to(parameter.device)


def _check_names(checkpoint: Checkpoint, group: str, saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name in sorted(saved.keys() ^ wanted.keys()):
        side = "lacks" if name in wanted else "holds the unknown"
        raise UserError(f"{checkpoint.path}: {group} {side} tensor '{name}'; the method's networks have changed")
    for name, tensor in wanted.items():
        if saved[name].shape != tensor.shape:
            shapes = f"{tuple(saved[name].shape)} instead of {tuple(tensor.shape)}"
            raise UserError(f"{checkpoint.path}: {group} has '{name}' of shape {shapes}")


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

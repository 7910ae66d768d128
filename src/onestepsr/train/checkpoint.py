"""Checkpoints on disk: folders of safetensors files with one JSON record, complete or absent.

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a process killed at any moment
leaves either the whole of it or something that :meth:`Checkpoints.latest` does not look at. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onestepsr.core.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
RECORD = "state.json"
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

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Read one group on the CPU."""
        path = self.path / f"{group}.safetensors"
        if group not in self.record["files"]:
            raise UserError(f"{self.path}: holds no '{group}'; the method of this run has changed")
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
        # Folders of a later step are damaged and were passed over: they must not count among the newest.
        later = [path for path in paths if path.name > newest.name]
        for path in [*later, *[path for path in paths if path not in later][: -self.keep]]:
            # Renamed first: a kill in the middle of the deletion must not leave a folder that looks like a checkpoint.
            doomed = path.with_name(f".writing_{path.name}")
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    copies: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().contiguous().cpu()
        copies[name] = copy.clone() if copy.data_ptr() in addresses else copy  # the format refuses shared memory
        addresses.add(copy.data_ptr())
    save_file(copies, path)
    _flush(path)
    return path.stat().st_size


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    _flush(path)


def _open(path: Path) -> Checkpoint | None:
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
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

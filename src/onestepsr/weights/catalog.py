"""Models that have a name: purpose, licence and files of each, read from ``catalog.yaml``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml

from onestepsr.core.config import from_mapping
from onestepsr.core.errors import DamagedWeights, UnknownModel, UserError, did_you_mean
from onestepsr.core.files import file_sha256
from onestepsr.weights.download import CACHE, Download, check, download_file, has_cache_folder, human_bytes

DEFAULT_MODEL = "d3sr-tiny"
BICUBIC = "bicubic"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".pkl")

Kind = Literal["upscaler", "backbone", "loss network", "metric network"]
"""Purpose of a model: to upscale images, to start a training from, to be read by a loss or only by a metric."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """An alias: purpose, licence and weights of a model."""

    id: str
    """Name given to ``--model`` or in a configuration."""
    summary: str
    """One line: method, backbone, data."""
    licence: str
    """Licence of the weights: SPDX identifier where there is one."""
    licence_url: str = ""
    """Address of its text; empty for the package's own."""
    notice: str = ""
    """Obligations that an unusual licence puts on the user, in one sentence; empty for permissive ones."""
    kind: Kind = "upscaler"
    """Purpose of the model."""
    family: str = ""
    """Family of published weights with a loader of its own: ``osediff``; empty for all others."""
    use: str = ""
    """The command or setting that reads the model; of an upscaler only where ``--model`` alone is not enough."""
    needs_prompt: bool = False
    """True if it restores badly without a text about the image."""
    bundled: str = ""
    """File name of the weights inside the package; empty for a model without weights of that kind."""
    sha256: str = ""
    """Checksum of the bundled file."""
    files: tuple[Download, ...] = ()
    """Files to download; empty for a model that is bundled or needs no weights."""
    scale: int = 4
    """Factor of an upscaler's network itself."""
    faithful: str = ""
    """The upscaler at the other end of the fidelity control: of the same shape, trained for faithful images."""

    @property
    def downloads(self) -> tuple[Download, ...]:
        """The files to download, with the terms of the model and the alternative to name in messages."""
        other = "a diffusers folder or a single-file checkpoint" if self.kind == "backbone" else "the file"
        if len(self.files) > 1:
            other = "a file that 'onestepsr models convert' has made of the published ones"
        return tuple(
            dataclasses.replace(
                file,
                model=self.id,
                notice=f"licence {self.licence} ({self.licence_url})" + (f": {self.notice}" if self.notice else ""),
                alternative=f"give the path of {other} instead of '{self.id}'",
            )
            for file in self.files
        )

    @property
    def path(self) -> Path:
        """Path of the weights on this machine, downloaded or not; of several files the first."""
        if self.bundled:
            return Path(str(resources.files("onestepsr") / "assets" / self.bundled))
        if self.files:
            return self.downloads[0].path
        raise UserError(f"model '{self.id}' has no weights file")

    @property
    def is_here(self) -> bool:
        """True if all of its files exist on this machine; nothing is read."""
        if self.files and not has_cache_folder():
            return False
        return all(download.path.exists() for download in self.downloads)

    @property
    def state(self) -> str:
        """State of the weights on this machine by name and size, with the size; nothing is read."""
        if not self.files:
            return "bundled" if self.bundled else "needs no weights"
        if not has_cache_folder():
            return f"no home folder for it: set {CACHE}"
        damage = next((download.damage for download in self.downloads if download.damage), "")
        is_own = any(not file.urls and not file.path.exists() for file in self.downloads)
        absent = "its file is yours to bring" if is_own else "not downloaded"
        state = f"damaged: {damage}" if damage else "cached" if self.is_here else absent
        sizes = [file.bytes for file in self.files if file.bytes is not None]
        return f"{state} ({human_bytes(sum(sizes))})" if len(sizes) == len(self.files) else state


def _read() -> dict[str, ModelSpec]:
    text = (resources.files("onestepsr") / "weights" / "catalog.yaml").read_text(encoding="utf-8")
    specs = [from_mapping(ModelSpec, values, values["id"]) for values in yaml.safe_load(text)["models"]]
    return {spec.id: spec for spec in specs}


_MODELS = _read()
OSEDIFF_SCALES = {spec.id: spec.scale for spec in _MODELS.values() if spec.family == "osediff"}
"""Factors of OSEDiff's published models by alias."""


def list_models(kind: Kind | None = None) -> list[ModelSpec]:
    """Every model that has a name, or those of one kind; the default upscaler first."""
    return [spec for spec in _MODELS.values() if kind in (None, spec.kind)]


def get_model(name: str) -> ModelSpec:
    """The model called ``name``; :class:`UnknownModel` otherwise."""
    if name not in _MODELS:
        raise UnknownModel(f"unknown model '{name}', and no .safetensors file: {did_you_mean(name, _MODELS)}")
    return _MODELS[name]


def resolve(name_or_path: str | Path) -> Path:
    """The weights file behind an alias or a path: bundled, else cached, else downloaded.

    Raises :class:`UnknownModel` for a name or file that does not exist, and :class:`UserError` in one line for weights
    that are damaged or cannot be had.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix in WEIGHT_SUFFIXES or len(path.parts) > 1:
        raise UnknownModel(f"{path}: {'a folder, no weights file' if path.is_dir() else 'no such weights file'}")
    spec = get_model(str(name_or_path))
    if len(spec.files) > 1:
        raise UserError(
            f"'{spec.id}' is published in {len(spec.files)} files, one is wanted here: 'onestepsr models convert "
            f"{spec.id} FILE.safetensors' makes one of them"
        )
    return download_file(spec.downloads[0]) if spec.files else spec.path


def require_upscaler(name_or_path: str | Path) -> None:
    """Raise :class:`UserError` for the alias of a model that is no upscaler, before it is downloaded."""
    spec = _MODELS.get(str(name_or_path))
    if spec is not None and spec.kind != "upscaler" and not Path(name_or_path).is_file():
        raise UserError(
            f"'{spec.id}' is a {spec.kind}, no upscaler: {spec.use}; to upscale, name {DEFAULT_MODEL} or the "
            "model.safetensors of a training"
        )


def verify(name: str) -> str:
    """Read a named model's weights through; returns their SHA-256, one per file (empty for a model without weights).

    Raises :class:`UserError` when they are altered, or not downloaded.
    """
    spec = get_model(name)
    if spec.files:
        return ", ".join(check(download, thorough=True) for download in spec.downloads)
    if not spec.bundled:
        return ""
    found = file_sha256(spec.path)
    if found != spec.sha256:
        raise DamagedWeights(
            f"{spec.path}: checksum {found[:12]}… is not the expected {spec.sha256[:12]}…: install the package again"
        )
    return found

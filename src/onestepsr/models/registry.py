"""Models by name or path: where their weights are, how to build them, and whether a file is what it says.

Weights are safetensors files whose metadata names the architecture and carries its configuration as JSON. An
architecture is a function from that configuration to a network; a model is an alias for weights with a licence and a
checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from onestepsr.errors import UnknownModel, UserError, did_you_mean
from onestepsr.files import replacing
from onestepsr.models.backbones import build_tiny_autoencoder, build_tiny_generator
from onestepsr.models.generators import BicubicGenerator, OneStepLatentGenerator

FORMAT = "onestepsr"
MAX_WEIGHT_BYTES = 20 * 2**30
DEFAULT_MODEL = "d3sr-tiny"

ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "tiny-autoencoder": build_tiny_autoencoder,
    "tiny-latent-diffusion": build_tiny_generator,
}
"""Builders of freshly initialised networks; their weights are loaded right after."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """An alias: what the model is, what it may be used for and where its weights are."""

    id: str
    """Name given to ``--model``."""
    summary: str
    """One line: method, backbone, data."""
    licence: str
    """SPDX identifier of the weights' licence."""
    bundled: str = ""
    """File name of the weights inside the package; empty for a model without weights."""
    sha256: str = ""
    """Checksum of that file."""
    scale: int = 4
    """Factor of the network itself."""

    @property
    def path(self) -> Path:
        """Where the weights lie on this machine."""
        if not self.bundled:
            raise UserError(f"model '{self.id}' has no weights file")
        return Path(str(resources.files("onestepsr") / "weights" / self.bundled))


BICUBIC = "bicubic"
_MODELS: dict[str, ModelSpec] = {
    spec.id: spec
    for spec in (
        ModelSpec(
            id=DEFAULT_MODEL,
            summary="D3SR on the tiny backbone, trained by this project on 1,380 photos; runs on any CPU",
            licence="Apache-2.0",
            bundled="d3sr-tiny.safetensors",
            sha256="745bfa1cf7f88366707c1e3a22f86f8ebecc2bd8f6931d248702243c313e3001",
        ),
        ModelSpec(id=BICUBIC, summary="no network: bicubic enlargement, for comparison", licence="Apache-2.0"),
    )
}


def list_models() -> list[ModelSpec]:
    """Every model that has a name, the default first."""
    return list(_MODELS.values())


def get_model(name: str) -> ModelSpec:
    """The model called ``name``; :class:`UnknownModel` otherwise."""
    if name not in _MODELS:
        raise UnknownModel(f"unknown model '{name}', and no .safetensors file: {did_you_mean(name, _MODELS)}")
    return _MODELS[name]


def verify(name: str) -> str:
    """Check that a named model's weights are present and unaltered; returns their SHA-256 (empty without weights)."""
    spec = get_model(name)
    if not spec.bundled:
        return ""
    found = file_sha256(spec.path)
    if found != spec.sha256:
        raise UserError(
            f"{spec.path}: checksum {found[:12]}… is not the expected {spec.sha256[:12]}…: install the package again"
        )
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def resolve(name_or_path: str | Path) -> Path:
    """The weights file behind an alias or a path."""
    path = Path(name_or_path)
    if path.suffix == ".safetensors" or path.is_file():
        if not path.is_file():
            raise UnknownModel(f"{path}: no such weights file")
        return path
    return get_model(str(name_or_path)).path


def read_weights(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Architecture, configuration and state dict of one of our weight files; everything about the file is checked."""
    try:
        if path.stat().st_size > MAX_WEIGHT_BYTES:
            raise UserError(f"{path}: larger than {MAX_WEIGHT_BYTES >> 30} GiB")
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not onestepsr weights (no 'format: {FORMAT}' in the file's metadata)")
    try:
        config = json.loads(metadata["config"])
        architecture = metadata["architecture"]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged metadata ({error})") from error
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path}: weight '{broken[0]}' holds values that are not finite; the file is damaged")
    return architecture, config, tensors


def save_model(
    path: Path,
    *,
    architecture: str,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write weights with their configuration; equal weights give equal files, complete or not there at all."""
    metadata = {
        "format": FORMAT,
        "architecture": architecture,
        "config": json.dumps(config, sort_keys=True),
        **(extra or {}),
    }
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state_dict.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(_in_fixed_order(save(tensors, metadata=metadata)))


def _in_fixed_order(blob: bytes) -> bytes:
    """The same safetensors file with a sorted header; the library's order of metadata changes from run to run."""
    length = int.from_bytes(blob[:8], "little")
    header = json.dumps(json.loads(blob[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of eight bytes
    return len(header).to_bytes(8, "little") + header + blob[8 + length :]


def load_network(name_or_path: str | Path) -> nn.Module:
    """Build the network a weights file describes and load it strictly, in float32 on the CPU, in eval mode."""
    path = resolve(name_or_path)
    architecture, config, tensors = read_weights(path)
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: unknown architecture '{architecture}': {did_you_mean(architecture, ARCHITECTURES)}")
    try:
        network = ARCHITECTURES[architecture](config)
        network.load_state_dict(tensors)
    except UserError as error:
        raise UserError(f"{path}: configuration does not fit '{architecture}': {error}") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: weights do not match their configuration: {reason}") from error
    return network.float().eval()


def load_generator(
    name_or_path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The generator called ``name_or_path`` (alias or safetensors file), ready for inference.

    It maps LR (N, 3, h, w) in [0, 1] of any size to SR (N, 3, s h, s w), where s is its attribute ``scale``.
    """
    network = BicubicGenerator().eval() if str(name_or_path) == BICUBIC else load_network(name_or_path)
    if not isinstance(network, (OneStepLatentGenerator, BicubicGenerator)):
        raise UserError(f"{name_or_path}: a {type(network).__name__} is no generator; it cannot upscale by itself")
    network.requires_grad_(False).to(device=device, dtype=dtype)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

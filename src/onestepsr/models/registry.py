"""Models by name or path: how to build them, and whether a file is what it says.

Weights are safetensors files whose metadata names the architecture and carries its configuration as JSON. An
architecture is a function from that configuration to a network; the names are in ``catalog``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onestepsr.errors import UserError, did_you_mean
from onestepsr.files import file_sha256, replacing
from onestepsr.models.architectures import ARCHITECTURES, is_random, random_generator
from onestepsr.models.blend import blend
from onestepsr.models.catalog import (
    BICUBIC,
    DEFAULT_MODEL,
    get_model,
    list_models,
    require_upscaler,
    resolve,
    verify,
)
from onestepsr.models.even_contrast import alike
from onestepsr.models.generators import BicubicGenerator, OneStepLatentGenerator
from onestepsr.models.model_spec import ModelSpec
from onestepsr.models.osediff_catalog import OSEDIFF_SCALES
from onestepsr.models.residual_checkpoints import is_published, load_published
from onestepsr.models.residual_generator import ResidualShiftGenerator
from onestepsr.models.safetensors_file import write_safetensors

FORMAT = "onestepsr"
MAX_WEIGHT_BYTES = 20 * 2**30
PICKLES = (".pth", ".pt", ".ckpt")
__all__ = [
    "ARCHITECTURES",
    "BICUBIC",
    "DEFAULT_MODEL",
    "FORMAT",
    "ModelSpec",
    "architecture_of",
    "file_sha256",
    "get_model",
    "list_models",
    "load_generator",
    "load_network",
    "read_weights",
    "resolve",
    "save_model",
    "verify",
]


def read_weights(
    path: Path, wanted: Callable[[str], bool] = lambda key: True
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Architecture, configuration and state dict of one of our weight files; everything about the file is checked.

    Tensors that are not ``wanted`` are not read.
    """
    try:
        if path.stat().st_size > MAX_WEIGHT_BYTES:
            raise UserError(f"{path}: larger than {MAX_WEIGHT_BYTES >> 30} GiB")
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {key: handle.get_tensor(key) for key in handle.keys() if wanted(key)}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        hint = "; 'onestepsr models convert' makes one of it" if path.suffix in PICKLES else ""
        raise UserError(f"{path}: not a safetensors file ({error}){hint}") from error
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


def architecture_of(path: str | Path) -> str:
    """The architecture that a weights file of ours names; empty for any other file, and for one that cannot be read."""
    if Path(path).suffix != ".safetensors":
        return ""
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
    except (OSError, SafetensorError):
        return ""
    return str(metadata.get("architecture", "unnamed")) if metadata.get("format") == FORMAT else ""


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
    with replacing(path) as temporary:
        write_safetensors(temporary, state_dict, metadata)


def load_network(name_or_path: str | Path) -> nn.Module:
    """Build the network a weights file describes and load it strictly, in float32 on the CPU, in eval mode."""
    require_upscaler(name_or_path)
    if is_published(name_or_path):
        return load_published(str(name_or_path))
    if str(name_or_path) in OSEDIFF_SCALES and not Path(name_or_path).is_file():
        from onestepsr.models import osediff_published  # imported here: it reads a backbone by this module

        return osediff_published.load_published(name_or_path)
    path = resolve(name_or_path)
    architecture, config, tensors = read_weights(path)
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: unknown architecture '{architecture}': {did_you_mean(architecture, ARCHITECTURES)}")
    try:
        with torch.device("meta"):  # nothing is initialised only to be overwritten
            network = ARCHITECTURES[architecture](config)
        copies = {key: _in_float32(tensor) for key, tensor in tensors.items()}
        network.load_state_dict(copies, assign=True)
    except UserError as error:
        raise UserError(f"{path}: configuration does not fit '{architecture}': {error}") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: weights do not match their configuration: {reason}") from error
    return network.eval()


def _in_float32(tensor: Tensor) -> Tensor:
    """A copy, because tensors of a file are windows on it, and the file may be replaced while the network lives."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def load_generator(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    steps: int | None = None,
    sampler: str | None = None,
    fidelity: float | None = None,
    faster: bool = True,
) -> nn.Module:
    """The generator called ``name_or_path`` (alias, safetensors file or ``random:ALIAS``), ready for inference.

    It maps LR (N, 3, h, w) in [0, 1] of any size to SR (N, 3, s h, s w), where s is its attribute ``scale``. Of a model
    that shifts residuals, ``steps`` and ``sampler`` can be chosen; None is what it was made for. Of a model with a
    faithful counterpart, ``fidelity`` (0 to 1) chooses a place between the two. ``faster``: with layers that take less
    time and memory in inference, where there are such; False leaves those that were trained.
    """
    network = _generator_without_file(str(name_or_path)) or load_network(name_or_path)
    if not isinstance(network, (OneStepLatentGenerator, ResidualShiftGenerator, BicubicGenerator)):
        raise UserError(f"{name_or_path}: a {type(network).__name__} is no generator; it cannot upscale by itself")
    _choose_sampling(network, str(name_or_path), steps, sampler)
    if fidelity is not None:
        if not 0.0 <= fidelity <= 1.0:
            raise UserError(f"fidelity: {fidelity:g}, accepted: 0 (the model as it is) to 1 (its faithful counterpart)")
        network = blend(*alike(network, load_network(_faithful(str(name_or_path)))), fidelity)
    network.requires_grad_(False).to(device=device, dtype=dtype)
    if isinstance(network, OneStepLatentGenerator):
        network.freeze_prompt()
    if faster and isinstance(network, (OneStepLatentGenerator, ResidualShiftGenerator)):
        network.speed_up()
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _choose_sampling(network: nn.Module, name: str, steps: int | None, sampler: str | None) -> None:
    if isinstance(network, ResidualShiftGenerator):
        network.choose(steps, sampler)
    elif steps is not None or sampler is not None:
        wish = f"--steps {steps}" if steps is not None else f"--sampler {sampler}"
        raise UserError(f"{wish}: '{name}' takes no steps; the ResShift family does, see 'onestepsr models list'")


def _faithful(name: str) -> str:
    """The counterpart of a model at the faithful end of the fidelity control."""
    having = [spec.id for spec in list_models() if spec.faithful]
    spec = get_model(name) if name in having else None
    if spec is None:
        raise UserError(f"fidelity: '{name}' has no faithful counterpart; accepted: {', '.join(having)}")
    return spec.faithful


def _generator_without_file(name: str) -> nn.Module | None:
    if is_random(name):
        return random_generator(name).eval()
    return BicubicGenerator().eval() if name == BICUBIC else None

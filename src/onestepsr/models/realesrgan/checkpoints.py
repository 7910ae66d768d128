"""Published weights of Real-ESRGAN's generator: the official ``.pth`` and ncnn's ``.bin``.

An ncnn file is the bare sequence of its layers' weights. All of this network's layers are 3x3 convolutions in the order
of evaluation, and of each it holds a 4-byte flag, the weights (out, in, 3, 3) in float16 padded to 4 bytes or in
float32, as the flag says, and the bias in float32. The description beside it (``.param``) is not needed: the network
has one size per number of convolutions.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.models.realesrgan.networks import PUBLISHED, RealESRGANConfig, RealESRGANGenerator
from onestepsr.weights.files import canonical_keys, check_tensors, foreign_weights, load_pickle, read_tensors, reading

FLOAT16, FLOAT32 = 0x01306B47, 0
"""ncnn's flags of how a layer's weights are stored."""
MAX_BYTES = 2**28
NCNN_SUFFIX = ".bin"
OFFICIAL_FIRST_KEY = "body.0.rdb1.conv1.weight"


def load_realesrgan(path: Path) -> RealESRGANGenerator:
    """The network in a ``.bin`` of ncnn or an official ``.pth``, in float32 in eval mode; :class:`UserError` in one
    line for anything else."""
    state = read_ncnn(path) if path.suffix == NCNN_SUFFIX else read_official(path)
    groups = len({key.split(".")[1] for key in state if key.startswith("body.")})
    with torch.device("meta"):
        network = RealESRGANGenerator(RealESRGANConfig(blocks=groups))
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:200]
        raise UserError(f"{path}: an ESRGAN checkpoint, but not a x4 network of Real-ESRGAN ({reason})") from error
    return network.eval()


def read_official(path: Path) -> dict[str, Tensor]:
    """Tensors of an official checkpoint: those under ``params_ema``, else under ``params``, else of the file itself."""
    content = torch_mapping(path)
    state = {key: value.float() for key, value in canonical_keys(content).items()}
    if OFFICIAL_FIRST_KEY not in state:
        missing = f"no weights of Real-ESRGAN (no tensor '{OFFICIAL_FIRST_KEY}')"
        raise UserError(f"{path}: {foreign_weights(state) or missing}")
    return state


def torch_mapping(path: Path) -> dict[str, Tensor]:
    """The state dict in a pickle of weights alone or a safetensors file."""
    if path.suffix == ".safetensors":
        return read_tensors(path, limit=MAX_BYTES)
    with reading(path):
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
        content = load_pickle(path)
    for inner in ("params_ema", "params"):
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, no state dict")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    with reading(path):
        check_tensors(tensors)
    return tensors


def read_ncnn(path: Path) -> dict[str, Tensor]:
    """State dict of an ncnn ``.bin``; every byte of the file is used, or it is refused."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    for config in PUBLISHED.values():
        state = _parse(content, config)
        if state is not None:
            return state
    raise UserError(f"{path}: {len(content)} bytes that are no x4plus network of Real-ESRGAN in ncnn's format")


def _parse(content: bytes, config: RealESRGANConfig) -> dict[str, Tensor] | None:
    """State dict of a network of these sizes, or None if the bytes do not add up to it."""
    with torch.device("meta"):
        network = RealESRGANGenerator(config)
    state: dict[str, Tensor] = {}
    place = 0
    for name, module in network.named_modules():  # in the order of evaluation
        if not isinstance(module, nn.Conv2d):
            continue
        count, bias = module.weight.numel(), cast(Tensor, module.bias).numel()
        flag = int.from_bytes(content[place : place + 4], "little")
        if flag not in (FLOAT16, FLOAT32):
            return None
        size = -(-2 * count // 4) * 4 if flag == FLOAT16 else 4 * count
        end = place + 4 + size + 4 * bias
        if end > len(content):
            return None
        weight = np.frombuffer(content, "<f2" if flag == FLOAT16 else "<f4", count, place + 4)
        state[f"{name}.weight"] = torch.from_numpy(weight.astype(np.float32)).reshape(module.weight.shape)
        state[f"{name}.bias"] = torch.from_numpy(np.frombuffer(content, "<f4", bias, end - 4 * bias).copy())
        place = end
    return state if place == len(content) else None


def looks_published(path: Path) -> bool:
    """True for a file in ncnn's format and for one with the tensor names of an official checkpoint."""
    if not path.is_file() or path.suffix not in (NCNN_SUFFIX, ".pth"):
        return False
    if path.suffix == NCNN_SUFFIX:
        return True
    try:
        return OFFICIAL_FIRST_KEY in torch_mapping(path)
    except UserError:
        return False

"""Weights that follow from a tensor's key and shape alone: a large network can be pinned without its checkpoint."""

import hashlib

import numpy as np
import torch
from torch import nn

from onestepsr.models.efficientnet_lite import BLOCKS, GROUPS

BUILT_BY_THE_NETWORK = ("relative_position_index", "attn_mask")


def fill_by_name(network: nn.Module) -> None:
    """Give every weight normal values: of deviation 1/sqrt(fan-in), around one for the gains of norms, small for
    biases."""
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if not key.endswith(BUILT_BY_THE_NETWORK):
                tensor.copy_(torch.from_numpy(values_by_name(key, tuple(tensor.shape))))


def values_by_name(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 values of one weight."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    values = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    if len(shape) >= 2:
        values /= np.sqrt(np.prod(shape[1:], dtype=np.float64))
    else:
        values = 1 + 0.1 * values if key.endswith("weight") else 0.1 * values
    return values.astype(np.float32)


def published_efficientnet(name: str = "EfficientNet-Lite0") -> dict[str, torch.Tensor]:
    """A state dict with the keys and shapes of a published file."""
    shapes: dict[str, tuple[int, ...]] = {"_conv_stem.weight": (32, 3, 3, 3), "_conv_head.weight": (1280, 320, 1, 1)}
    norms = {"_bn0": 32, "_bn1": 1280}
    number, width = 0, 32
    for count, (kernel, _, expansion, out) in zip(BLOCKS[name], GROUPS, strict=True):
        for _ in range(count):
            inner, block = width * expansion, f"_blocks.{number}"
            if expansion > 1:
                shapes[f"{block}._expand_conv.weight"] = (inner, width, 1, 1)
                norms[f"{block}._bn0"] = inner
            shapes[f"{block}._depthwise_conv.weight"] = (inner, 1, kernel, kernel)
            shapes[f"{block}._project_conv.weight"] = (out, inner, 1, 1)
            norms |= {f"{block}._bn1": inner, f"{block}._bn2": out}
            number, width = number + 1, out
    shapes |= {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}
    for norm, count in norms.items():
        shapes |= {f"{norm}.{part}": (count,) for part in ("weight", "bias", "running_mean", "running_var")}
    state = {key: torch.from_numpy(values_by_name(key, shape)) for key, shape in shapes.items()}
    return {key: value.abs() + 0.1 if key.endswith("running_var") else value for key, value in state.items()}

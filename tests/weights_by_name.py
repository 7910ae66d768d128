"""Weights that follow from a tensor's key and shape alone: a large network can be pinned without its checkpoint."""

import hashlib

import numpy as np
import torch
from torch import nn

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

"""Everything that changes while a run trains, as groups of tensors: what a checkpoint holds.

Of a network only what training moves is stored, parameters with ``requires_grad`` and buffers; frozen parameters (the
body below a LoRA) come from the method's own initial weights, and a fingerprint makes sure that these are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onestepsr.errors import UserError
from onestepsr.train.checkpoint import Checkpoint
from onestepsr.train.optimization import MovingAverage

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

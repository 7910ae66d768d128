"""Frozen layers in a 16-bit type: half the memory of a backbone, without touching what is trained.

Only linear and convolution layers are converted: they hold nearly all weights of a diffusion backbone, and they are the
layers that mixed precision computes in 16 bits anyway. Normalisation layers stay in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

CONVERTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def keep_frozen_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the layers of ``network`` that have no trained parameter in ``dtype``, in place.

    Such a layer computes in ``dtype`` and returns float32; under autocast it does what autocast says. A network whose
    attribute ``keeps_float32`` is true stays as it is.
    """
    if dtype == torch.float32 or getattr(network, "keeps_float32", False):
        return
    for module in network.modules():
        parameters = list(module.parameters(recurse=False))
        if not isinstance(module, CONVERTED) or any(parameter.requires_grad for parameter in parameters):
            continue
        if all(parameter.dtype == dtype for parameter in parameters):  # a layer that two networks share
            continue
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        module.register_forward_pre_hook(_to_stored_type)
        module.register_forward_hook(_to_float32)


def as_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` on the CPU, floating-point ones in float32: how a model is exported, whatever it was kept in."""
    return {
        name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }


def _to_stored_type(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first, *others = arguments
    if _autocast_is_on(first):
        return arguments
    return (first.to(next(module.parameters(recurse=False)).dtype), *others)


def _to_float32(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output if _autocast_is_on(output) else output.float()


def _autocast_is_on(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return torch.is_autocast_enabled("cpu" if kind == "meta" else kind)  # the meta device has no switch of its own

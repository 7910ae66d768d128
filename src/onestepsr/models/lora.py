"""Low-rank adapters through peft: put beside layers, and added to their weights for good."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from onestepsr.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation of a frozen network: W + (alpha / rank) B A."""

    rank: int = 16
    """Rank of the update (D3SR: 16)."""
    alpha: float = 16.0
    """Scaling numerator (D3SR: 16, so that the update enters with factor 1)."""
    targets: str | None = None
    """Regular expression of the module names that get an adapter; it must match the whole name. null is the network's
    own choice: every convolution and projection of the tiny UNet; every layer inside the blocks of Stable
    Diffusion's."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(
                f"LoRA rank must be at least 1 and alpha positive, got rank {self.rank}, alpha {self.alpha}"
            )
        try:
            re.compile(self.targets or "")
        except re.error as error:
            raise ValueError(f"LoRA targets '{self.targets}' are no regular expression: {error}") from error


def add_lora(module: nn.Module, config: LoraConfig) -> list[str]:
    """Freeze ``module`` and put trainable adapters on its matching linear and convolution layers; returns their names.

    Parameters that its attribute ``trained_beside_lora`` names stay trainable. Raises :class:`UserError` when nothing
    matches.
    """
    names = lora_layers(module, config.targets)
    module.requires_grad_(False)
    from peft import LoraConfig as PeftLoraConfig  # imported here: it takes seconds, and inference never needs it
    from peft import inject_adapter_in_model

    settings = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=names, init_lora_weights="gaussian", bias="none"
    )
    inject_adapter_in_model(settings, module)
    kept = getattr(module, "trained_beside_lora", ())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in kept)
    return names


def lora_layers(module: nn.Module, targets: str | None = None) -> list[str]:
    """Names of the linear and convolution layers that ``targets``, or else the module's ``lora_targets``, match."""
    pattern = targets if targets is not None else getattr(module, "lora_targets", None)
    if pattern is None:
        raise UserError(f"LoRA targets: a {type(module).__name__} has no default, name them")
    layers = (name for name, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d)))
    names = [name for name in layers if re.fullmatch(pattern, name)]
    if not names:
        raise UserError(f"LoRA targets '{pattern}' match no linear or convolution layer of {type(module).__name__}")
    return names


def merged_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """State dict of the network as if every adapter had been added to its layer, on the CPU; ``module`` stays as it is.

    The sum of weight and adapter is taken in float32, whatever the frozen weight is kept in. One layer at a time is
    copied, so that a large network on an accelerator needs no room for a second one.
    """
    state = module.state_dict()
    if not any(".lora_" in key for key in state):
        return {key: tensor.detach().cpu() for key, tensor in state.items()}
    from peft.tuners.lora import LoraLayer

    adapted = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    merged: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if ".lora_" in key:
            continue
        owner, _, rest = key.rpartition(".base_layer.")
        if not owner:
            merged[key] = tensor.detach().cpu()
            continue
        value = tensor.detach()
        if rest == "weight":
            layer = adapted[owner]
            value = value.float()
            for adapter in layer.active_adapters:
                value = value + layer.get_delta_weight(adapter).detach().float()
        merged[f"{owner}.{rest}"] = value.cpu()
    return merged


# ---- copies of a network that share its layers: one backbone several times, under other adapters each time ----

Network = TypeVar("Network", bound=nn.Module)


def copy_sharing_weights(network: Network, own: str = "(?!)") -> Network:
    """A copy of ``network`` whose layers (modules without children) are the same objects.

    Adapters put on either leave the other as it is, because they replace a layer in its parent. Layers whose whole name
    matches the regular expression ``own`` are copied. None of the shared layers may be trained.
    """
    leaves = ((name, module) for name, module in network.named_modules() if next(module.children(), None) is None)
    shared = {id(module): module for name, module in leaves if not re.fullmatch(own, name)}
    return copy.deepcopy(network, dict(shared))

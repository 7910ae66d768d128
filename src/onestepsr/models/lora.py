"""Low-rank adapters through peft: add, merge."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from onestepsr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation of a frozen network: W + (alpha / rank) B A."""

    rank: int = 16
    """Rank of the update (D3SR: 16)."""
    alpha: float = 16.0
    """Scaling numerator (D3SR: 16, so that the update enters with factor 1)."""
    targets: str = r".*(conv\w*|to_q|to_k|to_v|to_out|time|skip_gain)"
    """Regular expression of the module names that get an adapter; it must match the whole name."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(
                f"LoRA rank must be at least 1 and alpha positive, got rank {self.rank}, alpha {self.alpha}"
            )


def add_lora(module: nn.Module, config: LoraConfig) -> list[str]:
    """Freeze ``module`` and put trainable adapters on its matching linear and convolution layers; returns their
    names."""
    module.requires_grad_(False)
    names = [
        name
        for name, child in module.named_modules()
        if isinstance(child, (nn.Linear, nn.Conv2d)) and re.fullmatch(config.targets, name)
    ]
    if not names:
        raise UserError(
            f"LoRA targets '{config.targets}' match no linear or convolution layer of {type(module).__name__}"
        )
    from peft import LoraConfig as PeftLoraConfig  # imported here: it takes seconds, and inference never needs it
    from peft import inject_adapter_in_model

    settings = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=names, init_lora_weights="gaussian", bias="none"
    )
    inject_adapter_in_model(settings, module)
    return names


def merge_lora(module: nn.Module) -> nn.Module:
    """Fold every adapter into its layer and put the plain layer back, in place; the output stays the same."""
    from peft.tuners.lora import LoraLayer

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    return module

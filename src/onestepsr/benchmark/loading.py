"""The plain network that the product is measured beside."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from onestepsr.models.registry import load_generator
from onestepsr.models.residual_generator import ResidualShiftGenerator


def load_plain(model: str, device: torch.device, steps: int | None = None) -> nn.Module:
    """The generator in float32 and PyTorch's usual memory format, with the layers that were trained. What depends on
    the prompt alone is computed beforehand here too."""
    generator = load_generator(model, device=device, dtype=torch.float32, steps=steps, faster=False)
    return cast(nn.Module, generator.to(memory_format=torch.contiguous_format))  # type: ignore[call-overload]


def steps_of(generator: nn.Module) -> int:
    """Evaluations of the diffusion network for one picture."""
    return generator.schedule.steps if isinstance(generator, ResidualShiftGenerator) else 1

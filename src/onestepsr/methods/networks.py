"""What methods do with their networks alike: check a step, trade time for memory, and hand over what was trained."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from onestepsr.errors import UserError
from onestepsr.methods.base import Exported
from onestepsr.models.architectures import describe
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.lora import merged_state_dict


def check_timestep(timestep: int, backbone: OneStepLatentGenerator, name: str) -> None:
    """Refuse a step T_L that the diffusion of ``backbone``, called ``name`` by the user, does not have."""
    last = backbone.schedule.steps - 1
    if not 0 <= timestep <= last:
        raise UserError(f"config.timestep: {timestep}, but {name} knows steps from 0 to {last}")


def checkpoint_gradients(*networks: nn.Module) -> None:
    """Let networks compute activations again in the backward pass; :class:`UserError` for one that cannot."""
    for network in networks:
        enable = getattr(network, "enable_gradient_checkpointing", None)
        if enable is None:
            raise UserError(f"gradient_checkpointing: a {type(network).__name__} is too small to offer it")
        enable()


def exported(generator: nn.Module, beside: Mapping[str, Exported] | None = None) -> Exported:
    """A trained generator as it is shipped, its adapters merged; ``beside`` are further files of it."""
    architecture, config = describe(generator)
    state = merged_state_dict(generator)
    return Exported(state_dict=state, architecture=architecture, config=config, beside=beside or {})

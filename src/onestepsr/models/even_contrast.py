"""Switch the even contrast of generators on the tiny backbone on."""

from __future__ import annotations

from typing import cast

from torch import nn

from onestepsr.errors import UserError
from onestepsr.models.architectures import ARCHITECTURES, describe
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.tiny import TinyUNet


def with_even_contrast(generator: nn.Module) -> OneStepLatentGenerator:
    """A tiny generator of the same weights whose output passes :class:`onestepsr.models.tiny_decoder.EvenContrast`.

    Raises UserError for a generator of another kind.
    """
    if not _is_tiny(generator):
        raise UserError("even contrast is for models on the tiny backbone")
    architecture, config = describe(generator)
    result = ARCHITECTURES[architecture](config | {"model": config["model"] | {"even_contrast": True}})
    result.load_state_dict(generator.state_dict())
    return cast(OneStepLatentGenerator, result.train(generator.training))


def alike(first: nn.Module, second: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both generators, with even contrast if one of them has it: their weights can be set side by side."""
    if not (_is_tiny(first) and _is_tiny(second)) or _is_even(first) == _is_even(second):
        return first, second
    return (first, with_even_contrast(second)) if _is_even(first) else (with_even_contrast(first), second)


def _is_tiny(generator: nn.Module) -> bool:
    return isinstance(generator, OneStepLatentGenerator) and isinstance(generator.unet, TinyUNet)


def _is_even(generator: nn.Module) -> bool:
    return cast(TinyUNet, generator.unet).config.even_contrast

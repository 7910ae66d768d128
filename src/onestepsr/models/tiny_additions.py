"""Parts that a trained tiny generator can be given without changing what it makes: grain, and even contrast."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from onestepsr.errors import UserError
from onestepsr.models.architectures import ARCHITECTURES, describe
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.tiny import TinyConfig, TinyUNet
from onestepsr.models.tiny_decoder import FACTOR, grain_noise

GAIN = "autoencoder.decoder.even.gain"
"""Key of the factors of even contrast in a generator's weights."""
NOISE = "autoencoder.decoder.refine.noise"
"""Key of the noise of grain."""
_MIXING = "autoencoder.decoder.refine.conv1.weight"


def tiny_config(generator: nn.Module) -> TinyConfig | None:
    """Sizes of a generator on the tiny backbone; None for any other network."""
    tiny = isinstance(generator, OneStepLatentGenerator) and isinstance(generator.unet, TinyUNet)
    return cast(TinyUNet, generator.unet).config if tiny else None


def with_grain(generator: nn.Module) -> OneStepLatentGenerator:
    """A generator like this one whose decoder sees noise, of which it makes nothing before it is trained on."""
    config = _required(generator, "grain")
    if config.grain:
        return cast(OneStepLatentGenerator, generator)
    if not config.refine_width:
        raise UserError("grain is made by a decoder's last convolutions: expected a backbone with a refine_width")
    state = generator.state_dict()
    mixing = state[_MIXING]  # (width, width + 3, 3, 3)
    wider = torch.cat([mixing, mixing.new_zeros(mixing.shape[0], 1, *mixing.shape[2:])], dim=1)
    return _rebuilt(generator, state | {_MIXING: wider, NOISE: grain_noise().to(mixing)}, grain=True)


def with_gain(generator: nn.Module, gain: Tensor | None = None) -> OneStepLatentGenerator:
    """A generator like this one with the factors (4, 4) of even contrast; by default factors of one."""
    _required(generator, "even contrast")
    gain = torch.ones(FACTOR, FACTOR) if gain is None else gain
    return _rebuilt(generator, generator.state_dict() | {GAIN: gain}, even_contrast=True)


def alike(first: nn.Module, second: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both generators, each given what only the other one has, so that their weights can be set side by side."""
    ours, theirs = tiny_config(first), tiny_config(second)
    if ours is None or theirs is None:
        return first, second
    if ours.grain != theirs.grain:
        first, second = with_grain(first), with_grain(second)
    if ours.even_contrast != theirs.even_contrast:
        first = first if ours.even_contrast else with_gain(first)
        second = second if theirs.even_contrast else with_gain(second)
    return first, second


def _required(generator: nn.Module, what: str) -> TinyConfig:
    config = tiny_config(generator)
    if config is None:
        raise UserError(f"{what} is for models on the tiny backbone")
    return config


def _rebuilt(generator: nn.Module, state: dict[str, Tensor], **changes: bool) -> OneStepLatentGenerator:
    architecture, config = describe(generator)
    result = ARCHITECTURES[architecture](config | {"model": config["model"] | changes})
    result.load_state_dict(state)
    for parameter, original in zip(result.parameters(), generator.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return cast(OneStepLatentGenerator, result.train(generator.training))

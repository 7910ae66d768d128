"""More residual blocks for a trained tiny generator, which change nothing until they are trained.

Every new block starts as the identity, so that a deeper network goes on from where a shallow one stands (Chen et al.,
"Net2Net", 2016) and no training is lost.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import nn

from onestepsr.errors import UserError
from onestepsr.models.architectures import ARCHITECTURES, describe
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.tiny import TinyUNet
from onestepsr.models.tiny_decoder import ResidualBlock


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Residual blocks of a tiny generator; None leaves a part as it is."""

    down_blocks: tuple[int, ...] | None = None
    """In the UNet by level on the way down, the finest first."""
    up_blocks: tuple[int, ...] | None = None
    """In the UNet by level on the way up, the finest first."""
    decoder_blocks: int | None = None
    """In the decoder, at twice the latent's resolution."""
    refine_blocks: int | None = None
    """In the decoder, at the resolution of the picture; for models whose decoder has convolutions there."""


def deepened(generator: OneStepLatentGenerator, depth: Depth) -> OneStepLatentGenerator:
    """A generator of that depth with the weights, and so exactly the pictures, of a shallower one.

    Raises UserError for a generator that is not on the tiny backbone and for a depth that would take blocks away.
    """
    if not isinstance(generator.unet, TinyUNet):
        raise UserError("only models on the tiny backbone can be deepened")
    architecture, config = describe(generator)
    wanted = {name: count for name, count in asdict(depth).items() if count is not None}
    for name, count in wanted.items():
        _check_grows(name, getattr(generator.unet.config, name), count)
    result = ARCHITECTURES[architecture](config | {"model": config["model"] | wanted})
    own = generator.state_dict()
    for name, module in result.named_modules():
        if isinstance(module, ResidualBlock) and f"{name}.conv1.weight" not in own:
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(cast(torch.Tensor, module.conv2.bias))
    result.load_state_dict(result.state_dict() | own)
    return cast(OneStepLatentGenerator, result.train(generator.training))


def _check_grows(name: str, now: int | tuple[int, ...], wanted: int | tuple[int, ...]) -> None:
    pairs = ([now], [wanted]) if isinstance(now, int) or isinstance(wanted, int) else (now, wanted)
    if len(pairs[0]) != len(pairs[1]) or any(after < before for before, after in zip(*pairs, strict=True)):
        raise UserError(f"{name}: {wanted}, expected at least {now}, which the model has already")

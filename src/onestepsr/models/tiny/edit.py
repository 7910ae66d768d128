"""More residual blocks for a trained tiny generator, which change nothing until they are trained.

Every new block starts as the identity, so that a deeper network goes on from where a shallow one stands (Chen et al.,
"Net2Net", 2016) and no training is lost.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
from torch import nn

from onestepsr.core.errors import UserError
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.tiny.decoder import ResidualBlock
from onestepsr.models.tiny.generator import tiny_config, tiny_generator
from onestepsr.models.tiny.networks import TinyUNet


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
    """In the decoder, at the resolution of the image; for models whose decoder has convolutions there."""


def deepened(generator: OneStepLatentGenerator, depth: Depth) -> OneStepLatentGenerator:
    """A generator of that depth with the weights, and so exactly the images, of a shallower one.

    Raises UserError for a generator that is not on the tiny backbone and for a depth that would take blocks away.
    """
    if not isinstance(generator.unet, TinyUNet):
        raise UserError("only models on the tiny backbone can be deepened")
    wanted = {name: count for name, count in asdict(depth).items() if count is not None}
    for name, count in wanted.items():
        _check_grows(name, getattr(generator.unet.config, name), count)
    config = tiny_config(generator)
    result = tiny_generator(replace(config, model=replace(config.model, **wanted)))
    own = generator.state_dict()
    for name, module in result.named_modules():
        if isinstance(module, ResidualBlock) and f"{name}.conv1.weight" not in own:
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(cast(torch.Tensor, module.conv2.bias))
    result.load_state_dict(result.state_dict() | own)
    return result.train(generator.training)


def _check_grows(name: str, now: int | tuple[int, ...], wanted: int | tuple[int, ...]) -> None:
    pairs = ([now], [wanted]) if isinstance(now, int) or isinstance(wanted, int) else (now, wanted)
    if len(pairs[0]) != len(pairs[1]) or any(after < before for before, after in zip(*pairs, strict=True)):
        raise UserError(f"{name}: {wanted}, expected at least {now}, which the model has already")


# Switch the even contrast of generators on the tiny backbone on -------------------------------------------------------


def equalize_subpixel_contrast(generator: nn.Module) -> OneStepLatentGenerator:
    """A tiny generator of the same weights whose output passes :class:`onestepsr.models.tiny.decoder.EvenContrast`.

    Raises UserError for a generator of another kind.
    """
    if not _is_tiny(generator):
        raise UserError("even contrast is for models on the tiny backbone")
    config = tiny_config(cast(OneStepLatentGenerator, generator))
    result = tiny_generator(replace(config, model=replace(config.model, even_contrast=True)))
    result.load_state_dict(generator.state_dict())
    return result.train(generator.training)


def match_architecture(first: nn.Module, second: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both generators, with even contrast if one of them has it: their weights can be set side by side."""
    if not (_is_tiny(first) and _is_tiny(second)) or _is_even(first) == _is_even(second):
        return first, second
    return (
        (first, equalize_subpixel_contrast(second)) if _is_even(first) else (equalize_subpixel_contrast(first), second)
    )


def _is_tiny(generator: nn.Module) -> bool:
    return isinstance(generator, OneStepLatentGenerator) and isinstance(generator.unet, TinyUNet)


def _is_even(generator: nn.Module) -> bool:
    return cast(TinyUNet, generator.unet).config.even_contrast


# A control between two models of one family: the straight line between their weights ----------------------------------


def blend(first: nn.Module, second: nn.Module, share: float) -> nn.Module:
    """A copy of ``first`` whose weights lie the part ``share`` (0 to 1) of the way to those of ``second``.

    At 0 and 1 the weights are exactly those of one network. What is not a weight, such as counters, comes from
    ``first``. Raises UserError for a share out of range and for networks of different shapes.
    """
    if not 0.0 <= share <= 1.0:
        raise UserError(f"share between two models: {share:g}, accepted: 0 (the first) to 1 (the second)")
    ours, theirs = first.state_dict(), second.state_dict()
    different = sorted(ours.keys() ^ theirs.keys())
    different += [key for key in ours.keys() & theirs.keys() if ours[key].shape != theirs[key].shape]
    if different:
        raise UserError(f"the two models differ in shape, first at '{different[0]}'")
    blended = copy.deepcopy(first)
    mixed = {
        key: torch.lerp(value, theirs[key].to(value), share) if value.is_floating_point() else value
        for key, value in ours.items()
    }
    blended.load_state_dict(mixed)
    return blended

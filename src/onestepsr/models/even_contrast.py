"""Measure how a tiny generator's fine contrast depends on the position in its latent cells, and take that back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from onestepsr.errors import UserError
from onestepsr.models.architectures import ARCHITECTURES, describe
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.tiny import TinyUNet
from onestepsr.models.tiny_decoder import FACTOR, EvenContrast, fine_contrast

GAIN = "autoencoder.decoder.even.gain"
"""Key of the factors in a generator's weights."""
ROUNDS = 3
"""How often the factors are corrected: scaling detail changes the local mean, and so the detail, a little."""


@torch.no_grad()
def make_even(generator: nn.Module, pictures: Iterable[Tensor]) -> OneStepLatentGenerator:
    """A tiny generator like this one, with its :class:`EvenContrast` set by ``pictures``, LR (1, 3, h, w) in [0, 1].

    Every picture counts the same; there must be one. Raises UserError for a generator of another kind.
    """
    neutral = with_gain(generator).eval()
    outputs = [_whole_cells(neutral(lr)) for lr in pictures]
    even = EvenContrast()
    for _ in range(ROUNDS):
        even.gain /= torch.stack([_profile(even(output)) for output in outputs]).mean(dim=0)
    return with_gain(neutral, even.gain).eval()


def with_gain(generator: nn.Module, gain: Tensor | None = None) -> OneStepLatentGenerator:
    """A tiny generator like this one with the factors (4, 4) of even contrast; by default of one, which change nothing.

    Raises UserError for a generator of another kind.
    """
    if not _is_tiny(generator):
        raise UserError("even contrast is for models on the tiny backbone")
    architecture, config = describe(generator)
    result = ARCHITECTURES[architecture](config | {"model": config["model"] | {"even_contrast": True}})
    result.load_state_dict(generator.state_dict() | {GAIN: torch.ones(FACTOR, FACTOR) if gain is None else gain})
    return cast(OneStepLatentGenerator, result.train(generator.training))


def alike(first: nn.Module, second: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both generators, with factors of one where only the other has some: their weights can be set side by side."""
    if not (_is_tiny(first) and _is_tiny(second)) or _is_even(first) == _is_even(second):
        return first, second
    return (first, with_gain(second)) if _is_even(first) else (with_gain(first), second)


def _is_tiny(generator: nn.Module) -> bool:
    return isinstance(generator, OneStepLatentGenerator) and isinstance(generator.unet, TinyUNet)


def _is_even(generator: nn.Module) -> bool:
    return cast(TinyUNet, generator.unet).config.even_contrast


def _profile(image: Tensor) -> Tensor:
    """Mean |fine contrast| at the positions (4, 4) of the cells of an image (1, 3, H, W), relative to their mean."""
    detail = fine_contrast(image)[0, 0].abs()
    by_position = detail.reshape(detail.shape[0] // FACTOR, FACTOR, detail.shape[1] // FACTOR, FACTOR).mean(dim=(0, 2))
    return by_position / by_position.mean().clamp(min=1e-12)


def _whole_cells(image: Tensor) -> Tensor:
    height, width = (side - side % FACTOR for side in image.shape[-2:])
    return image[..., :height, :width].float()

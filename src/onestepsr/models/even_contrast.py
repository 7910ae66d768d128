"""Measure how a tiny generator's fine contrast depends on the position in its latent cells, and take that back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from onestepsr.errors import UserError
from onestepsr.image import read_picture, samples_to_tensor
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.tiny_additions import with_gain
from onestepsr.models.tiny_decoder import FACTOR, EvenContrast, fine_contrast

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
"""Endings of the files that are looked at."""
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


def lr_pictures(folder: Path, *, count: int = 80, side: int = 192) -> Iterator[Tensor]:
    """LR pictures (1, 3, h, w) in [0, 1]: the middle, at most ``side`` pixels wide and high, of the first ``count``
    readable files of ``folder`` by name. Raises UserError where there is no folder or no picture."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of LR pictures")
    found = 0
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES):
        pixels = read_picture(path).pixels
        top, left = (max(0, (length - side) // 2) for length in pixels.shape[:2])
        yield samples_to_tensor(pixels[top : top + side, left : left + side]).expand(1, 3, -1, -1)
        found += 1
        if found == count:
            return
    if not found:
        raise UserError(f"{folder}: holds no pictures to measure contrast on, accepted: {', '.join(PICTURES)}")


def _profile(image: Tensor) -> Tensor:
    """Mean |fine contrast| at the positions (4, 4) of the cells of an image (1, 3, H, W), relative to their mean."""
    detail = fine_contrast(image)[0, 0].abs()
    by_position = detail.reshape(detail.shape[0] // FACTOR, FACTOR, detail.shape[1] // FACTOR, FACTOR).mean(dim=(0, 2))
    return by_position / by_position.mean().clamp(min=1e-12)


def _whole_cells(image: Tensor) -> Tensor:
    height, width = (side - side % FACTOR for side in image.shape[-2:])
    return image[..., :height, :width].float()

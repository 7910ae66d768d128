"""From a tagger's numbers to a prompt, as OSEDiff does it with RAM's network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.core.files import read_text
from onestepsr.models.perceptual_features import IMAGENET_MEAN, IMAGENET_STD

TAGGER_SIDE = 384
"""Side of the image that RAM's networks see, whatever its proportions were."""
MAX_LIST_BYTES = 4_000_000


def format_tags(tags: Sequence[str], user_prompt: str = "") -> str:
    """OSEDiff's prompt at inference: the tags, the user's words, and a comma after either.

    Without words of the user it ends in ", ,": the published models were measured with that.
    """
    return f"{', '.join(tags)}, {user_prompt},"


def select_tags(probabilities: Tensor, thresholds: Tensor | float, names: Sequence[str]) -> list[str]:
    """The ``names`` whose probability (K,) lies above the threshold of their class (K,), in the order of the list."""
    if probabilities.shape != (len(names),):
        raise ValueError(f"probabilities {tuple(probabilities.shape)}: expected ({len(names)},), one for each name")
    chosen = torch.nonzero(probabilities.cpu() > thresholds).flatten().tolist()
    return [names[index] for index in chosen]


def tagger_input(picture: Image.Image, *, antialias: bool = False, side: int = TAGGER_SIDE) -> Tensor:
    """``image`` as RAM's network takes it: (1, 3, side, side), stretched to a square, in ImageNet's statistics.

    Whether OSEDiff's resizing widens its filter depends on the version of torchvision: 0.15, which its requirements
    name, does not, those since 0.17 do (``antialias``).
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    square = F.interpolate(image, (side, side), mode="bilinear", antialias=antialias)
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (square - mean) / deviation


def published_input(picture: Image.Image, scale: int = 4, process_side: int = 512) -> Image.Image:
    """``image`` as OSEDiff's script prepares it for tagger and network alike, 8 bit.

    A short side below ``process_side / scale`` is raised to that; then all is enlarged ``scale`` times, both bicubic;
    then shrunk by Lanczos to whole multiples of 8, which loses up to 7 pixels of either side.
    """
    picture = picture.convert("RGB")
    shortest = process_side // scale
    if min(picture.size) < shortest:
        factor = shortest / min(picture.size)
        picture = picture.resize((int(factor * picture.width), int(factor * picture.height)))
    picture = picture.resize((picture.width * scale, picture.height * scale))
    even = (picture.width - picture.width % 8, picture.height - picture.height % 8)
    return picture.resize(even, Image.Resampling.LANCZOS)


def read_tag_names(path: Path) -> list[str]:
    """One tag per line."""
    return [line.strip() for line in _read_lines(path)]


def read_thresholds(path: Path, count: int) -> Tensor:
    """One number from 0 to 1 per line, ``count`` of them, as (count,) float32."""
    lines = _read_lines(path)
    try:
        values = [float(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path}: expected one number per line ({error})") from error
    if len(values) != count:
        raise UserError(f"{path}: {len(values)} thresholds for {count} tags")
    if not all(0 <= value <= 1 for value in values):
        raise UserError(f"{path}: a threshold outside 0 to 1")
    return torch.tensor(values)


def _read_lines(path: Path) -> list[str]:
    return read_text(path, MAX_LIST_BYTES, "list of tags").splitlines()

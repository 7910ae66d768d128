"""LR and HR images of photos in files, the same ones whether ``degrade`` writes or ``evaluate`` measures them.

What is done to a photo depends on the seed and on its name alone.
"""

from __future__ import annotations

from pathlib import Path

from onestepsr.core.errors import UserError
from onestepsr.core.rng import generator
from onestepsr.data.degradation.pipeline import Degradation, Recipe, apply_degradation, draw_degradation, target_of
from onestepsr.data.photos import read_pixels
from onestepsr.imaging.read import Samples, samples_to_tensor, tensor_to_samples


def draw_for(recipe: Recipe, seed: int, name: str) -> Degradation:
    """Draw the parameters for the photo called ``name``, its path in the folder of photos with forward slashes."""
    return draw_degradation(recipe, generator(seed, "degrade", name))


def make_pair(
    path: Path, drawn: Degradation, *, seed: int, name: str, scale: int, multiple: int
) -> tuple[Samples, Samples]:
    """LR samples (h, w, 3) and HR samples (h scale, w scale, 3), uint8, of the photo in ``path``.

    HR is cut at the bottom and right to multiples of ``multiple``, itself a multiple of ``scale``. Raises UserError for
    a photo that cannot be read or leaves nothing then.
    """
    pixels = read_pixels(path)
    height, width = (side // multiple * multiple for side in pixels.shape[:2])
    if not height or not width:
        raise UserError(f"{path}: {pixels.shape[1]} x {pixels.shape[0]}, expected sides of at least {multiple}")
    hr = samples_to_tensor(pixels[:height, :width])[0]
    lr = apply_degradation(hr, drawn, generator(seed, "degrade noise", name), scale)
    kind = pixels.dtype.type
    return tensor_to_samples(lr, kind), tensor_to_samples(target_of(hr, drawn), kind)

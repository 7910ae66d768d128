"""Small images for tests of evaluation."""

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def published_pair(which: str) -> tuple[Tensor, Tensor]:
    """SR and HR (1, 3, H, W) of the ``first`` or ``second`` golden pair."""
    if which == "first":
        with np.load(GOLDEN / "metrics_sr.npz") as made, np.load(GOLDEN / "metrics_hr.npz") as reference:
            arrays = [made["sr"], reference["hr"]]
    else:
        with np.load(GOLDEN / "metrics_second.npz") as pair:
            arrays = [np.array(Image.open(io.BytesIO(pair[name].tobytes()))) for name in ("sr_png", "hr_png")]
    sr, hr = (torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255 for array in arrays)
    return sr, hr


def scene(height: int, width: int, seed: int = 0) -> Tensor:
    """Something between noise and a photo, (1, 3, H, W) on the levels of 8 bits: edges and texture of every size."""
    rng = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, height, width)
    for step in (32, 16, 8, 4, 2, 1):
        coarse = torch.rand(1, 3, -(-height // step) + 1, -(-width // step) + 1, generator=rng)
        fine = coarse.repeat_interleave(step, -1).repeat_interleave(step, -2)[..., :height, :width]
        image += fine * step**0.7
    return (image / image.amax() * 255).round() / 255


def samples(image: Tensor) -> NDArray[np.uint8]:
    """(1, 3, H, W) in [0, 1] as (H, W, 3) uint8."""
    return (image[0].permute(1, 2, 0) * 255).round().clamp(0, 255).byte().numpy()


def save(path: Path, image: Tensor, mode: str = "RGB") -> Path:
    """Write (1, 3, H, W) in [0, 1]; the ending decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(samples(image)).convert(mode).save(path)
    return path


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, the border repeated."""
    if sigma == 0:
        return image
    radius = int(3 * sigma + 1)
    offset = torch.arange(-radius, radius + 1, dtype=image.dtype)
    taps = torch.exp(-(offset**2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(3, 1, 1, -1)
    padded = torch.nn.functional.pad(image, (radius,) * 4, mode="replicate")
    rows = torch.nn.functional.conv2d(padded, taps, groups=3)
    return torch.nn.functional.conv2d(rows, taps.transpose(2, 3), groups=3)


def noisy(image: Tensor, level: float, seed: int = 1) -> Tensor:
    """Gaussian noise of deviation ``level``, clamped to [0, 1]; the same field at every level."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed), dtype=image.dtype)
    return (image + level * noise).clamp(0, 1)

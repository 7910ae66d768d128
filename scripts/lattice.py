"""Dependence of detail on the position within 4x4 output pixels, seen by several filters.

    python scripts/lattice.py PHOTOS sr/ other_sr/ --count 40

The measure *grid* looks at images through one filter, the difference from a 5x5 mean. A model could please that one
alone, so this shows the same number for others: finer and coarser means, differences of neighbours across and down,
and the Laplacian. One line per folder, means over its first images by name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from onestepsr.data.photos import find_images
from onestepsr.evaluate.metrics.fidelity import lattice_variation
from onestepsr.imaging.color import luma
from onestepsr.imaging.read import read_image, samples_to_tensor

BORDER = 8
"""Pixels left out on every side: more than any filter reaches over the edge."""


def main() -> None:
    """Read the arguments, measure, write one line per folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=100)
    arguments = parser.parse_args()
    for folder in arguments.folders:
        rows = [_unevenness(path) for path in find_images(folder, recursive=False)[: arguments.count]]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        sys.stdout.write(f"{folder}: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()) + "\n")
        sys.stdout.flush()


def _unevenness(path: Path) -> dict[str, float]:
    rgb = samples_to_tensor(read_image(path).pixels).expand(1, 3, -1, -1).double()
    y = luma(rgb)
    responses = {f"{side}x{side} mean": y - _mean(y, side) for side in (3, 5, 9)}
    responses["across"] = F.pad(y[..., 1:] - y[..., :-1], (0, 1))
    responses["down"] = F.pad(y[..., 1:, :] - y[..., :-1, :], (0, 0, 0, 1))
    responses["Laplacian"] = F.conv2d(y, y.new_tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]]), padding=1)
    return {name: _variation(response.abs()) for name, response in responses.items()}


def _mean(y: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(y, side, stride=1, padding=side // 2)


def _variation(strength: Tensor) -> float:
    return float(lattice_variation(strength[..., BORDER:-BORDER, BORDER:-BORDER]))


if __name__ == "__main__":
    main()

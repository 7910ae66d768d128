"""AlexNet's convolutions, the features of LPIPS as tables print it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.errors import UserError
from onestepsr.models.features import IMAGENET_MEAN, IMAGENET_STD
from onestepsr.models.tensors import read_wanted

MAX_BYTES = 2**29
"""Limit on weight files; the published one has 233 MiB, most of it the classifier."""
LAYERS = (("0", 3, 64, 11, 4, 2), ("3", 64, 192, 5, 1, 2), ("6", 192, 384, 3, 1, 1), ("8", 384, 256, 3, 1, 1))
LAST_LAYER = ("10", 256, 256, 3, 1, 1)
"""Key, channels in and out, kernel, stride and padding of the convolutions."""
POOLED_BEFORE = ("3", "6")
SMALLEST_SIDE = 31
"""Smaller images leave nothing of the third map."""


class AlexNetFeatures(nn.Module):
    """The five convolutions of torchvision's AlexNet (Krizhevsky's second, "one weird trick" version).

    State-dict keys are torchvision's ``features.N``. The colour normalisation of LPIPS is ImageNet's, rounded.
    """

    mean: Tensor
    std: Tensor
    channels = (3, 64, 192, 384, 256, 256)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        for key, width, out, kernel, stride, padding in (*LAYERS, LAST_LAYER):
            self.features[key] = nn.Conv2d(width, out, kernel, stride, padding)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    @classmethod
    def from_file(cls, path: Path) -> AlexNetFeatures:
        """Load published weights (torchvision's keys, as ``.pth`` or safetensors; a classifier is ignored)."""
        network = cls()
        kind = "AlexNet weights with torchvision's keys"
        network.load_state_dict(read_wanted(path, network.state_dict(), limit=MAX_BYTES, kind=kind))
        return network

    def forward(self, x: Tensor) -> list[Tensor]:
        """Six maps for ``x`` (N, 3, H, W) in [0, 1], sides of 31 and more: the image, then the five ReLUs."""
        if min(x.shape[-2:]) < SMALLEST_SIDE:
            raise UserError(f"AlexNet needs at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels")
        maps, h = [x], (x - self.mean) / self.std
        for key, layer in self.features.items():
            if key in POOLED_BEFORE:
                h = F.max_pool2d(h, 3, stride=2)
            h = F.relu(layer(h))
            maps.append(h)
        return maps

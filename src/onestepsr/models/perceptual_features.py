"""Feature networks for perceptual losses and metrics: VGG-16, AlexNet, and a fixed filter bank that needs no weights.

Each returns a list of feature maps of growing depth, beginning with the image itself, as DISTS wants it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.weights.files import read_wanted

MAX_BYTES = 2**30
"""Limit on VGG weight files; the published one has 528 MiB."""
VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class HannPool(nn.Module):
    """L2 pooling with a 3x3 Hann window and stride 2: sqrt(blur(x^2) + 1e-12), the aliasing-free pooling of DISTS."""

    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.hann_window(5, periodic=False)[1:-1]
        kernel = torch.outer(taps, taps)
        self.register_buffer("window", (kernel / kernel.sum())[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, ceil(H/2), ceil(W/2))."""
        window = self.window.to(x.dtype).expand(x.shape[1], 1, 3, 3)
        return (F.conv2d(x**2, window, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


class VGG16Features(nn.Module):
    """VGG-16 up to relu5_3: with Hann pooling the features of DISTS, with max pooling those of LPIPS.

    State-dict keys are torchvision's ``features.N``. Both distances normalise colours alike, by ImageNet's statistics.
    """

    keeps_float32 = True
    """Distances are small differences of its features; training leaves it in float32 when it keeps backbones in 16
    bits."""
    mean: Tensor
    std: Tensor
    channels = (3, 64, 128, 256, 512, 512)

    def __init__(self, *, pooling: Literal["hann", "max"] = "hann") -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        self.stages: list[list[str]] = []
        index, width = 0, 3
        for stage in VGG_STAGES:
            names: list[str] = []
            for size in stage:
                self.features[str(index)] = nn.Conv2d(width, size, 3, padding=1)
                names.append(str(index))
                index, width = index + 2, size  # the number after each convolution is its ReLU
            self.stages.append(names)
            index += 1  # the pooling layer
        self.pool = HannPool() if pooling == "hann" else nn.MaxPool2d(2)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    @classmethod
    def from_file(cls, path: Path, *, pooling: Literal["hann", "max"] = "hann") -> VGG16Features:
        """Load published weights (torchvision's keys, as ``.pth`` or safetensors; a classifier is ignored)."""
        network = cls(pooling=pooling)
        kind = "VGG-16 weights with torchvision's keys"
        network.load_state_dict(read_wanted(path, network.state_dict(), limit=MAX_BYTES, kind=kind))
        return network

    def forward(self, x: Tensor) -> list[Tensor]:
        """Six maps for ``x`` (N, 3, H, W) in [0, 1]: the image, then relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
        maps = [x]
        h = (x - self.mean) / self.std
        for number, names in enumerate(self.stages):
            h = self.pool(h) if number else h
            for name in names:
                h = F.relu(self.features[name](h))
            maps.append(h)
        return maps


class OrientedFeatures(nn.Module):
    """A fixed feature network of ours for machines without VGG weights: oriented band-pass filters on a pyramid.

    Per octave, luma is filtered by odd and even oriented derivative filters (edges and lines in ``orientations``
    directions; three span every direction), both half-waves are kept apart as ReLU networks do, and the next octave
    sees the blurred image at half the size. Nothing is learnt, so nothing can be missing; it measures texture energy
    and edge position by scale and direction, and knows nothing of objects.
    """

    bank: Tensor
    luma: Tensor
    blur: Tensor
    channels: tuple[int, ...]

    def __init__(self, *, octaves: int = 4, orientations: int = 3, size: int = 5) -> None:
        super().__init__()
        self.octaves = octaves
        bank = oriented_filters(orientations, size)
        self.channels = (3, *([2 * bank.shape[0]] * octaves))
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("luma", torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1), persistent=False)
        taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("blur", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``octaves`` + 1 maps for ``x`` (N, 3, H, W) in [0, 1]: the image, then each octave's filter responses."""
        x = x.contiguous()  # reductions per channel are fastest on contiguous planes
        maps = [x]
        gray = (x * self.luma.to(x.dtype)).sum(dim=1, keepdim=True)
        pad = self.bank.shape[-1] // 2
        for octave in range(self.octaves):
            if octave:
                gray = F.conv2d(F.pad(gray, (2, 2, 2, 2), mode="reflect"), self.blur.to(x.dtype), stride=2)
            response = F.conv2d(F.pad(gray, (pad,) * 4, mode="reflect"), self.bank.to(x.dtype))
            maps.append(torch.cat([F.relu(response), F.relu(-response)], dim=1))
        return maps


def oriented_filters(orientations: int, size: int, sigma: float = 0.9) -> Tensor:
    """First and second directional derivatives of a Gaussian: (2 orientations, 1, size, size).

    Every filter sums to zero and has unit L1 norm, so that responses to an image in [0, 1] stay within [-1, 1].
    """
    grid = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    gaussian = torch.exp(-(x**2 + y**2) / (2 * sigma**2))
    filters = []
    for k in range(orientations):
        u = math.cos(math.pi * k / orientations) * x + math.sin(math.pi * k / orientations) * y
        filters += [u * gaussian, (u**2 / sigma**2 - 1) * gaussian]
    bank = torch.stack(filters)
    bank = bank - bank.mean(dim=(1, 2), keepdim=True)
    return (bank / bank.abs().sum(dim=(1, 2), keepdim=True)).float()[:, None]


# ---- AlexNet's convolutions, the features of LPIPS as tables print it ----

ALEXNET_MAX_BYTES = 2**29
"""Limit on AlexNet weight files; the published one has 233 MiB, most of it the classifier."""
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
        network.load_state_dict(read_wanted(path, network.state_dict(), limit=ALEXNET_MAX_BYTES, kind=kind))
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

"""FID, the Frechet distance between two sets of images in the features of one Inception network.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017; images are
resized as Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", 2022 ("clean-fid").

The network is that of Szegedy et al., "Rethinking the Inception Architecture", 2016, in TensorFlow's form: FID is
defined by one set of weights (the graph of 5 December 2015) and by TensorFlow's operations: averages at the border
count only pixels of the image, and the last block takes a maximum where the paper has an average. Modules carry the
names of torchvision's Inception3, so that the published conversion loads as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.evaluate.metrics.fidelity import check_image
from onestepsr.evaluate.metrics.perceptual import weights
from onestepsr.weights.files import read_wanted

SMALLEST_SET = 2
SIDE = 299
"""Side of the network's input."""
MAX_BYTES = 2**28
"""Limit on weight files; the published one has 91 MiB."""


# ---- distance ----


class SetDistance(Protocol):
    """A metric of two sets of images: features of each image, then one number."""

    def features(self, image: Tensor) -> Tensor:
        """Features (N, D) of RGB (N, 3, H, W) in [0, 1]."""
        ...

    def distance(self, sr: Tensor, hr: Tensor) -> float:
        """The metric from the features of both sets, (images, D)."""
        ...


class FID:
    """FID in the features of ``network``: (N, 3, 299, 299) in [-1, 1) -> (N, 2048)."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def features(self, image: Tensor) -> Tensor:
        """Features (N, 2048) float64 on the CPU of RGB (N, 3, H, W) in [0, 1], which have to fit 8 bits."""
        resized = torch.stack([resize_for_inception(one) for one in image]).to(image.device)
        self.network.to(image.device)
        with torch.no_grad():
            return cast(Tensor, self.network(resized)).to("cpu", torch.float64)

    def distance(self, sr: Tensor, hr: Tensor) -> float:
        """FID from the features (images, D) of SR and HR; UserError for fewer than two images."""
        if min(len(sr), len(hr)) < SMALLEST_SET:
            raise UserError(f"FID needs at least {SMALLEST_SET} images, got {min(len(sr), len(hr))}")
        return frechet_distance(sr, hr)


def load_fid() -> FID:
    """FID with the published weights, which have to be on this machine."""
    (path,) = weights("inception-fid")
    return FID(InceptionFeatures.from_file(path))


def resize_for_inception(image: Tensor) -> Tensor:
    """RGB (3, H, W) in [0, 1] -> (3, 299, 299) in [-1, 1): each channel by Pillow's antialiased bicubic, in float32."""
    check_image(image[None])
    planes = (image.detach().to("cpu", torch.float32) * 255).numpy()
    images = [Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for plane in planes]
    return (torch.from_numpy(np.stack([np.asarray(one) for one in images])).clamp(0, 255) - 128) / 128


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features (n_1, D), (n_2, D).

    |m_1 - m_2|^2 + tr(S_1) + tr(S_2) - 2 tr((S_1 S_2)^(1/2)). With the centred features A_i = U S_i^(1/2) the last
    trace is the sum of the singular values of A_1 A_2^T: no root of a matrix, and exact for few images too, where
    implementations that take the root of the singular S_1 S_2 lose some digits.
    """
    means = first.mean(dim=0), second.mean(dim=0)
    roots = [
        _compact((features - mean) / (len(features) - 1) ** 0.5)
        for features, mean in zip((first, second), means, strict=True)
    ]
    spread = sum(float(root.square().sum()) for root in roots)
    shared = float(torch.linalg.svdvals(roots[0] @ roots[1].T).sum())
    return max(0.0, float((means[0] - means[1]).square().sum()) + spread - 2 * shared)


def _compact(rows: Tensor) -> Tensor:
    """At most D rows with the same ``rows^T rows``."""
    if len(rows) <= rows.shape[1]:
        return rows
    return cast(Tensor, torch.linalg.qr(rows, mode="r").R)


# ---- Inception-v3 ----

Kernel = int | tuple[int, int]


class Step(NamedTuple):
    """Convolutions side by side, mostly one, whose outputs are joined."""

    out: int
    """Output channels of each."""
    kernels: tuple[Kernel, ...]
    stride: int = 1


Branches = Mapping[str, tuple[Step, ...]]
Pool = Literal["average", "maximum", "halving maximum"]


def _steps(*steps: tuple[int, Kernel], halve: bool = False) -> tuple[Step, ...]:
    """One convolution after the other; with ``halve``, the last has stride 2."""
    chain = [Step(out, (kernel,)) for out, kernel in steps]
    return (*chain[:-1], chain[-1]._replace(stride=2)) if halve else tuple(chain)


_ROW, _COLUMN = (1, 7), (7, 1)
_FORK = Step(384, ((1, 3), (3, 1)))
_A: Branches = {
    "branch1x1": _steps((64, 1)),
    "branch5x5": _steps((48, 1), (64, 5)),
    "branch3x3dbl": _steps((64, 1), (96, 3), (96, 3)),
}
_B: Branches = {
    "branch3x3": _steps((384, 3), halve=True),
    "branch3x3dbl": _steps((64, 1), (96, 3), (96, 3), halve=True),
}
_D: Branches = {
    "branch3x3": _steps((192, 1), (320, 3), halve=True),
    "branch7x7x3": _steps((192, 1), (192, _ROW), (192, _COLUMN), (192, 3), halve=True),
}
_E: Branches = {
    "branch1x1": _steps((320, 1)),
    "branch3x3": (*_steps((384, 1)), _FORK),
    "branch3x3dbl": (*_steps((448, 1), (384, 3)), _FORK),
}


def _c(width: int) -> Branches:
    return {
        "branch1x1": _steps((192, 1)),
        "branch7x7": _steps((width, 1), (width, _ROW), (192, _COLUMN)),
        "branch7x7dbl": _steps((width, 1), (width, _COLUMN), (width, _ROW), (width, _COLUMN), (192, _ROW)),
    }


BLOCKS: tuple[tuple[str, int, Branches, Pool, int], ...] = (
    ("Mixed_5b", 192, _A, "average", 32),
    ("Mixed_5c", 256, _A, "average", 64),
    ("Mixed_5d", 288, _A, "average", 64),
    ("Mixed_6a", 288, _B, "halving maximum", 0),
    ("Mixed_6b", 768, _c(128), "average", 192),
    ("Mixed_6c", 768, _c(160), "average", 192),
    ("Mixed_6d", 768, _c(160), "average", 192),
    ("Mixed_6e", 768, _c(192), "average", 192),
    ("Mixed_7a", 768, _D, "halving maximum", 0),
    ("Mixed_7b", 1280, _E, "average", 192),
    ("Mixed_7c", 2048, _E, "maximum", 192),
)
"""Name, input channels, branches, pooling branch and its output channels (0: not convolved) of the mixed blocks."""


class ConvolutionUnit(nn.Module):
    """Convolution, batch normalisation by stored statistics, ReLU; same size where the stride is 1 and ``same``."""

    def __init__(self, width: int, out: int, kernel: Kernel, *, stride: int = 1, same: bool = True) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (high // 2, wide // 2) if same and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(width, out, (high, wide), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)
        self.bn.num_batches_tracked = None  # a counter of training, which published files may lack

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) to (N, out, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class MixedBlock(nn.Module):
    """Branches of convolutions and one of pooling, joined along the channels."""

    def __init__(self, width: int, branches: Branches, pool: Pool, pooled: int) -> None:
        super().__init__()
        self.pool = pool
        self.chains = [self._add(name, width, steps) for name, steps in branches.items()]
        if pooled:
            self.branch_pool = ConvolutionUnit(width, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) to (N, the sum of the branches' channels, H or about H / 2, ...)."""
        results = []
        for chain in self.chains:
            h = x
            for names in chain:
                outputs = [self.get_submodule(name)(h) for name in names]
                h = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
            results.append(h)
        return torch.cat([*results, self._pooled(x)], dim=1)

    def _add(self, name: str, width: int, steps: tuple[Step, ...]) -> list[list[str]]:
        """Register the units of one branch; returns their names, step by step."""
        chain: list[list[str]] = []
        for number, step in enumerate(steps, 1):
            own = f"{name}_{number}" if len(steps) > 1 else name
            names = [own] if len(step.kernels) == 1 else [own + letter for letter in "ab"]
            for unit, kernel in zip(names, step.kernels, strict=True):
                self.add_module(unit, ConvolutionUnit(width, step.out, kernel, stride=step.stride))
            chain.append(names)
            width = step.out * len(names)
        return chain

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "halving maximum":
            return F.max_pool2d(x, 3, stride=2)
        if self.pool == "maximum":
            return cast(Tensor, self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        return cast(Tensor, self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))


class InceptionFeatures(nn.Module):
    """Inception-v3 up to its last pooling: the 2048 features of FID."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvolutionUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvolutionUnit(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvolutionUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvolutionUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvolutionUnit(80, 192, 3, same=False)
        for name, width, branches, pool, pooled in BLOCKS:
            self.add_module(name, MixedBlock(width, branches, pool, pooled))
        self.eval()

    @classmethod
    def from_file(cls, path: Path) -> InceptionFeatures:
        """Load the published conversion (``.pth`` or safetensors; its classifier is ignored)."""
        with torch.device("meta"):  # filled at once: random values first would take longer than reading the file
            network = cls()
        kind = "the Inception weights of FID"
        tensors = read_wanted(path, network.state_dict(), limit=MAX_BYTES, kind=kind)
        network.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True, strict=False)
        return network

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, 2048) of images (N, 3, 299, 299) in [-1, 1)."""
        h = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        h = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(h, 3, stride=2)))
        h = F.max_pool2d(h, 3, stride=2)
        for name, *_ in BLOCKS:
            h = self.get_submodule(name)(h)
        return cast(Tensor, h.mean(dim=(2, 3)))

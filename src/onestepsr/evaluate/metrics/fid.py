"""FID, the Frechet distance between two sets of images in the features of one Inception network.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017; images are
resized as Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", 2022 ("clean-fid").
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.evaluate.metrics.fidelity import check_image
from onestepsr.evaluate.metrics.inception import SIDE, InceptionFeatures
from onestepsr.evaluate.metrics.perceptual import weights

SMALLEST_SET = 2


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
    return (torch.from_numpy(np.stack([np.asarray(picture) for picture in images])).clamp(0, 255) - 128) / 128


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

"""The image-space part of a generator's loss: squared error, a perceptual distance, and the lattice penalty.

D3SR calls it L_spatial (Eq. 8). Which distance and which features are settings, for the rows of its Table 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.losses.perceptual import (
    DISTS,
    LPIPS,
    ea_dists,
    ea_lpips,
    lattice_loss,
    read_dists_weights,
    read_lpips_weights,
)
from onestepsr.models.efficientnet_lite import EfficientNetFeatures, EfficientNetLite
from onestepsr.models.perceptual_features import OrientedFeatures, VGG16Features
from onestepsr.weights.catalog import resolve
from onestepsr.weights.files import SMALL_WEIGHTS, read_tensors

ORIENTED_LPIPS_EPSILON = 0.02
"""Responses of the oriented filters lie in [-1, 1] and vanish where nothing is; weaker ones than this are noise."""


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The perceptual distance of the spatial loss and the features behind it."""

    distance: Literal["ea_dists", "dists", "ea_lpips", "lpips"] = "ea_dists"
    """D3SR's EA-DISTS (Eq. 5), DISTS without the edge term, or LPIPS with and without it (Table 5)."""
    features: Literal["oriented", "vgg16", "efficientnet-lite0"] = "oriented"
    """``vgg16`` is the paper's and needs published weights; ``efficientnet-lite0`` is trained on ImageNet too, costs a
    tenth and comes from the package registry; ``oriented`` is a fixed filter pyramid that needs nothing."""
    vgg16_weights: str = "vgg16"
    """Name of a model, or file with torchvision's VGG-16 keys."""
    efficientnet_weights: str = "efficientnet-lite0"
    """Name of a model, or file with EfficientNet-Lite0's published keys."""
    efficientnet_stages: int = 5
    """Number of its maps that count, at 1/2 to 1/32 of the image's sides."""
    dists_weights: str | None = "dists"
    """Name or file of the published channel weights, used with ``vgg16``; null gives every channel the same."""
    lpips_weights: str | None = "lpips-vgg"
    """Likewise for LPIPS."""
    texture_share: float = 0.5
    """Part of the texture term in DISTS where no published channel weights are used; the rest is structure."""
    per_channel_edges: bool = False
    """Take Sobel edges per colour channel instead of on the channel mean; the paper does not say which."""

    def __post_init__(self) -> None:
        if not 0 <= self.texture_share <= 1:
            raise ValueError(f"texture_share must be 0..1, got {self.texture_share}")


@dataclass(frozen=True, kw_only=True)
class SpatialWeights:
    """Weights of the three terms; a term of weight 0 is not computed."""

    mse: float
    """Of the squared error of images in [-1, 1]."""
    perceptual: float
    """Of the perceptual distance, lambda_2 in D3SR."""
    lattice: float = 0.0
    """Of the penalty on patterns locked to the latent grid."""


class SpatialLoss:
    """L_spatial = MSE + lambda_2 distance (D3SR, Eq. 8), and the lattice penalty where it is asked for."""

    def __init__(self, weights: SpatialWeights, config: PerceptualConfig) -> None:
        self.weights, self.config = weights, config
        self.frozen: dict[str, nn.Module] = {}
        """Networks behind the perceptual distance, for :attr:`Method.frozen`; empty without such a term."""
        if weights.perceptual:
            features, distance = build_perceptual(config)
            self.frozen = {"features": features, "distance": distance}

    def __call__(self, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Weighted terms for images (N, 3, H, W) in [0, 1]."""
        terms = {}
        if self.weights.mse:
            terms["mse"] = self.weights.mse * 4 * F.mse_loss(sr, hr)  # 4: the error is counted in [-1, 1]
        if self.weights.perceptual:
            terms[self.config.distance] = self.weights.perceptual * self._distance(sr, hr).mean()
        if self.weights.lattice:
            terms["lattice"] = self.weights.lattice * 4 * lattice_loss(sr, hr)
        return terms

    def _distance(self, sr: Tensor, hr: Tensor) -> Tensor:
        features = cast(Callable[[Tensor], list[Tensor]], self.frozen["features"])
        distance = self.frozen["distance"]
        per_channel = self.config.per_channel_edges
        if self.config.distance == "ea_lpips":
            return ea_lpips(cast(LPIPS, distance), features, sr, hr, per_channel=per_channel)
        if self.config.distance == "ea_dists":
            return ea_dists(cast(DISTS, distance), features, sr, hr, per_channel=per_channel)
        return cast(Tensor, distance(features, sr, hr))


def build_perceptual(config: PerceptualConfig) -> tuple[nn.Module, DISTS | LPIPS]:
    """Feature network, frozen, and distance of a configuration; missing weights are reported in one line."""
    lpips = config.distance in ("lpips", "ea_lpips")
    if config.features == "oriented":
        oriented = OrientedFeatures()  # has no parameters
        if lpips:
            return oriented, LPIPS(oriented.channels[1:], epsilon=ORIENTED_LPIPS_EPSILON)
        return oriented, DISTS(oriented.channels, texture_share=config.texture_share)
    if config.features == "efficientnet-lite0":
        network = EfficientNetLite.from_file(resolve(config.efficientnet_weights)).requires_grad_(False)
        efficientnet = EfficientNetFeatures(network, config.efficientnet_stages)
        if lpips:
            return efficientnet, LPIPS.averaged(efficientnet.channels[1:])
        return efficientnet, DISTS(efficientnet.channels, texture_share=config.texture_share)
    vgg = VGG16Features.from_file(resolve(config.vgg16_weights), pooling="max" if lpips else "hann")
    vgg.requires_grad_(False)
    if lpips:
        weights = None if config.lpips_weights is None else read_lpips_weights(_small(config.lpips_weights))
        return vgg, LPIPS(vgg.channels[1:], weights)
    alpha, beta = (None, None) if config.dists_weights is None else read_dists_weights(_small(config.dists_weights))
    return vgg, DISTS(vgg.channels, alpha, beta, texture_share=config.texture_share)


def _small(name: str) -> dict[str, Tensor]:
    return read_tensors(Path(resolve(name)), limit=SMALL_WEIGHTS)

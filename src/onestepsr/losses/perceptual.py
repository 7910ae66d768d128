"""DISTS, the edge-aware DISTS of D3SR, LPIPS, and the lattice penalty.

The feature network is an argument; losses and metrics share this code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onestepsr.core.errors import UserError

Features = Callable[[Tensor], list[Tensor]]
"""Image (N, 3, H, W) in [0, 1] to feature maps, the image itself first."""

STABILITY = 1e-6
"""c1 and c2 of DISTS."""


class _Moments(torch.autograd.Function):
    """E[x], E[x^2] and E[xy] per channel, with a backward that makes one pass: feature maps are large, and autograd's
    elementwise intermediates would cost more than the networks that made them. ``y`` is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, y)
        size = x.shape[2] * x.shape[3]
        square, product = (torch.einsum("nchw,nchw->nc", x, other) / size for other in (x, y))
        return x.mean(dim=(2, 3)), square, product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        by_mean, by_square, by_product = (g[..., None, None] / (x.shape[2] * x.shape[3]) for g in grads)
        return (x * (2 * by_square)).addcmul_(y, by_product).add_(by_mean), None


class DISTS(nn.Module):
    """Deep image structure and texture similarity, as a distance in about [0, 1] (Ding et al., 2020).

    Per feature channel, texture is compared by the similarity of global means and structure by that of the global
    covariance; ``alpha`` and ``beta`` weigh the channels and are normalised to sum to one together. Without published
    weights every stage counts alike and every channel of a stage alike.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        alpha: Tensor | None = None,
        beta: Tensor | None = None,
        *,
        texture_share: float = 0.5,
    ) -> None:
        """``channels`` lists the feature maps' widths; ``alpha`` and ``beta`` are (sum of channels,).

        ``texture_share`` is alpha's part of the default weights.
        """
        super().__init__()
        even = torch.cat([torch.full((c,), 1.0 / (c * len(channels))) for c in channels])
        alpha = texture_share * even if alpha is None else alpha.flatten()
        beta = (1 - texture_share) * even if beta is None else beta.flatten()
        if alpha.shape != even.shape or beta.shape != even.shape:
            raise ValueError(f"DISTS weights need {even.numel()} channels, got {alpha.numel()} and {beta.numel()}")
        total = alpha.sum() + beta.sum()
        self.channels = tuple(channels)
        self.register_buffer("alpha", alpha / total, persistent=False)
        self.register_buffer("beta", beta / total, persistent=False)

    def compare(self, x_maps: Sequence[Tensor], y_maps: Sequence[Tensor]) -> Tensor:
        """Distance (N,) of two lists of feature maps (N, C_k, H_k, W_k); ``y_maps`` are constants without a graph."""
        similarity = torch.zeros(x_maps[0].shape[0], device=x_maps[0].device, dtype=x_maps[0].dtype)
        alphas, betas = (torch.split(weights, list(self.channels)) for weights in (self.alpha, self.beta))
        for x, y, alpha, beta in zip(x_maps, y_maps, alphas, betas, strict=True):
            x_mean, x_square, product = _Moments.apply(x, y)  # type: ignore[no-untyped-call]
            y_mean = y.mean(dim=(2, 3))
            y_square = torch.einsum("nchw,nchw->nc", y, y) / (y.shape[2] * y.shape[3])
            texture = (2 * x_mean * y_mean + STABILITY) / (x_mean**2 + y_mean**2 + STABILITY)
            variances = (x_square - x_mean**2) + (y_square - y_mean**2)
            structure = (2 * (product - x_mean * y_mean) + STABILITY) / (variances + STABILITY)
            similarity = similarity + (alpha * texture).sum(dim=1) + (beta * structure).sum(dim=1)
        return 1 - similarity

    def forward(self, features: Features, x: Tensor, y: Tensor) -> Tensor:
        """Distance (N,) of images (N, 3, H, W) in [0, 1]; gradients flow to ``x`` only."""
        with torch.no_grad():
            target = features(y.detach())  # the first map is the image itself
        return self.compare(features(x), target)


def read_dists_weights(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``alpha`` and ``beta`` (1475,) of the published DISTS weights file."""
    if not {"alpha", "beta"} <= tensors.keys():
        raise UserError(f"no DISTS weights: expected tensors 'alpha' and 'beta', found {sorted(tensors)[:4]}")
    return tensors["alpha"].flatten().float(), tensors["beta"].flatten().float()


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, a distance (Zhang et al., "The Unreasonable Effectiveness of Deep
    Features as a Perceptual Metric", 2018, Eq. 1).

    Feature vectors are scaled to unit length at every position, their squared differences weighted per channel,
    averaged over positions and summed over layers. Without published weights every channel counts alike: each layer
    then gives its mean squared difference times the number of channels.
    """

    weights: Tensor

    def __init__(
        self, channels: Sequence[int], weights: Sequence[Tensor] | None = None, *, epsilon: float = 1e-10
    ) -> None:
        """``channels`` are the widths of the feature maps, image excluded; ``weights`` one (C_k,) for each of them.

        Vectors much shorter than ``epsilon`` stay short: features that vanish on flat regions need a larger one.
        """
        super().__init__()
        self.epsilon = epsilon
        given = [torch.ones(c) for c in channels] if weights is None else [w.flatten().float() for w in weights]
        if [w.numel() for w in given] != list(channels):
            raise ValueError(f"LPIPS weights need {list(channels)} channels, got {[w.numel() for w in given]}")
        self.channels = tuple(channels)
        self.register_buffer("weights", torch.cat(given), persistent=False)

    @classmethod
    def averaged(cls, channels: Sequence[int]) -> LPIPS:
        """Without channel weights, and as the mean over the layers instead of their sum: in [0, 4]."""
        return cls(channels, [torch.full((count,), 1 / len(channels)) for count in channels])

    def compare(self, x_maps: Sequence[Tensor], y_maps: Sequence[Tensor]) -> Tensor:
        """Distance (N,) of two lists of feature maps (N, C_k, H_k, W_k), the images themselves first, which do not
        count; gradients flow to ``x_maps`` only."""
        distance = torch.zeros(x_maps[0].shape[0], device=x_maps[0].device, dtype=x_maps[0].dtype)
        weights = torch.split(self.weights, list(self.channels))
        for feature, target, weight in zip(x_maps[1:], y_maps[1:], weights, strict=True):
            difference = (self._unit(feature) - self._unit(target).detach()).square()  # (N, C, H, W)
            distance = distance + (difference.mean(dim=(2, 3)) * weight).sum(dim=1)
        return distance

    def forward(self, features: Features, x: Tensor, y: Tensor) -> Tensor:
        """Distance (N,) of images (N, 3, H, W) in [0, 1]; gradients flow to ``x`` only."""
        with torch.no_grad():
            target = features(y)
        return self.compare(features(x), target)

    def _unit(self, feature: Tensor) -> Tensor:
        # The square of epsilon under the root, and not epsilon beside it: the gradient stays finite at zero.
        return feature / (feature.square().sum(dim=1, keepdim=True) + self.epsilon**2).sqrt()


def read_lpips_weights(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Channel weights of the five layers, from the published file of LPIPS 0.1 on VGG-16 (keys
    ``linK.model.1.weight``)."""
    names = [f"lin{k}.model.1.weight" for k in range(5)]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UserError(f"no LPIPS weights: tensor '{missing[0]}' is missing, found {sorted(tensors)[:4]}")
    return [tensors[name].flatten().float() for name in names]


def sobel_magnitude(x: Tensor, *, per_channel: bool = False, epsilon: float = 1e-6) -> Tensor:
    """S(x) = sqrt((G_x * x)^2 + (G_y * x)^2) (D3SR, Eq. 6-7), (N, 3, H, W) for (N, 3, H, W), borders replicated.

    The paper does not say how colour enters. By default the channel mean is taken first and the result repeated on
    three channels; ``per_channel`` filters each channel on its own. ``epsilon`` under the root keeps the gradient
    finite.
    """
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device, dtype=x.dtype)
    source = x if per_channel else x.mean(dim=1, keepdim=True)
    channels = source.shape[1]
    padded = F.pad(source, (1, 1, 1, 1), mode="replicate")
    bank = torch.stack([kernel, kernel.T])[:, None].repeat(channels, 1, 1, 1)  # (2 channels, 1, 3, 3)
    gradient = F.conv2d(padded, bank, groups=channels).reshape(len(x), channels, 2, *x.shape[2:])
    magnitude: Tensor = (gradient.square().sum(dim=2) + epsilon).sqrt()
    return magnitude if per_channel else magnitude.expand(-1, 3, -1, -1)


def ea_lpips(lpips: LPIPS, features: Features, x: Tensor, y: Tensor, *, per_channel: bool = False) -> Tensor:
    """Edge-aware LPIPS (N,): LPIPS(x, y) + LPIPS(S(x), S(y)) (D3SR, Eq. 5 with LPIPS); images (N, 3, H, W)."""
    edges_x, edges_y = (sobel_magnitude(image, per_channel=per_channel) for image in (x, y))
    return torch.as_tensor(lpips(features, x, y) + lpips(features, edges_x, edges_y))


def ea_dists(dists: DISTS, features: Features, x: Tensor, y: Tensor, *, per_channel: bool = False) -> Tensor:
    """Edge-aware DISTS (N,): DISTS(x, y) + DISTS(S(x), S(y)) (D3SR, Eq. 5); images (N, 3, H, W) in [0, 1]."""
    edges_x, edges_y = (sobel_magnitude(image, per_channel=per_channel) for image in (x, y))
    return torch.as_tensor(dists(features, x, y) + dists(features, edges_x, edges_y))


# ---- Lattice penalty: patterns locked to the latent grid, the typical artefact of decoders that enlarge --------------


def lattice_loss(sr: Tensor, hr: Tensor, *, factor: int = 4, window: int = 4) -> Tensor:
    """Mean squared local error at each of the ``factor`` x ``factor`` positions, less the error that they share.

    Real texture is independent of the latent grid, so its error averages out over ``window`` x ``window`` latent
    positions at every sub-position alike; a grid does not. A loss of texture statistics is blind to that difference and
    may even ask for a grid. Images are (N, 3, H, W) with sides multiples of ``factor``, at least ``factor * window``.
    """
    n, channels = sr.shape[:2]
    error = F.pixel_unshuffle(sr - hr, factor)  # (N, 3 f^2, H/f, W/f)
    pooled = F.avg_pool2d(error, window, stride=max(1, window // 2))
    by_position = pooled.reshape(n, channels, factor**2, -1)
    return (by_position - by_position.mean(dim=2, keepdim=True)).square().mean()


# ---- Likely artefacts: a weight map for pixel errors -----------------------------------------------------------------

ARTIFACT_WINDOW = 7
ARTIFACT_POWER = 0.2


def artifact_map(sr: Tensor, hr: Tensor) -> Tensor:
    """Weights (N, 1, H, W), without gradient, for the pixel errors of ``sr`` (N, 3, H, W) against ``hr``, in [0, 1].

    Detail that a generator invents differs from the photo's wildly from pixel to pixel where it is an artefact and
    evenly where it is only softer: the map is the local variance of the residual, times the fifth root of its variance
    in the whole image (Liang, Zeng and Zhang, "Details or Artifacts", 2022, Eq. 3 to 5, without the comparison with an
    averaged model).
    """
    residual = (sr.detach() - hr).abs().sum(dim=1, keepdim=True)
    padded = F.pad(residual, (ARTIFACT_WINDOW // 2,) * 4, mode="reflect")
    mean, square = (F.avg_pool2d(plane, ARTIFACT_WINDOW, stride=1) for plane in (padded, padded.square()))
    local = (square - mean.square()).clamp(min=0)
    whole = residual.flatten(1).var(dim=1).clamp(min=1e-12) ** ARTIFACT_POWER
    return local * whole[:, None, None, None]

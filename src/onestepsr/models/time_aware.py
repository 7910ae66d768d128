"""The discriminator of TAD-SR: it judges noised latents by the features of a frozen diffusion model, and is told the
step from which they come.

The features are made outside of it, by the teacher, so that checkpoints hold what is trained and nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The head that judges the features of one scale; the paper leaves it open."""

    width: int = 128
    """Channels between the 3x3 convolution on the features and the 1x1 convolution to the logit. A head that sees a
    neighbourhood and is not linear is the smallest that can tell textures apart."""
    norm_groups: int = 16
    """Groups of the norm on the features, for all scales; every scale's channels must be a multiple. The paper says
    only "Norm": a group norm is what the teacher's own blocks modulate."""
    slope: float = 0.2
    """Of the leaky ReLU behind the first convolution."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.norm_groups < 1:
            raise ValueError(f"width and norm_groups must be at least 1, got {self.width} and {self.norm_groups}")


class ScaleHead(nn.Module):
    """Judges the features of one scale: Norm(F_k) (1 + gamma_k) + beta_k, then two convolutions (TAD-SR, Eq. 10).

    gamma and beta start at zero, where the head is what it would be without them.
    """

    def __init__(self, channels: int, time_channels: int | None, config: HeadConfig) -> None:
        """``time_channels`` is the width of the time embedding; None leaves the modulation out."""
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, affine=False)
        self.modulation = None if time_channels is None else nn.Linear(time_channels, 2 * channels)
        self.features = nn.Conv2d(channels, config.width, 3, padding=1)
        self.logit = nn.Conv2d(config.width, 1, 1)
        self.slope = config.slope
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Logits (N, 1, h, w) of features (N, C, h, w) under the time embedding (N, time_channels)."""
        x = self.norm(x)
        if self.modulation is not None:
            gamma, beta = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
            x = x * (1 + gamma) + beta
        return self.logit(F.leaky_relu(self.features(x), self.slope))  # type: ignore[no-any-return]


class TimeAwareDiscriminator(nn.Module):
    """One head for each scale of the teacher's features."""

    def __init__(
        self,
        channels: Sequence[int],
        time_channels: int,
        config: HeadConfig | None = None,
        *,
        scales: Sequence[int] | None = None,
        time_aware: bool = True,
    ) -> None:
        """``channels`` are those of every scale's features, the finest first; ``time_channels`` is the width of the
        time embedding. ``scales`` are the ones that are judged, by number from 0; None means all. Without
        ``time_aware`` nothing is modulated, which is the plain discriminator that the paper compares with.

        Raises ValueError for a scale that is not there and for channels that the norm cannot group.
        """
        super().__init__()
        config = config or HeadConfig()
        self.scales = tuple(range(len(channels)) if scales is None else scales)
        unknown = [scale for scale in self.scales if not 0 <= scale < len(channels)]
        if unknown or not self.scales or len(set(self.scales)) != len(self.scales):
            raise ValueError(f"scales must be different numbers from 0 to {len(channels) - 1}, got {self.scales}")
        judged = [channels[scale] for scale in self.scales]
        if any(count % config.norm_groups for count in judged):
            raise ValueError(f"norm_groups is {config.norm_groups}, but the features have {judged} channels")
        width = time_channels if time_aware else None
        self.heads = nn.ModuleList(ScaleHead(count, width, config) for count in judged)

    def forward(self, emb: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        """Realism logits (N, 1, h_k, w_k) of each judged scale.

        ``emb`` (N, time_channels) is the teacher's time embedding, ``features`` (N, C_k, h_k, w_k) its features of all
        scales. Losses average over scales.
        """
        return tuple(head(features[scale], emb) for scale, head in zip(self.scales, self.heads, strict=True))

"""Drawn parameters of one degradation: plain numbers that can be written down, and read back to repeat it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onestepsr.data.degradation.jpeg import Variant
from onestepsr.data.degradation.kernels import Kernel
from onestepsr.data.degradation.operators import ResizeMode


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Noise that is added to one image."""

    kind: Literal["gaussian", "poisson"]
    level: float
    """Standard deviation in 8-bit levels (gaussian) or factor on the shot noise (poisson)."""
    gray: bool
    """Equal in all channels."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One drawn round."""

    blur: Kernel | None
    scale: float
    """Resize factor: of the image in the first round, of the LR size in the second."""
    mode: ResizeMode
    noise: Noise


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """Everything that was drawn for one image, except the noise fields themselves."""

    sharpen: bool
    first: Stage | None
    first_jpeg: float | None
    second: Stage | None
    final_mode: ResizeMode
    final_resize_first: bool
    final_sinc: Kernel | None
    final_jpeg: float | None
    antialias: bool
    jpeg_variant: Variant = "published"
    """JPEG arithmetic: that of published training code, or that of an encoder."""
    gray: Literal["none", "lr", "both"] = "none"
    """Images that lose their colour in the end."""

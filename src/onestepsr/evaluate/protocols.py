"""Named protocols: the settings besides the images that decide the numbers of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.evaluate.metrics.catalog import METRICS, MetricSpec
from onestepsr.evaluate.result import ProtocolRecord, Setting

Resize = Literal["never", "crop", "sr-to-hr", "hr-to-sr"]
COLOUR = "stored RGB values, gray repeated, profiles and transparency left aside"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Preparation of images before they are measured, and the metrics."""

    name: str
    """Name, also in result files."""
    summary: str
    """Origin of the protocol, in one line."""
    metrics: tuple[str, ...]
    """Metrics by name, in the order of the table."""
    crop: int = 0
    """Side of the central square of HR and SR that is measured; 0 measures whole images.

    If the evaluation runs the model, its input is cut to the matching square first.
    """
    crop_border: int = 0
    """Rows and columns cut from every side of SR and HR before anything is measured."""
    resize: Resize = "never"
    """Treatment of SR and HR of different sizes.

    ``never``: the image counts as failed. ``crop``: both are cut to the common size, at the bottom and right, as for
    HR images whose sides are no multiple of the scale. ``sr-to-hr`` and ``hr-to-sr``: one is resized by an
    antialiased bicubic filter and rounded to 8 bits.
    """

    def __post_init__(self) -> None:
        if self.crop < 0 or self.crop_border < 0:
            raise UserError(f"crop {self.crop}, crop border {self.crop_border}: accepted: 0 pixels and more")
        if self.resize not in get_args(Resize):
            raise UserError(f"resize '{self.resize}': accepted: {', '.join(get_args(Resize))}")

    def fitted(self, sr: Tensor, hr: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """SR and HR (1, 3, H, W) cropped and resized for measuring, of equal size; UserError if that is impossible."""
        if hr is not None:
            sr, hr = _equal(sr, hr, self.resize)
        return self._cut(sr), None if hr is None else self._cut(hr)

    def record(self, metrics: Sequence[MetricSpec], **settings: Setting) -> ProtocolRecord:
        """Description saved with the values of ``metrics``; ``settings`` are further ones that decided numbers."""
        own: dict[str, Setting] = {
            "pictures": "crops" if self.crop else "whole",
            "crop": self.crop,
            "crop_border": self.crop_border,
            "resize": self.resize,
            "colour": COLOUR,
        }
        return ProtocolRecord(
            name=self.name, metrics={metric.name: metric.record for metric in metrics}, settings={**own, **settings}
        )

    def _cut(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if self.crop:
            if min(height, width) < self.crop:
                raise UserError(f"{width} x {height}: protocol {self.name} measures {self.crop} x {self.crop} pixels")
            top, left = (height - self.crop) // 2, (width - self.crop) // 2
            image = image[..., top : top + self.crop, left : left + self.crop]
        border, (height, width) = self.crop_border, image.shape[-2:]
        if min(height, width) <= 2 * border:
            raise UserError(f"{width} x {height}: a border of {border} pixels leaves nothing to measure")
        return image[..., border : height - border, border : width - border]


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="basic",
            summary="whole images; what can be measured without downloads",
            metrics=("psnr", "ssim", "niqe", "grid"),
        ),
        Protocol(
            name="d3sr",
            summary="D3SR (DFOSD): whole images, nothing cut off; variants as pyiqa's, the paper names none",
            metrics=("psnr", "ssim", "lpips", "dists", "niqe", "musiq", "maniqa-pipal", "clipiqa"),
        ),
        Protocol(
            name="tadsr",
            summary="TAD-SR: whole images; variants as in its authors' script, the paper names none",
            metrics=("psnr", "ssim", "lpips", "clipiqa", "musiq"),
        ),
        Protocol(
            name="osediff",
            summary="OSEDiff and StableSR: crops of 128 to 512 pixels, settings of pyiqa",
            metrics=("psnr", "ssim", "lpips", "dists", "fid", "niqe", "musiq", "maniqa-pipal", "clipiqa"),
            crop=512,
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol called ``name``; UserError otherwise."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol '{name}': {did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def applicable(protocol: Protocol, *, with_reference: bool) -> list[MetricSpec]:
    """The metrics of a protocol; without references, only those that need none."""
    chosen = [METRICS[name] for name in protocol.metrics]
    return [metric for metric in chosen if with_reference or not metric.needs_reference]


def _equal(sr: Tensor, hr: Tensor, resize: Resize) -> tuple[Tensor, Tensor]:
    if sr.shape == hr.shape:
        return sr, hr
    sizes = [f"{image.shape[-1]} x {image.shape[-2]}" for image in (sr, hr)]
    if resize == "never":
        raise UserError(f"SR is {sizes[0]} but HR is {sizes[1]}: sizes have to be equal, or --resize has to say how")
    if resize == "crop":
        height, width = (min(pair) for pair in zip(sr.shape[-2:], hr.shape[-2:], strict=True))
        return sr[..., :height, :width], hr[..., :height, :width]
    return (_resized(sr, hr), hr) if resize == "sr-to-hr" else (sr, _resized(hr, sr))


def _resized(image: Tensor, like: Tensor) -> Tensor:
    size = [like.shape[-2], like.shape[-1]]
    return (F.interpolate(image, size, mode="bicubic", antialias=True).clamp(0, 1) * 255).round() / 255

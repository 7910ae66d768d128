"""Validation: the same few images again and again, scored and drawn side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.core.files import replacing
from onestepsr.methods.base import Batch, Networks
from onestepsr.methods.shared.image_loss import PerceptualConfig, build_perceptual
from onestepsr.train.batches import SampleSource, to_device
from onestepsr.train.config import PreviewConfig
from onestepsr.train.networks import NetworkSet

GAP = 4
TITLE_HEIGHT = 18
FONT_SIZE = 13
PAPER, INK = (24, 24, 24), (235, 235, 235)


@dataclass(frozen=True)
class Validation:
    """What one validation found."""

    scores: dict[str, float]
    """Means over the validation images; empty when the method shows no pair of "SR" and "HR"."""
    image: Path | None
    """The grid of previews."""


class Validator:
    """Evaluates a method's preview on the first ``images`` samples of a dataset."""

    def __init__(
        self,
        preview: Callable[[Networks, Batch], dict[str, Tensor]],
        source: SampleSource,
        config: PreviewConfig,
        folder: Path,
        *,
        multiple: int = 1,
    ) -> None:
        """Whole images are cut at the bottom and right to HR sides that are multiples of ``multiple``."""
        self.preview, self.source, self.config, self.folder = preview, source, config, folder
        self.multiple = multiple
        self.distance = perceptual_distance(config)

    def run(self, step: int, networks: NetworkSet, device: torch.device, channels_last: bool = False) -> Validation:
        """Score and draw with averaged weights; the image is ``previews/step_XXXXXX.png`` under ``folder``."""
        scores: list[dict[str, float]] = []
        rows: list[dict[str, Tensor]] = []
        with networks.evaluating() as callables:
            for index in range(self.config.images):
                sample = {name: tensor[None] for name, tensor in cut(self.source[index], self.multiple).items()}
                columns = self.preview(callables, to_device(sample, device, channels_last))
                columns = {title: image.detach().float().cpu().clamp(0, 1) for title, image in columns.items()}
                scores.append({**score(columns), **self._distance(columns)})
                if index < self.config.rows:
                    rows.append({title: image[0] for title, image in columns.items()})
        path = self.folder / "previews" / f"step_{step:06d}.png"
        write_image(draw_grid(rows), path)
        return Validation({name: sum(row[name] for row in scores) / len(scores) for name in scores[0]}, path)

    def _distance(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        if self.distance is None or self.config.best is None or not {"SR", "HR"} <= columns.keys():
            return {}
        with torch.no_grad():
            return {self.config.best: float(self.distance(columns["SR"], columns["HR"]).mean())}


def perceptual_distance(config: PreviewConfig) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The distance (SR, HR) -> (N,) that ``best`` names, by the published networks; none where it is another score."""
    if config.best not in ("dists", "lpips"):
        return None
    features, distance = build_perceptual(PerceptualConfig(distance=config.best, features="vgg16"))
    return lambda sr, hr: cast(Tensor, distance(features, sr, hr))


def cut(sample: Mapping[str, Tensor], multiple: int) -> dict[str, Tensor]:
    """``sample`` with ``hr`` (3, H, W) cut to sides that are multiples of ``multiple``, and ``lr`` to what belongs to
    it; UserError for an image that leaves nothing."""
    hr, sides = sample["hr"], [side // multiple * multiple for side in sample["hr"].shape[-2:]]
    if not all(sides):
        raise UserError(f"a validation image is {hr.shape[-1]} x {hr.shape[-2]}, expected at least {multiple} a side")
    kept = {"hr": hr[..., : sides[0], : sides[1]]}
    if "lr" in sample:
        scale = hr.shape[-1] // sample["lr"].shape[-1]
        kept["lr"] = sample["lr"][..., : sides[0] // scale, : sides[1] // scale]
    return {**sample, **kept}


def is_better(name: str, score: float, than: float | None) -> bool:
    """Whether ``score`` is an improvement: similarities grow, distances shrink."""
    if than is None:
        return True
    return score < than if name in ("dists", "lpips") else score > than


def score(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """PSNR (dB) and SSIM of luma between the columns "SR" and "HR", each (1, 3, H, W) in [0, 1], where both exist."""
    if "SR" not in columns or "HR" not in columns:
        return {}
    from onestepsr.evaluate.metrics.fidelity import SSIM_WINDOW, psnr_y, ssim_y

    sr, hr = columns["SR"], columns["HR"]
    result = {"psnr_y": float(psnr_y(sr, hr).mean())}
    if min(hr.shape[-2:]) >= SSIM_WINDOW:
        result["ssim_y"] = float(ssim_y(sr, hr).mean())
    return result


def draw_grid(rows: list[dict[str, Tensor]]) -> Image.Image:
    """One row per image, one titled column per kind; smaller images (3, H, W) are enlarged to the row's largest."""
    titles = list(rows[0])
    sizes = [_row_size(row) for row in rows]
    width = max(size[1] for size in sizes)
    canvas_width = len(titles) * (width + GAP) + GAP
    canvas = Image.new("RGB", (canvas_width, TITLE_HEIGHT + sum(size[0] + GAP for size in sizes)), PAPER)
    font, draw = ImageFont.load_default(FONT_SIZE), ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (width + GAP), 1), title, fill=INK, font=font)
    top = TITLE_HEIGHT
    for row, (height, row_width) in zip(rows, sizes, strict=True):
        for column, title in enumerate(titles):
            canvas.paste(_image(row[title], height, row_width), (GAP + column * (width + GAP), top))
        top += height + GAP
    return canvas


def write_image(picture: Image.Image, path: Path) -> None:
    """Write a PNG that appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _row_size(row: Mapping[str, Tensor]) -> tuple[int, int]:
    return max(image.shape[-2] for image in row.values()), max(image.shape[-1] for image in row.values())


def _image(image: Tensor, height: int, width: int) -> Image.Image:
    if image.shape[-2:] != (height, width):  # pixels stay visible: this shows what the network was given
        image = F.interpolate(image[None], size=(height, width), mode="nearest")[0]
    levels = (image * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy(), mode=None)

"""Reports of a run while it trains: JSON lines, TensorBoard where installed, progress, and validation previews."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.core.files import replacing
from onestepsr.methods.base import Batch, Networks
from onestepsr.methods.shared.image_loss import PerceptualConfig, build_perceptual
from onestepsr.train.batches import SampleSource, to_device
from onestepsr.train.networks import NetworkSet
from onestepsr.train.recipes import PreviewConfig, TrainConfig
from onestepsr.train.trainer import StepRecord

logger = logging.getLogger(__name__)


class JsonLines:
    """``log.jsonl``: one record per line, each flushed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop records of steps after ``step``, and a line that a killed process left unfinished."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            kept = [line for line in file if _step_of(line) <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


class Reporter:
    """Collects step records into one log record per ``log_every`` steps. Use as a context manager."""

    def __init__(self, folder: Path, config: TrainConfig, first_step: int, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Console(stderr=True)
        self.lines = JsonLines(folder / "log.jsonl")
        self.lines.forget_after(first_step)
        self._board = _tensorboard(folder / "tensorboard", first_step)
        self._records: list[StepRecord] = []  # since the last log record
        self._images, self._since = 0, time.monotonic()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("train", total=config.steps, completed=first_step, status="")

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._board is not None:
            self._board.close()

    def on_step(self, record: StepRecord) -> None:
        """Count one iteration, and log when it is time."""
        self._records.append(record)
        self._images += record.images
        self._bar.update(self._task, completed=record.step)
        if record.step % self.config.log_every == 0 or record.step == self.config.steps:
            self._log(record)

    def on_validation(self, step: int, scores: Mapping[str, float], image: Path | None) -> None:
        """Log the scores of one validation."""
        self.lines.append({"kind": "validation", "step": step, "scores": dict(scores)})
        self._to_board(step, {f"validation/{name}": value for name, value in scores.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self._say(f"step {step}: validation  {shown}  {image or ''}".rstrip())
        self._since, self._images = time.monotonic(), 0  # validation time is no training time

    def _log(self, record: StepRecord) -> None:
        losses = _means([record.losses for record in self._records])
        norms = _means([record.gradient_norms for record in self._records])
        self._records.clear()
        rate = self._images / max(time.monotonic() - self._since, 1e-9)
        self._images, self._since = 0, time.monotonic()
        self.lines.append(
            {
                "kind": "train",
                "step": record.step,
                "seconds": round(record.seconds, 3),
                "losses": losses,
                "gradient_norms": norms,
                "learning_rates": record.learning_rates,
                "images_per_second": round(rate, 3),
                **record.peak_memory,
            }
        )
        groups = {"loss": losses, "gradient_norm": norms, "learning_rate": record.learning_rates}
        scalars = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        self._to_board(record.step, {**scalars, "images_per_second": rate})
        status = "  ".join([*(f"{name} {value:.4g}" for name, value in losses.items()), f"{rate:.1f} img/s"])
        self._bar.update(self._task, status=status)
        if not self.console.is_terminal:
            seconds = int((self.config.steps - record.step) * self.config.batch_size / max(rate, 1e-9))
            left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
            self._say(f"step {record.step}/{self.config.steps}  {status}  {left}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _to_board(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean by name over the rows that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: sum(column) / len(column) for name, column in values.items()}


def _tensorboard(folder: Path, first_step: int) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("TensorBoard is not installed (pip install 'onestepsr[train]'): scalars go to log.jsonl only")
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _step_of(line: str) -> float:
    """Step of one log line; infinity for a line that is no record."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


# ---- Validation: the same few images again and again, scored and drawn side by side ----------------------------------

GAP = 4
TITLE_HEIGHT = 18
FONT_SIZE = 13
PAPER, INK = (24, 24, 24), (235, 235, 235)


@dataclass(frozen=True)
class Validation:
    """Result of one validation."""

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
    """Tell whether ``score`` is an improvement: similarities grow, distances shrink."""
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
    sizes = [tuple(max(image.shape[axis] for image in row.values()) for axis in (-2, -1)) for row in rows]
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


def write_image(image: Image.Image, path: Path) -> None:
    """Write a PNG that appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def _image(image: Tensor, height: int, width: int) -> Image.Image:
    if image.shape[-2:] != (height, width):  # pixels stay visible: this shows what the network was given
        image = F.interpolate(image[None], size=(height, width), mode="nearest")[0]
    levels = (image * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy(), mode=None)

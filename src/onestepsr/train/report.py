"""What a run tells while it trains: JSON lines, TensorBoard where installed, and a progress bar or plain lines."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from onestepsr.core.files import replacing
from onestepsr.train.config import TrainConfig
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


class Averages:
    """Means of the values added since the last :meth:`take`."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Count one more value for each name."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The means by name; counting starts anew."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means


class Reporter:
    """Collects step records into one log record per ``log_every`` steps. Use as a context manager."""

    def __init__(self, folder: Path, config: TrainConfig, first_step: int, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Console(stderr=True)
        self.lines = JsonLines(folder / "log.jsonl")
        self.lines.forget_after(first_step)
        self._board = _tensorboard(folder / "tensorboard", first_step)
        self._losses, self._norms = Averages(), Averages()
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
        self._losses.add(record.losses)
        self._norms.add(record.gradient_norms)
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
        losses, norms = self._losses.take(), self._norms.take()
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
            self._say(f"step {record.step}/{self.config.steps}  {status}  {self._remaining(record, rate)}")

    def _remaining(self, record: StepRecord, rate: float) -> str:
        seconds = int((self.config.steps - record.step) * self.config.batch_size / max(rate, 1e-9))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _to_board(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)


def _tensorboard(folder: Path, first_step: int) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("TensorBoard is not installed (pip install 'onestepsr[train]'): scalars go to log.jsonl alone")
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _step_of(line: str) -> float:
    """Step of one log line; a line that is no record counts as later than any step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

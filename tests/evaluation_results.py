"""Results of evaluations that tests make up."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from onestepsr.evaluate.result import EvaluationResult, Files, MetricRecord, ProtocolRecord, Setting

PSNR = MetricRecord(title="PSNR-Y", unit="dB", higher_is_better=True, variant="Y of BT.601 studio range, not rounded")
NIQE = MetricRecord(title="NIQE", higher_is_better=False, variant="Y of YIQ, rounded")
SETTINGS: Mapping[str, Setting] = {"crop_border": 0, "resize": "never"}


def make_result(
    label: str,
    psnr: Mapping[str, float],
    niqe: Mapping[str, float] | None = None,
    *,
    protocol: str = "osediff",
    settings: Mapping[str, Setting] = SETTINGS,
    psnr_record: MetricRecord = PSNR,
    folders: Files | None = None,
) -> EvaluationResult:
    """A result with the given values by image."""
    images = {name: {"psnr": value} for name, value in psnr.items()}
    for name, value in (niqe or {}).items():
        images.setdefault(name, {})["niqe"] = value
    metrics = {"psnr": psnr_record, "niqe": NIQE} if niqe else {"psnr": psnr_record}
    record = ProtocolRecord(name=protocol, metrics=metrics, settings=settings)
    return EvaluationResult(label=label, protocol=record, images=images, folders=folders or Files())


def write_images(root: Path, names: list[str], *, methods: int = 2, side: int = 32) -> None:
    """Folders ``lr``, ``hr`` and ``sr0``, ``sr1``, ... of noise; LR is four times smaller."""
    rng = np.random.default_rng(0)
    for folder in ("lr", "hr", *(f"sr{number}" for number in range(methods))):
        size = side // 4 if folder == "lr" else side
        for name in names:
            path = root / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)

"""The report: what the table says, that it can be computed from the JSON, and how large the images are."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from onestepsr.core.errors import UserError
from onestepsr.train.ablation_report import markdown, sheet, write_report

METRICS = [
    {"name": "psnr", "title": "PSNR-Y dB", "higher_is_better": True},
    {"name": "grid", "title": "grid", "higher_is_better": False},
]


def row(name: str, title: str, psnr: float | None, grid: float, **more: Any) -> dict[str, Any]:
    scores: dict[str, Any] = {"grid": {"mean": grid, "std": 0.001}}
    if psnr is not None:
        scores["psnr"] = {"mean": psnr, "std": 0.25}
    return {"name": name, "title": title, "scores": scores, "runs": [{"values": {}}], **more}


def results(**changes: Any) -> dict[str, Any]:
    runs = [{"seconds": 60.0, "values": {}}, {"seconds": 120.0, "values": {}}]
    found = {
        "suite": "small",
        "title": "Two losses",
        "source": "Table 5",
        "version": "1",
        "command": "onestepsr ablate small",
        "machine": "a CPU",
        "date": "2026-01-02",
        "recipe": "d3sr-tiny",
        "overrides": ["train.steps=2"],
        "seeds": [0, 1],
        "steps": 1500,
        "batch_size": 6,
        "evaluation": {"pairs": 60},
        "metrics": METRICS,
        "rows": [
            row("bicubic", "bicubic", 30.0, 0.01),
            row("a", "MSE", 23.5, 0.05, runs=runs, differences=["config.perceptual_weight=0"]),
            row("b", "DISTS", 22.5, 0.04, runs=runs, differences=[]),
            row("hr", "HR", None, 0.02),
        ],
        "failures": {"b/seed-2": "training ended with exit code 2"},
        "notes": ["NIQE was not measured: no file"],
        "published": {"columns": ["NIQE ↓"], "rows": {"MSE": [7.5], "DISTS": [None]}, "note": "Other photos."},
    }
    return {**found, **changes}


def test_the_table_shows_means_deviations_and_the_best_variant() -> None:
    lines = markdown(results(), "small.png").splitlines()
    assert "| variant | PSNR-Y dB ↑ | grid ↓ | minutes per run |" in lines
    assert "| bicubic | 30.00 ± 0.25 | 0.0100 ± 0.0010 | - |" in lines, "bicubic is no variant, however good"
    assert "| MSE | **23.50 ± 0.25** | 0.0500 ± 0.0010 | 1.5 |" in lines
    assert "| DISTS | 22.50 ± 0.25 | **0.0400 ± 0.0010** | 1.5 |" in lines
    assert "| HR | - | 0.0200 ± 0.0010 | - |" in lines


def test_a_comparison_at_equal_time_names_every_number_of_steps() -> None:
    rows = [one | {"steps": steps} for one, steps in zip(results()["rows"], (None, 1500, 900, None), strict=True)]
    text = markdown(results(rows=rows, budget="time"), "small.png")
    assert "4 runs of about equal time, which is 1,500 (MSE), 900 (DISTS) steps, with batch 6" in text


def test_models_that_were_there_are_shown_and_not_counted() -> None:
    there = row("t", "teacher", 30.0, 0.01, differences=["model=x"], trained=False)
    rows = [*results()["rows"][:3], there, results()["rows"][3]]
    text = markdown(results(rows=rows), "small.png")
    assert "| teacher | 30.00 ± 0.25 | 0.0100 ± 0.0010 | - |" in text, "no bold: it had another budget"
    assert "| MSE | **23.50 ± 0.25**" in text
    assert "4 runs of 1,500 steps" in text
    assert "in bold. Measured beside them, not trained here: teacher." in text
    assert "- **teacher**: `model=x`" in text


def test_the_report_says_how_it_came_about_and_what_is_missing() -> None:
    text = markdown(results(), "small.png")
    for part in (
        "1,500 steps with batch 6, mean ± standard deviation over seeds 0, 1; 60 held-out pairs",
        "- NIQE was not measured: no file\n- b/seed-2 is missing: training ended with exit code 2",
        "](small.png)",
        "Other photos.\n\n|  | NIQE ↓ |\n| --- | ---: |\n| MSE | 7.5 |\n| DISTS | - |",
        "`onestepsr ablate small`",
        "a CPU, 2026-01-02",
        "- **MSE**: `config.perceptual_weight=0`\n- **DISTS**: no changes",
    ):
        assert part in text
    assert "\n\n\n" not in text
    alone = markdown(results(seeds=[3], published=None), "small.png")
    assert "one seed (3), so that chance may be behind any difference" in alone
    assert "own table" not in alone


def test_images_are_titled_and_kept_small() -> None:
    noise = torch.rand(3, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    rows = [{"bicubic": image, "a title that is too long for its column": image, "HR": image} for image in noise]
    whole = Image.open(io.BytesIO(sheet(rows)))
    assert whole.width >= 180
    cut = sheet(rows, limit=2 * len(sheet(rows[:1])))
    assert len(cut) <= 2 * len(sheet(rows[:1]))
    assert Image.open(io.BytesIO(cut)).height == whole.height - 44, "one row less"
    assert len(sheet(rows, limit=10)) == len(sheet(rows[:1])), "one row stays whatever the limit"


def test_files_are_written_under_the_suites_name(tmp_path: Path) -> None:
    rows = [{"bicubic": torch.zeros(3, 8, 8), "HR": torch.ones(3, 8, 8)}]
    paths = write_report(results(), rows, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["small.md", "small.json", "small.png"]
    assert markdown(json.loads(paths[1].read_text()), "small.png") == paths[0].read_text(), "the JSON holds all of it"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        write_report(results(), rows, tmp_path / "file")

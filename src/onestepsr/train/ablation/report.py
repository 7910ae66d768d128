"""The results of a suite as JSON with every single value, as a Markdown table, and as a sheet of images.

Tables are made from the JSON alone: whatever they show can be computed again, or otherwise, from it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageFont
from torch import Tensor

from onestepsr import __version__
from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.files import file_sha256, replacing
from onestepsr.train.ablation.runs import Ablation, PlannedRun, training_seconds
from onestepsr.train.ablation.scoring import Candidate, HeldOut, Track, Values, describe_metrics, over_seeds, untracked
from onestepsr.train.ablation.suite import override_lines
from onestepsr.train.validation import FONT_SIZE, draw_grid
from onestepsr.weights.catalog import BICUBIC

SCHEMA = 1
MAX_PICTURE_BYTES = 1_500_000
DIGITS = {"psnr": 2, "psnr_rgb": 2, "niqe": 2, "overshoot": 2}
"""Decimals shown; four for the others, whose values are around 0.01 to 1."""
Results = dict[str, Any]
"""What the JSON file holds."""


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """How the results came about, for their reader."""

    command: str
    machine: str
    date: str


def measure(
    ablation: Ablation,
    held_out: HeldOut,
    circumstances: Circumstances,
    failures: Mapping[str, str],
    track: Track = untracked,
) -> Results:
    """Measure every trained model of the suite, bicubic enlargement and the HR images themselves."""
    suite, rows = ablation.suite, []
    trained = [item for item in ablation.planned if item.run.name not in failures]
    if not trained:
        raise UserError(f"none of the {len(ablation.planned)} runs was finished; see the messages above")
    for name in ablation.variants:
        variant = suite.config.variants[name]
        runs = [_measure_run(item, held_out, track) for item in trained if item.run.variant == name]
        if name in ablation.models:
            runs = [_measure_model(ablation.models[name], held_out, track)]
        row = _row(name, variant.title, runs) | {"differences": variant.differences}
        steps = next((item.run.config.train.steps for item in trained if item.run.variant == name), None)
        rows.append(row | {"trained": name not in ablation.models, "steps": steps})
    baseline = _row("bicubic", "bicubic", [{"values": held_out.measure(Candidate(BICUBIC), track)}])
    reference = _row("hr", "HR", [{"values": held_out.measure_references(track)}])
    training = trained[0].run.config.train
    return {
        "schema": SCHEMA,
        "suite": suite.name,
        "title": suite.config.title,
        "source": suite.config.source,
        "version": __version__,
        **vars(circumstances),
        "recipe": suite.config.recipe,
        "overrides": [*override_lines(suite.config.overrides), *suite.changes],
        "seeds": ablation.seeds,
        "budget": suite.config.budget,
        "steps": training.steps,
        "batch_size": training.batch_size,
        "evaluation": to_mapping(suite.config.evaluation) | {"pairs": len(held_out.indices)},
        "metrics": describe_metrics(held_out.metrics),
        "rows": [baseline, *rows, reference],
        "failures": dict(failures),
        "notes": held_out.notes,
        "published": to_mapping(suite.config.published),
    }


def write_report(results: Results, rows: Sequence[Mapping[str, Tensor]], folder: Path) -> list[Path]:
    """Write ``SUITE.md``, ``SUITE.json`` and ``SUITE.png`` into ``folder``; returns their paths."""
    name = results["suite"]
    paths = [folder / f"{name}.{ending}" for ending in ("md", "json", "png")]
    contents = [
        markdown(results, paths[2].name).encode(),
        (json.dumps(results, allow_nan=False) + "\n").encode(),
        sheet(rows),
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents, strict=True):
            with replacing(path) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written ({error.strerror})") from error
    return paths


def sheet(rows: Sequence[Mapping[str, Tensor]], limit: int = MAX_PICTURE_BYTES) -> bytes:
    """PNG of titled columns of images (3, h, w); the last rows are left out until it fits into ``limit`` bytes."""
    shown = [{_fitting(title, image.shape[-1]): image for title, image in row.items()} for row in rows]
    while True:
        buffer = io.BytesIO()
        draw_grid(shown).save(buffer, format="PNG", optimize=True)
        if buffer.tell() <= limit or len(shown) == 1:
            return buffer.getvalue()
        shown.pop()


def markdown(results: Results, picture: str) -> str:
    """The report as Markdown: table, images, the paper's table, and how to repeat it."""
    runs = sum(len(row["runs"]) for row in _trained(results))
    lines = [
        f"# {results['title']}",
        "",
        f"Follows {results['source']}. {runs} {'run' if runs == 1 else 'runs'} of {_budget(results)} "
        f"with batch {results['batch_size']}, "
        f"{_seeds(results['seeds'])}; {results['evaluation']['pairs']} held-out pairs, the same for every model. "
        "Best variant in bold." + _untrained_note(results),
        "",
        *_table(results),
        "",
        *(f"- {note}" for note in [*results["notes"], *_failures(results)]),
        "",
        f"![The first held-out pairs; every variant with seed {results['seeds'][0]}]({picture})",
        "",
        f"The first held-out pairs, not chosen ones; every variant with seed {results['seeds'][0]}.",
        "",
        *_published(results["published"]),
        "## How it was made",
        f"`{results['command']}`",
        "",
        f"onestepsr {results['version']}, {results['machine']}, {results['date']}. Base recipe `{results['recipe']}` "
        f"with {_code(results['overrides'])}. Every value: [{results['suite']}.json]({results['suite']}.json).",
        "",
        *(f"- **{row['title']}**: {_code(row['differences'])}" for row in _variants(results)),
    ]
    return _squeeze(lines)


def _measure_run(item: PlannedRun, held_out: HeldOut, track: Track) -> dict[str, Any]:
    values = held_out.measure(Candidate(item.model), lambda items, title: track(items, item.run.name))
    return {
        "seed": item.run.seed,
        "folder": str(item.folder),
        "sha256": file_sha256(item.model),
        "seconds": training_seconds(item.folder),
        "values": _all_rounded(values),
    }


def _measure_model(candidate: Candidate, held_out: HeldOut, track: Track) -> dict[str, Any]:
    path = Path(candidate.model)
    checksum = file_sha256(path) if path.is_file() else None
    return {"model": str(path), "sha256": checksum, "values": _all_rounded(held_out.measure(candidate, track))}


def _row(name: str, title: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    values: list[Values] = [run["values"] for run in runs]
    return {"name": name, "title": title, "runs": runs, "scores": over_seeds(values)}


def _all_rounded(values: Values) -> Values:
    return {name: [_rounded(value) for value in column] for name, column in values.items()}


def _rounded(value: float | None) -> float | None:
    """Seven digits: more than any of the metrics is worth."""
    return None if value is None else float(f"{value:.7g}")


def _variants(results: Results) -> list[dict[str, Any]]:
    return [row for row in results["rows"] if "differences" in row]


def _trained(results: Results) -> list[dict[str, Any]]:
    return [row for row in _variants(results) if row.get("trained", True)]


def _budget(results: Results) -> str:
    if results.get("budget") != "time":
        return f"{results['steps']:,} steps"
    steps = [f"{row['steps']:,} ({row['title']})" for row in _trained(results) if row.get("steps")]
    return f"about equal time, which is {', '.join(steps)} steps,"


def _untrained_note(results: Results) -> str:
    titles = [row["title"] for row in _variants(results) if not row.get("trained", True)]
    return f" Measured beside them, not trained here: {', '.join(titles)}." if titles else ""


def _table(results: Results) -> list[str]:
    metrics = results["metrics"]
    titles = [f"{m['title']} {'↑' if m['higher_is_better'] else '↓'}" for m in metrics]
    best = {m["name"]: _best(results, m) for m in metrics}
    lines = [f"| variant | {' | '.join(titles)} | minutes per run |", f"|---|{'---|' * (len(metrics) + 1)}"]
    for row in results["rows"]:
        cells = [_cell(row, m["name"], best[m["name"]]) for m in metrics]
        lines.append(f"| {row['title']} | {' | '.join(cells)} | {_minutes(row)} |")
    return lines


def _best(results: Results, metric: Mapping[str, Any]) -> str | None:
    scores = {row["name"]: row["scores"].get(metric["name"], {}).get("mean") for row in _trained(results)}
    known: dict[str, float] = {name: score for name, score in scores.items() if score is not None}
    if len(known) < 2:
        return None
    sign = 1 if metric["higher_is_better"] else -1
    return max(known, key=lambda name: sign * known[name])


def _cell(row: Mapping[str, Any], metric: str, best: str | None) -> str:
    score = row["scores"].get(metric)
    if score is None or score["mean"] is None:
        return "-"
    digits = DIGITS.get(metric, 4)
    text = f"{score['mean']:.{digits}f}"
    text = f"**{text}**" if row["name"] == best else text
    return text if score["std"] is None else f"{text} ± {score['std']:.{digits}f}"


def _minutes(row: Mapping[str, Any]) -> str:
    seconds = [run["seconds"] for run in row["runs"] if run.get("seconds") is not None]
    return f"{sum(seconds) / len(seconds) / 60:.1f}" if seconds else "-"


def _failures(results: Results) -> list[str]:
    return [f"{name} is missing: {reason}" for name, reason in results["failures"].items()]


def _published(table: Mapping[str, Any] | None) -> list[str]:
    if table is None:
        return []
    columns = table["columns"]
    lines = ["## The paper's own table", table["note"], ""] if table["note"] else ["## The paper's own table", ""]
    lines += [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for label, row in table["rows"].items():
        lines.append(f"| {label} | {' | '.join('-' if value is None else f'{value:g}' for value in row)} |")
    return [*lines, ""]


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"one seed ({seeds[0]}), so that chance may be behind any difference"
    return f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}"


def _code(settings: Sequence[str]) -> str:
    return ", ".join(f"`{setting}`" for setting in settings) if settings else "no changes"


def _squeeze(lines: Sequence[str]) -> str:
    """One text without two blank lines in a row."""
    kept = [line for number, line in enumerate(lines) if line or (number and lines[number - 1])]
    return "\n".join(kept).rstrip("\n") + "\n"


def _fitting(title: str, width: int) -> str:
    font = ImageFont.load_default(FONT_SIZE)
    if font.getlength(title) <= width:
        return title
    while title and font.getlength(f"{title}…") > width:
        title = title[:-1]
    return f"{title}…"

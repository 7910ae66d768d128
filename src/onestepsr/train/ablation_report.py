"""Results of a suite: measured on the same held-out pairs, as JSON with every value, a Markdown table and images.

Tables are made from the JSON alone: whatever they show can be computed again, or otherwise, from it.
"""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import ImageFont
from torch import Tensor, nn

from onestepsr import __version__
from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.core.files import file_sha256, replacing, writing
from onestepsr.core.rng import derived_seed
from onestepsr.data.datasets import build_dataset
from onestepsr.evaluate.metrics.catalog import METRICS, MetricSpec, Reference
from onestepsr.evaluate.metrics.fidelity import as_eight_bit
from onestepsr.inference.upscaler import resolve_device
from onestepsr.methods.shared.image_loss import PerceptualConfig, build_perceptual
from onestepsr.train.ablation import Ablation, Candidate, EvaluationConfig, override_lines
from onestepsr.train.report import FONT_SIZE, draw_grid
from onestepsr.weights.catalog import BICUBIC

Values = dict[str, list[float | None]]
"""By metric, one value for each held-out pair; none where an image cannot be measured (NIQE of a flat one)."""
Results = dict[str, Any]
"""Content of the JSON file."""
Track = Callable[[Sequence[int], str], Iterable[int]]
"""A progress bar around a loop: items and title to the same items."""

# ---- Measuring -------------------------------------------------------------------------------------------------------

PERCEPTUAL = ("dists", "lpips")
"""Metrics whose features are part of a suite's settings."""
OPTIONAL = "niqe"
"""Metric that is left out, with a note, where the statistics it needs are not available."""


def untracked(items: Sequence[int], title: str) -> Iterable[int]:
    """No progress bar."""
    return items


class HeldOut:
    """The held-out pairs and the metrics; everything that can be missing is reported on construction."""

    def __init__(self, config: EvaluationConfig, device: str = "auto") -> None:
        self.config, self.device = config, resolve_device(device)
        # A stream of its own: sample i of a training set with the same seed would get the same degradation.
        self.pairs = build_dataset(config.data, derived_seed(config.seed, "held-out pairs"), with_lr=True)
        self.indices = range(config.images if config.data.crop else min(config.images, len(self.pairs)))
        """Numbers of the pairs; whole images are each used once."""
        self.notes: list[str] = []
        self.metrics: list[MetricSpec] = []
        self._measures: dict[str, Reference] = {}
        for name in config.metrics:
            try:
                metric = find_metric(name, config.perceptual)
                self._measures[metric.name] = metric.load()
                self.metrics.append(metric)
            except UserError as error:
                if name != OPTIONAL:
                    raise
                self.notes.append(f"NIQE was not measured: {error}")

    def measure(self, candidate: Candidate, track: Track = untracked, title: str = "") -> Values:
        """Values of a generator, computed in float32 and rounded to 8 bits."""
        generator = candidate.load(self.device)
        title = title or str(candidate.model)
        return self._collect(lambda pair: self._restore(generator, pair["lr"]), self.metrics, track, title)

    def measure_references(self, track: Track = untracked) -> Values:
        """Values of the HR images themselves, for the metrics that compare with nothing."""
        alone = [metric for metric in self.metrics if not metric.needs_reference]
        return self._collect(lambda pair: pair["hr"][None], alone, track, "HR")

    def images(self, candidates: Mapping[str, Candidate]) -> list[dict[str, Tensor]]:
        """Rows of the image sheet: centre parts (3, side, side) by title, bicubic first and HR last."""
        rows: list[dict[str, Tensor]] = [{} for _ in self.indices[: self.config.shown]]
        for title, candidate in {"bicubic": Candidate(BICUBIC), **candidates}.items():
            generator = candidate.load(self.device)
            for index, row in enumerate(rows):
                row[title] = self._centre(self._restore(generator, self.pairs[index]["lr"])[0])
        for index, row in enumerate(rows):
            row["HR"] = self._centre(self.pairs[index]["hr"])
        return rows

    def _restore(self, generator: nn.Module, lr: Tensor) -> Tensor:
        """SR image (1, 3, s h, s w) of one LR image (3, h, w), in [0, 1] on the levels of 8 bits, on the CPU."""
        with torch.no_grad():
            return as_eight_bit(generator(lr[None].to(self.device)).float().cpu())

    def _centre(self, image: Tensor) -> Tensor:
        side = self.config.shown_side
        top, left = (max(0, length - side) // 2 for length in image.shape[-2:])
        return image[:, top : top + side, left : left + side]

    def _collect(
        self, image_of: Callable[[dict[str, Tensor]], Tensor], metrics: Sequence[MetricSpec], track: Track, title: str
    ) -> Values:
        values: Values = {metric.name: [] for metric in metrics}
        for index in track(self.indices, title):
            pair = self.pairs[index]
            sr, hr = image_of(pair), pair["hr"][None]
            for name, column in values.items():
                column.append(self._value(name, sr, hr))
        return values

    def _value(self, name: str, sr: Tensor, hr: Tensor) -> float | None:
        try:
            with torch.no_grad():
                return float(f"{float(self._measures[name](sr, hr)):.7g}")  # more digits than any metric is worth
        except UserError:
            if name != OPTIONAL:
                raise
            return None  # a flat image has no natural-scene statistics


def find_metric(name: str, perceptual: PerceptualConfig) -> MetricSpec:
    """The metric called ``name``; perceptual ones are named after their features, so that none pass for others."""
    plain = {key: spec for key, spec in METRICS.items() if key not in PERCEPTUAL and spec.of_sets is None}
    if name in plain:
        return plain[name]
    if name not in PERCEPTUAL:
        raise UserError(f"evaluation.metrics: unknown metric '{name}': {did_you_mean(name, [*plain, *PERCEPTUAL])}")
    config = replace(perceptual, distance="dists" if name == "dists" else "lpips")

    def load() -> Reference:
        features, distance = build_perceptual(config)
        return lambda sr, hr: distance(features, sr, hr)

    title = name.upper() if config.features == "vgg16" else f"{name.upper()} ({config.features})"
    return MetricSpec(name=f"{name}_{config.features}", title=title, higher_is_better=False, against=load)


def over_seeds(runs: Sequence[Values]) -> dict[str, dict[str, float | None]]:
    """By metric, ``mean`` and ``std`` (of the sample; none for one run) over runs of each run's mean over images."""
    found: dict[str, dict[str, float | None]] = {}
    for name in runs[0] if runs else ():
        columns = [[value for value in run[name] if value is not None] for run in runs]
        means = [statistics.fmean(column) for column in columns if column]
        found[name] = {
            "mean": statistics.fmean(means) if means else None,
            "std": statistics.stdev(means) if len(means) > 1 else None,
        }
    return found


def training_seconds(folder: Path) -> float | None:
    """Duration of a run from its log; none if it has none."""
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return max(float(json.loads(line)["seconds"]) for line in lines if '"kind": "train"' in line)
    except (OSError, ValueError, KeyError):
        return None


# ---- Results ---------------------------------------------------------------------------------------------------------

SCHEMA = 1


def measure(
    ablation: Ablation,
    held_out: HeldOut,
    failures: Mapping[str, str],
    track: Track = untracked,
    *,
    command: str,
    machine: str,
    date: str,
) -> Results:
    """Measure every trained model of the suite, bicubic enlargement and the HR images themselves.

    ``command``, ``machine`` and ``date`` document for a reader how the results were made.
    """
    suite, config, rows = ablation.suite, ablation.suite.config, []
    trained = [run for run in ablation.runs if run.name not in failures]
    if not trained:
        raise UserError(f"none of the {len(ablation.runs)} runs was finished; see the messages above")
    for name in ablation.variants:
        variant, runs = config.variants[name], [run for run in trained if run.variant == name]
        if name in ablation.models:
            path = Path(str(variant.model))
            checksum = file_sha256(path) if path.is_file() else None
            values = held_out.measure(ablation.models[name], track)
            measured: list[dict[str, Any]] = [{"model": str(path), "sha256": checksum, "values": values}]
        else:
            measured = [
                {
                    "seed": run.seed,
                    "folder": str(run.folder),
                    "sha256": file_sha256(run.model),
                    "seconds": training_seconds(run.folder),
                    "values": held_out.measure(Candidate(run.model), track, run.name),
                }
                for run in runs
            ]
        steps = runs[0].config.train.steps if runs else None
        more = {"differences": variant.differences, "trained": name not in ablation.models, "steps": steps}
        rows.append(_row(name, variant.title, measured) | more)
    baseline = _row("bicubic", "bicubic", [{"values": held_out.measure(Candidate(BICUBIC), track)}])
    reference = _row("hr", "HR", [{"values": held_out.measure_references(track)}])
    training = trained[0].config.train
    return {
        "schema": SCHEMA,
        "suite": suite.name,
        "title": config.title,
        "source": config.source,
        "version": __version__,
        "command": command,
        "machine": machine,
        "date": date,
        "recipe": config.recipe,
        "overrides": [*override_lines(config.overrides), *suite.changes],
        "seeds": ablation.seeds,
        "budget": config.budget,
        "steps": training.steps,
        "batch_size": training.batch_size,
        "evaluation": to_mapping(config.evaluation) | {"pairs": len(held_out.indices)},
        "metrics": [
            {"name": m.name, "title": f"{m.title} {m.unit}".strip(), "higher_is_better": m.higher_is_better}
            for m in held_out.metrics
        ],
        "rows": [baseline, *rows, reference],
        "failures": dict(failures),
        "notes": held_out.notes,
        "published": to_mapping(config.published),
    }


def _row(name: str, title: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "title": title, "runs": runs, "scores": over_seeds([run["values"] for run in runs])}


def compare(
    ablation: Ablation,
    held_out: HeldOut,
    failures: Mapping[str, str],
    folder: Path,
    track: Track = untracked,
    **circumstances: str,
) -> tuple[Results, list[Path]]:
    """Measure the trained models and write ``SUITE.md``, ``SUITE.json`` and ``SUITE.png`` into ``folder``."""
    results = measure(ablation, held_out, failures, track, **circumstances)
    first = (run for run in ablation.runs if run.seed == ablation.seeds[0] and run.name not in failures)
    found = {run.variant: Candidate(run.model) for run in first} | ablation.models
    shown = {ablation.suite.config.variants[name].title: found[name] for name in ablation.variants if name in found}
    return results, write_report(results, held_out.images(shown), folder)


def write_report(results: Results, rows: Sequence[Mapping[str, Tensor]], folder: Path) -> list[Path]:
    """Write the three files of the report into ``folder``; returns their paths."""
    paths = [folder / f"{results['suite']}.{ending}" for ending in ("md", "json", "png")]
    text, data = markdown(results, paths[2].name), json.dumps(results, allow_nan=False) + "\n"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, (text.encode(), data.encode(), sheet(rows)), strict=True):
            with replacing(path) as temporary:
                temporary.write_bytes(content)
    return paths


# ---- Report ----------------------------------------------------------------------------------------------------------

MAX_SHEET_BYTES = 1_500_000
DIGITS = {"psnr": 2, "psnr_rgb": 2, "niqe": 2, "overshoot": 2}
"""Decimals shown; four for the others, whose values are around 0.01 to 1."""


def markdown(results: Results, image: str) -> str:
    """The report as Markdown: table, images, the paper's table, and the commands to repeat it."""
    variants = [row for row in results["rows"] if "differences" in row]
    trained = [row for row in variants if row.get("trained", True)]
    others = [row["title"] for row in variants if row not in trained]
    runs, seeds = sum(len(row["runs"]) for row in trained), results["seeds"]
    budget = f"{results['steps']:,} steps"
    if results.get("budget") == "time":
        steps = [f"{row['steps']:,} ({row['title']})" for row in trained if row.get("steps")]
        budget = f"about equal time, which is {', '.join(steps)} steps,"
    spread = f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}"
    if len(seeds) == 1:
        spread = f"one seed ({seeds[0]}), so that chance may be behind any difference"
    beside = f" Measured beside them, not trained here: {', '.join(others)}." if others else ""
    lines = [
        f"# {results['title']}",
        "",
        f"Follows {results['source']}. {runs} {'run' if runs == 1 else 'runs'} of {budget} with batch "
        f"{results['batch_size']}, {spread}; {results['evaluation']['pairs']} held-out pairs, the same for every "
        f"model. Best variant in bold.{beside}",
        "",
        *_table(results, trained),
        "",
        *(f"- {note}" for note in results["notes"]),
        *(f"- {name} is missing: {reason}" for name, reason in results["failures"].items()),
        "",
        f"![The first held-out pairs; every variant with seed {seeds[0]}]({image})",
        "",
        f"The first held-out pairs, not chosen ones; every variant with seed {seeds[0]}.",
        "",
        *_published(results["published"]),
        "## How it was made",
        f"`{results['command']}`",
        "",
        f"onestepsr {results['version']}, {results['machine']}, {results['date']}. Base recipe `{results['recipe']}` "
        f"with {_code(results['overrides'])}. Every value: [{results['suite']}.json]({results['suite']}.json).",
        "",
        *(f"- **{row['title']}**: {_code(row['differences'])}" for row in variants),
    ]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


def _table(results: Results, trained: Sequence[Mapping[str, Any]]) -> list[str]:
    metrics = results["metrics"]
    titles = [f"{m['title']} {'↑' if m['higher_is_better'] else '↓'}" for m in metrics]
    best = {m["name"]: _best(trained, m) for m in metrics}
    lines = [f"| variant | {' | '.join(titles)} | minutes per run |", f"|---|{'---|' * (len(metrics) + 1)}"]
    for row in results["rows"]:
        scores = [_score(row["scores"].get(name), DIGITS.get(name, 4), row["name"] == best[name]) for name in best]
        seconds = [run["seconds"] for run in row["runs"] if run.get("seconds") is not None]
        minutes = f"{statistics.fmean(seconds) / 60:.1f}" if seconds else "-"
        lines.append(f"| {row['title']} | {' | '.join(scores)} | {minutes} |")
    return lines


def _best(trained: Sequence[Mapping[str, Any]], metric: Mapping[str, Any]) -> str | None:
    scores = {row["name"]: row["scores"].get(metric["name"], {}).get("mean") for row in trained}
    known: dict[str, float] = {name: score for name, score in scores.items() if score is not None}
    pick = max if metric["higher_is_better"] else min
    return pick(known, key=lambda name: known[name]) if len(known) > 1 else None


def _score(score: Mapping[str, float | None] | None, digits: int, best: bool) -> str:
    if score is None or score["mean"] is None:
        return "-"
    text = f"{score['mean']:.{digits}f}"
    text = f"**{text}**" if best else text
    return text if score["std"] is None else f"{text} ± {score['std']:.{digits}f}"


def _published(table: Mapping[str, Any] | None) -> list[str]:
    if table is None:
        return []
    lines = ["## The paper's own table", table["note"], ""]
    lines += [f"| | {' | '.join(table['columns'])} |", f"|---|{'---|' * len(table['columns'])}"]
    for label, row in table["rows"].items():
        lines.append(f"| {label} | {' | '.join('-' if value is None else f'{value:g}' for value in row)} |")
    return [*lines, ""]


def _code(settings: Sequence[str]) -> str:
    return ", ".join(f"`{setting}`" for setting in settings) if settings else "no changes"


def sheet(rows: Sequence[Mapping[str, Tensor]], limit: int = MAX_SHEET_BYTES) -> bytes:
    """PNG of titled columns of images (3, h, w); the last rows are left out until it fits into ``limit`` bytes."""
    shown = [{_fitting(title, image.shape[-1]): image for title, image in row.items()} for row in rows]
    while True:
        buffer = io.BytesIO()
        draw_grid(shown).save(buffer, format="PNG", optimize=True)
        if buffer.tell() <= limit or len(shown) == 1:
            return buffer.getvalue()
        shown.pop()


def _fitting(title: str, width: int) -> str:
    font, text = ImageFont.load_default(FONT_SIZE), title
    while title and font.getlength(text) > width:
        title = title[:-1]
        text = f"{title}…"
    return text

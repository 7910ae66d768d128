"""Results of a suite: measured on the same held-out pairs, as JSON with every value, a Markdown table and images.

Tables are made from the JSON alone: whatever they show can be computed again, or otherwise, from it.
"""

from __future__ import annotations

import datetime
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import StrictUndefined, Template
from PIL import ImageFont
from torch import Tensor, nn

from onestepsr import __version__
from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.core.files import file_sha256, replacing, writing
from onestepsr.core.machine import describe_machine
from onestepsr.core.progress import progress
from onestepsr.core.rng import derived_seed
from onestepsr.core.tables import DOWN, UP, Grid
from onestepsr.data.datasets import Pool, build_dataset
from onestepsr.evaluate.metrics.catalog import METRICS, MetricSpec, Reference
from onestepsr.evaluate.metrics.fidelity import as_eight_bit
from onestepsr.inference.upscaler import resolve_device
from onestepsr.methods.shared.image_loss import PerceptualConfig, build_perceptual
from onestepsr.models.loading import load_generator
from onestepsr.prompts.embedder import EmbeddingCache, PromptEmbedder
from onestepsr.prompts.sources import FilePrompts
from onestepsr.train.ablation import Ablation, EvaluationConfig, override_lines, text_encoder_of
from onestepsr.train.batches import Prompted
from onestepsr.train.report import FONT_SIZE, draw_grid
from onestepsr.weights.catalog import BICUBIC

Values = dict[str, list[float | None]]
"""By metric, one value for each held-out pair; none where an image cannot be measured (NIQE of a flat one)."""
Results = dict[str, Any]
"""Content of the JSON file."""

# ---- Measuring -------------------------------------------------------------------------------------------------------

PERCEPTUAL = ("dists", "lpips")
"""Metrics whose features are part of a suite's settings."""
NIQE = "niqe"
"""Metric that needs statistics, and blocks that are not flat."""
PYIQA = ("musiq", "maniqa", "maniqa-pipal", "clipiqa", "clipiqa+", "topiq_nr", "liqe", "ilniqe", "pi")
OPTIONAL = (NIQE, *PYIQA)
"""Metrics that are left out, with a note, where what they need is not on this machine."""


class Measured(NamedTuple):
    """Values of one generator, and images to show."""

    values: Values
    images: list[Tensor]
    """Centre parts (3, side, side) of the first images."""


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
                if name not in OPTIONAL or len(config.metrics) == 1:
                    raise
                self.notes.append(f"{find_metric(name, config.perceptual).title} was not measured: {error}")
        if not self.metrics:
            raise UserError(f"nothing can be measured here: {'; '.join(self.notes)}")

    def measure(self, generator: nn.Module | None, title: str = "", *, pairs: Any = None) -> Measured:
        """Values and images of a generator, computed in float32 and rounded to 8 bits.

        ``pairs`` are :attr:`pairs` with the embeddings of texts, for a generator that reads them.

        Without a generator, those of the HR images themselves, for the metrics that compare with nothing.
        """
        metrics = [metric for metric in self.metrics if generator is not None or not metric.needs_reference]
        measured = Measured({metric.name: [] for metric in metrics}, [])
        for index in progress(self.indices, f"Measuring {title}"):
            pair = (self.pairs if pairs is None else pairs)[index]
            sr = hr = pair["hr"][None]
            if generator is not None:
                prompt = {"prompt": pair["prompt"][None].to(self.device)} if "prompt" in pair else {}
                with torch.no_grad():
                    sr = as_eight_bit(generator(pair["lr"][None].to(self.device), **prompt).float().cpu())
            for name, column in measured.values.items():
                column.append(self._value(name, sr, hr))
            if index < self.config.shown:
                side = self.config.shown_side
                top, left = (max(0, length - side) // 2 for length in sr.shape[-2:])
                measured.images.append(sr[0, :, top : top + side, left : left + side])
        return measured

    def prompted(self, texts: Path, text_encoder: str) -> Prompted:
        """The same pairs, each with the embedding of the text that ``texts`` has about its photo."""
        data = replace(self.config.data, prompts=texts)
        pairs = build_dataset(data, derived_seed(self.config.seed, "held-out pairs"), with_lr=True)
        prompts, cache = FilePrompts(texts), EmbeddingCache(data.cache_dir / "prompts", limit=None)
        assert not isinstance(pairs, Pool)  # refused beside texts
        found = [prompts.text(Path(name)) for name in pairs.names()]
        return Prompted(pairs, found, PromptEmbedder(text_encoder, cache=cache))

    def _value(self, name: str, sr: Tensor, hr: Tensor) -> float | None:
        try:
            with torch.no_grad():
                return float(f"{float(self._measures[name](sr, hr)):.7g}")  # more digits than any metric is worth
        except UserError:
            if name != NIQE:
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


def compare(
    ablation: Ablation, held_out: HeldOut, failures: Mapping[str, str], folder: Path, *, command: str
) -> tuple[Results, list[Path]]:
    """Measure every trained model of the suite, bicubic enlargement and the HR images themselves.

    Writes ``SUITE.md``, ``SUITE.json`` and ``SUITE.png`` into ``folder``. ``command`` tells a reader how the results
    were made.
    """
    suite, config = ablation.suite, ablation.suite.config
    trained = [run for run in ablation.runs if run.name not in failures]
    if not trained:
        raise UserError(f"none of the {len(ablation.runs)} runs was finished; see the messages above")
    bicubic = held_out.measure(load_generator(BICUBIC, device=held_out.device), "bicubic")
    rows, shown = [_row("bicubic", "bicubic", [{"values": bicubic.values}])], {"bicubic": bicubic.images}
    for name in ablation.variants:
        variant, runs = config.variants[name], [run for run in trained if run.variant == name]
        measured: list[dict[str, Any]] = []
        if variant.model is not None:
            found, path = held_out.measure(variant.load(held_out.device), variant.model), Path(variant.model)
            checksum = file_sha256(path) if path.is_file() else None
            measured.append({"model": str(path), "sha256": checksum, "values": found.values})
            shown[variant.title] = found.images
        for run in runs:
            encoder, pairs = text_encoder_of(run), None
            if variant.prompts is not None and encoder is not None:
                pairs = held_out.prompted(variant.prompts, encoder)
            found = held_out.measure(load_generator(run.model, device=held_out.device), run.name, pairs=pairs)
            origin = {"seed": run.seed, "folder": str(run.folder), "sha256": file_sha256(run.model)}
            measured.append({**origin, "seconds": training_seconds(run.folder), "values": found.values})
            if run.seed == ablation.seeds[0]:
                shown[variant.title] = found.images
        steps = runs[0].config.train.steps if runs else None
        more = {"differences": variant.differences, "trained": variant.model is None, "steps": steps}
        rows.append(_row(name, variant.title, measured) | more)
    reference = held_out.measure(None, "HR")
    rows.append(_row("hr", "HR", [{"values": reference.values}]))
    shown["HR"] = reference.images
    results = {
        "schema": SCHEMA,
        "suite": suite.name,
        "title": config.title,
        "source": config.source,
        "version": __version__,
        "command": command,
        "machine": describe_machine(),
        "date": datetime.date.today().isoformat(),
        "recipe": config.recipe,
        "overrides": [*override_lines(config.overrides), *suite.changes],
        "seeds": ablation.seeds,
        "budget": config.budget,
        "steps": trained[0].config.train.steps,
        "batch_size": trained[0].config.train.batch_size,
        "evaluation": to_mapping(config.evaluation) | {"pairs": len(held_out.indices)},
        "metrics": [
            {"name": m.name, "title": f"{m.title} {m.unit}".strip(), "higher_is_better": m.higher_is_better}
            for m in held_out.metrics
        ],
        "rows": rows,
        "failures": dict(failures),
        "notes": held_out.notes,
        "published": to_mapping(config.published),
    }
    images = [dict(zip(shown, row, strict=True)) for row in zip(*shown.values(), strict=True)]
    return results, write_report(results, images, folder)


def _row(name: str, title: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "title": title, "runs": runs, "scores": over_seeds([run["values"] for run in runs])}


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

TEMPLATE = Path(__file__).parent / "templates" / "ablation.md"
MAX_SHEET_BYTES = 1_500_000
DIGITS = {"psnr": 2, "psnr_rgb": 2, "niqe": 2, "overshoot": 2}
"""Decimals shown; four for the others, whose values are around 0.01 to 1."""


def markdown(results: Results, image: str) -> str:
    """The report as Markdown (``ablation.md``): table, images, the paper's table, and the commands to repeat it."""
    variants = [row for row in results["rows"] if "differences" in row]
    trained = [row for row in variants if row.get("trained", True)]
    budget = f"{results['steps']:,} steps"
    if results.get("budget") == "time":
        steps = [f"{row['steps']:,} ({row['title']})" for row in trained if row.get("steps")]
        budget = f"about equal time, which is {', '.join(steps)} steps,"
    published = results["published"]
    if published is not None:
        values = [["-" if v is None else f"{v:g}" for v in row] for row in published["rows"].values()]
        rows = tuple((label, *row) for label, row in zip(published["rows"], values, strict=True))
        published = {**published, "table": Grid(title="", columns=("", *published["columns"]), rows=rows).markdown()}
    page = Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, undefined=StrictUndefined).render(
        **{**results, "published": published, "budget": budget},
        image=image,
        table=results_grid(results).markdown(),
        variants=variants,
        beside=[row["title"] for row in variants if row not in trained],
        count=sum(len(row["runs"]) for row in trained),
    )
    return re.sub("\n{3,}", "\n\n", page)


def results_grid(results: Results) -> Grid:
    """A row for bicubic enlargement, each variant and the HR images; means and standard deviations over seeds."""
    metrics, rows, best = results["metrics"], [], set()
    for row in results["rows"]:
        scores = [_score(row["scores"].get(m["name"]), DIGITS.get(m["name"], 4)) for m in metrics]
        seconds = [run["seconds"] for run in row["runs"] if run.get("seconds") is not None]
        rows.append((row["title"], *scores, f"{statistics.fmean(seconds) / 60:.1f}" if seconds else "-"))
    for column, metric in enumerate(metrics, 1):  # the best of those with equal budgets, where there are several
        means = {
            number: mean * (1 if metric["higher_is_better"] else -1)
            for number, row in enumerate(results["rows"])
            if "differences" in row and row.get("trained", True)
            if (mean := row["scores"].get(metric["name"], {}).get("mean")) is not None
        }
        best |= {(max(means, key=means.__getitem__), column)} if len(means) > 1 else set()
    titles = [f"{metric['title']} {UP if metric['higher_is_better'] else DOWN}" for metric in metrics]
    columns = ("variant", *titles, "minutes per run")
    return Grid(title=results["title"], columns=columns, rows=tuple(rows), best=frozenset(best))


def _score(score: Mapping[str, float | None] | None, digits: int) -> str:
    if score is None or score["mean"] is None:
        return "-"
    return f"{score['mean']:.{digits}f}" + ("" if score["std"] is None else f" ± {score['std']:.{digits}f}")


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

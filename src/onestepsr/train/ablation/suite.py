"""Suites: one comparison, such as a paper's ablation table, as data.

A suite names a recipe and the variants of it that are compared. Each variant is trained with each seed at equal
budget and measured on the same held-out pairs. What a run is in the end: the recipe, then the suite's ``overrides``,
then those of the command line, then the variant's own, then the seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import yaml

from onestepsr.core.config import apply_overrides, from_mapping, read_mapping, to_mapping
from onestepsr.core.errors import UserError, did_you_mean, error_context
from onestepsr.data.config import DataConfig
from onestepsr.methods.shared.image_loss import PerceptualConfig
from onestepsr.train.recipes import RunConfig, load_run, read_recipe

Overrides = dict[str, Any] | tuple[str, ...]
"""Settings as ``key=value`` lines, or as a mapping whose keys may be dotted or nested."""

ROWS = ("bicubic", "hr")
"""Rows that every table has besides the variants."""
HELD_OUT = "validation"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """One row of the table."""

    title: str
    """What the row is called in tables and images."""
    overrides: Overrides = ()
    """What makes it differ from the suite's recipe."""
    recipe: str | None = None
    """Another recipe than the suite's."""
    method: str | None = None
    """Another method than the recipe's: data and loop stay, ``config`` holds this variant's settings alone.

    Whichever way a variant comes to another method, ``config`` settings of suite and command line do not reach it.
    """
    model: str | None = None
    """A generator that is there already, by name or weights file: it is measured beside the others and not trained."""
    steps: int | None = None
    """Network evaluations of that model, where it is one that takes several; null is what it was made for."""
    sampler: str | None = None
    """How it takes them, likewise."""

    def __post_init__(self) -> None:
        if self.model is not None and (self.overrides or self.recipe or self.method):
            raise ValueError(f"'{self.title}' has a model that is there already: overrides, recipe, method have no use")
        if self.model is None and (self.steps is not None or self.sampler is not None):
            raise ValueError(f"'{self.title}' has steps or sampler and no model: expected with a model alone")

    @property
    def differences(self) -> list[str]:
        """What makes it differ, in ``key=value`` lines for a reader."""
        given = {key: getattr(self, key) for key in ("recipe", "method", "model", "steps", "sampler")}
        return [*(f"{key}={value}" for key, value in given.items() if value), *override_lines(self.overrides)]


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """The paper's own numbers, shown beside the measured ones and never mixed with them."""

    columns: tuple[str, ...]
    """Metrics, as the paper names them."""
    rows: dict[str, tuple[float | None, ...]]
    """Values by label, in the order of ``columns``; null where the paper gives none."""
    note: str = ""
    """Data set and whatever else a reader has to know."""

    def __post_init__(self) -> None:
        for label, row in self.rows.items():
            if len(row) != len(self.columns):
                raise ValueError(f"row '{label}' has {len(row)} values for {len(self.columns)} columns")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The held-out pairs, always the same ones, and what is measured on them."""

    data: DataConfig
    """Photos that no run trains on, and how they are degraded."""
    images: int = 60
    """Number of pairs."""
    seed: int = 0
    """Start of their crops and degradations; the seeds of the runs have no part in them."""
    metrics: tuple[str, ...] = ("psnr", "ssim", "dists", "lpips", "niqe", "grid")
    """Columns of the table; ``niqe`` is left out where its statistics are not at hand."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """Features behind the columns ``dists`` and ``lpips``. Without ``features: vgg16`` they are ours, and the
    columns say so; the ``distance`` here has no use."""
    shown: int = 4
    """Rows of the image sheet: the first pairs, not chosen ones."""
    shown_side: int = 160
    """Side of the centre part that the sheet shows, in output pixels."""

    def __post_init__(self) -> None:
        for name in ("images", "shown", "shown_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """A comparison; see the module's description for how a run comes about."""

    title: str
    """Heading of the report."""
    source: str
    """The table or figure that it follows."""
    recipe: str
    """Packaged recipe or YAML file that all variants start from."""
    evaluation: EvaluationConfig
    """How the trained models are compared."""
    variants: dict[str, VariantConfig]
    """Rows of the table in order, by a short name that is also a folder's."""
    overrides: Overrides = ()
    """Settings that all variants share, the budget above all."""
    budget: Literal["steps", "time"] = "steps"
    """What is equal for all variants: the number of steps, or, where their steps cost differently, the time. For the
    latter each variant names the ``train.steps`` that fit into it, as measured; the report shows both."""
    published: PaperTable | None = None
    """The paper's own table."""

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError("variants is empty: expected at least one")
        for name in self.variants:
            if not _NAME.fullmatch(name) or name in ROWS:
                raise ValueError(f"variants.{name}: expected a name of a-z, 0-9, - and _, other than {', '.join(ROWS)}")
        if all(variant.model is not None for variant in self.variants.values()):
            raise ValueError("variants are all models that are there already: expected at least one that is trained")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite as it was asked for."""

    name: str
    config: SuiteConfig
    changes: tuple[str, ...] = field(default=())
    """Settings from the command line, for every variant."""

    def chosen(self, names: Sequence[str] = ()) -> list[str]:
        """The variants called ``names`` in the suite's order; all of them without names."""
        for name in names:
            if name not in self.config.variants:
                raise UserError(
                    f"suite '{self.name}' has no variant '{name}': {did_you_mean(name, self.config.variants)}"
                )
        return [name for name in self.config.variants if not names or name in names]

    def trained(self, names: Sequence[str]) -> list[str]:
        """Those of the variants ``names`` that are trained and not there already."""
        return [name for name in names if self.config.variants[name].model is None]


@dataclass(frozen=True, kw_only=True)
class VariantRun:
    """One variant with one seed: an ordinary run."""

    variant: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """Variant and seed in one word."""
        return f"{self.variant}/seed-{self.seed}"


def suite_names() -> list[str]:
    """Names of the suites inside the package."""
    folder = files("onestepsr") / "suites"
    found = list(folder.iterdir()) if folder.is_dir() else []
    return sorted(file.name.removesuffix(".yaml") for file in found if file.name.endswith(".yaml"))


def load_suite(suite: str, settings: Sequence[str] = ()) -> Suite:
    """Read a packaged suite or a file; ``settings`` are the ``key=value`` words of the command line.

    ``validation=FOLDER`` names the held-out photos, ``evaluation.KEY=VALUE`` changes how models are compared,
    ``variants.NAME.KEY=VALUE`` a variant, and all others change the runs.
    """
    values = _read_suite(suite)
    changes: list[str] = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == HELD_OUT:
            values = apply_overrides(values, [f"evaluation.data.paths={json.dumps(_folders(value))}"])
        elif key.split(".")[0] in ("evaluation", "variants"):
            values = apply_overrides(values, [setting])
        else:
            changes.append(setting)
    _require_held_out(values)
    config = from_mapping(SuiteConfig, values)
    _refuse_ineffective(config, changes)
    return Suite(name=Path(suite).stem, config=config, changes=tuple(changes))


def plan_runs(suite: Suite, variants: Sequence[str], seeds: Sequence[int], out: Path) -> list[VariantRun]:
    """Every trained variant with every seed, seed by seed, so that an interrupted suite has whole seeds to compare.

    All settings are checked here, and that all variants have the same budget; of equal time only the batch size can be
    checked before anything has run.
    """
    runs = [_plan_run(suite, name, seed, out) for seed in seeds for name in suite.trained(variants)]
    if not runs:
        raise UserError(f"nothing to train: of {', '.join(variants)} there are models already; choose another one too")
    first = runs[0]
    equal = ("steps", "batch_size") if suite.config.budget == "steps" else ("batch_size",)
    for run in runs:
        for key in equal:
            own, other = getattr(run.config.train, key), getattr(first.config.train, key)
            if own != other:
                raise UserError(
                    f"train.{key}: {own} in variant '{run.variant}' but {other} in '{first.variant}'; "
                    "a suite compares at equal budget"
                )
    return runs


def override_lines(overrides: Overrides) -> list[str]:
    """``key=value`` lines, whichever way the settings were written."""
    return list(overrides) if isinstance(overrides, tuple) else list(_lines(overrides))


def _lines(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _lines(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value)}"


def _read_suite(suite: str) -> dict[str, Any]:
    if Path(suite).is_file():
        return read_mapping(Path(suite))
    if suite in suite_names():
        with as_file(files("onestepsr") / "suites" / f"{suite}.yaml") as path:
            return read_mapping(path)
    raise UserError(f"suite '{suite}' is neither a file nor a packaged suite: {did_you_mean(suite, suite_names())}")


def _folders(text: str) -> list[str]:
    if not text.strip():  # as an unset variable of the shell leaves it; it would mean the present folder
        raise UserError(f"{HELD_OUT}=: expected a folder of held-out photos")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:  # a folder may have any name
        return [text]
    return [str(folder) for folder in value] if isinstance(value, list) else [text]


def _require_held_out(values: Mapping[str, Any]) -> None:
    evaluation = values.get("evaluation")
    data = evaluation.get("data") if isinstance(evaluation, Mapping) else None
    if isinstance(data, Mapping) and not data.get("paths"):
        raise UserError(f"the held-out photos are missing: add {HELD_OUT}=FOLDER")


def _plan_run(suite: Suite, name: str, seed: int, out: Path) -> VariantRun:
    variant = suite.config.variants[name]
    recipe = variant.recipe or suite.config.recipe
    with error_context(f"variant '{name}'"):
        base = read_recipe(recipe).get("method")
        method = variant.method or base
        if not isinstance(method, str):
            raise UserError(f"recipe '{recipe}' names no method: give 'method' in the variant")
        common = [*override_lines(suite.config.overrides), *suite.changes]
        if method != read_recipe(suite.config.recipe).get("method", method):
            common = [line for line in common if line.split("=")[0].split(".")[0] != "config"]
        anew = [f"method={method}", "config={}"] if method != base else []
        fixed = [f"train.seed={seed}", f"out={json.dumps(str(out / name / f'seed-{seed}'))}"]
        lines = [*_previews(suite.config.evaluation.data), *common, *anew, *override_lines(variant.overrides), *fixed]
        return VariantRun(variant=name, seed=seed, config=load_run(method, recipe, lines))


def _previews(data: DataConfig) -> list[str]:
    """Runs show the held-out photos while they train, unless these are whole images, whose sizes need padding."""
    return [f"validation.data={json.dumps(to_mapping(data))}"] if data.crop else []


def _refuse_ineffective(config: SuiteConfig, changes: Sequence[str]) -> None:
    """Settings of the command line that would be overwritten everywhere, which nobody can mean."""
    options = {"train.seed": "--seeds", "out": "--out", "method": "the suite's variants"}
    trained = [variant for variant in config.variants.values() if variant.model is None]
    own = [{line.split("=")[0] for line in override_lines(variant.overrides)} for variant in trained]
    for key in (line.split("=")[0] for line in changes):
        if key in options:
            raise UserError(f"{key}: set by {options[key]}, not by {key}=VALUE")
        if all(key in keys for keys in own):
            raise UserError(f"{key}: every variant of the suite sets it, so {key}=VALUE would change nothing")

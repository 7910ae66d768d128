"""Ablation suites: a list of training runs, such as a paper's ablation table, as data.

A suite names a recipe and the variants of it that are compared. Each variant is trained with each seed at equal
budget and measured on the same held-out pairs. The settings of a run are the recipe, then the suite's ``overrides``,
then those of the command line, then the variant's own, then the seed.

Each run is an ordinary one in a process of its own, in ``OUT/VARIANT/seed-N``. A finished run is left alone and an
interrupted one resumed, so the same command continues after any interruption.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from onestepsr.core.config import apply_overrides, from_mapping, parse_yaml, read_mapping, to_mapping
from onestepsr.core.errors import UserError, did_you_mean, error_context
from onestepsr.core.files import locked, write_text, writing
from onestepsr.core.signals import Interruption
from onestepsr.data.datasets import DataConfig
from onestepsr.methods.shared.image_loss import PerceptualConfig
from onestepsr.models.loading import load_generator
from onestepsr.train.checkpoint import Checkpoints
from onestepsr.train.recipes import RunConfig, changed_setting, flatten, load_run, read_recipe
from onestepsr.train.run import CONFIG, MODEL, config_text, prepare

# ---- Suites ----------------------------------------------------------------------------------------------------------

PACKAGED = Path(__file__).parents[1] / "suites"
ROWS = ("bicubic", "hr")
"""Rows that every table has besides the variants."""
HELD_OUT = "validation"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
Overrides = dict[str, Any] | tuple[str, ...]
"""Settings as ``key=value`` lines, or as a mapping whose keys may be dotted or nested."""


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """One row of the table."""

    title: str
    """Name of the row in tables and images."""
    overrides: Overrides = ()
    """Differences from the suite's recipe."""
    recipe: str | None = None
    """Another recipe than the suite's."""
    method: str | None = None
    """Another method than the recipe's: data and loop stay, ``config`` holds this variant's settings alone.

    Whichever way a variant comes to another method, ``config`` settings of suite and command line do not reach it.
    """
    model: str | None = None
    """An existing generator, by name or weights file: it is measured beside the others and not trained."""
    steps: int | None = None
    """Network evaluations of that model, where it is one that takes several; null is the number it was made for."""
    sampler: str | None = None
    """Sampler of these evaluations, likewise."""
    prompts: Path | None = None
    """Texts about the held-out photos, in the form of ``data.prompts``, for a variant that is trained with texts."""

    def __post_init__(self) -> None:
        if self.model is not None and (self.overrides or self.recipe or self.method):
            raise ValueError(f"'{self.title}' has an existing model: overrides, recipe and method have no effect")
        if self.model is None and (self.steps is not None or self.sampler is not None):
            raise ValueError(f"'{self.title}' has steps or sampler and no model: expected with a model alone")
        if self.model is not None and self.prompts is not None:
            raise ValueError(f"'{self.title}' has prompts and an existing model: expected with a trained variant")

    @property
    def differences(self) -> list[str]:
        """Differences from the suite's recipe in ``key=value`` lines for a reader."""
        given = {key: getattr(self, key) for key in ("recipe", "method", "model", "steps", "sampler", "prompts")}
        return [*(f"{key}={value}" for key, value in given.items() if value), *override_lines(self.overrides)]

    def load(self, device: torch.device | str = "cpu") -> nn.Module:
        """The existing generator, ready for inference."""
        return load_generator(str(self.model), device=device, steps=self.steps, sampler=self.sampler)


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """The paper's own numbers, shown beside the measured ones and never mixed with them."""

    columns: tuple[str, ...]
    """Metrics, as the paper names them."""
    rows: dict[str, tuple[float | None, ...]]
    """Values by label, in the order of ``columns``; null where the paper gives none."""
    note: str = ""
    """Dataset and whatever else a reader has to know."""

    def __post_init__(self) -> None:
        for label, row in self.rows.items():
            if len(row) != len(self.columns):
                raise ValueError(f"row '{label}' has {len(row)} values for {len(self.columns)} columns")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The held-out pairs, always the same ones, and the metrics."""

    data: DataConfig
    """Photos that no run trains on, and their degradation."""
    images: int = 60
    """Number of pairs."""
    seed: int = 0
    """Start of their crops and degradations; the seeds of the runs have no part in them."""
    metrics: tuple[str, ...] = ("psnr", "ssim", "dists", "lpips", "niqe", "grid")
    """Columns of the table. ``niqe``, and metrics of pyiqa such as ``musiq``, are left out where what they need is not
    installed, and the report says so."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """Features behind the columns ``dists`` and ``lpips``. Without ``features: vgg16`` they are ours, and the
    columns say so; the ``distance`` here has no effect."""
    shown: int = 4
    """Rows of the image sheet: the first pairs, not chosen ones."""
    shown_side: int = 160
    """Side of the centre part that the sheet shows, in output pixels."""

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("shown", 1), ("shown_side", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """A comparison; see the module's description for the settings of a run."""

    title: str
    """Heading of the report."""
    source: str
    """The table or figure that it follows."""
    recipe: str
    """Packaged recipe or YAML file that all variants start from."""
    evaluation: EvaluationConfig
    """Comparison of the trained models."""
    variants: dict[str, VariantConfig]
    """Rows of the table in order, by a short name that is also a folder's."""
    overrides: Overrides = ()
    """Settings that all variants share, the budget above all."""
    budget: Literal["steps", "time"] = "steps"
    """Budget that is equal for all variants: the number of steps, or, where steps cost differently, the time. For the
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
            raise ValueError("variants are all existing models: expected at least one that is trained")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite with the settings of the command line."""

    name: str
    config: SuiteConfig
    changes: tuple[str, ...] = ()
    """Settings from the command line, for every variant."""

    def chosen(self, names: Sequence[str] = ()) -> list[str]:
        """The variants called ``names`` in the suite's order; all of them without names."""
        for name in names:
            if name not in self.config.variants:
                known = did_you_mean(name, self.config.variants)
                raise UserError(f"suite '{self.name}' has no variant '{name}': {known}")
        return [name for name in self.config.variants if not names or name in names]


def suite_names() -> list[str]:
    """Names of the suites inside the package."""
    return sorted(file.stem for file in PACKAGED.glob("*.yaml"))


def load_suite(suite: str, settings: Sequence[str] = ()) -> Suite:
    """Read a packaged suite or a file; ``settings`` are the ``key=value`` words of the command line.

    ``validation=FOLDER`` names the held-out photos, ``evaluation.KEY=VALUE`` changes the comparison,
    ``variants.NAME.KEY=VALUE`` a variant, and all others change the runs.
    """
    path = Path(suite) if Path(suite).is_file() else PACKAGED / f"{suite}.yaml"
    if path.parent == PACKAGED and suite not in suite_names():
        raise UserError(f"suite '{suite}' is neither a file nor a packaged suite: {did_you_mean(suite, suite_names())}")
    values, changes = read_mapping(path), []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == HELD_OUT:
            if not value.strip():  # as an unset variable of the shell leaves it; it would mean the present folder
                raise UserError(f"{HELD_OUT}=: expected a folder of held-out photos")
            try:
                folders = parse_yaml(value)
            except ValueError:  # a folder may have any name
                folders = value
            paths = list(map(str, folders)) if isinstance(folders, list) else [value]
            values = apply_overrides(values, [f"evaluation.data.paths={json.dumps(paths)}"])
        elif key.split(".")[0] in ("evaluation", "variants"):
            values = apply_overrides(values, [setting])
        else:
            changes.append(setting)
    evaluation = values.get("evaluation")
    data = evaluation.get("data") if isinstance(evaluation, Mapping) else None
    if isinstance(data, Mapping) and not data.get("paths"):
        raise UserError(f"the held-out photos are missing: add {HELD_OUT}=FOLDER")
    config = from_mapping(SuiteConfig, values)
    _refuse_ineffective(config, changes)
    return Suite(name=Path(suite).stem, config=config, changes=tuple(changes))


def override_lines(overrides: Overrides) -> list[str]:
    """``key=value`` lines, whichever way the settings were written."""
    if isinstance(overrides, tuple):
        return list(overrides)
    return [f"{name}={json.dumps(value)}" for name, value in flatten(overrides).items()]


def _refuse_ineffective(config: SuiteConfig, changes: Sequence[str]) -> None:
    """Refuse settings of the command line that every run would overwrite."""
    options = {"train.seed": "--seeds", "out": "--out", "method": "the suite's variants"}
    trained = [variant for variant in config.variants.values() if variant.model is None]
    own = [{line.split("=")[0] for line in override_lines(variant.overrides)} for variant in trained]
    for key in (line.split("=")[0] for line in changes):
        if key in options:
            raise UserError(f"{key}: set by {options[key]}, not by {key}=VALUE")
        if all(key in keys for keys in own):
            raise UserError(f"{key}: every variant of the suite sets it, so {key}=VALUE would change nothing")


# ---- Runs: the list, and the progress found on disk ------------------------------------------------------------------

MARK, LOCK = "suite.json", ".lock"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One variant with one seed, an ordinary training run, and its progress so far."""

    variant: str
    seed: int
    config: RunConfig
    folder: Path
    """Folder of its model: its own, or that of an equal run in a folder given for reuse."""
    state: Literal["new", "interrupted", "finished"] = "new"
    step: int = 0
    """Step of the newest checkpoint."""

    @property
    def name(self) -> str:
        """Variant and seed in one word."""
        return f"{self.variant}/seed-{self.seed}"

    @property
    def model(self) -> Path:
        """The trained generator."""
        return self.folder / MODEL


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A suite whose settings, folders and photos have been checked; nothing has been written."""

    suite: Suite
    variants: list[str]
    seeds: list[int]
    out: Path
    runs: list[Run]


def plan_ablation(
    suite: Suite, *, only: Sequence[str], seeds: Sequence[int], out: Path, reuse: Sequence[Path] = ()
) -> Ablation:
    """Check everything that can be wrong with any run of the suite, and find the progress on disk."""
    variants, config = suite.chosen(only), suite.config
    runs = plan_runs(suite, variants, seeds, out)
    _check_out(suite, out)
    others = _finished_runs(reuse)
    runs = [_with_progress(run, others) for run in runs]
    for run in runs:
        _refuse_training_photos(config.evaluation.data, run.config.data)
    first: dict[str, Run] = {}
    for run in runs:
        if run.state != "finished":
            first.setdefault(run.variant, run)
    for run in first.values():
        with error_context(f"variant '{run.variant}'"):  # absent photos and backbones, wrong sizes, unknown networks
            prepare(run.config, resume=True, dry=True)
    for run in runs:
        if config.variants[run.variant].prompts is not None and text_encoder_of(run) is None:
            raise UserError(f"variants.{run.variant}.prompts: networks of method {run.config.method} read no texts")
    for name in (name for name in variants if config.variants[name].model is not None):
        with error_context(f"variant '{name}'"):
            config.variants[name].load()
    return Ablation(suite=suite, variants=variants, seeds=list(seeds), out=out, runs=runs)


def text_encoder_of(run: Run) -> str | None:
    """The text encoder that a run's networks are trained with; None if they read no texts."""
    return getattr(getattr(run.config.config, "prompt", None), "text_encoder", None)


def plan_runs(suite: Suite, variants: Sequence[str], seeds: Sequence[int], out: Path) -> list[Run]:
    """Every trained variant with every seed, seed by seed, so that an interrupted suite has whole seeds to compare.

    All settings are checked here, and that all variants have the same budget; of equal time only the batch size can be
    checked before anything has run.
    """
    trained = [name for name in variants if suite.config.variants[name].model is None]
    runs = [_plan_run(suite, name, seed, out) for seed in seeds for name in trained]
    if not runs:
        raise UserError(f"nothing to train: {', '.join(variants)} are existing models; choose another variant too")
    first = runs[0]
    equal = ("steps", "batch_size") if suite.config.budget == "steps" else ("batch_size",)
    for run, key in itertools.product(runs, equal):
        own, other = getattr(run.config.train, key), getattr(first.config.train, key)
        if own != other:
            named = f"{own} in variant '{run.variant}' but {other} in '{first.variant}'"
            raise UserError(f"train.{key}: {named}; a suite compares at equal budget")
    return runs


def _plan_run(suite: Suite, name: str, seed: int, out: Path) -> Run:
    variant, data = suite.config.variants[name], suite.config.evaluation.data
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
        # Runs show the held-out photos while they train, unless these are whole images, whose sizes need padding.
        previews = [f"validation.data={json.dumps(to_mapping(data))}"] if data.crop else []
        folder = out / name / f"seed-{seed}"
        fixed = [f"train.seed={seed}", f"out={json.dumps(str(folder))}"]
        lines = [*previews, *common, *anew, *override_lines(variant.overrides), *fixed]
        return Run(variant=name, seed=seed, config=load_run(method, recipe, lines), folder=folder)


def _check_out(suite: Suite, out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; choose another --out")
    if (out / MARK).is_file():
        other = read_mapping(out / MARK).get("suite")
        if other != suite.name:
            raise UserError(f"{out}: holds runs of suite '{other}', not of '{suite.name}'; choose another --out")
    elif any(path.name != LOCK for path in out.iterdir()):
        raise UserError(f"{out}: is not empty and holds no runs of a suite; choose another --out")


def _with_progress(run: Run, others: Sequence[tuple[Path, RunConfig]]) -> Run:
    steps, saved = run.config.train.steps, run.folder / CONFIG
    if saved.is_file():
        change = _difference(_load_saved(saved), run.config)
        if change:
            raise UserError(
                f"{run.folder} holds a run with other settings ({change}); remove it or choose another --out"
            )
        others = [(run.folder, run.config), *others] if _is_finished(run.folder, run.config) else others
    for folder, config in others:
        if _difference(config, run.config) is None:
            return replace(run, state="finished", step=steps, folder=folder)
    checkpoint = Checkpoints(run.folder / "checkpoints").latest()
    return run if checkpoint is None else replace(run, state="interrupted", step=checkpoint.step)


def _load_saved(path: Path) -> RunConfig:
    """The resolved settings that a run left in its folder."""
    return load_run(str(read_mapping(path).get("method")), str(path))


def _finished_runs(folders: Sequence[Path]) -> list[tuple[Path, RunConfig]]:
    """Finished runs in, or up to two levels below, each of ``folders``."""
    found: list[tuple[Path, RunConfig]] = []
    for folder, pattern in itertools.product(folders, (CONFIG, f"*/{CONFIG}", f"*/*/{CONFIG}")):
        if not folder.is_dir():
            raise UserError(f"--reuse {folder}: no such folder")
        for path in sorted(folder.glob(pattern)):
            with suppress(UserError):  # settings of another version: certainly no equal run
                config = _load_saved(path)
                if _is_finished(path.parent, config):
                    found.append((path.parent, config))
    return found


def _difference(saved: RunConfig, wanted: RunConfig) -> str | None:
    """The first setting by which two runs would make other weights; none if they would make the same."""
    if saved.train.steps != wanted.train.steps:  # a learning-rate schedule ends with the run: longer is not the same
        return f"train.steps is {saved.train.steps} there and {wanted.train.steps} now"
    change = changed_setting(to_mapping(saved), wanted)
    return None if change is None else f"{change.name} is {change.before!r} there and {change.now!r} now"


def _is_finished(folder: Path, config: RunConfig) -> bool:
    """Tell whether the exported model is that of the last step."""
    try:
        with safe_open(folder / MODEL, framework="pt") as handle:
            metadata: dict[str, str] = handle.metadata() or {}
    except (OSError, SafetensorError):
        return False
    return metadata.get("step") == str(config.train.steps)


def _refuse_training_photos(held_out: DataConfig, training: DataConfig) -> None:
    """Refuse to compare models on photos from a folder that they were trained on."""
    for folder, other in itertools.product(held_out.paths, training.paths):
        own, theirs = folder.resolve(), other.resolve()
        if own == theirs or theirs in own.parents or own in theirs.parents:
            raise UserError(f"the held-out photos in {folder} are among the training photos in {other}")


# ---- Training --------------------------------------------------------------------------------------------------------

POLL_SECONDS = 0.2
"""Longest delay until a request to stop is passed on to the running process."""


def train_all(
    ablation: Ablation, *, launcher: Sequence[str] = (), announce: Callable[[str], None] = lambda line: None
) -> dict[str, str]:
    """Train the unfinished runs; returns the reason, by run, of those that failed. A failure does not stop the others.

    The resolved settings of a run are written beside its folder as a recipe. ``launcher`` replaces the Python
    interpreter in front of ``-m onestepsr train``. Ctrl-C and SIGTERM let the current run write a checkpoint and then
    raise KeyboardInterrupt.
    """
    out, failures = ablation.out, {}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK, wait=False) as alone:
        if not alone:
            raise UserError(f"{out}: another ablation trains there; wait for it or end it")
        write_text(out / MARK, json.dumps({"suite": ablation.suite.name}) + "\n")
        for number, run in enumerate(ablation.runs, 1):
            if run.state == "finished":
                continue
            resumed = f", resumed at step {run.step}" if run.step else ""
            announce(f"[{number}/{len(ablation.runs)}] {run.name}{resumed}")
            recipe = run.folder.with_suffix(".yaml")
            write_text(recipe, config_text(run.config))
            python = list(launcher) or [sys.executable]
            words = ["-m", "onestepsr", "train", run.config.method, "--recipe", str(recipe), "--resume"]
            code = run_process([*python, *words])
            if code:
                failures[run.name] = f"training ended with exit code {code}"
            elif not _is_finished(run.folder, run.config):
                failures[run.name] = f"training left no {MODEL} of its last step"
            if run.name in failures:
                announce(f"{run.name}: {failures[run.name]}")
    return failures


def run_process(command: Sequence[str]) -> int:
    """Run ``command`` to its end and return its exit code (negative: the signal that ended it).

    A request to stop is passed on and the process waited for; then KeyboardInterrupt is raised.
    """
    with Interruption() as interruption:
        try:
            process = subprocess.Popen(command)
        except OSError as error:
            raise UserError(f"{command[0]}: cannot be started ({error.strerror})") from error
        asked = os.name != "posix"  # elsewhere Ctrl-C reaches all processes by itself, and terminating is no request
        try:
            while process.poll() is None:
                if interruption.requested and not asked:
                    process.terminate()
                    asked = True
                time.sleep(POLL_SECONDS)
        finally:
            if process.returncode is None:
                process.terminate()
                process.wait()
        if interruption.requested:
            raise KeyboardInterrupt
    return process.returncode

"""What ``onestepsr evaluate`` does once its options are read: measure pictures in folders, or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from onestepsr.apps.evaluate_prompts import CasePrompts, prompt_settings
from onestepsr.apps.progress import progress
from onestepsr.errors import UserError, shortened

if TYPE_CHECKING:
    from onestepsr.apps.upscale_prompts import PromptChoice
    from onestepsr.data.degradation import Recipe
    from onestepsr.evaluate.evaluation import Degradation, EvaluatedModel
    from onestepsr.evaluate.folder import DataSet
    from onestepsr.evaluate.measuring import Measurer, Score
    from onestepsr.evaluate.result import EvaluationResult

LISTED_NAMES = 10
"""How many names of pictures without counterpart are shown."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A result, and what of it the user has been told."""

    result: EvaluationResult
    lonely: list[Path]
    """Pictures to measure that found no reference; they have been listed."""
    told: frozenset[str]
    """Metrics of which it was said that they cannot be measured."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What to measure and how."""

    protocol: str
    metrics: str | None
    """Names with commas between them, in place of the protocol's."""
    crop_border: int | None
    resize: str | None
    device: str
    label: str | None

    def __post_init__(self) -> None:
        from onestepsr.evaluate.result import NAME_LENGTH

        if self.label is not None and not 1 <= len(self.label) <= NAME_LENGTH:
            raise UserError(f"--label has {len(self.label)} characters; accepted: 1 to {NAME_LENGTH}")

    def measurer(self, *, with_reference: bool) -> Measurer:
        """The metrics, loaded; why some cannot be is told on stderr, before the work and in one line each."""
        from onestepsr.evaluate.catalog import select_metrics
        from onestepsr.evaluate.measuring import Measurer
        from onestepsr.evaluate.protocols import applicable, get_protocol
        from onestepsr.upscaler import resolve_device

        protocol = get_protocol(self.protocol)
        changes: dict[str, Any] = {"crop_border": self.crop_border, "resize": self.resize}
        protocol = replace(protocol, **{name: value for name, value in changes.items() if value is not None})
        if self.metrics is None:
            chosen = applicable(protocol, with_reference=with_reference)
        else:
            names = [name.strip() for name in self.metrics.split(",") if name.strip()]
            chosen = select_metrics(names, with_reference=with_reference)
        measurer = Measurer(chosen, protocol, resolve_device(self.device))
        show_missing(measurer.unavailable)
        return measurer


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model to run, and on what."""

    model: str
    data: Path | None
    lr: Path | None
    hr: Path | None
    degradation: str | None
    seed: int
    tile: str
    dtype: str
    device: str
    color_fix: str
    steps: int | None
    sampler: str | None
    prompts: PromptChoice

    def __post_init__(self) -> None:
        if (self.data is None) == (self.lr is None):
            raise UserError("--model needs either --data (a data set) or --lr (a folder of LR pictures)")
        if self.data is not None and self.hr is not None:
            raise UserError("--hr goes with --lr: --data names a data set that has its references inside")
        if self.degradation is not None and self.data is None:
            raise UserError(
                "--degradation makes LR pictures of the HR photos in --data; with --lr they are there already"
            )

    def data_set(self) -> DataSet:
        """The pictures."""
        from onestepsr.evaluate.folder import find_cases, find_photos

        if self.lr is not None:
            return find_cases(self.lr, self.hr)
        assert self.data is not None
        return find_photos(self.data) if self.degradation is not None else find_cases(self.data)

    def recipe(self) -> Recipe | None:
        """How LR pictures are made; None where they are there."""
        from onestepsr.apps.degrade import load_recipe

        return None if self.degradation is None else load_recipe(self.degradation)

    def load(self, prompts: CasePrompts) -> EvaluatedModel:
        """The model, ready to enlarge."""
        from onestepsr.evaluate.evaluation import EvaluatedModel
        from onestepsr.evaluate.result import ModelRecord
        from onestepsr.upscale_options import UpscaleOptions, tile_of
        from onestepsr.upscaler import Upscaler

        chosen = {"steps": self.steps, "sampler": self.sampler}
        upscaler = Upscaler.from_pretrained(self.model, self.device, self.dtype, steps=self.steps, sampler=self.sampler)
        options = UpscaleOptions(
            scale=upscaler.scale, tile=tile_of(self.tile), color_fix=cast(Any, self.color_fix), seed=self.seed
        )
        prompts.start(upscaler)
        used = {"device": str(upscaler.device), "dtype": str(upscaler.dtype).removeprefix("torch.")}
        settings = {"tile": self.tile, "color_fix": self.color_fix, "seed": self.seed}
        settings |= {name: value for name, value in chosen.items() if value is not None}
        settings |= prompt_settings(self.prompts)
        return EvaluatedModel(
            enlarge=lambda picture, path: upscaler.upscale_picture(picture, prompts.added_to(options, picture, path)),
            scale=upscaler.scale,
            record=ModelRecord(name=self.model, sha256=_checksum(self.model), options={**used, **settings}),
        )


def measure_pictures(sr: Path, hr: Path | None, suffix: str, options: MeasureOptions) -> Outcome:
    """Measure pictures in files."""
    from onestepsr.evaluate.evaluation import evaluate_pictures
    from onestepsr.evaluate.folder import pair_by_name
    from onestepsr.evaluate.result import Files

    pairing = pair_by_name(sr, hr, suffix=suffix)
    show_lonely("SR without HR", pairing.lonely_sr)
    show_lonely("HR without SR", pairing.lonely_hr)
    folders = Files(sr=str(sr), hr=None if hr is None else str(hr))
    label = options.label or sr.resolve().stem or str(sr)
    measurer = options.measurer(with_reference=hr is not None)
    result = evaluate_pictures(pairing, folders, measurer, label=label, track=_tracked)
    return Outcome(result=result, lonely=pairing.lonely_sr, told=frozenset(measurer.unavailable))


def measure_model(options: ModelOptions, measuring: MeasureOptions, keep: Path | None) -> Outcome:
    """Run a model and measure it; ``keep`` is a folder for its pictures."""
    from onestepsr.evaluate.evaluation import evaluate_model

    recipe, data = options.recipe(), options.data_set()
    show_lonely("LR without HR", data.lonely_lr)
    show_lonely("HR without LR", data.lonely_hr)
    measurer = measuring.measurer(with_reference=data.hr is not None)
    changed = recipe is not None or measurer.protocol.crop > 0
    paths = [case.path for case in data.cases]
    model = options.load(CasePrompts(choice=options.prompts, paths=paths, changed=changed))
    typer.echo(f"{len(data.cases)} pictures ({data.layout})", err=True)
    result = evaluate_model(
        model,
        data,
        measurer,
        label=measuring.label or Path(options.model).stem,
        degradation=_degradation(options, recipe, data, model.scale),
        keep=keep,
        track=_tracked,
    )
    return Outcome(result=result, lonely=data.lonely_lr, told=frozenset(measurer.unavailable))


def _degradation(options: ModelOptions, recipe: Recipe | None, data: DataSet, scale: int) -> Degradation | None:
    from onestepsr.evaluate.evaluation import Degradation
    from onestepsr.evaluate.inputs import Degrader

    if recipe is None or options.degradation is None or data.hr is None:
        return None
    make = Degrader(recipe=recipe, seed=options.seed, folder=data.hr, scale=scale)
    return Degradation(name=options.degradation, make=make)


def show_missing(reasons: Mapping[str, str]) -> None:
    """Say on stderr which metrics are not measured, and why."""
    for name, reason in reasons.items():
        typer.echo(f"not measured: {name}: {reason}", err=True)


def show_lonely(title: str, paths: Sequence[Path]) -> None:
    """Name pictures without counterpart on stderr, the first ten of them."""
    from onestepsr.evaluate.result import safe_text

    if paths:
        names = safe_text(shortened([path.name for path in paths], LISTED_NAMES))
        typer.echo(f"{title} ({len(paths)}): {names}", err=True)


def _tracked(scores: Iterable[Score], total: int) -> Iterable[Score]:
    return progress(scores, "Measuring", total)


def _checksum(model: str) -> str | None:
    """SHA-256 of a model's weights, of named ones as the catalogue has it; none where there is no such file."""
    from onestepsr.files import file_sha256
    from onestepsr.models.catalog import get_model

    path = Path(model)
    if path.is_file():
        return file_sha256(path)
    if path.is_dir():
        return None
    spec = get_model(model)
    found = spec.sha256 or (spec.downloads[0].sha256 if spec.downloads else "")
    return found or None

"""What ``onestepsr evaluate`` does once its options are read: measure images in folders, or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from onestepsr.core.errors import UserError, join_names
from onestepsr.core.progress import progress

if TYPE_CHECKING:
    from onestepsr.cli.upscale.prompts import PromptChoice
    from onestepsr.data.degradation.pipeline import Recipe
    from onestepsr.evaluate.pairing import EvaluationData
    from onestepsr.evaluate.result import EvaluationResult
    from onestepsr.evaluate.run import Degradation, EvaluatedModel
    from onestepsr.evaluate.scoring import Score, Scorer
from collections.abc import Iterator
from dataclasses import field
from typing import TYPE_CHECKING, Annotated

from onestepsr.cli.upscale.prompts import PreparedPrompt, PromptChoice, Prompts, prompted

if TYPE_CHECKING:
    from onestepsr.imaging.read import LoadedImage
    from onestepsr.inference.upscaler import UpscaleOptions, Upscaler


# Prompts for ``onestepsr evaluate --model``: those that ``onestepsr upscale`` would give to the  ----------------------

PromptOption = Annotated[
    str | None,
    typer.Option(help="For --model that reads text: the words for all images; '' is the empty prompt."),
]
PromptFileOption = Annotated[
    Path | None, typer.Option(help="A folder of NAME.txt, one .txt for all images, or a table of names and prompts.")
]
PromptFromOption = Annotated[
    str | None, typer.Option(help="Who looks at the images: a captioner or tagger, such as blip or dape.")
]
TextEncoderOption = Annotated[
    str, typer.Option(help="Who turns words into embeddings: a diffusers folder, or a name on the hub.")
]
TruncateOption = Annotated[
    bool, typer.Option("--truncate-prompt", help="Cut texts off after 75 tokens instead of refusing them.")
]


def prompt_settings(choice: PromptChoice) -> dict[str, str | bool]:
    """What a result says of its prompts."""
    given = {
        "prompt": choice.text,
        "prompt_file": None if choice.file is None else str(choice.file),
        "prompt_from": choice.extractor,
        "text_encoder": choice.text_encoder if choice.is_given else None,
        "truncate_prompt": choice.truncate or None,
    }
    return {name: value for name, value in given.items() if value is not None}


@dataclass(kw_only=True)
class CasePrompts:
    """One prompt after the other, for images that come in the order of ``paths``; some may be left out."""

    choice: PromptChoice
    paths: Sequence[Path]
    """The files of all images."""
    changed: bool
    """Whether the model gets other images than those in the files: made of them, or cut."""
    _waiting: Iterator[tuple[Path, PreparedPrompt]] = field(init=False, default_factory=lambda: iter(()))
    _prompts: Prompts | None = field(init=False, default=None)

    def start(self, upscaler: Upscaler) -> None:
        """Check the prompts against the model; those of files are made in groups, as they are asked for."""
        self.choice.warn_if_unused(upscaler.name)
        if self.choice.is_given:
            self._prompts = Prompts(self.choice, upscaler)
            self._waiting = zip(self.paths, prompted(self.paths, self._prompts), strict=True)

    def applied_to(self, options: UpscaleOptions, image: LoadedImage, path: Path) -> UpscaleOptions:
        """``options`` with the prompt of ``image``; :class:`UserError` if it has none."""
        if self._prompts is None:
            return options
        if self.changed and self._prompts.source.needs_image:
            return self._prompts.of_image(path, image).applied_to(options)
        prepared = next(prepared for own, prepared in self._waiting if own == path)
        if prepared.error is not None:
            raise prepared.error
        return prepared.applied_to(options)


LISTED_NAMES = 10
"""How many names of images without counterpart are shown."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A result, and what of it the user has been told."""

    result: EvaluationResult
    unmatched: list[Path]
    """Images to measure that found no reference; they have been listed."""
    reported_unavailable: frozenset[str]
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

    def measurer(self, *, with_reference: bool) -> Scorer:
        """The metrics, loaded; why some cannot be is told on stderr, before the work and in one line each."""
        from onestepsr.evaluate.metrics.catalog import select_metrics
        from onestepsr.evaluate.protocols import applicable, get_protocol
        from onestepsr.evaluate.scoring import Scorer
        from onestepsr.inference.upscaler import resolve_device

        protocol = get_protocol(self.protocol)
        changes: dict[str, Any] = {"crop_border": self.crop_border, "resize": self.resize}
        protocol = replace(protocol, **{name: value for name, value in changes.items() if value is not None})
        if self.metrics is None:
            chosen = applicable(protocol, with_reference=with_reference)
        else:
            names = [name.strip() for name in self.metrics.split(",") if name.strip()]
            chosen = select_metrics(names, with_reference=with_reference)
        measurer = Scorer(chosen, protocol, resolve_device(self.device))
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
            raise UserError("--model needs either --data (a dataset) or --lr (a folder of LR images)")
        if self.data is not None and self.hr is not None:
            raise UserError("--hr goes with --lr: --data names a dataset that has its references inside")
        if self.degradation is not None and self.data is None:
            raise UserError(
                "--degradation makes LR images of the HR photos in --data; with --lr they are there already"
            )

    def data_set(self) -> EvaluationData:
        """The images."""
        from onestepsr.evaluate.pairing import find_cases, find_photos

        if self.lr is not None:
            return find_cases(self.lr, self.hr)
        assert self.data is not None
        return find_photos(self.data) if self.degradation is not None else find_cases(self.data)

    def recipe(self) -> Recipe | None:
        """How LR images are made; None where they are there."""
        from onestepsr.cli.degrade import load_recipe

        return None if self.degradation is None else load_recipe(self.degradation)

    def load(self, prompts: CasePrompts) -> EvaluatedModel:
        """The model, ready to enlarge."""
        from onestepsr.evaluate.result import ModelRecord
        from onestepsr.evaluate.run import EvaluatedModel
        from onestepsr.inference.options import UpscaleOptions, tile_of
        from onestepsr.inference.upscaler import Upscaler

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
            enlarge=lambda image, path: upscaler.upscale_image(image, prompts.applied_to(options, image, path)),
            scale=upscaler.scale,
            record=ModelRecord(name=self.model, sha256=_checksum(self.model), options={**used, **settings}),
        )


def measure_images(sr: Path, hr: Path | None, suffix: str, options: MeasureOptions) -> Outcome:
    """Measure images in files."""
    from onestepsr.evaluate.pairing import pair_by_name
    from onestepsr.evaluate.result import Files
    from onestepsr.evaluate.run import evaluate_images

    pairing = pair_by_name(sr, hr, suffix=suffix)
    show_unmatched("SR without HR", pairing.unmatched_sr)
    show_unmatched("HR without SR", pairing.unmatched_hr)
    folders = Files(sr=str(sr), hr=None if hr is None else str(hr))
    label = options.label or sr.resolve().stem or str(sr)
    measurer = options.measurer(with_reference=hr is not None)
    result = evaluate_images(pairing, folders, measurer, label=label, track=_tracked)
    return Outcome(result=result, unmatched=pairing.unmatched_sr, reported_unavailable=frozenset(measurer.unavailable))


def measure_model(options: ModelOptions, measuring: MeasureOptions, keep: Path | None) -> Outcome:
    """Run a model and measure it; ``keep`` is a folder for its images."""
    from onestepsr.evaluate.run import evaluate_model

    recipe, data = options.recipe(), options.data_set()
    show_unmatched("LR without HR", data.unmatched_lr)
    show_unmatched("HR without LR", data.unmatched_hr)
    measurer = measuring.measurer(with_reference=data.hr is not None)
    changed = recipe is not None or measurer.protocol.crop > 0
    paths = [case.path for case in data.cases]
    model = options.load(CasePrompts(choice=options.prompts, paths=paths, changed=changed))
    typer.echo(f"{len(data.cases)} images ({data.layout})", err=True)
    result = evaluate_model(
        model,
        data,
        measurer,
        label=measuring.label or Path(options.model).stem,
        degradation=_degradation(options, recipe, data, model.scale),
        keep=keep,
        track=_tracked,
    )
    return Outcome(result=result, unmatched=data.unmatched_lr, reported_unavailable=frozenset(measurer.unavailable))


def _degradation(options: ModelOptions, recipe: Recipe | None, data: EvaluationData, scale: int) -> Degradation | None:
    from onestepsr.evaluate.inputs import Degrader
    from onestepsr.evaluate.run import Degradation

    if recipe is None or options.degradation is None or data.hr is None:
        return None
    make = Degrader(recipe=recipe, seed=options.seed, folder=data.hr, scale=scale)
    return Degradation(name=options.degradation, make=make)


def show_missing(reasons: Mapping[str, str]) -> None:
    """Say on stderr which metrics are not measured, and why."""
    for name, reason in reasons.items():
        typer.echo(f"not measured: {name}: {reason}", err=True)


def show_unmatched(title: str, paths: Sequence[Path]) -> None:
    """Name images without counterpart on stderr, the first ten of them."""
    from onestepsr.evaluate.result import safe_text

    if paths:
        names = safe_text(join_names([path.name for path in paths], LISTED_NAMES))
        typer.echo(f"{title} ({len(paths)}): {names}", err=True)


def _tracked(scores: Iterable[Score], total: int) -> Iterable[Score]:
    return progress(scores, "Measuring", total)


def _checksum(model: str) -> str | None:
    """SHA-256 of a model's weights, of named ones as the catalogue has it; none where there is no such file."""
    from onestepsr.core.files import file_sha256
    from onestepsr.weights.catalog import get_model

    path = Path(model)
    if path.is_file():
        return file_sha256(path)
    if path.is_dir():
        return None
    spec = get_model(model)
    found = spec.sha256 or (spec.downloads[0].sha256 if spec.downloads else "")
    return found or None

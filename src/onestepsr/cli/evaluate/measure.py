"""Options of ``onestepsr evaluate``, and the evaluation itself: of images in folders, or of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from onestepsr.cli.upscale.prompts import PreparedPrompt, PromptOptions, Prompts, prompted
from onestepsr.core.errors import UserError, join_names
from onestepsr.core.progress import progress

if TYPE_CHECKING:
    from onestepsr.batch.job import Cluster
    from onestepsr.evaluate.pairing import Case, CaseSet
    from onestepsr.evaluate.result import EvaluationResult
    from onestepsr.evaluate.run import Degrader, EvaluatedModel, Score, Scorer, Scores
    from onestepsr.imaging.read import LoadedImage
    from onestepsr.inference.options import UpscaleOptions
    from onestepsr.inference.upscaler import Upscaler

LIST_METRICS = "help"
"""Value of ``--metrics`` that lists them."""
LISTED_NAMES = 10
"""Number of images without counterpart that are named."""


# ---- options ----


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Metrics and protocol."""

    protocol: Annotated[str, typer.Option(help="basic, d3sr, osediff or tadsr: metrics, crops, borders.")] = "basic"
    metrics: Annotated[
        str | None, typer.Option(help=f"Comma-separated, instead of the protocol's; '{LIST_METRICS}' lists them.")
    ] = None
    crop_border: Annotated[int | None, typer.Option(help="Pixels cut from every side before measuring.")] = None
    resize: Annotated[
        str | None, typer.Option(help="Where SR and HR differ in size: never, crop, sr-to-hr or hr-to-sr.")
    ] = None
    unpaired: Annotated[
        Path | None,
        typer.Option(help="Folder of other photos, such as FFHQ, for the metric unpaired_fid, which it adds."),
    ] = None
    label: Annotated[str | None, typer.Option(help="Name of the method in tables.")] = None
    device: Annotated[
        str, typer.Option(help="Device of the model and of metrics that are networks: auto, cpu, cuda, cuda:1, mps.")
    ] = "auto"

    def scorer(self, *, with_reference: bool) -> Scorer:
        """The metrics, loaded; those that cannot be are reported on stderr, before the work and in one line each."""
        from onestepsr.evaluate.metrics.catalog import METRICS, UNPAIRED_FID, select_metrics
        from onestepsr.evaluate.protocols import applicable, get_protocol
        from onestepsr.evaluate.run import Scorer
        from onestepsr.inference.devices import resolve_device

        if self.label == "":
            raise UserError("--label is empty, expected the name of the method")
        changes: dict[str, Any] = {"crop_border": self.crop_border, "resize": self.resize}
        changes = {name: value for name, value in changes.items() if value is not None}
        protocol = replace(get_protocol(self.protocol), **changes)
        if self.metrics is None:
            chosen = applicable(protocol, with_reference=with_reference)
        else:
            names = [name.strip() for name in self.metrics.split(",") if name.strip()]
            chosen = select_metrics(names, with_reference=with_reference)
        chosen += [METRICS[UNPAIRED_FID]] if self.unpaired is not None and METRICS[UNPAIRED_FID] not in chosen else []
        scorer = Scorer(chosen, protocol, resolve_device(self.device), unpaired=self.unpaired)
        show_unavailable(scorer.unavailable)
        return scorer


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model to run, and its inputs."""

    model: Annotated[str | None, typer.Option(help="Run this model on --data or --lr first: name or file.")] = None
    data: Annotated[
        Path | None,
        typer.Option(help="Dataset: folders LR and HR in it, names ending in _LR and _HR, or LR images alone."),
    ] = None
    lr: Annotated[Path | None, typer.Option(help="Folder of LR images; --hr may name their references.")] = None
    degradation: Annotated[
        str | None,
        typer.Option(help="--data holds HR photos: make LR images by this recipe, as 'onestepsr degrade' does."),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of --degradation, and of models that draw noise.")] = 0
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Keep the images of --model in this folder.")] = None
    tile: Annotated[str, typer.Option(help="For --model: tile side in input pixels, auto or off.")] = "auto"
    dtype: Annotated[str, typer.Option(help="For --model: auto, float32, bfloat16 or float16.")] = "auto"
    color_fix: Annotated[str, typer.Option(help="For --model: auto, wavelet, drift, adain or none.")] = "auto"
    steps: Annotated[int | None, typer.Option(help="For --model of ResShift's family: network evaluations.")] = None
    sampler: Annotated[
        str | None, typer.Option(help="For --model of ResShift's family: ancestral or deterministic.")
    ] = None

    def check(self, hr: Path | None) -> None:
        """UserError for options that do not go together."""
        if (self.data is None) == (self.lr is None):
            raise UserError("--model needs either --data (a dataset) or --lr (a folder of LR images)")
        if self.data is not None and hr is not None:
            raise UserError("--hr goes with --lr: --data names a dataset that has its references inside")
        if self.degradation is not None and self.data is None:
            raise UserError(
                "--degradation makes LR images of the HR photos in --data; with --lr they are there already"
            )
        out = self.out
        if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: is there already; name a new or empty folder")

    def cases(self, hr: Path | None, suffix: str) -> CaseSet:
        """The images."""
        from onestepsr.evaluate.pairing import find_cases, find_photos

        if self.lr is not None:
            return find_cases(self.lr, hr, suffix=suffix)
        assert self.data is not None
        return find_photos(self.data) if self.degradation is not None else find_cases(self.data, suffix=suffix)

    def load(self, device: str, prompts: CasePrompts) -> EvaluatedModel:
        """The model, ready to enlarge."""
        from onestepsr.evaluate.result import ModelRecord
        from onestepsr.evaluate.run import EvaluatedModel
        from onestepsr.inference.options import UpscaleOptions, tile_of
        from onestepsr.inference.upscaler import Upscaler

        assert self.model is not None
        upscaler = Upscaler.from_pretrained(self.model, device, self.dtype, steps=self.steps, sampler=self.sampler)
        options = UpscaleOptions(
            scale=upscaler.scale, tile=tile_of(self.tile), color_fix=cast(Any, self.color_fix), seed=self.seed
        )
        prompts.start(upscaler)
        given = prompts.options
        settings = {
            "device": str(upscaler.device),
            "dtype": str(upscaler.dtype).removeprefix("torch."),
            "tile": self.tile,
            "color_fix": upscaler.resolved(options).color_fix,
            "seed": self.seed,
            "steps": self.steps,
            "sampler": self.sampler,
            "prompt": given.prompt,
            "prompt_file": None if given.prompt_file is None else str(given.prompt_file),
            "prompt_from": given.prompt_from,
            "text_encoder": given.text_encoder if given.are_given else None,
            "truncate_prompt": given.truncate_prompt or None,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        parameters = sum(parameter.numel() for parameter in upscaler.generator.parameters())
        return EvaluatedModel(
            enlarge=lambda image, path: upscaler.upscale_image(image, prompts.applied_to(options, image, path)),
            scale=upscaler.scale,
            draws_noise=upscaler.draws_noise,
            record=ModelRecord(name=self.model, sha256=_checksum(self.model), options=settings, parameters=parameters),
        )


@dataclass(kw_only=True)
class CasePrompts:
    """One prompt after the other, for images that come in the order of ``paths``; some may be left out."""

    options: PromptOptions
    paths: Sequence[Path]
    """The files of all images."""
    changed: bool
    """True if the model gets degraded or cropped images instead of those in the files."""
    _waiting: Iterator[tuple[Path, PreparedPrompt]] = field(init=False, default_factory=lambda: iter(()))
    _prompts: Prompts | None = field(init=False, default=None)

    def start(self, upscaler: Upscaler) -> None:
        """Check the prompts against the model; those of files are made in groups, as they are asked for."""
        self._prompts = self.options.load(upscaler)
        self._waiting = zip(self.paths, prompted(self.paths, self._prompts), strict=True)

    def applied_to(self, options: UpscaleOptions, image: LoadedImage, path: Path) -> UpscaleOptions:
        """``options`` with the prompt of ``image``; UserError if it has none."""
        if self._prompts is not None and self.changed and self._prompts.source.needs_image:
            return self._prompts.of_image(path, image).applied_to(options)
        prepared = next(prepared for own, prepared in self._waiting if own == path)
        if prepared.error is not None:
            raise prepared.error
        return prepared.applied_to(options)


# ---- measuring ----


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A result, and the gaps in it that have been reported."""

    result: EvaluationResult
    unmatched: Sequence[Path]
    """Images to measure that found no reference; they have been listed."""
    reported_unavailable: frozenset[str]
    """Metrics that have been reported as unavailable."""


def measure_images(
    sr: Path, hr: Path | None, suffix: str, options: MeasureOptions, cluster: Cluster | None = None
) -> Outcome:
    """Measure images in files, on a Ray cluster if one is given."""
    from onestepsr.evaluate.pairing import pair_by_name
    from onestepsr.evaluate.run import evaluate_images

    data = pair_by_name(sr, hr, suffix=suffix)
    _show_unmatched("SR without HR", data.unmatched)
    _show_unmatched("HR without SR", data.unmatched_hr)
    scorer = options.scorer(with_reference=hr is not None)
    label = options.label or sr.resolve().stem or str(sr)
    spread: Callable[[Sequence[Case]], Scores] | None = None
    if cluster is not None:
        from onestepsr.batch.job import measure_files

        make_scorer = partial(options.scorer, with_reference=hr is not None)
        spread = partial(measure_files, make_scorer=make_scorer, cluster=cluster)
    result = evaluate_images(data, scorer, label=label, track=_tracked, spread=spread)
    return Outcome(result=result, unmatched=data.unmatched, reported_unavailable=frozenset(scorer.unavailable))


def measure_model(
    model: ModelOptions,
    hr: Path | None,
    prompts: PromptOptions,
    options: MeasureOptions,
    *,
    keep: Path | None,
    suffix: str = "",
    refuse_seed: Callable[[str], None] = lambda reason: None,
) -> Outcome:
    """Run a model and measure it; ``keep`` is a folder for its images.

    ``refuse_seed`` is called with the reason where a seed would do nothing.
    """
    from onestepsr.cli.degrade import draws, load_recipe
    from onestepsr.evaluate.run import Degrader, evaluate_model

    recipe = None if model.degradation is None else load_recipe(model.degradation)
    data = model.cases(hr, suffix)
    _show_unmatched("LR without HR", data.unmatched)
    _show_unmatched("HR without LR", data.unmatched_hr)
    scorer = options.scorer(with_reference=data.hr is not None)
    changed = recipe is not None or scorer.protocol.crop > 0
    paths = [case.path for case in data.cases]
    loaded = model.load(options.device, CasePrompts(options=prompts, paths=paths, changed=changed))
    if not loaded.draws_noise and (recipe is None or not draws(recipe)):
        refuse_seed("neither the model nor the degradation draws anything at random")
    degrader: Degrader | None = None
    if recipe is not None and model.degradation is not None and data.hr is not None:
        degrader = Degrader(name=model.degradation, recipe=recipe, seed=model.seed, folder=data.hr, scale=loaded.scale)
    typer.echo(f"{len(data.cases)} images ({data.layout})", err=True)
    label = options.label or Path(str(model.model)).stem
    result = evaluate_model(loaded, data, scorer, label=label, degrader=degrader, keep=keep, track=_tracked)
    return Outcome(result=result, unmatched=data.unmatched, reported_unavailable=frozenset(scorer.unavailable))


def show_unavailable(reasons: Mapping[str, str]) -> None:
    """Report metrics that are not measured on stderr, with the reason."""
    for name, reason in reasons.items():
        typer.echo(f"not measured: {name}: {reason}", err=True)


def _show_unmatched(title: str, paths: Sequence[Path]) -> None:
    from onestepsr.core.tables import safe_text

    if paths:
        names = safe_text(join_names([path.name for path in paths], LISTED_NAMES))
        typer.echo(f"{title} ({len(paths)}): {names}", err=True)


def _tracked(scores: Iterable[Score], total: int) -> Iterable[Score]:
    """``scores`` with a bar, or lines; an interruption says how far it had come."""
    done = 0
    try:
        for score in progress(scores, "Measuring", total, line=lambda score: score.name):
            yield score
            done += 1
    except KeyboardInterrupt:
        typer.echo(f"{done} of {total} images measured; nothing was written, the same command starts again", err=True)
        raise


def _checksum(model: str) -> str | None:
    """SHA-256 of a model's weights, from the catalogue for aliases; None if there is no file."""
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

"""``onestepsr evaluate``: metrics of super-resolved images, or of a model that is run first."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from onestepsr.cli.evaluate.compare import WithCompare
from onestepsr.cli.evaluate.measure import (
    MeasureOptions,
    ModelOptions,
    Outcome,
    PromptFileOption,
    PromptFromOption,
    PromptOption,
    TextEncoderOption,
    TruncateOption,
    measure_images,
    measure_model,
    show_missing,
)
from onestepsr.cli.evaluate.output import (
    BesideOption,
    CsvOption,
    LatexOption,
    MarkdownOption,
    Outputs,
    ReportOption,
    check_file,
)
from onestepsr.cli.upscale.prompts import PromptChoice
from onestepsr.core.errors import UserError

LIST = "help"
"""Value of ``--metrics`` that lists them."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate", no_args_is_help=True, cls=WithCompare)(evaluate_command)


def evaluate_command(
    sr: Annotated[
        Path | None, typer.Argument(help="Super-resolved image, or a folder of them.", show_default=False)
    ] = None,
    *,
    hr: Annotated[Path | None, typer.Option(help="Reference image or folder; matched by file name.")] = None,
    model: Annotated[str | None, typer.Option(help="Run this model on --data or --lr first: name or file.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Data set: folders LR and HR in it, names ending in _LR and _HR, or LR images alone."),
    ] = None,
    lr: Annotated[Path | None, typer.Option(help="Folder of LR images; --hr may name their references.")] = None,
    degradation: Annotated[
        str | None,
        typer.Option(help="--data holds HR photos: make LR images by this recipe, as 'onestepsr degrade' does."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --degradation, and of models that draw noise.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Keep the images of --model in this folder.")] = None,
    protocol: Annotated[str, typer.Option(help="basic, d3sr or osediff: metrics, crops, borders.")] = "basic",
    metrics: Annotated[
        str | None,
        typer.Option(help=f"Comma-separated, instead of the protocol's; '{LIST}' lists them.", show_default=False),
    ] = None,
    crop_border: Annotated[int | None, typer.Option(help="Pixels cut from every side before measuring.")] = None,
    resize: Annotated[
        str | None, typer.Option(help="Where SR and HR differ in size: never, crop, sr-to-hr or hr-to-sr.")
    ] = None,
    suffix: Annotated[str, typer.Option(help="Ending that SR names have beyond HR names, such as -mine.")] = "",
    label: Annotated[str | None, typer.Option(help="Name of the method in tables.")] = None,
    tile: Annotated[str, typer.Option(help="For --model: tile side in input pixels, auto or off.")] = "auto",
    dtype: Annotated[str, typer.Option(help="For --model: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="Of networks: auto, cpu, cuda, cuda:1, mps.")] = "auto",
    color_fix: Annotated[str, typer.Option(help="For --model: wavelet, adain or none.")] = "wavelet",
    steps: Annotated[int | None, typer.Option(help="For --model of ResShift's family: network evaluations.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="For --model of ResShift's family: ancestral or deterministic.")
    ] = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    prompt_from: PromptFromOption = None,
    text_encoder: TextEncoderOption = "sd21-base",
    truncate_prompt: TruncateOption = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    csv: CsvOption = None,
    markdown: MarkdownOption = None,
    latex: LatexOption = None,
    report: ReportOption = None,
    beside: BesideOption = None,
) -> None:
    """Measure super-resolved images, against references where there are any; or run a model and measure it.

    'onestepsr evaluate compare A.json B.json' puts results side by side. Ends with exit code 1 if an image could not
    be read, paired or measured, or a metric of --metrics could not; the others are measured all the same.
    """
    if metrics == LIST:
        return list_metrics()
    outputs = Outputs(csv=csv, markdown=markdown, latex=latex, report=report, beside=beside)
    outputs.check()
    check_file("--json", json_file)
    prompts = PromptChoice(
        text=prompt, file=prompt_file, extractor=prompt_from, text_encoder=text_encoder, truncate=truncate_prompt
    )
    measuring = MeasureOptions(
        protocol=protocol, metrics=metrics, crop_border=crop_border, resize=resize, device=device, label=label
    )
    if model is None:
        given = {"--prompt": prompt, "--prompt-file": prompt_file, "--prompt-from": prompt_from}
        _refuse_without_model({"--data": data, "--lr": lr, "--degradation": degradation, "--out": out, **given})
        outcome = measure_images(_required(sr), hr, suffix, measuring)
        show(outcome, outputs, json_file)
        return end(outcome, strict=metrics is not None)
    _refuse_beside_model(sr)
    options = ModelOptions(
        model=model,
        data=data,
        lr=lr,
        hr=hr,
        degradation=degradation,
        seed=seed,
        tile=tile,
        dtype=dtype,
        device=device,
        color_fix=color_fix,
        steps=steps,
        sampler=sampler,
        prompts=prompts,
    )
    with kept(out, report) as keep:
        outcome = measure_model(options, measuring, keep)
        show(outcome, outputs, json_file, images_stay=keep == out)
    return end(outcome, strict=metrics is not None)


def end(outcome: Outcome, *, strict: bool) -> None:
    """Exit code 1 where something was left out; metrics that are not to be had here count if ``strict``."""
    if outcome.result.failed or outcome.unmatched or (strict and outcome.result.unavailable):
        raise typer.Exit(1)


def show(outcome: Outcome, outputs: Outputs, json_file: Path | None, *, images_stay: bool = True) -> None:
    """Print failures and the table, and write what was asked for."""
    from onestepsr.evaluate.comparison import compare
    from onestepsr.evaluate.result import safe_text, write_result
    from onestepsr.evaluate.run import without_images
    from onestepsr.evaluate.tables import result_grid

    result = outcome.result
    for reason in result.failed.values():
        typer.echo(f"failed: {safe_text(reason)}", err=True)
    show_missing(
        {name: reason for name, reason in result.unavailable.items() if name not in outcome.reported_unavailable}
    )
    grid = result_grid(result)
    replace(grid, notes=()).show()
    if json_file is not None:
        write_result(json_file, result if images_stay else without_images(result))
    if result.images or result.whole:
        outputs.write(compare([result]), [grid])


def list_metrics() -> None:
    """Print the metrics and what their numbers are."""
    from onestepsr.evaluate.metrics.catalog import METRICS
    from onestepsr.evaluate.tables import Grid

    rows = [
        (
            spec.name,
            spec.title,
            "higher" if spec.higher_is_better else "lower",
            "yes" if spec.needs_reference else "no",
            spec.variant,
        )
        for spec in METRICS.values()
    ]
    Grid(title="", columns=("name", "title", "better", "needs HR", "variant"), rows=tuple(rows), words=5).show()


@contextmanager
def kept(out: Path | None, report: Path | None) -> Iterator[Path | None]:
    """The folder for SR images: the one asked for, a passing one if only a report needs them, or none."""
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: is there already; name a new or empty folder")
        yield out
    elif report is not None:
        with tempfile.TemporaryDirectory(prefix="onestepsr-") as folder:
            yield Path(folder)
    else:
        yield None


def _required(sr: Path | None) -> Path:
    if sr is None:
        raise UserError("nothing to measure: give SR images, or --model with --data")
    return sr


def _refuse_beside_model(sr: Path | None) -> None:
    if sr is not None:
        raise UserError(f"'{sr}' and --model exclude each other: --data or --lr names the model's input")


def _refuse_without_model(options: Mapping[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"{given[0]} needs --model")

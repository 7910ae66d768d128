"""``onestepsr upscale``: files, folders, patterns or stdin in, enlarged images out."""

from __future__ import annotations

import json
import logging
import os
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onestepsr.cli.upscale.jobs import FORMATS, STREAM, Job, Naming, check_format, existing, plan_jobs
from onestepsr.cli.upscale.pipeline import Pipeline, Result, result_of, upscale_stream
from onestepsr.cli.upscale.prompts import PromptChoice, Setup
from onestepsr.core.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from onestepsr.inference.options import UpscaleOptions

SCHEMA = 1
"""Version of the ``--json`` document."""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("upscale")(upscale)


def upscale(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Files, folders, patterns such as 'in/*.jpg', or - for stdin."),
    ],
    *,
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            help="Output file, or folder for several inputs; - for stdout. "
            "Default: photo_x4.jpg beside photo.jpg, FOLDER_x4/ for FOLDER.",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Model alias or file.")] = "d3sr-tiny",
    scale: Annotated[float, typer.Option(help="Output side / input side, 1 to 8.")] = 4.0,
    width: Annotated[int | None, typer.Option(help="Output width in pixels, instead of --scale.")] = None,
    height: Annotated[
        int | None, typer.Option(help="Output height in pixels; one alone keeps the aspect ratio.")
    ] = None,
    tile: Annotated[
        str, typer.Option(help="Tile side in input pixels, auto (follows the free memory) or off.")
    ] = "auto",
    tile_blend: Annotated[
        str,
        typer.Option(
            help="How tiles are joined: smooth (seamless), or average, the plain mean of ResShift's and SinSR's "
            "published code (give --tile 512, 256 or 64 for its overlaps)."
        ),
    ] = "smooth",
    memory: Annotated[
        float | None,
        typer.Option(
            help="Most GB for weights, feature maps and the image that is enlarged; images read ahead or being written "
            "come on top, about 0.3 GB. Default: 0.6 of what is free."
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile the network first, which takes minutes: for many or large images."),
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    color_fix: Annotated[str, typer.Option(help="Colours from the input: wavelet, adain or none.")] = "wavelet",
    seed: Annotated[int | None, typer.Option(help="For models that draw noise; 0 if not given.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Network evaluations, for ResShift's family; by default as trained.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="For ResShift's family: ancestral (new noise in every step) or deterministic.")
    ] = None,
    fidelity: Annotated[
        float | None,
        typer.Option(help="For d3sr-tiny: 0 (crisp, as it is) to 1 (faithful: fewer details drawn, higher PSNR)."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="For models that read text: what the image shows; '' is the empty prompt."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Folder with NAME.txt for NAME.jpg, one text file for all, or a JSON/YAML table of prompts."),
    ] = None,
    prompt_from: Annotated[
        str | None,
        typer.Option(
            help="Captioner or tagger that looks at each image: a folder, blip, dape, or owner/name of the hub."
        ),
    ] = None,
    text_encoder: Annotated[
        str, typer.Option(help="Who reads the prompts: a diffusers folder, sd21-base, or owner/name of the hub.")
    ] = "sd21-base",
    truncate_prompt: Annotated[
        bool, typer.Option("--truncate-prompt", help="Cut prompts off after 75 tokens instead of refusing them.")
    ] = False,
    file_format: Annotated[str, typer.Option("--format", help=f"keep, {', '.join(FORMATS)}.")] = "keep",
    recursive: Annotated[bool, typer.Option(help="Read subfolders too and keep their tree.")] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave outputs that are there as they are.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document about all files on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log what is decided and why.")] = False,
) -> None:
    """Enlarge images: JPEG, PNG, WebP, TIFF, BMP.

    Colours, orientation, transparency, bit depth and metadata are kept. An output that exists is an error before any
    work, unless --skip-existing or --overwrite is given. Exit code: 0 all written, 1 some failed (the others are done),
    2 wrong usage or a single input that failed.
    """
    if verbose:
        logging.getLogger("onestepsr").setLevel(logging.INFO)
    if scale != 4.0 and (width is not None or height is not None):
        raise UserError("--scale and --width/--height exclude each other")
    check_format(file_format)
    setup = Setup(
        model=model,
        device=device,
        dtype=dtype,
        steps=steps,
        sampler=sampler,
        fidelity=fidelity,
        options=_options(
            tile,
            scale=scale,
            width=width,
            height=height,
            tile_blend=tile_blend,
            memory=memory,
            color_fix=color_fix,
            seed=seed,
        ),
        compiled=compiled,
        prompts=PromptChoice(
            text=prompt, file=prompt_file, extractor=prompt_from, text_encoder=text_encoder, truncate=truncate_prompt
        ),
    )
    if STREAM in (*inputs, out):
        if len(inputs) > 1 or (as_json and out in (None, STREAM)):
            what = "- (stdin): must be the only input" if STREAM in inputs else "-o - (stdout): takes one input"
            raise UserError(f"{what}, and --json needs -o FILE with it")
        result = upscale_stream(
            setup, inputs[0], out=out, file_format=file_format, skip_existing=skip_existing, overwrite=overwrite
        )
        if result.output != STREAM:
            _report([result], model, as_json)
        return
    naming = Naming(
        out=None if out is None else Path(out),
        file_format=file_format,
        suffix=_suffix(setup.options),
        out_is_folder=out is not None and out.endswith(("/", os.sep)),
    )
    jobs = plan_jobs(inputs, naming, recursive, skip_existing=skip_existing)
    skipped = existing(jobs, skip_existing, overwrite)
    results = [result_of(job, "skipped") for job in jobs if job.target in skipped]
    results += _run([job for job in jobs if job.target not in skipped], setup)
    _report(results, model, as_json)


def _options(tile: str, **others: Any) -> UpscaleOptions:
    from onestepsr.inference.options import UpscaleOptions, tile_of

    return UpscaleOptions(tile=tile_of(tile), **others)


def _suffix(options: UpscaleOptions) -> str:
    if options.width is None and options.height is None:
        return f"_x{options.scale:g}"
    sides = (("w", options.width), ("h", options.height))
    return "_" + "".join(f"{name}{side}" for name, side in sides if side is not None)


def _run(jobs: list[Job], setup: Setup) -> list[Result]:
    """Results in the order of the jobs."""
    from onestepsr.core.files import remove_leftovers
    from onestepsr.imaging.write import check_writable

    if not jobs:
        return []
    for job in {job.target.parent: job for job in jobs}.values():
        check_writable(job.target)
    remove_leftovers(*(job.target for job in jobs))
    upscaler, prompts = setup.load()
    with _progress() as progress:
        files = progress.add_task("files", total=len(jobs), visible=len(jobs) > 1)
        with closing(Pipeline(upscaler, setup.options, prompts, progress).run([jobs])) as made:
            results = []
            for result in made:
                results.append(result)
                progress.advance(files)
            return results


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _report(results: list[Result], model: str, as_json: bool) -> None:
    failed = [result for result in results if result.status == "failed"]
    if as_json:
        document = {"schema": SCHEMA, "model": model, "failed": len(failed), "results": [asdict(r) for r in results]}
        typer.echo(json.dumps(document, indent=2))
    else:
        for result in results:
            if result.status == "written":
                typer.echo(result.output)
    if failed and len(results) == 1:
        raise UserError(str(failed[0].error))
    for result in failed:
        typer.echo(f"failed: {result.error}", err=True)
    if failed:
        typer.echo(f"{len(failed)} of {len(results)} images failed", err=True)
        raise typer.Exit(1)

"""``onestepsr upscale``: files, folders, patterns or stdin in, enlarged images out."""

from __future__ import annotations

import json
import logging
import os
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestepsr.cli.options import grouped
from onestepsr.cli.upscale.jobs import (
    FORMATS,
    STREAM,
    Job,
    Naming,
    Result,
    existing,
    plan_jobs,
    result_of,
    target_file,
    upscale_jobs,
    upscale_stream,
)
from onestepsr.cli.upscale.prompts import PromptOptions
from onestepsr.core.errors import UserError

if TYPE_CHECKING:
    from onestepsr.inference.options import UpscaleOptions
    from onestepsr.inference.upscaler import Upscaler

logger = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the ``--json`` document."""


# ---- options ----


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Destination and format of the results."""

    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            help="Output file, or folder for several inputs; - for stdout. "
            "Default: photo_x4.jpg beside photo.jpg, FOLDER_x4/ for FOLDER.",
        ),
    ] = None
    file_format: Annotated[str, typer.Option("--format", help=f"keep, {', '.join(FORMATS)}.")] = "keep"
    recursive: Annotated[bool, typer.Option(help="Read subfolders too and keep their tree.")] = False
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave outputs that are there as they are.")
    ] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that are there.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document about all files on stdout.")] = False

    def __post_init__(self) -> None:
        if self.file_format != "keep" and self.file_format not in FORMATS:
            raise UserError(f"format '{self.file_format}': accepted: keep, {', '.join(FORMATS)}")

    def naming(self, suffix: str) -> Naming:
        """The names of outputs; ``suffix`` is for those beside their input."""
        return Naming(
            out=None if self.out is None else Path(self.out),
            file_format=self.file_format,
            suffix=suffix,
            out_is_folder=self.out is not None and self.out.endswith(("/", os.sep)),
        )


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Size of the output, tiles and colours."""

    scale: Annotated[float, typer.Option(help="Output side / input side, 1 to 8.")] = 4.0
    width: Annotated[int | None, typer.Option(help="Output width in pixels, instead of --scale.")] = None
    height: Annotated[int | None, typer.Option(help="Output height in pixels; one alone keeps the aspect ratio.")] = (
        None
    )
    tile: Annotated[str, typer.Option(help="Tile side in input pixels, auto (follows the free memory) or off.")] = (
        "auto"
    )
    tile_blend: Annotated[
        str,
        typer.Option(
            help="How tiles are joined: smooth (seamless), or average, the plain mean of ResShift's and SinSR's "
            "published code (give --tile 512, 256 or 64 for its overlaps)."
        ),
    ] = "smooth"
    memory: Annotated[
        float | None,
        typer.Option(
            help="Most GB for weights, feature maps and the image that is enlarged; images read ahead or being written "
            "come on top, about 0.3 GB. Default: 0.6 of what is free."
        ),
    ] = None
    color_fix: Annotated[str, typer.Option(help="Colours from the input: wavelet, adain or none.")] = "wavelet"
    seed: Annotated[int | None, typer.Option(help="For models that draw noise; 0 if not given.")] = None

    def __post_init__(self) -> None:
        if self.scale != 4.0 and (self.width is not None or self.height is not None):
            raise UserError("--scale and --width/--height exclude each other")

    def checked(self) -> UpscaleOptions:
        """Options for the upscaler; UserError for values out of range."""
        from onestepsr.inference.options import UpscaleOptions, tile_of

        return UpscaleOptions(**{**asdict(self), "tile": tile_of(self.tile)})

    @property
    def suffix(self) -> str:
        """Ending of names of outputs that lie beside their input, such as ``_x4`` or ``_w800``."""
        if self.width is None and self.height is None:
            return f"_x{self.scale:g}"
        return "_" + "".join(
            f"{name}{side}" for name, side in (("w", self.width), ("h", self.height)) if side is not None
        )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, its device and its dtype."""

    model: Annotated[str, typer.Option(help="Model alias or file.")] = "d3sr-tiny"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile the network first, which takes minutes: for many or large images."),
    ] = False
    steps: Annotated[
        int | None, typer.Option(help="Network evaluations, for ResShift's family; by default as trained.")
    ] = None
    sampler: Annotated[
        str | None, typer.Option(help="For ResShift's family: ancestral (new noise in every step) or deterministic.")
    ] = None
    fidelity: Annotated[
        float | None,
        typer.Option(help="For d3sr-tiny: 0 (crisp, as it is) to 1 (faithful: fewer details drawn, higher PSNR)."),
    ] = None

    def load(self) -> Upscaler:
        """The model, ready to enlarge."""
        from onestepsr.inference.upscaler import Upscaler

        upscaler = Upscaler.from_pretrained(
            self.model,
            self.device,
            self.dtype,
            steps=self.steps,
            sampler=self.sampler,
            fidelity=self.fidelity,
            compiled=self.compiled,
        )
        logger.info("%s on %s in %s", self.model, upscaler.device, upscaler.dtype)
        return upscaler


# ---- the command ----


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("upscale")(grouped(upscale))


def upscale(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Files, folders, patterns such as 'in/*.jpg', or - for stdin."),
    ],
    *,
    output: OutputOptions,
    model: ModelOptions,
    image: ImageOptions,
    prompt: PromptOptions,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log decisions and their reasons.")] = False,
) -> None:
    """Enlarge images: JPEG, PNG, WebP, TIFF, BMP.

    Colours, orientation, transparency, bit depth and metadata are kept. An output that exists is an error before any
    work, unless --skip-existing or --overwrite is given. Exit code: 0 all written, 1 some failed (the others are done),
    2 wrong usage or a single input that failed.
    """
    if verbose:
        logging.getLogger("onestepsr").setLevel(logging.INFO)
    options = image.checked()
    if STREAM in (*inputs, output.out):
        result = _run_stream(inputs, output, options, model, prompt)
        if result.output != STREAM:
            _report([result], model.model, output.as_json)
        return
    jobs = plan_jobs(inputs, output.naming(image.suffix), output.recursive, skip_existing=output.skip_existing)
    skipped = existing(jobs, output.skip_existing, output.overwrite)
    results = [result_of(job, "skipped") for job in jobs if job.target in skipped]
    results += _run_jobs([job for job in jobs if job.target not in skipped], options, model, prompt)
    _report(results, model.model, output.as_json)


def _run_jobs(jobs: list[Job], options: UpscaleOptions, model: ModelOptions, prompt: PromptOptions) -> list[Result]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from onestepsr.core.files import remove_leftovers
    from onestepsr.imaging.write import check_writable

    if not jobs:
        return []
    for job in {job.target.parent: job for job in jobs}.values():
        check_writable(job.target)
    remove_leftovers(*(job.target for job in jobs))
    upscaler = model.load()
    prompts = prompt.load(upscaler)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        files = progress.add_task("files", total=len(jobs), visible=len(jobs) > 1)
        with closing(upscale_jobs(jobs, upscaler, options, prompts, progress)) as made:
            results = []
            for result in made:
                results.append(result)
                progress.advance(files)
            return results


def _run_stream(
    inputs: list[str], output: OutputOptions, options: UpscaleOptions, model: ModelOptions, prompt: PromptOptions
) -> Result:
    from onestepsr.imaging.write import check_writable

    to_stdout = output.out in (None, STREAM)
    if len(inputs) > 1 or (output.as_json and to_stdout):
        what = "- (stdin): must be the only input" if STREAM in inputs else "-o - (stdout): takes one input"
        raise UserError(f"{what}, and --json needs -o FILE with it")
    target = None if to_stdout else target_file(output.naming(""))
    jobs = [] if target is None else [Job(Path(inputs[0]), target)]
    if existing(jobs, output.skip_existing, output.overwrite):
        return result_of(jobs[0], "skipped")
    if target is not None:
        check_writable(target)
    upscaler = model.load()
    prompts = prompt.load(upscaler)
    return upscale_stream(inputs[0], target, output.file_format, upscaler=upscaler, options=options, prompts=prompts)


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

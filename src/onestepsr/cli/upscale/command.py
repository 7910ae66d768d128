"""``onestepsr upscale``: files, folders, patterns or stdin in, enlarged images out."""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from onestepsr.cli.options import grouped, refuse
from onestepsr.cli.upscale.jobs import (
    KEEP,
    STREAM,
    Handling,
    Job,
    Naming,
    Result,
    existing,
    is_pipe,
    plan_jobs,
    result_of,
    target_file,
    unwritable,
    upscale_jobs,
    upscale_stream,
)
from onestepsr.cli.upscale.prompts import PromptOptions
from onestepsr.core.errors import UserError, error_context

if TYPE_CHECKING:
    from onestepsr.inference.engines import Engine
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
    file_format: Annotated[
        str,
        typer.Option(
            "--format", help="keep, or a format by name or ending: jpg, png, webp, tif, bmp, avif, heic, jxl."
        ),
    ] = KEEP
    recursive: Annotated[bool, typer.Option(help="Read subfolders too and keep their tree.")] = False
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave outputs that are there as they are.")
    ] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that are there.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document about all files on stdout.")] = False
    strip_metadata: Annotated[
        bool, typer.Option("--strip-metadata", help="Leave out EXIF, XMP, IPTC and texts; colours stay right.")
    ] = False
    keep_times: Annotated[bool, typer.Option("--keep-times", help="Give outputs the times of their inputs.")] = False
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Most pixels of an input, by its header; 250,000,000 if not given.")
    ] = None

    def __post_init__(self) -> None:
        if self.out in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
            object.__setattr__(self, "out", STREAM)
        if self.out not in (None, STREAM) and os.path.lexists(str(self.out)):
            mode = os.stat(str(self.out), follow_symlinks=os.path.exists(str(self.out))).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                raise UserError(f"{self.out}: neither a file nor a folder; -o - writes to stdout")

    @property
    def handling(self) -> Handling:
        """Options of reading and writing."""
        return Handling(max_pixels=self.max_pixels, strip_metadata=self.strip_metadata, keep_times=self.keep_times)

    def naming(self, suffix: str) -> Naming:
        """The names of outputs; ``suffix`` is for those beside their input. UserError for an unknown format."""
        from onestepsr.imaging.formats import format_named

        if self.file_format.lower() == KEEP:
            file_format = KEEP
        else:
            with error_context("--format"):
                file_format = format_named(self.file_format)
        return Naming(
            out=None if self.out is None else Path(self.out),
            file_format=file_format,
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
    color_fix: Annotated[str, typer.Option(help="Colours from the input: auto, wavelet, drift, adain or none.")] = (
        "auto"
    )
    alpha: Annotated[
        str, typer.Option(help="Transparency: bicubic (smooth), or network (edges of hard masks as sharp as colours).")
    ] = "bicubic"
    seed: Annotated[int | None, typer.Option(help="For models that draw noise; 0 if not given.")] = None

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
    engine: Annotated[
        str,
        typer.Option(help="auto (what doctor measured, else torch), torch; or onnxruntime, openvino: a CPU, float32."),
    ] = "auto"
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

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of :meth:`Upscaler.from_pretrained` after model, device and dtype."""
        return {name: getattr(self, name) for name in ("steps", "sampler", "fidelity", "compiled", "engine")}

    def load(self, seed: int | None = None) -> Upscaler:
        """The model, ready to enlarge; UserError for a ``seed`` of a model that draws no noise."""
        from onestepsr.inference.upscaler import Upscaler

        upscaler = Upscaler.from_pretrained(
            self.model,
            self.device,
            self.dtype,
            steps=self.steps,
            sampler=self.sampler,
            fidelity=self.fidelity,
            compiled=self.compiled,
            engine=cast("Engine", self.engine),
        )
        if seed is not None and not upscaler.draws_noise:
            raise UserError(f"--seed: '{self.model}' draws no noise, so that it would do nothing")
        logger.info("%s on %s in %s by %s", self.model, upscaler.device, upscaler.dtype, upscaler.engine)
        return upscaler


# ---- the command ----


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("upscale")(grouped(upscale))


def upscale(
    context: typer.Context,
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
    if image.width is not None or image.height is not None:
        refuse(context, ["scale"], "--width and --height exclude it")
    prompt.refuse_unused(context)
    options, naming = image.checked(), output.naming(image.suffix)
    single_pipe = len(inputs) == 1 and is_pipe(inputs[0])
    if STREAM in (*inputs, output.out) or single_pipe:
        result = _run_stream(context, inputs, output, naming=naming, options=options, model=model, prompt=prompt)
        if result.output != STREAM:
            Teller(as_json=output.as_json, alone=True).about(result)
            _report([result], model.model, output.as_json)
        return
    planned = plan_jobs(inputs, naming, output.recursive, skip_existing=output.skip_existing)
    skipped = existing(planned.jobs, output.skip_existing, output.overwrite)
    results = [result_of(job, "skipped") for job in planned.jobs if job.target in skipped]
    results += planned.refused
    alone = len(planned.jobs) + len(planned.refused) == 1
    tell = Teller(as_json=output.as_json, alone=alone)
    for result in planned.refused:
        tell.about(result)
    to_do = [job for job in planned.jobs if job.target not in skipped]
    try:
        with closing(_run_jobs(to_do, options, model, prompt, output.handling)) as made:
            for result in made:
                results.append(result)
                tell.about(result)
    except KeyboardInterrupt:
        written = sum(result.status == "written" for result in results)
        typer.echo(f"{written} of {len(to_do)} images written; the same command with --skip-existing goes on", err=True)
        raise
    for line in planned.left_out:
        typer.echo(f"left out: {line}", err=True)
    _report(results, model.model, output.as_json)


@dataclass(frozen=True, kw_only=True)
class Teller:
    """Lines about images as they are finished: what was written on stdout, what failed on stderr.

    With ``--json``, stdout is for the document: where stderr is no terminal, which has a bar, lines go there.
    """

    as_json: bool
    alone: bool
    """True where there is one image only, whose failure is that of the command."""

    def about(self, result: Result) -> None:
        """Print the line of one result."""
        if result.status == "failed" and not self.alone:
            typer.echo(f"failed: {result.error}", err=True)
        elif result.status == "written" and not self.as_json:
            typer.echo(result.output)
        elif result.status == "written" and not sys.stderr.isatty():
            typer.echo(f"written: {result.output}", err=True)


def _run_jobs(
    jobs: list[Job], options: UpscaleOptions, model: ModelOptions, prompt: PromptOptions, handling: Handling
) -> Generator[Result, None, None]:
    """Enlarge files; results come as they are finished, first those whose folder cannot be written."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from onestepsr.core.files import remove_leftovers

    closed = unwritable({job.target.parent: job for job in jobs})
    if jobs and all(job.target.parent in closed for job in jobs):
        raise UserError(closed[jobs[0].target.parent])
    yield from (result_of(job, "failed", closed[job.target.parent]) for job in jobs if job.target.parent in closed)
    jobs = [job for job in jobs if job.target.parent not in closed]
    if not jobs:
        return
    remove_leftovers(*(job.target for job in jobs))
    upscaler = model.load(options.seed)
    prompts = prompt.load(upscaler)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # Lines on stdout go above the bar where both are the terminal; where stdout is a file they must not be redirected.
    on_terminal = sys.stdout.isatty()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=on_terminal
    ) as progress:
        files = progress.add_task("files", total=len(jobs), visible=len(jobs) > 1)
        with closing(upscale_jobs(jobs, upscaler, options, prompts, progress, handling=handling)) as made:
            for result in made:
                progress.advance(files)
                yield result


def _run_stream(
    context: typer.Context,
    inputs: list[str],
    output: OutputOptions,
    *,
    naming: Naming,
    options: UpscaleOptions,
    model: ModelOptions,
    prompt: PromptOptions,
) -> Result:
    from onestepsr.imaging.write import check_writable

    to_stdout = output.out in (None, STREAM)
    if to_stdout:
        refuse(context, ["skip_existing", "overwrite"], "stdout is no file")
    refuse(context, ["recursive"], "there is no folder, but one image")
    if len(inputs) > 1 or (output.as_json and to_stdout):
        what = "- (stdin): must be the only input" if STREAM in inputs else "-o - (stdout): takes one input"
        raise UserError(f"{what}, and --json needs -o FILE with it")
    if output.keep_times and (to_stdout or inputs[0] == STREAM or is_pipe(inputs[0])):
        raise UserError("--keep-times: stdin, stdout and pipes have no times of a file")
    target = None if to_stdout else target_file(naming)
    jobs = [] if target is None else [Job(Path(inputs[0]), target)]
    if existing(jobs, output.skip_existing, output.overwrite):
        return result_of(jobs[0], "skipped")
    if target is not None:
        check_writable(target)
    upscaler = model.load(options.seed)
    prompts = prompt.load(upscaler)
    return upscale_stream(
        inputs[0],
        target,
        naming.file_format,
        upscaler=upscaler,
        options=options,
        prompts=prompts,
        handling=output.handling,
    )


def _report(results: list[Result], model: str, as_json: bool) -> None:
    """Print the document, and how many images failed; each of them has been named already, unless it is the only
    one."""
    failed = [result for result in results if result.status == "failed"]
    if as_json:
        document = {"schema": SCHEMA, "model": model, "failed": len(failed), "results": [asdict(r) for r in results]}
        typer.echo(json.dumps(document, indent=2))
    if failed and len(results) == 1:
        raise UserError(str(failed[0].error))
    if failed:
        typer.echo(f"{len(failed)} of {len(results)} images failed", err=True)
        raise typer.Exit(1)

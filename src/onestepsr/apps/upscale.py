"""``onestepsr upscale``: files, folders, patterns or stdin in, enlarged pictures out."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

import typer

from onestepsr.apps.upscale_files import FORMATS, STREAM, Job, Naming, plan_jobs
from onestepsr.apps.upscale_prompts import Prepared, PromptChoice, Prompts, prompted
from onestepsr.errors import OneStepSRError, UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from onestepsr.upscaler import UpscaleOptions, Upscaler

logger = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the ``--json`` document."""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("upscale")(upscale)


@dataclass(kw_only=True)
class Result:
    """What became of one input; sizes are (width, height)."""

    input: str
    output: str
    status: Literal["written", "skipped", "failed"]
    input_size: tuple[int, int] | None = None
    output_size: tuple[int, int] | None = None
    seconds: float = 0.0
    error: str | None = None
    prompt: str | None = None


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
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    color_fix: Annotated[str, typer.Option(help="Colours from the input: wavelet, adain or none.")] = "wavelet",
    seed: Annotated[int | None, typer.Option(help="For models that draw noise.")] = None,
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
        typer.Option(help="For models that read text: what the picture shows; '' is the empty prompt."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Folder with NAME.txt for NAME.jpg, one text file for all, or a JSON/YAML table of prompts."),
    ] = None,
    prompt_from: Annotated[
        str | None,
        typer.Option(help="Captioner or tagger that looks at each picture: a folder, blip, or owner/name of the hub."),
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
    """Enlarge pictures: JPEG, PNG, WebP, TIFF, BMP.

    Colours, orientation, transparency, bit depth and metadata are kept. An output that exists is an error before any
    work, unless --skip-existing or --overwrite is given. Exit code: 0 all written, 1 some failed (the others are done),
    2 wrong usage or a single input that failed.
    """
    if verbose:
        logging.getLogger("onestepsr").setLevel(logging.INFO)
    if scale != 4.0 and (width is not None or height is not None):
        raise UserError("--scale and --width/--height exclude each other")
    options = _options(
        tile, scale=scale, width=width, height=height, tile_blend=tile_blend, color_fix=color_fix, seed=seed
    )
    loading = _Loading(model, device, dtype, steps, sampler, fidelity)
    choice = PromptChoice(
        text=prompt, file=prompt_file, extractor=prompt_from, text_encoder=text_encoder, truncate=truncate_prompt
    )
    if STREAM in inputs:
        if len(inputs) > 1 or (as_json and out in (None, STREAM)):
            raise UserError("- (stdin): must be the only input, and --json needs -o FILE with it")
        upscaler = _load(loading)
        prompts = Prompts(choice, upscaler) if choice.is_given else None
        _upscale_stream(upscaler, options, prompts, out=out, file_format=file_format, overwrite=overwrite)
        return
    naming = Naming(out=None if out is None else Path(out), file_format=file_format, suffix=_suffix(options))
    jobs = plan_jobs(inputs, naming, recursive)
    skipped = _existing(jobs, skip_existing, overwrite)
    results = _run_all(jobs, skipped, options, loading, choice)
    _report(results, model, as_json)


def _options(tile: str, **others: Any) -> UpscaleOptions:
    from onestepsr.upscaler import UpscaleOptions

    return UpscaleOptions(tile=int(tile) if tile.lstrip("-").isdigit() else cast(Any, tile), **others)


def _suffix(options: UpscaleOptions) -> str:
    if options.width is None and options.height is None:
        return f"_x{options.scale:g}"
    sides = (("w", options.width), ("h", options.height))
    return "_" + "".join(f"{name}{side}" for name, side in sides if side is not None)


class _Loading(NamedTuple):
    """Which model runs, and how."""

    model: str
    device: str
    dtype: str
    steps: int | None
    sampler: str | None
    fidelity: float | None


def _load(wanted: _Loading) -> Upscaler:
    from onestepsr.upscaler import Upscaler

    upscaler = Upscaler.from_pretrained(
        wanted.model,
        wanted.device,
        wanted.dtype,
        steps=wanted.steps,
        sampler=wanted.sampler,
        fidelity=wanted.fidelity,
    )
    logger.info("%s on %s in %s", wanted.model, upscaler.device, upscaler.dtype)
    return upscaler


def _existing(jobs: list[Job], skip_existing: bool, overwrite: bool) -> set[Path]:
    """Targets to leave alone; raises UserError when some exist and nothing is said about them."""
    if skip_existing and overwrite:
        raise UserError("--skip-existing and --overwrite exclude each other")
    present = [job.target for job in jobs if job.target.exists()]
    if present and not (skip_existing or overwrite):
        others = f" (and {len(present) - 1} more)" if len(present) > 1 else ""
        raise UserError(f"{present[0]}: already exists{others}; give --skip-existing or --overwrite")
    return set(present) if skip_existing else set()


def _run_all(
    jobs: list[Job], skipped: set[Path], options: UpscaleOptions, loading: _Loading, choice: PromptChoice
) -> list[Result]:
    from onestepsr.image_write import check_writable

    wanted = [job for job in jobs if job.target not in skipped]
    for job in {job.target.parent: job for job in wanted}.values():
        check_writable(job.target)
    results = [Result(input=str(j.source), output=str(j.target), status="skipped") for j in jobs if j.target in skipped]
    if not wanted:
        return results
    upscaler = _load(loading)
    prompts = Prompts(choice, upscaler) if choice.is_given else None
    with _progress() as progress:
        files = progress.add_task("files", total=len(wanted), visible=len(wanted) > 1)
        for job, prompt in zip(wanted, prompted([job.source for job in wanted], prompts), strict=True):
            results.append(_run(job, upscaler, options, prompt, progress))
            progress.advance(files)
    return results


def _run(job: Job, upscaler: Upscaler, options: UpscaleOptions, prompt: Prepared, progress: Progress) -> Result:
    import torch

    from onestepsr.image import read_picture
    from onestepsr.image_write import check_size, format_of, write_picture
    from onestepsr.upscaler import target_size

    result = Result(input=str(job.source), output=str(job.target), status="failed", prompt=prompt.text)
    started = time.perf_counter()
    task = progress.add_task(job.source.name, total=None)
    try:
        if prompt.error is not None:
            raise prompt.error
        picture = read_picture(job.source)
        result.input_size = (picture.width, picture.height)
        size = target_size(picture.width, picture.height, options)
        check_size(format_of(job.target), *size, str(job.target))
        enlarged = upscaler.upscale_picture(
            picture,
            prompt.added_to(options),
            lambda done, total: progress.update(task, completed=done, total=total),
        )
        write_picture(enlarged, job.target)
        result.output_size, result.status = size, "written"
    except (OneStepSRError, MemoryError, torch.OutOfMemoryError) as error:
        result.error = (
            str(error) if isinstance(error, OneStepSRError) else f"{job.source}: not enough memory; try --tile 64"
        )
    finally:
        progress.remove_task(task)
    result.seconds = round(time.perf_counter() - started, 3)
    return result


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
        typer.echo(f"{len(failed)} of {len(results)} pictures failed", err=True)
        raise typer.Exit(1)


def _upscale_stream(
    upscaler: Upscaler,
    options: UpscaleOptions,
    prompts: Prompts | None,
    *,
    out: str | None,
    file_format: str,
    overwrite: bool,
) -> None:
    from onestepsr.image import MAX_BYTES, read_picture
    from onestepsr.image_write import check_size, check_writable, encode_picture, format_of, write_picture
    from onestepsr.upscaler import target_size

    target = None if out in (None, STREAM) else Path(str(out))
    if target is not None:
        if target.exists() and not overwrite:
            raise UserError(f"{target}: already exists; give --overwrite")
        check_writable(target)
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"<stdin>: more than the limit of {MAX_BYTES:,} bytes")
    picture = read_picture(data, "<stdin>")
    wanted = picture.format or "png"
    if file_format != "keep":
        wanted = format_of(Path("a" + FORMATS[file_format]))
    wanted = format_of(target) if target is not None else wanted
    check_size(wanted, *target_size(picture.width, picture.height, options), "output")
    if prompts is not None:
        options = prompts.of_picture(Path("stdin"), picture).added_to(options)
    enlarged = upscaler.upscale_picture(picture, options)
    if target is not None:
        write_picture(enlarged, target)
    else:
        sys.stdout.buffer.write(encode_picture(enlarged, wanted))
        sys.stdout.buffer.flush()

"""``onestepsr degrade``: make LR/HR pairs from a folder of photos, with a record of each degradation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onestepsr.cli.options import refuse
from onestepsr.core.errors import UserError
from onestepsr.core.files import remove_leftovers, write_text
from onestepsr.core.progress import progress

if TYPE_CHECKING:
    from onestepsr.data.degradation.pipeline import Degradation, Recipe

RECORD = "degradation.json"
SCHEMA = 1
RECIPE_HELP = (
    "real_esrgan, resshift, camera, web, bicubic, mixed, face_resshift, face_osediff, "
    "or a YAML/JSON file with settings."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One photo and where its pair goes."""

    name: str
    """Path relative to the photo folder; with the seed, all that the degradation depends on."""
    source: Path
    lr: Path
    hr: Path


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("degrade", no_args_is_help=True)(degrade_command)


def degrade_command(
    context: typer.Context,
    hr_dir: Annotated[Path, typer.Argument(help="Folder of high-resolution photos.")],
    out_dir: Annotated[Path, typer.Argument(help="Receives LR/, HR/ (cropped to fit) and degradation.json.")],
    *,
    recipe: Annotated[str, typer.Option(help=RECIPE_HELP)] = "real_esrgan",
    scale: Annotated[
        int | None,
        typer.Option(min=1, max=16, help="HR size divided by LR size: 1 to 16. Default 4, for face recipes 1."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed and file name give the same degradation.")] = 0,
    recursive: Annotated[bool, typer.Option("--recursive", help="Include sub-folders.")] = False,
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Keep pairs that are there already.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pairs that are there already.")] = False,
    crop_multiple: Annotated[
        int | None,
        typer.Option(min=1, help="Crop HR sides to multiples of this, itself a multiple of the scale (the default)."),
    ] = None,
) -> None:
    """Make low-resolution versions of photos, as training and test sets are made."""
    if skip_existing and overwrite:
        raise UserError("--skip-existing and --overwrite: choose one of them")
    if not draws(load_recipe(recipe)):
        refuse(context, ["seed"], f"recipe '{recipe}' draws nothing at random")
    scale = usual_scale(recipe) if scale is None else scale
    multiple = scale if crop_multiple is None else crop_multiple
    if multiple % scale:
        raise UserError(f"--crop-multiple {multiple}: expected a multiple of the scale, {scale}")
    jobs, clashes = plan(hr_dir, out_dir, recursive)
    header = {"schema": SCHEMA, "recipe": recipe, "scale": scale, "seed": seed, "crop_multiple": multiple}
    existing = [job.lr for job in jobs if _is_there(job.lr) or _is_there(job.hr)]
    if existing and not (skip_existing or overwrite):
        raise UserError(f"{existing[0]}: exists; give --skip-existing or --overwrite")
    others = _other_pairs(jobs, out_dir, header, overwrite)
    for reason in clashes:
        typer.echo(f"failed: {reason}", err=True)
    failures = run(jobs, out_dir, header, skip_existing, others)
    typer.echo(f"{len(jobs) - len(failures)} pairs in {out_dir} (LR, HR, {RECORD})")
    if failures or clashes:
        typer.echo(f"{len(failures) + len(clashes)} of {len(jobs) + len(clashes)} photos failed", err=True)
        raise typer.Exit(1)


def plan(hr_dir: Path, out_dir: Path, recursive: bool) -> tuple[list[Job], list[str]]:
    """The pairs to make from ``hr_dir``, and a line for each photo that would give an output another one gives."""
    from onestepsr.data.photos import find_images

    if out_dir.resolve() == hr_dir.resolve() or (recursive and hr_dir.resolve() in out_dir.resolve().parents):
        raise UserError(f"{out_dir}: lies in the folder of photos; choose another folder")
    jobs: dict[Path, Job] = {}
    clashes = []
    for path in find_images(hr_dir, recursive=recursive):
        relative = path.relative_to(hr_dir)
        target = relative.with_suffix(".png")
        if target in jobs:
            clashes.append(f"{path}: gives the same output as {jobs[target].source.name}; rename one of them")
            continue
        jobs[target] = Job(
            name=relative.as_posix(), source=path, lr=_lr_of(relative.as_posix(), out_dir), hr=out_dir / "HR" / target
        )
    return list(jobs.values()), clashes


def run(
    jobs: list[Job], out_dir: Path, header: dict[str, Any], skip_existing: bool, others: dict[str, Any] | None = None
) -> dict[str, str]:
    """Make all pairs and the record; returns the error of each photo that failed, by name, once it has been reported.

    ``others`` is the record of pairs from other photos that lie in ``out_dir`` already.
    """
    from onestepsr.data.degradation.pipeline import draw_for

    recipe = load_recipe(header["recipe"])
    # Parameters do not depend on the photo, so the record is complete before the first image is written.
    drawn = {job.name: draw_for(recipe, header["seed"], job.name) for job in jobs}
    write_record(out_dir, header, drawn, others)
    remove_leftovers(*(path for job in jobs for path in (job.lr, job.hr)))
    failures: dict[str, str] = {}
    made = 0
    try:
        for job in progress(jobs, "Degrading", line=lambda job: job.name + " (failed)" * (job.name in failures)):
            if skip_existing and _is_there(job.lr) and _is_there(job.hr):
                continue
            try:
                write_pair(job, drawn[job.name], header)
                made += 1
            except UserError as error:
                failures[job.name] = str(error)
                typer.echo(f"failed: {error}", err=True)
    except KeyboardInterrupt:
        typer.echo(f"{made} of {len(jobs)} pairs made; the same command with --skip-existing goes on", err=True)
        raise
    if failures:
        drawn = {name: entry for name, entry in drawn.items() if name not in failures}
        write_record(out_dir, header, drawn, others)
    return failures


def load_recipe(name: str) -> Recipe:
    """A preset by name, or the settings in a YAML or JSON file: those of faces if its names are theirs."""
    from onestepsr.core.config import from_mapping, read_mapping
    from onestepsr.data.degradation.pipeline import DegradationConfig, FaceDegradationConfig
    from onestepsr.data.degradation.presets import get_preset

    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        return get_preset(name)
    values = read_mapping(path)
    if values.keys() & {field.name for field in dataclasses.fields(FaceDegradationConfig)}:
        return from_mapping(FaceDegradationConfig, values)
    return from_mapping(DegradationConfig, values)


def draws(recipe: Recipe) -> bool:
    """True if what a recipe does to an image depends on the seed; found by trying."""
    from onestepsr.data.degradation.pipeline import draw_for

    # Without a last filter, the order of filter and resize is drawn for nothing.
    orders = [draw_for(recipe, seed, "image") for seed in range(32)]
    drawn = [each if each.final_sinc else dataclasses.replace(each, final_resize_first=False) for each in orders]
    return any(each != drawn[0] or each.first is not None or each.second is not None for each in drawn)


def usual_scale(name: str) -> int:
    """The scale for which the recipe ``name`` is meant: faces are restored at their own size."""
    from onestepsr.data.degradation.pipeline import FaceDegradationConfig

    return 1 if isinstance(load_recipe(name), FaceDegradationConfig) else 4


def write_pair(job: Job, drawn: Degradation, header: dict[str, Any]) -> None:
    """Degrade one photo and write its LR and cropped HR image as PNG; leftovers of a killed run stay."""
    from onestepsr.data.degradation.pipeline import make_pair
    from onestepsr.imaging.read import from_array
    from onestepsr.imaging.write import write_image

    seed, scale, multiple = header["seed"], header["scale"], header["crop_multiple"]
    lr, hr = make_pair(job.source, drawn, seed=seed, name=job.name, scale=scale, multiple=multiple)
    for path, samples in ((job.hr, hr), (job.lr, lr)):
        write_image(from_array(samples), path, sweep=False)


def write_record(
    out_dir: Path, header: dict[str, Any], drawn: dict[str, Degradation], others: dict[str, Any] | None = None
) -> None:
    """Write degradation.json atomically."""
    from onestepsr.core.config import to_mapping

    images = {**(others or {}), **{name: to_mapping(entry) for name, entry in drawn.items()}}
    write_text(out_dir / RECORD, json.dumps({**header, "images": images}, indent=1) + "\n")


def _other_pairs(jobs: list[Job], out_dir: Path, header: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The record of pairs in ``out_dir`` from photos that are not in ``jobs``.

    Raises UserError where they were made with other settings; with ``overwrite``, the record then forgets them.
    """
    record = out_dir / RECORD
    if not record.exists():
        return {}
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        images = dict(before["images"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if overwrite:
            return {}
        raise UserError(f"{record}: cannot be read ({error}); remove it or give --overwrite") from error
    made = {job.name for job in jobs if _is_there(job.lr)}
    others = {
        name: images[name] for name in images.keys() - {job.name for job in jobs} if _lr_of(name, out_dir).exists()
    }
    changed = [name for name, value in header.items() if before.get(name) != value]
    if not changed:
        return dict(sorted(others.items()))
    if (others or made) and not overwrite:
        name = changed[0]
        raise UserError(f"{record}: these pairs were made with {name} {before.get(name)}, now it is {header[name]}")
    return {}


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that became too long
        return False


def _lr_of(name: str, out_dir: Path) -> Path:
    return out_dir / "LR" / Path(name).with_suffix(".png")

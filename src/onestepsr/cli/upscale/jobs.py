"""Which files the ``upscale`` command reads and where each result goes: everything that is decided before any work."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onestepsr.core.errors import UserError

STREAM = "-"
"""The input or output that stands for stdin or stdout."""
FORMATS = {"jpg": ".jpg", "png": ".png", "webp": ".webp", "tiff": ".tif"}
"""Values of ``--format`` besides "keep", and the file ending of each."""


@dataclass(frozen=True)
class Job:
    """One image to make."""

    source: Path
    target: Path


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How outputs are named."""

    out: Path | None
    """``-o``: a file for one input file, else a folder."""
    file_format: str
    """``--format``."""
    suffix: str
    """Added to the stem of outputs that lie beside their input, such as "_x4"."""
    out_is_folder: bool = False
    """Whether ``-o`` was written as a folder is, with a slash at its end, which a path does not keep."""

    def __post_init__(self) -> None:
        check_format(self.file_format)


def check_format(file_format: str) -> None:
    """UserError unless this is a value of ``--format``."""
    if file_format != "keep" and file_format not in FORMATS:
        raise UserError(f"format '{file_format}': accepted: keep, {', '.join(FORMATS)}")


def plan_jobs(inputs: Sequence[str], naming: Naming, recursive: bool, *, skip_existing: bool = False) -> list[Job]:
    """Expand files, folders and glob patterns into jobs, in a fixed order, each input once.

    With ``skip_existing``, an input that is what another one becomes is left out: ``*.jpg`` matches the outputs of its
    first run in the second. Raises UserError for what does not exist, an empty folder, two inputs with one output and
    an output that is an input.
    """
    jobs: dict[Path, Job] = {}
    single = len(inputs) == 1 and os.path.isfile(inputs[0])
    for text in inputs:
        try:
            for job in _expand(text, naming, recursive, single):
                jobs.setdefault(job.source.resolve(), job)
        except OSError as error:  # such as a name that is too long
            raise UserError(f"{error.filename or text}: {error.strerror}") from error
    if skip_existing:
        made = {job.target.resolve() for source, job in jobs.items() if job.target.resolve() != source}
        jobs = {source: job for source, job in jobs.items() if source not in made}
    _check_distinct(jobs)
    return list(jobs.values())


def existing(jobs: Sequence[Job], skip_existing: bool, overwrite: bool) -> set[Path]:
    """Targets to leave alone; raises UserError when some exist and nothing is said about them."""
    if skip_existing and overwrite:
        raise UserError("--skip-existing and --overwrite exclude each other")
    present = [job.target for job in jobs if _is_there(job.target)]
    if present and not (skip_existing or overwrite):
        others = f" (and {len(present) - 1} more)" if len(present) > 1 else ""
        raise UserError(f"{present[0]}: already exists{others}; give --skip-existing or --overwrite")
    return set(present) if skip_existing else set()


def _is_there(target: Path) -> bool:
    try:
        return target.exists()
    except OSError as error:  # such as a name that became too long with its suffix
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error


def _expand(text: str, naming: Naming, recursive: bool, single: bool) -> Iterator[Job]:
    if not text:
        raise UserError("an empty name; expected a file, a folder or a pattern")
    path = Path(text)
    if path.is_dir():
        yield from _expand_folder(path, naming, recursive)
    elif path.exists():
        yield Job(path, _target_of_file(path, naming, single))
    elif glob.has_magic(text):
        matches = [Path(match) for match in sorted(glob.glob(text, recursive=True)) if _is_image(Path(match))]
        if not matches:
            raise UserError(f"{text}: no image matches this pattern")
        for match in matches:
            yield Job(match, _target_of_file(match, naming, False))
    else:
        raise UserError(f"{text}: no such file or folder")


def _expand_folder(folder: Path, naming: Naming, recursive: bool) -> Iterator[Job]:
    if naming.out is None and not folder.resolve().name:
        raise UserError(f"{folder}: images of this folder cannot go beside it; give -o FOLDER")
    root = naming.out or folder.resolve().with_name(folder.resolve().name + naming.suffix)
    _check_folder(root)
    files = list(_walk(folder, recursive))
    if not _is_within(folder, root):  # else the inputs themselves lie there
        whole = root.resolve()
        files = [path for path in files if not path.resolve().is_relative_to(whole)]
    if not files:
        hint = "" if recursive else " (subfolders are read with --recursive)"
        raise UserError(f"{folder}: the folder holds no images{hint}; accepted: JPEG, PNG, WebP, TIFF and BMP")
    for path in files:
        yield Job(path, (root / path.relative_to(folder)).with_suffix(_ending(path, naming.file_format)))


def _walk(folder: Path, recursive: bool) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    for path in entries:
        if path.name.startswith("."):  # hidden, and unfinished files of a run that was killed
            continue
        if path.is_dir():
            if recursive and not path.is_symlink():
                yield from _walk(path, recursive)
        elif _is_image(path):
            yield path


def _is_image(path: Path) -> bool:
    from onestepsr.imaging.read import EXTENSIONS

    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()


def _target_of_file(path: Path, naming: Naming, single: bool) -> Path:
    ending = _ending(path, naming.file_format)
    if naming.out is None:
        return path.with_name(path.stem + naming.suffix + ending)
    if single and naming.out.suffix and not (naming.out_is_folder or naming.out.is_dir()):
        return target_file(naming)
    _check_folder(naming.out)
    return naming.out / (path.stem + ending)


def target_file(naming: Naming) -> Path:
    """``-o`` as the one file that is written; UserError where its ending is no format, or not that of ``--format``."""
    from onestepsr.imaging.write import format_of

    assert naming.out is not None
    chosen = format_of(naming.out)
    wanted = naming.file_format
    if wanted != "keep" and chosen != format_of(Path("a" + FORMATS[wanted])):
        raise UserError(f"{naming.out}: the ending does not agree with --format {wanted}")
    return naming.out


def _check_folder(path: Path) -> None:
    from onestepsr.imaging.read import EXTENSIONS

    if path.is_file() or (path.suffix.lower() in EXTENSIONS and not path.is_dir()):
        raise UserError(f"{path}: several images need a folder as output, not a file")


def _ending(path: Path, file_format: str) -> str:
    from onestepsr.imaging.read import EXTENSIONS

    if file_format != "keep":
        return FORMATS[file_format]
    return path.suffix if path.suffix.lower() in EXTENSIONS else ".png"


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _check_distinct(jobs: Mapping[Path, Job]) -> None:
    """``jobs`` by the resolved path of their source."""
    seen: dict[Path, Path] = {}
    for job in jobs.values():
        target = job.target.resolve()
        if target in jobs:
            raise UserError(
                f"{job.target}: this output is also an input; --skip-existing leaves it out, -o chooses another place"
            )
        if target in seen:
            raise UserError(f"{job.target}: both {seen[target]} and {job.source} would be written there")
        seen[target] = job.source

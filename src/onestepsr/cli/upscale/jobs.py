"""Jobs of the ``upscale`` command: input and output files, and running them."""

from __future__ import annotations

import glob
import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onestepsr.cli.upscale.prompts import Prompts, prompted
from onestepsr.core.errors import OneStepSRError, UserError, error_context, first_line
from onestepsr.core.files import writing

if TYPE_CHECKING:
    from rich.progress import Progress

    from onestepsr.imaging.read import LoadedImage
    from onestepsr.inference.options import UpscaleOptions
    from onestepsr.inference.upscaler import Upscaler

logger = logging.getLogger(__name__)

STREAM = "-"
"""The input or output that stands for stdin or stdout."""
KEEP = "keep"
"""Value of ``--format`` for the format of the input."""


# ---- planning: everything that is decided before any work ----


@dataclass(frozen=True)
class Job:
    """One image to make."""

    source: Path
    target: Path


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Options that decide the names of outputs."""

    out: Path | None
    """``-o``: a file for one input file, else a folder."""
    file_format: str
    """``--format``: "keep" or a format by its name in :mod:`onestepsr.imaging.formats`."""
    suffix: str
    """Added to the stem of outputs that lie beside their input, such as "_x4"."""
    out_is_folder: bool = False
    """True if ``-o`` was written with a slash at its end, which a path does not keep."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Everything that a run is to do, and what it is not."""

    jobs: list[Job]
    refused: list[Result]
    """Failed results of inputs whose output another input has taken."""
    left_out: list[str]
    """One line for each kind of thing in folders that is no input."""


def plan_jobs(inputs: Sequence[str], naming: Naming, recursive: bool, *, skip_existing: bool = False) -> Planned:
    """Expand files, folders and glob patterns into jobs, in a fixed order, each input once.

    A link is an input of its own, beside the file that it leads to. With ``skip_existing``, an input that is the output
    of another one is left out: ``*.jpg`` matches the outputs of its first run in the second. Raises UserError for
    missing files, an empty folder, and an output that is an input.
    """
    jobs: dict[Path, Job] = {}
    left_out: list[str] = []
    single = len(inputs) == 1 and os.path.isfile(inputs[0])
    for text in inputs:
        try:
            for job in _expand(text, naming, recursive, single, left_out):
                jobs.setdefault(_unresolved(job.source), job)
        except OSError as error:  # such as a name that is too long
            raise UserError(f"{error.filename or text}: {error.strerror}") from error
    if skip_existing:
        made = {job.target.resolve() for job in jobs.values() if job.target.resolve() != job.source.resolve()}
        jobs = {path: job for path, job in jobs.items() if job.source.resolve() not in made}
    sources = {job.source.resolve() for job in jobs.values()}
    seen: dict[Path, Path] = {}
    accepted, refused = [], []
    for job in jobs.values():
        target = job.target.resolve()
        if target in sources:
            hint = "--skip-existing leaves it out, -o chooses another name"
            raise UserError(f"{job.target}: this output is also an input; {hint}")
        if target in seen:
            why = f"{job.source}: its output {job.target} is that of {seen[target]} already"
            refused.append(result_of(job, "failed", f"{why}; rename one of them, or run it by itself with another -o"))
        else:
            accepted.append(job)
            seen[target] = job.source
    return Planned(jobs=accepted, refused=refused, left_out=left_out)


def existing(jobs: Sequence[Job], skip_existing: bool, overwrite: bool) -> set[Path]:
    """Targets to skip; UserError if some exist and neither option is given."""
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
    except OSError:  # such as a name that became too long with its suffix: found when its turn comes
        return False


def check_name(target: Path) -> None:
    """Raise UserError for a name that the file system does not take, before any work is done for it."""
    with writing(target), suppress(FileNotFoundError, NotADirectoryError):
        target.lstat()


def unwritable(targets: Mapping[Path, Job]) -> dict[Path, str]:
    """The reason for each folder, of which one job each is given, in which no file can be made; they are made now."""
    from onestepsr.imaging.write import check_writable

    reasons: dict[Path, str] = {}
    for folder, job in targets.items():
        try:
            check_name(job.target)
            check_writable(job.target)
        except UserError as error:
            try:
                check_writable(folder / "image")  # a name that is too long is no fault of the folder
            except UserError:
                reasons[folder] = str(error)
    return reasons


def is_pipe(text: str) -> bool:
    """True for a file that is no regular one, such as a named pipe, ``/dev/stdin`` or the shell's ``<(...)``."""
    return os.path.exists(text) and not os.path.isfile(text) and not os.path.isdir(text)


def _unresolved(path: Path) -> Path:
    """``path`` with the links of its folder followed, but not its own."""
    return path.parent.resolve() / path.name


def _expand(text: str, naming: Naming, recursive: bool, single: bool, left_out: list[str]) -> Iterator[Job]:
    from onestepsr.imaging.folders import is_image_name, literal_prefix

    if not text:
        raise UserError("an empty name; expected a file, a folder or a pattern")
    path = Path(text)
    if path.is_dir():
        yield from _expand_folder(path, naming, recursive, left_out)
    elif path.exists():
        yield Job(path, _target_of_file(path, naming, single))
    elif glob.has_magic(text):
        folder, rest = literal_prefix(text)
        found = (Path(match) for match in sorted(glob.glob(os.path.join(glob.escape(folder), rest), recursive=True)))
        matches = [match for match in found if is_image_name(match.name) and match.is_file()]
        if not matches:
            raise UserError(f"{text}: no image matches this pattern")
        for match in matches:
            yield Job(match, _target_of_file(match, naming, False))
    else:
        raise UserError(f"{text}: no such file or folder")


def _expand_folder(folder: Path, naming: Naming, recursive: bool, left_out: list[str]) -> Iterator[Job]:
    from onestepsr.imaging.folders import list_images
    from onestepsr.imaging.formats import ACCEPTED

    if naming.out is None and not folder.resolve().name:
        raise UserError(f"{folder}: images of this folder cannot go beside it; give -o FOLDER")
    root = naming.out or folder.resolve().with_name(folder.resolve().name + naming.suffix)
    _check_folder(root)
    found = list_images(folder, recursive)
    files = [folder / name for name in found.names]
    outputs = root.resolve()
    if not folder.resolve().is_relative_to(outputs):  # else the inputs themselves lie there
        files = [path for path in files if not _unresolved(path).is_relative_to(outputs)]
    if not files:
        hint = "" if recursive else " (subfolders are read with --recursive)"
        others = "".join(f"; left out: {line}" for line in found.left_out)
        raise UserError(f"{folder}: the folder holds no images{hint}{others}; {ACCEPTED}")
    left_out += found.left_out
    for path in files:
        yield Job(path, (root / path.relative_to(folder)).with_suffix(_ending(path, naming.file_format)))


def _target_of_file(path: Path, naming: Naming, single: bool) -> Path:
    ending = _ending(path, naming.file_format)
    if naming.out is None:
        return path.with_name(path.stem + naming.suffix + ending)
    if single and naming.out.suffix and not (naming.out_is_folder or naming.out.is_dir()):
        return target_file(naming)
    _check_folder(naming.out)
    return naming.out / (path.stem + ending)


def target_file(naming: Naming) -> Path:
    """``-o`` as the output file; UserError if its ending is not a format, or not that of ``--format``."""
    from onestepsr.imaging.write import format_of

    assert naming.out is not None
    chosen = format_of(naming.out)
    if naming.file_format not in (KEEP, chosen):
        raise UserError(f"{naming.out}: the ending does not agree with --format {naming.file_format}")
    return naming.out


def _check_folder(path: Path) -> None:
    from onestepsr.imaging.formats import READABLE

    if path.is_file() or (path.suffix.lower() in READABLE and not path.is_dir()):
        raise UserError(f"{path}: several images need a folder as output, not a file")


def _ending(path: Path, file_format: str) -> str:
    from onestepsr.imaging.formats import EXTENSIONS, FORMATS

    if file_format != KEEP:
        return FORMATS[file_format].endings[0]
    return path.suffix if path.suffix.lower() in EXTENSIONS else ".png"


# ---- running: files through one upscaler, or one image from stdin or to stdout ----


@dataclass(kw_only=True)
class Result:
    """Outcome for one input; sizes are (width, height)."""

    input: str
    output: str
    status: Literal["written", "skipped", "failed"]
    input_size: tuple[int, int] | None = None
    output_size: tuple[int, int] | None = None
    seconds: float = 0.0
    """Reading, enlarging and writing of this image, without the time it waited for others."""
    error: str | None = None
    prompt: str | None = None
    plan: dict[str, Any] | None = None
    """Plan of the run: tiles, dtype, expected memory."""


def result_of(job: Job, status: Literal["skipped", "failed"], error: str | None = None) -> Result:
    """The result of a job that wrote nothing (yet)."""
    return Result(input=str(job.source), output=str(job.target), status=status, error=error)


@dataclass(frozen=True, kw_only=True)
class Handling:
    """Options of reading and writing files, beside those of the enlargement itself."""

    max_pixels: int | None = None
    """Most pixels of an input; None is the usual limit."""
    strip_metadata: bool = False
    keep_times: bool = False

    def read(self, source: Path | bytes, name: str | None = None) -> LoadedImage:
        """The image in a file, or in ``source`` called ``name``."""
        from onestepsr.imaging.formats import MAX_PIXELS
        from onestepsr.imaging.read import read_image

        image = read_image(source, name, self.max_pixels or MAX_PIXELS)
        return image.without_metadata() if self.strip_metadata else image

    def write(self, image: LoadedImage, job: Job, *, sweep: bool) -> None:
        """Write the enlarged image of a job, with the times of its input if they are to be kept."""
        from onestepsr.imaging.write import write_image

        write_image(image, job.target, sweep=sweep)
        if self.keep_times:
            with writing(job.target):
                status = job.source.stat()
                os.utime(job.target, ns=(status.st_atime_ns, status.st_mtime_ns))


_AS_IT_IS = Handling()


@dataclass(kw_only=True)
class _Item:
    """An image on its way through the pipeline."""

    job: Job
    result: Result
    image: LoadedImage | None = None
    """The input, then the output; None after a failure."""
    output_size: tuple[int, int] = (0, 0)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add the time inside to the result; an error that concerns this image alone becomes the result's error."""
        import torch

        started = time.perf_counter()
        try:
            yield
        except OneStepSRError as error:
            text, names = str(error), (str(self.job.source), str(self.job.target))
            self.result.error = text if any(name in text for name in names) else f"{self.job.source}: {text}"
        except (MemoryError, torch.OutOfMemoryError):
            self.result.error = f"{self.job.source}: not enough memory; try --tile 64"
        except Exception as error:  # whatever is wrong with one image, the others go on
            logger.debug("%s", self.job.source, exc_info=True)
            self.result.error = f"{self.job.source}: {type(error).__name__}: {first_line(error)}"
        finally:
            self.result.seconds += time.perf_counter() - started

    @property
    def nbytes(self) -> int:
        """Bytes of the input and of the output that it will become."""
        if self.image is None:
            return 0
        alpha = 0 if self.image.alpha is None else self.image.alpha.nbytes
        own = int(self.image.pixels.nbytes) + int(alpha)
        return own + own * self.output_size[0] * self.output_size[1] // (self.image.width * self.image.height)


def upscale_jobs(
    jobs: Sequence[Job],
    upscaler: Upscaler,
    options: UpscaleOptions,
    prompts: Prompts | None = None,
    progress: Progress | None = None,
    *,
    handling: Handling = _AS_IT_IS,
) -> Generator[Result, None, None]:
    """Enlarge files into files; results come in the order of the jobs. Close the generator to stop early.

    Reading and writing overlap the network (:func:`~onestepsr.inference.pipeline.bounded_map`); prompts are made for
    a group of images before its first one is enlarged. An image that cannot be read, enlarged or written is a failed
    result. ``progress`` gets a bar for the tiles of every image.
    """
    from onestepsr.imaging.write import check_size, format_of
    from onestepsr.inference.options import target_size
    from onestepsr.inference.pipeline import bounded_map

    prepared = prompted([job.source for job in jobs], prompts)

    def read(job: Job) -> _Item:
        item = _Item(job=job, result=result_of(job, "failed"))
        with item.measured():
            check_name(job.target)
            image = handling.read(job.source)
            item.result.input_size = (image.width, image.height)
            item.output_size = target_size(image.width, image.height, options)
            check_size(format_of(job.target), *item.output_size, str(job.target))
            item.image = image
        return item

    def enlarge(item: _Item) -> _Item:
        prompt = next(prepared)
        item.result.prompt = prompt.text
        image, item.image = item.image, None
        if prompt.error is not None:
            item.result.error = str(prompt.error)
        elif image is not None:
            with item.measured(), _tile_bar(progress, item.job) as tell:
                item.image = upscaler.upscale_image(image, prompt.applied_to(options), tell)
                plan = upscaler.last_plan
                item.result.plan = None if plan is None else plan.as_json()
        return item

    def write(item: _Item) -> Result:
        result = item.result
        if item.image is not None:
            with item.measured():
                handling.write(item.image, item.job, sweep=False)
                result.output_size, result.status = item.output_size, "written"
        result.seconds = round(result.seconds, 3)
        return result

    return bounded_map(jobs, read, enlarge, write, nbytes=lambda item: item.nbytes)


@contextmanager
def _tile_bar(progress: Progress | None, job: Job) -> Iterator[Callable[[int, int], None] | None]:
    if progress is None:
        yield None
        return
    task = progress.add_task(job.source.name, total=None)
    try:
        yield lambda done, total: progress.update(task, completed=done, total=total)
    finally:
        progress.remove_task(task)


def upscale_stream(
    source: str,
    target: Path | None,
    file_format: str,
    *,
    upscaler: Upscaler,
    options: UpscaleOptions,
    prompts: Prompts | None = None,
    handling: Handling = _AS_IT_IS,
) -> Result:
    """Enlarge one image from stdin (``source`` "-") or a pipe, or to stdout (``target`` None); errors are raised.

    To stdout, "keep" is the format of the input, or PNG where that is only read.
    """
    from onestepsr.imaging.formats import kept_format
    from onestepsr.imaging.write import check_size, encode_image, format_of
    from onestepsr.inference.options import target_size

    started = time.perf_counter()
    image = _read_stream(source, handling)
    if target is not None:
        written_format = format_of(target)
    elif file_format == KEEP:
        written_format = kept_format(image.format)
    else:
        written_format = file_format
    with error_context("<stdin>" if source == STREAM else source):
        size = target_size(image.width, image.height, options)
    check_size(written_format, *size, "output" if target is None else str(target))
    result = Result(input=source, output=STREAM if target is None else str(target), status="written")
    if prompts is not None:
        prompt = prompts.of_image(Path("stdin" if source == STREAM else source), image)
        result.prompt, options = prompt.text, prompt.applied_to(options)
    enlarged = upscaler.upscale_image(image, options)
    if target is not None:
        handling.write(enlarged, Job(Path(source), target), sweep=True)
    else:
        sys.stdout.buffer.write(encode_image(enlarged, written_format))
        sys.stdout.buffer.flush()
    plan = upscaler.last_plan
    result.plan = None if plan is None else plan.as_json()
    result.input_size, result.output_size = (image.width, image.height), size
    result.seconds = round(time.perf_counter() - started, 3)
    return result


def _read_stream(source: str, handling: Handling) -> LoadedImage:
    from onestepsr.imaging.formats import MAX_BYTES

    if source != STREAM:
        return handling.read(Path(source))
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"<stdin>: more than the limit of {MAX_BYTES:,} bytes")
    return handling.read(data, "<stdin>")

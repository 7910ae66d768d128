"""``onestepsr upscale -`` and ``-o -``: one picture from stdin or to stdout."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from onestepsr.apps.upscale_files import FORMATS, STREAM, Job, Naming, existing, target_file
from onestepsr.apps.upscale_pipeline import Result
from onestepsr.apps.upscale_setup import Setup
from onestepsr.errors import UserError

if TYPE_CHECKING:
    from onestepsr.image import Picture


def upscale_stream(
    setup: Setup, source: str, *, out: str | None, file_format: str, skip_existing: bool, overwrite: bool
) -> Result:
    """Read one picture to its end and write it enlarged; what became of it.

    ``source`` is a file name, or "-" for stdin; ``out`` a file name, or "-" or None for stdout. Raises UserError for
    what is no picture, and for a file that exists unless it is to be skipped or replaced.
    """
    from onestepsr.image_write import check_size, check_writable, encode_picture, write_picture
    from onestepsr.upscaler import target_size

    target = None if out is None or out == STREAM else _target(out, file_format)
    result = Result(input=source, output=out or STREAM, status="skipped")
    if existing([] if target is None else [Job(Path(source), target)], skip_existing, overwrite):
        return result
    if target is not None:
        check_writable(target)
    upscaler, prompts = setup.load()
    started = time.perf_counter()
    picture, options = _read(source), setup.options
    wanted = _format(picture.format, target, file_format)
    size = target_size(picture.width, picture.height, options)
    check_size(wanted, *size, "output" if target is None else str(target))
    if prompts is not None:
        prompt = prompts.of_picture(Path("stdin" if source == STREAM else source), picture)
        result.prompt, options = prompt.text, prompt.added_to(options)
    enlarged = upscaler.upscale_picture(picture, options)
    if target is not None:
        write_picture(enlarged, target)
    else:
        sys.stdout.buffer.write(encode_picture(enlarged, wanted))
        sys.stdout.buffer.flush()
    plan, result.status = upscaler.last_plan, "written"
    result.plan = None if plan is None else plan.as_json()
    result.input_size, result.output_size = (picture.width, picture.height), size
    result.seconds = round(time.perf_counter() - started, 3)
    return result


def _target(out: str, file_format: str) -> Path:
    return target_file(Naming(out=Path(out), file_format=file_format, suffix=""))


def _read(source: str) -> Picture:
    from onestepsr.image import read_picture

    return _read_stdin() if source == STREAM else read_picture(Path(source))


def _read_stdin() -> Picture:
    from onestepsr.image import MAX_BYTES, read_picture

    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"<stdin>: more than the limit of {MAX_BYTES:,} bytes")
    return read_picture(data, "<stdin>")


def _format(own: str | None, target: Path | None, file_format: str) -> str:
    from onestepsr.image_write import format_of

    if target is not None:
        return format_of(target)
    return (own or "png") if file_format == "keep" else format_of(Path("a" + FORMATS[file_format]))

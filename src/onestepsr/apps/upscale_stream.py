"""``onestepsr upscale -``: one picture from stdin to stdout or to a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from onestepsr.apps.upscale_files import FORMATS, STREAM
from onestepsr.apps.upscale_setup import Setup
from onestepsr.errors import UserError

if TYPE_CHECKING:
    from onestepsr.image import Picture


def upscale_stream(setup: Setup, *, out: str | None, file_format: str, overwrite: bool) -> None:
    """Read stdin to its end and write the enlarged picture; ``out`` is a file name, or "-" or None for stdout.

    Raises UserError for what is no picture and for a file that exists, unless ``overwrite``.
    """
    from onestepsr.image_write import check_size, encode_picture, write_picture
    from onestepsr.upscaler import target_size

    upscaler, prompts = setup.load()
    target = _target(out, overwrite)
    picture = _read_stdin()
    wanted = _format(picture.format, target, file_format)
    check_size(wanted, *target_size(picture.width, picture.height, setup.options), "output")
    options = setup.options
    if prompts is not None:
        options = prompts.of_picture(Path("stdin"), picture).added_to(options)
    enlarged = upscaler.upscale_picture(picture, options)
    if target is not None:
        write_picture(enlarged, target)
    else:
        sys.stdout.buffer.write(encode_picture(enlarged, wanted))
        sys.stdout.buffer.flush()


def _target(out: str | None, overwrite: bool) -> Path | None:
    from onestepsr.image_write import check_writable

    if out is None or out == STREAM:
        return None
    target = Path(out)
    if target.exists() and not overwrite:
        raise UserError(f"{target}: already exists; give --overwrite")
    check_writable(target)
    return target


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

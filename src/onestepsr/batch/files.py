"""Files of any filesystem that PyArrow knows, read whole and written whole."""

from __future__ import annotations

import os
import posixpath
import re
import secrets
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from onestepsr.core.errors import UserError, first_line
from onestepsr.core.files import PARTIAL_PREFIX, replacing, writing
from onestepsr.imaging.formats import MAX_BYTES


def split_query(uri: str) -> tuple[str, dict[str, str]]:
    """A URI without the settings behind its question mark, and these by the root that they are for.

    ``s3://photos/2001?endpoint_override=http://127.0.0.1:5000`` is a folder on another server than Amazon's.
    """
    bare, mark, query = uri.partition("?")
    root = root_of(bare)
    return (bare, {root: query}) if root and mark and "=" in query else (uri, {})


def located(uri: str, queries: Mapping[str, str] | None = None) -> tuple[Any, str]:
    """PyArrow's filesystem of a path or URI, and the path in it; :class:`UserError` if there is none."""
    root = root_of(uri)
    if not root:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    filesystem, prefix = _filesystem(root, (queries or {}).get(root, ""))
    return filesystem, prefix + uri.removeprefix(root).lstrip("/")


@lru_cache
def _filesystem(root: str, query: str) -> tuple[Any, str]:
    try:
        filesystem, probe = fs.FileSystem.from_uri(f"{root}/x{'?' if query else ''}{query}")
    except (pa.ArrowException, OSError, ImportError) as error:
        raise UserError(f"{root}: no filesystem that can be reached ({first_line(error)})") from error
    return filesystem, probe.removesuffix("x")


def root_of(uri: str) -> str:
    """Scheme and server, bucket or nothing, such as ``s3://photos``; empty for a local path."""
    match = re.match(r"[A-Za-z][\w+.-]*://[^/?]*", uri)
    return "" if match is None else match.group()


def read_bytes(uri: str, queries: Mapping[str, str] | None = None) -> bytes:
    """The content of a file; :class:`UserError` in one line."""
    filesystem, path = located(uri, queries)
    try:
        with filesystem.open_input_stream(path) as stream:
            content = bytes(stream.read(MAX_BYTES + 1))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot be read ({reason(error)})") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{uri}: more than the limit of {MAX_BYTES:,} bytes")
    return content


def write_bytes(uri: str, content: bytes, queries: Mapping[str, str] | None = None) -> None:
    """Write a file that is never seen half; :class:`UserError` in one line.

    Local files and those of HDFS are renamed when complete; an object of S3 or Google's storage is there or not.
    """
    filesystem, path = located(uri, queries)
    if isinstance(filesystem, fs.LocalFileSystem):
        with writing(Path(uri)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with replacing(Path(path)) as partial:
                partial.write_bytes(content)
        return
    renamed = filesystem.type_name == "hdfs"
    partial_name = posixpath.join(posixpath.dirname(path), f"{PARTIAL_PREFIX}{secrets.token_hex(8)}")
    try:
        if renamed:
            filesystem.create_dir(posixpath.dirname(path), recursive=True)
        with filesystem.open_output_stream(partial_name if renamed else path) as stream:
            stream.write(content)
        if renamed:
            filesystem.move(partial_name, path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot be written ({reason(error)})") from error


def exists(uri: str, queries: Mapping[str, str]) -> bool:
    """True if there is something at ``uri``."""
    filesystem, path = located(uri, queries)
    try:
        return bool(filesystem.get_file_info(path).type == fs.FileType.File)
    except (OSError, pa.ArrowException):
        return False


def reason(error: BaseException) -> str:
    """An error in one line."""
    return str(getattr(error, "strerror", None) or first_line(error))

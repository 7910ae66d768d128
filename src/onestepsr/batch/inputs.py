"""The inputs of a job: a folder, a pattern or a list, on any filesystem."""

from __future__ import annotations

import fnmatch
import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa
from pyarrow import csv, fs, parquet

from onestepsr.batch.files import located, read_bytes, reason, root_of
from onestepsr.batch.manifest import PARTS
from onestepsr.core.errors import UserError, first_line
from onestepsr.imaging.folders import is_image_name

PATH_COLUMNS = ("path", "input", "uri", "url", "file")
"""Names of the column with paths in a list of inputs; the first that is there counts."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Images of a job: paths or URIs, and the part of each that its output mirrors."""

    inputs: list[str]
    names: list[str]

    def outside(self, folder: str) -> Listed:
        """Those that do not lie below ``folder``, whose images are outputs; UserError if there are none."""
        start = _place(f"{folder.rstrip('/')}/x").removesuffix("x")
        kept = [
            (path, name)
            for path, name in zip(self.inputs, self.names, strict=True)
            if not _place(path).startswith(start)
        ]
        if not kept:
            raise UserError(f"{folder}: the output folder holds the inputs; choose another")
        return Listed(inputs=[path for path, _ in kept], names=[name for _, name in kept])


def _place(uri: str) -> str:
    """Where a file lies, without links: the same for all ways to say it."""
    root = root_of(uri)
    path = uri if root in ("", "file://") else None
    if path is None:
        return f"{root}{posixpath.normpath('/' + uri.removeprefix(root).lstrip('/'))}"
    path = path.removeprefix(root)
    if os.path.islink(path):
        return os.path.realpath(path)
    return os.path.join(_real_folder(os.path.dirname(path)), os.path.basename(path))


@lru_cache(1024)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def list_inputs(text: str, queries: Mapping[str, str], column: str | None = None) -> Listed:
    """The images that ``text`` stands for: a file, a folder with all below it, a pattern, or a list of them.

    A list is a Parquet, CSV or TSV file with a column of paths (:data:`PATH_COLUMNS`, or ``column``), or a text file
    with a path in each line. :class:`UserError` if there is none.
    """
    try:
        return _listed(text, queries, column)
    except UnicodeError as error:
        shown = text.encode("utf-8", "replace").decode()
        raise UserError(f"{shown}: a name in it is not UTF-8; rename the file, or save the list as UTF-8") from error


def _listed(text: str, queries: Mapping[str, str], column: str | None) -> Listed:
    ending = posixpath.splitext(text)[1].lower()
    if ending in (".parquet", ".csv", ".tsv", ".txt"):
        return _of_list(text, read_bytes(text, queries), ending, column)
    filesystem, path = located(text, queries)
    root = root_of(text)
    magic = re.search(r"[*?\[]", path)
    base = path if magic is None else posixpath.dirname(path[: magic.start()] + "x")
    try:
        info = filesystem.get_file_info(base)
        if info.type == fs.FileType.File and magic is None:
            return Listed(inputs=[text], names=[posixpath.basename(path)])
        if info.type == fs.FileType.NotFound:
            raise UserError(f"{text}: no such file, folder or bucket")
        found = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{text}: cannot be listed ({reason(error)})") from error
    wanted = None if magic is None else re.compile(_pattern(path))
    names = [
        entry.path.removeprefix(base).lstrip("/")
        for entry in found
        if entry.type == fs.FileType.File
        and is_image_name(posixpath.basename(entry.path))
        and not any(part.startswith(".") or part == PARTS for part in entry.path.removeprefix(base).split("/")[:-1])
        and (wanted is None or wanted.fullmatch(entry.path))
    ]
    if not names:
        raise UserError(f"{text}: no images there")
    # On an object store the path in the filesystem begins with the bucket, which is in the root already.
    inside = base if not root else base.removeprefix(root.partition("://")[2]).lstrip("/")
    start = posixpath.join(f"{root}/" if root else "", inside)
    return Listed(inputs=[posixpath.join(start, name) for name in sorted(names)], names=sorted(names))


def _pattern(path: str) -> str:
    """A regular expression for a glob pattern in which ``**`` crosses folders and ``*`` does not."""
    parts = re.split(r"(\*\*/?|\*|\?)", path)
    own = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(own.get(part) or re.sub(r"^\(\?s:(.*)\)\\[zZ]$", r"\1", fnmatch.translate(part)) for part in parts)


def _of_list(text: str, content: bytes, ending: str, column: str | None) -> Listed:
    if ending == ".txt":
        lines = (line.strip() for line in content.decode("utf-8-sig").splitlines())
        paths = [line for line in lines if line and not line.startswith("#")]
    else:
        try:
            if ending == ".parquet":
                table = parquet.read_table(pa.BufferReader(content))
            else:
                options = csv.ParseOptions(delimiter="\t" if ending == ".tsv" else ",")
                table = csv.read_csv(pa.BufferReader(content), parse_options=options)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{text}: cannot be read as a list ({first_line(error)})") from error
        known = [column] if column is not None else list(PATH_COLUMNS)
        chosen = next((name for name in known if name in table.column_names), None)
        if chosen is None:
            have = ", ".join(table.column_names)
            raise UserError(f"{text}: has the columns {have}; expected one of {', '.join(known)}")
        values = [path for path in table.column(chosen).to_pylist() if path]
        paths = [path.decode() if isinstance(path, bytes) else str(path) for path in values]
    paths = list(dict.fromkeys(paths))
    if not paths:
        raise UserError(f"{text}: the list is empty")
    bare = (re.sub(r"^[A-Za-z][\w+.-]*://", "", path).lstrip("/") for path in paths)
    below = [posixpath.normpath(f"/{path}").lstrip("/") for path in bare]  # no output lies above its folder
    common = posixpath.commonpath([posixpath.dirname(path) for path in below])
    return Listed(inputs=paths, names=[posixpath.relpath(path, common) if common else path for path in below])

"""Images by the million on Ray Data: one class that enlarges rows of a table, and the job of the ``batch`` command.

Ray schedules small tables of names onto a pool of actors, each with a model of its own; an actor reads, enlarges and
writes its images through the same pipeline as ``onestepsr upscale``, so outputs are equal to the byte. No image goes
through Ray's object store, so memory does not grow with their number. Every image becomes one row of a manifest in
Parquet. The files themselves are the record of what is done: each appears under its name when it is complete.
"""

from __future__ import annotations

import fnmatch
import io
import json
import logging
import os
import pickle
import posixpath
import re
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from onestepsr import __version__
from onestepsr.core.errors import MissingExtra, OneStepSRError, UserError, first_line
from onestepsr.core.files import PARTIAL_PREFIX, replacing, writing
from onestepsr.evaluate.pairing import Case
from onestepsr.evaluate.run import Problem, Score, Scorer, score_files
from onestepsr.imaging.folders import is_image_name
from onestepsr.imaging.formats import EXTENSIONS, FORMATS, MAX_BYTES, MAX_PIXELS, kept_format
from onestepsr.imaging.image import LoadedImage
from onestepsr.imaging.read import read_image
from onestepsr.imaging.write import check_size, encode_image
from onestepsr.inference.devices import is_out_of_memory
from onestepsr.inference.options import UpscaleOptions, target_size
from onestepsr.inference.pipeline import Limits, grouped_map
from onestepsr.inference.upscaler import Upscaler, kind_of

try:
    import pyarrow as pa
    from pyarrow import csv, fs, parquet
except ImportError as error:
    raise MissingExtra("onestepsr batch", "batch") from error

logger = logging.getLogger(__name__)

MANIFEST = "manifest.parquet"
"""Name of the manifest in the output folder."""
PARTS = "_manifest"
"""Folder beside it with the rows of a run that is not over, and with what the run is."""
PATH_COLUMNS = ("path", "input", "uri", "url", "file")
"""Names of the column with paths in a list of inputs; the first that is there counts."""
FLUSH_S = 15.0
"""Seconds after which the rows that have come are written to a part of the manifest."""

SCHEMA = pa.schema(
    [
        ("input", pa.string()),
        ("output", pa.string()),
        ("status", pa.string()),
        ("input_width", pa.int32()),
        ("input_height", pa.int32()),
        ("output_width", pa.int32()),
        ("output_height", pa.int32()),
        ("seconds", pa.float64()),
        ("error", pa.string()),
    ]
)
"""A row of the manifest: status is "written", "found" (complete from an earlier run) or "failed"."""
WITH_IMAGE = SCHEMA.append(pa.field("image", pa.binary()))
"""The same with the encoded image, for tables without a column of outputs."""

Row = dict[str, Any]


def _row(path: str, output: str | None) -> Row:
    """The row of an image for which nothing has been done."""
    return {**dict.fromkeys(WITH_IMAGE.names), "input": path, "output": output}


# ---- files of any filesystem that PyArrow knows ------------------------------------------------------------------


def split_query(uri: str) -> tuple[str, dict[str, str]]:
    """A URI without the settings behind its question mark, and these by the root that they are for.

    ``s3://photos/2001?endpoint_override=http://127.0.0.1:5000`` is a folder on another server than Amazon's.
    """
    bare, mark, query = uri.partition("?")
    root = _root(bare)
    return (bare, {root: query}) if root and mark and "=" in query else (uri, {})


def located(uri: str, queries: Mapping[str, str] | None = None) -> tuple[Any, str]:
    """PyArrow's filesystem of a path or URI, and the path in it; :class:`UserError` if there is none."""
    root = _root(uri)
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


def _root(uri: str) -> str:
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
        raise UserError(f"{uri}: cannot be read ({_reason(error)})") from error
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
        raise UserError(f"{uri}: cannot be written ({_reason(error)})") from error


def _exists(uri: str, queries: Mapping[str, str]) -> bool:
    filesystem, path = located(uri, queries)
    try:
        return bool(filesystem.get_file_info(path).type == fs.FileType.File)
    except (OSError, pa.ArrowException):
        return False


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or first_line(error))


# ---- the class that enlarges -------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Item:
    """One image on its way through the pipeline."""

    row: Row
    content: bytes | None = None
    image: LoadedImage | None = None
    size: tuple[int, int] = (0, 0)
    file_format: str = "png"
    found: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the input and of the output that it will become."""
        if self.image is None:
            return 0
        own = int(self.image.pixels.nbytes)
        return own + own * self.size[0] * self.size[1] // (self.image.width * self.image.height)


class UpscaleImages:
    """A model that enlarges the images of a table, for ``Dataset.map_batches`` of Ray and ``mapInPandas`` of Spark.

    A row has a ``path``, and the file's content in ``bytes`` (Ray's ``read_binary_files``) or ``content`` (Spark's
    ``binaryFile``); without, it is read from the path. If it has an ``output``, the image is written there in the
    format of its ending; else its encoded bytes come back in the column ``image``. An image that cannot be enlarged is
    a row whose status is "failed", with the reason in ``error``.

    The model is loaded with the first table, so that an instance is small and can be sent to other processes.
    """

    def __init__(
        self,
        model: str = "d3sr-tiny",
        device: str = "auto",
        dtype: str = "auto",
        options: UpscaleOptions | None = None,
        *,
        file_format: str = "keep",
        loading: Mapping[str, Any] | None = None,
        max_pixels: int = MAX_PIXELS,
        strip_metadata: bool = False,
        skip_existing: bool = False,
        queries: Mapping[str, str] | None = None,
    ) -> None:
        """``loading`` are the other arguments of :meth:`Upscaler.from_pretrained`; ``file_format`` is that of bytes
        that come back, "keep" for the format of the input. ``queries``: see :func:`split_query`."""
        self.model, self.device, self.dtype = model, device, dtype
        self.options, self.file_format, self.loading = options or UpscaleOptions(), file_format, dict(loading or {})
        self.max_pixels, self.strip_metadata, self.skip_existing = max_pixels, strip_metadata, skip_existing
        self.queries = dict(queries or {})
        self._upscaler: Upscaler | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_upscaler": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def upscaler(self) -> Upscaler:
        """The model, loaded once in each process."""
        with self._lock:
            if self._upscaler is None:
                self._upscaler = Upscaler.from_pretrained(self.model, self.device, self.dtype, **self.loading)
            return self._upscaler

    def __call__(self, batch: Any) -> Any:
        """Enlarge the images of a table: a mapping of columns, or a pandas DataFrame, which comes back as one.

        Returns an Arrow table with the columns of :data:`SCHEMA`, and ``image`` if there are no outputs.
        """
        columns = {str(name): list(batch[name]) for name in batch}
        if "path" not in columns:
            raise UserError(f"columns {', '.join(columns)}: expected 'path', and 'bytes' or 'content' if it is loaded")
        contents = columns.get("bytes") or columns.get("content") or [None] * len(columns["path"])
        outputs = columns.get("output") or [None] * len(columns["path"])
        items = [
            _Item(row=_row(str(path), output), content=content)
            for path, content, output in zip(columns["path"], contents, outputs, strict=True)
        ]
        rows = list(self.rows(items))
        table = pa.Table.from_pylist(rows, SCHEMA if "output" in columns else WITH_IMAGE)
        return table.to_pandas() if hasattr(batch, "iloc") else table

    def rows(self, items: Sequence[_Item]) -> Generator[Row, None, None]:
        """Enlarge images; the next ones are read and the last ones written while the network runs.

        On a GPU, images of one size go through it together; rows come in the order of running.
        """
        upscaler = self.upscaler
        most = upscaler.images_at_once(self.options)
        return grouped_map(
            items,
            self._guarded(self._read),
            lambda group: self._enlarge(upscaler, group),
            lambda item: self._guarded(self._write)(item).row,
            kind=lambda item: None if item.image is None else kind_of(item.image),
            most=most,
            nbytes=lambda item: item.nbytes,
            limits=Limits(images=max(8, 2 * most), readers=2 if most == 1 else 4),
        )

    def _guarded(self, step: Callable[[_Item], None]) -> Callable[[_Item], _Item]:
        """``step`` with its time in the row, and its error too: whatever is wrong with one image, others go on."""

        def run(item: _Item) -> _Item:
            if item.row["status"] is not None:
                return item
            started = time.perf_counter()
            row = item.row
            try:
                step(item)
            except Exception as error:  # noqa: BLE001  (one row, not a failed job)
                item.image = item.content = None
                row["status"] = "failed"
                if is_out_of_memory(error):
                    text = "not enough memory; try --tile 64"
                elif isinstance(error, OneStepSRError):
                    text = first_line(error, 1000)
                else:
                    text = f"{type(error).__name__}: {first_line(error)}"
                named = any(name and name in text for name in (row["input"], row["output"]))
                row["error"] = text if named else f"{row['input']}: {text}"
            row["seconds"] = round((row["seconds"] or 0.0) + time.perf_counter() - started, 4)
            return item

        return run

    def _read(self, item: _Item) -> None:
        output = item.row["output"]
        if output is not None and self.skip_existing and _exists(output, self.queries):
            width, height = _size(read_bytes(output, self.queries))
            item.row.update(status="found", output_width=width, output_height=height)
            return
        content = item.content if item.content is not None else read_bytes(item.row["input"], self.queries)
        image = read_image(content, item.row["input"], self.max_pixels)
        item.image, item.content = image.without_metadata() if self.strip_metadata else image, None
        item.row.update(input_width=image.width, input_height=image.height)
        item.size = target_size(image.width, image.height, self.options)
        if output is not None:
            item.file_format = EXTENSIONS[posixpath.splitext(output)[1].lower()]
        elif self.file_format != "keep":
            item.file_format = self.file_format
        else:
            item.file_format = kept_format(image.format)
        check_size(item.file_format, *item.size, output or item.row["input"])

    def _enlarge(self, upscaler: Upscaler, group: list[_Item]) -> list[_Item]:
        images = [item.image for item in group if item.image is not None]
        if len(images) > 1:
            started = time.perf_counter()
            with suppress(Exception):  # then each by itself, so that the fault of one is no other's
                for item, image in zip(group, upscaler.upscale_images(images, self.options), strict=True):
                    item.image = image
                    item.row["seconds"] += round((time.perf_counter() - started) / len(group), 4)
                return group

        def alone(item: _Item) -> None:
            image, item.image = item.image, None
            assert image is not None
            item.image = upscaler.upscale_image(image, self.options)

        return [self._guarded(alone)(item) for item in group]

    def _write(self, item: _Item) -> None:
        assert item.image is not None
        content = encode_image(item.image, item.file_format)
        if item.row["output"] is None:
            item.row["image"] = content
        else:
            write_bytes(item.row["output"], content, self.queries)
        item.row.update(status="written", output_width=item.size[0], output_height=item.size[1])


def _size(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content)) as image:
        return image.size


# ---- the inputs of a job -----------------------------------------------------------------------------------------


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
    root = _root(uri)
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
    root = _root(text)
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
        raise UserError(f"{text}: cannot be listed ({_reason(error)})") from error
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


# ---- the manifest ------------------------------------------------------------------------------------------------


class Manifest:
    """One row for every image of a job, in Parquet: parts while it runs, one file when it is over."""

    def __init__(self, output: str, queries: Mapping[str, str]) -> None:
        """``output`` is the folder of the job."""
        self.output, self.queries = output.rstrip("/"), queries
        self.path = f"{self.output}/{MANIFEST}"
        self._parts: list[str] = []
        self._job: dict[str, Any] = {}
        self._before: bytes | None = None
        self._run = secrets.token_hex(4)
        self._started = time.time_ns()

    def begin(self, job: Mapping[str, Any], *, overwrite: bool) -> dict[str, Row]:
        """Rows of earlier runs of the same job, by input; UserError if the outputs are those of another job."""
        record = f"{self.output}/{PARTS}/job.json"
        if _exists(record, self.queries):
            self._before = read_bytes(record, self.queries)
            known = json.loads(self._before)
            if known.pop("overwriting", False) and not overwrite:
                raise UserError(f"{self.output}: a run with --overwrite was interrupted; give --overwrite again")
            if known != job and not overwrite:
                differs = sorted(key for key in {*known, *job} if known.get(key) != job.get(key))
                if "source" in differs:
                    held = known.get("source", "another source")
                    raise UserError(f"{self.output}: holds images of {held}; choose another folder, or --overwrite")
                raise UserError(
                    f"{self.output}: holds images made with other settings ({', '.join(differs)}); "
                    "choose another folder, or --overwrite"
                )
        elif _exists(self.path, self.queries) and not overwrite:
            raise UserError(f"{self.path}: is no manifest of this job; choose another folder, or --overwrite")
        self._job = dict(job)
        self._note({**job, "overwriting": True} if overwrite else job)
        rows: dict[str, Row] = {}
        for row in self._recorded(self._list()):
            rows[row["input"]] = row
        return {} if overwrite else rows

    def _note(self, job: Mapping[str, Any]) -> None:
        write_bytes(f"{self.output}/{PARTS}/job.json", json.dumps(job, indent=1).encode(), self.queries)

    def forget(self) -> None:
        """Leave the record as it was before :meth:`begin`: nothing was made."""
        record = f"{self.output}/{PARTS}/job.json"
        if self._before is not None:
            write_bytes(record, self._before, self.queries)
            return
        filesystem, path = located(record, self.queries)
        with suppress(OSError, pa.ArrowException):
            filesystem.delete_file(path)

    def outputs(self) -> set[str]:
        """Outputs that are there, by one listing."""
        filesystem, path = located(self.output, self.queries)
        try:
            found = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
            return {
                f"{self.output}/{entry.path.removeprefix(path).lstrip('/')}"
                for entry in found
                if entry.type == fs.FileType.File
            }
        except (OSError, pa.ArrowException, UnicodeError) as error:
            raise UserError(f"{self.output}: cannot be listed ({_reason(error)})") from error

    def add(self, rows: Sequence[Row]) -> None:
        """Write rows that have come."""
        if rows:
            # Names in the order of writing, also over several runs.
            name = f"part-{self._started:020d}-{self._run}-{len(self._parts):06d}.parquet"
            self._parts.append(f"{self.output}/{PARTS}/{name}")
            self._write(self._parts[-1], rows)

    def end(self) -> list[Row]:
        """Join all rows into the one file: the latest of each input, sorted by input."""
        rows: dict[str, Row] = {}
        parts = self._list()
        for row in self._recorded(parts):
            known = rows.get(row["input"])
            # An image that was written and is found by a later run keeps the row of its making.
            if not (row["status"] == "found" and known is not None and known["status"] == "written"):
                rows[row["input"]] = row
        joined = [rows[name] for name in sorted(rows)]
        self._write(self.path, joined)
        self._note(self._job)
        for part in parts:
            if part != self.path:
                filesystem, path = located(part, self.queries)
                with suppress(OSError, pa.ArrowException):
                    filesystem.delete_file(path)
        return joined

    def _list(self) -> list[str]:
        """The file of an earlier job, and the parts after it."""
        filesystem, path = located(f"{self.output}/{PARTS}", self.queries)
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        names = sorted(entry.base_name for entry in found if entry.base_name.startswith("part-"))
        whole = [self.path] if _exists(self.path, self.queries) else []
        return [*whole, *(f"{self.output}/{PARTS}/{name}" for name in names)]

    def _recorded(self, parts: Sequence[str]) -> Iterator[Row]:
        """Rows of some parts, in the order of writing."""
        for part in parts:
            content = read_bytes(part, self.queries)
            try:
                yield from parquet.read_table(pa.BufferReader(content)).to_pylist()
            except pa.ArrowException as error:
                why = f"cannot be read as a manifest ({first_line(error)}); delete it, the outputs are found again"
                raise UserError(f"{part}: {why}") from error

    def _write(self, uri: str, rows: Sequence[Row]) -> None:
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(list(rows), SCHEMA), sink)
        write_bytes(uri, sink.getvalue().to_pybytes(), self.queries)


# ---- the job -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Resources of a job on Ray."""

    address: str = "local"
    """local: a cluster on this machine for the time of the job; auto: the one that runs here; or ray://HOST:PORT;
    none: without Ray, in this process alone."""
    num_cpus: float = 1.0
    """Processor cores of one actor."""
    num_gpus: float = 0.0
    """GPUs of one actor; fractions share one."""
    actors: int | None = None
    """Actors; None for as many as the cluster has room for."""
    images: int = 16
    """Images in one task: what the loss of a machine repeats at most, per actor."""
    retries: int = 3
    """Rounds in which images that came back from no actor are tried again, before they count as failed."""

    def __post_init__(self) -> None:
        if self.num_cpus < 0 or self.num_gpus < 0 or self.num_cpus + self.num_gpus == 0:
            raise UserError(f"{self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs per actor: accepted: more than none")
        if self.images < 1:
            raise UserError(f"{self.images} images per task: accepted: 1 and more")

    @property
    def lost(self) -> str:
        """The reason for images that come back from no actor."""
        return f"its process died in {self.retries + 1} tries"

    def spread(self, missing: dict[str, Row], actor: type, argument: Any) -> Generator[Row, None, None]:
        """Rows that actors of the class ``actor`` make of those of ``missing``, by "input"; what came is taken out.

        An actor is made with ``argument`` and called with tables of a task. It may die: what is left in ``missing`` at
        the end has taken its process with it in every round.
        """
        if not missing:
            return
        if self.address == "none":
            own = actor(argument)
            items = list(missing.values())
            for start in range(0, len(items), self.images):
                group = items[start : start + self.images]
                for row in own({name: [item[name] for item in group] for name in group[0]}).to_pylist():
                    del missing[row["input"]]
                    yield row
            return
        started = _connect(self.address)
        try:
            # Ray tries a task of a lost actor again, but it may use its tries up on a machine that is gone. Images that
            # come back from no actor have a round of their own, in the last one each by itself: only one that takes
            # its process with it is left then.
            for turn in range(self.retries + 1):
                alone = 0 < turn == self.retries
                for row in self._turn(list(missing.values()), 1 if alone else self.images, actor, argument):
                    if missing.pop(row["input"], None) is not None:
                        yield row
                if not missing:
                    return
                logger.warning("%d images came back from no actor", len(missing))
        finally:
            if started:
                import ray

                ray.shutdown()

    def _turn(self, items: list[Row], size: int, actor: type, argument: Any) -> Generator[Row, None, None]:
        """Rows that come back of ``items``, in tasks of ``size``."""
        import ray

        blocks = -(-len(items) // size)
        # Ray 2.60 to 2.63 take max_task_retries this way only, and warn that it will be a parameter.
        warnings.filterwarnings("ignore", category=ray.util.annotations.RayDeprecationWarning)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # images of an actor that died too often are rows, not the end of the job
        dataset = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
            actor,
            fn_constructor_args=(argument,),
            batch_size=None,  # a task is a block
            num_cpus=self.num_cpus or None,
            num_gpus=self.num_gpus or None,
            compute=ray.data.ActorPoolStrategy(size=self._actors(ray.cluster_resources(), blocks)),
            max_task_retries=1,
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch.to_pylist()

    def _actors(self, resources: Mapping[str, float], blocks: int) -> int:
        """Actors for which the cluster has room; UserError if for none."""
        room = [
            int(resources.get(kind, 0) / each)
            for kind, each in (("CPU", self.num_cpus), ("GPU", self.num_gpus))
            if each > 0
        ]
        most = min(room)
        if most < 1:
            have = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
            wanted = f"{self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs"
            raise UserError(f"the cluster has {have}, but one actor takes {wanted}")
        return max(1, min(self.actors or most, most, blocks))


@dataclass(kw_only=True)
class BatchJob:
    """All images of a folder, pattern or list into a folder; call :meth:`run`, again after an interruption."""

    source: str
    """Path or URI: see :func:`list_inputs`. Settings of its filesystem may follow a question mark."""
    output: str
    """Folder, local or on another filesystem; names below it mirror those of the inputs."""
    upscale: UpscaleImages = field(default_factory=UpscaleImages)
    cluster: Cluster = field(default_factory=Cluster)
    file_format: str = "keep"
    """Format of outputs; "keep" for that of the input, or PNG where that is only read."""
    column: str | None = None
    """Column of paths in a list."""
    overwrite: bool = False
    """Make every image anew, instead of those that are missing."""
    total: int = field(init=False, default=0)
    """Images of the job."""
    done: int = field(init=False, default=0)
    """Of these, those that earlier runs have made."""

    def plan(self) -> tuple[Manifest, list[tuple[str, str]], list[Row]]:
        """The manifest, (input, output) of images to make, and rows of those that cannot be; UserError in one line."""
        source, queries = split_query(self.source)
        output, more = split_query(self.output)
        self.upscale.queries.update({**queries, **more})
        listed = list_inputs(source, self.upscale.queries, self.column).outside(output)
        manifest = Manifest(output, self.upscale.queries)
        self.upscale.skip_existing = not self.overwrite
        rows = manifest.begin(self._description(), overwrite=self.overwrite)
        there = manifest.outputs() if rows else set()
        taken: dict[str, str] = {}
        pairs: list[tuple[str, str]] = []
        refused: list[Row] = []
        for path, name in zip(listed.inputs, listed.names, strict=True):
            target = f"{manifest.output}/{self._renamed(name)}"
            if target in taken:
                why = f"{path}: its output {target} is that of {taken[target]} already"
                refused.append({**_row(path, None), "status": "failed", "error": why})
                continue
            taken[target] = path
            if rows.get(path, {}).get("status") not in ("written", "found") or target not in there:
                pairs.append((path, target))
        self.total = len(listed.inputs)
        self.done = self.total - len(pairs) - len(refused)
        return manifest, pairs, refused

    def run(self) -> Generator[Row, None, None]:
        """Make what is missing; yields the row of every image as it is finished. Close the generator to stop early."""
        manifest, pairs, waiting = self.plan()
        yield from waiting
        flushed, any_made = time.monotonic(), False
        try:
            with closing(self._made(pairs)) as made:
                for row in made:
                    any_made = True
                    waiting.append(row)
                    if time.monotonic() - flushed > FLUSH_S:
                        flushed = time.monotonic()
                        try:
                            manifest.add(waiting)
                            waiting = []
                        except UserError as error:  # a full disk, for the images too: the others may fit
                            logger.warning("%s; its rows wait", error)
                    yield row
        except UserError:
            if not any_made:  # such as a model that there is none of: the folder is not bound to it
                waiting = []
                manifest.forget()
            raise
        finally:
            manifest.add(waiting)
        manifest.end()

    def _made(self, pairs: Sequence[tuple[str, str]]) -> Generator[Row, None, None]:
        if self.cluster.address == "none":
            yield from self.upscale.rows([_Item(row=_row(path, target)) for path, target in pairs])
            return
        missing = {path: {"input": path, "path": path, "output": target} for path, target in pairs}
        yield from self.cluster.spread(missing, _Actor, self.upscale)
        for path, item in missing.items():
            yield {**_row(path, item["output"]), "status": "failed", "error": f"{path}: {self.cluster.lost}"}

    def _renamed(self, name: str) -> str:
        stem, ending = posixpath.splitext(name)
        if self.file_format != "keep":
            return stem + FORMATS[self.file_format].endings[0]
        return name if ending.lower() in EXTENSIONS else stem + ".png"

    def _description(self) -> dict[str, Any]:
        """Everything that decides the outputs and their bytes."""
        hidden = ("prompt_embedding", "memory")
        options = {key: value for key, value in vars(self.upscale.options).items() if key not in hidden}
        source = split_query(self.source)[0]
        own = {
            "source": source.rstrip("/") if _root(source) else os.path.abspath(source),
            "model": self.upscale.model,
            "dtype": self.upscale.dtype,
            "loading": self.upscale.loading,
            "options": options,
            "format": self.file_format,
            "strip_metadata": self.upscale.strip_metadata,
            "version": __version__,
        }
        return dict(json.loads(json.dumps(own)))


class _Actor:
    """An actor of Ray with one model."""

    def __init__(self, upscale: UpscaleImages) -> None:
        self.upscale = upscale
        _ = upscale.upscaler

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> Any:
        """Enlarge one task's images."""
        return self.upscale(batch)


class MeasureFiles:
    """An actor of Ray that measures images in files, for ``onestepsr evaluate --ray``."""

    def __init__(self, make_scorer: Callable[[], Scorer]) -> None:
        """``make_scorer`` loads the metrics."""
        self.scorer = make_scorer()

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> Any:
        """Measure one task's images: :class:`Case` in, :class:`Score` out, both pickled, which keeps every digit."""
        workers = max(1, torch.get_num_threads())  # Ray sets it to the cores of the actor
        scores = list(score_files([pickle.loads(case) for case in batch["case"]], self.scorer, workers))
        return pa.table({"input": [score.name for score in scores], "score": [pickle.dumps(score) for score in scores]})


def measure_files(
    cases: Sequence[Case], make_scorer: Callable[[], Scorer], cluster: Cluster
) -> Generator[Score, None, None]:
    """Scores of images in files that all machines of ``cluster`` can read, in the order in which they are done."""
    missing = {case.name: {"input": case.name, "case": pickle.dumps(case)} for case in cases}
    with closing(cluster.spread(missing, MeasureFiles, make_scorer)) as rows:
        for row in rows:
            yield pickle.loads(row["score"])
    for name in missing:
        yield Score(name=name, problems=[Problem(reason=f"{name}: {cluster.lost}")])


def _connect(address: str) -> bool:
    """Connect to Ray unless this process is connected already; True if it was not. UserError if that fails."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtra("onestepsr batch", "batch") from error
    if ray.is_initialized():
        return False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Workers of Ray are nice by 15 for the sake of its own processes: beside anything else that computes, they starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    own: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        own |= {"include_dashboard": None, "object_store_memory": 200_000_000}
    try:
        ray.init(address=address, **own)
    except (ConnectionError, ValueError, OSError, RuntimeError) as error:
        raise UserError(f"--address {address}: Ray cannot be reached ({first_line(error)})") from error
    return True

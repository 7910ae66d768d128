"""The manifest of a job: what became of every image, kept while the job runs and after it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
from pyarrow import fs, parquet

from onestepsr.batch.files import exists, located, read_bytes, reason, write_bytes
from onestepsr.batch.images import SCHEMA, Row
from onestepsr.core.errors import UserError, first_line

MANIFEST = "manifest.parquet"
"""Name of the manifest in the output folder."""
PARTS = "_manifest"
"""Folder beside it with the rows of a run that is not over, and with what the run is."""
FLUSH_S = 15.0
"""Seconds after which the rows that have come are written to a part of the manifest."""


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
        if exists(record, self.queries):
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
        elif exists(self.path, self.queries) and not overwrite:
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
            raise UserError(f"{self.output}: cannot be listed ({reason(error)})") from error

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
        whole = [self.path] if exists(self.path, self.queries) else []
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

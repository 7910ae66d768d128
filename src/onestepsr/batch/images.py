"""The class that enlarges the images of a table's rows: for Ray Data, Spark, or a loop of one's own."""

from __future__ import annotations

import io
import posixpath
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from onestepsr.batch.files import exists, read_bytes, write_bytes
from onestepsr.core.errors import OneStepSRError, UserError, first_line
from onestepsr.imaging.formats import EXTENSIONS, MAX_PIXELS, kept_format
from onestepsr.imaging.image import LoadedImage
from onestepsr.imaging.read import read_image
from onestepsr.imaging.write import check_size, encode_image
from onestepsr.inference.devices import is_out_of_memory
from onestepsr.inference.options import UpscaleOptions, target_size
from onestepsr.inference.pipeline import Limits, grouped_map
from onestepsr.inference.upscaler import Upscaler, kind_of

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


def new_row(path: str, output: str | None) -> Row:
    """The row of an image for which nothing has been done."""
    return {**dict.fromkeys(WITH_IMAGE.names), "input": path, "output": output}


@dataclass(kw_only=True)
class Item:
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
            Item(row=new_row(str(path), output), content=content)
            for path, content, output in zip(columns["path"], contents, outputs, strict=True)
        ]
        rows = list(self.rows(items))
        table = pa.Table.from_pylist(rows, SCHEMA if "output" in columns else WITH_IMAGE)
        return table.to_pandas() if hasattr(batch, "iloc") else table

    def rows(self, items: Sequence[Item]) -> Generator[Row, None, None]:
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

    def _guarded(self, step: Callable[[Item], None]) -> Callable[[Item], Item]:
        """``step`` with its time in the row, and its error too: whatever is wrong with one image, others go on."""

        def run(item: Item) -> Item:
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

    def _read(self, item: Item) -> None:
        output = item.row["output"]
        if output is not None and self.skip_existing and exists(output, self.queries):
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

    def _enlarge(self, upscaler: Upscaler, group: list[Item]) -> list[Item]:
        images = [item.image for item in group if item.image is not None]
        if len(images) > 1:
            started = time.perf_counter()
            with suppress(Exception):  # then each by itself, so that the fault of one is no other's
                for item, image in zip(group, upscaler.upscale_images(images, self.options), strict=True):
                    item.image = image
                    item.row["seconds"] += round((time.perf_counter() - started) / len(group), 4)
                return group

        def alone(item: Item) -> None:
            image, item.image = item.image, None
            assert image is not None
            item.image = upscaler.upscale_image(image, self.options)

        return [self._guarded(alone)(item) for item in group]

    def _write(self, item: Item) -> None:
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

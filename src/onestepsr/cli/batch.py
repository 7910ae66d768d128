"""``onestepsr batch``: a folder, pattern or list of images on any filesystem, enlarged on a Ray cluster."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from onestepsr.cli.options import grouped, refuse
from onestepsr.cli.upscale.command import ImageOptions, ModelOptions
from onestepsr.core.errors import error_context
from onestepsr.core.progress import progress

if TYPE_CHECKING:
    from onestepsr.batch.job import Cluster

LINE_S = 10.0
"""Seconds between lines about progress where stderr is no terminal."""


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The cluster and its share for one actor."""

    address: Annotated[
        str,
        typer.Option(
            help="local (a cluster on this machine for this job), auto (the one running here), ray://HOST:PORT."
        ),
    ] = "local"
    num_cpus_per_actor: Annotated[float, typer.Option(help="Cores of one actor, which holds one model.")] = 1.0
    num_gpus_per_actor: Annotated[float, typer.Option(help="GPUs of one actor; 0.5 puts two on one.")] = 0.0
    actors: Annotated[int | None, typer.Option(min=1, help="Actors; by default as many as there is room for.")] = None
    images_per_task: Annotated[
        int, typer.Option(min=1, help="Images in one task: what a lost actor repeats at most.")
    ] = 16
    retries: Annotated[
        int, typer.Option(min=0, help="Rounds for images that were lost with their actor, before they count as failed.")
    ] = 3

    def checked(self) -> Cluster:
        """The cluster of a job; UserError for values out of range, and without the extra."""
        from onestepsr.batch.job import Cluster

        return Cluster(
            address=self.address,
            num_cpus=self.num_cpus_per_actor,
            num_gpus=self.num_gpus_per_actor,
            actors=self.actors,
            images=self.images_per_task,
            retries=self.retries,
        )


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Format and treatment of files."""

    file_format: Annotated[
        str, typer.Option("--format", help="keep, or a format by name or ending, as for 'onestepsr upscale'.")
    ] = "keep"
    column: Annotated[
        str | None, typer.Option(help="Column of paths in a Parquet, CSV or TSV list; path, input, uri, url or file.")
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make all images anew, not only missing ones.")] = False
    strip_metadata: Annotated[
        bool, typer.Option("--strip-metadata", help="Leave out EXIF, XMP, IPTC and texts; colours stay right.")
    ] = False
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Most pixels of an input, by its header; 250,000,000 if not given.")
    ] = None


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("batch")(grouped(batch))


def batch(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="Folder, pattern such as 's3://bucket/**/*.jpg', or a list: .txt, .csv, .tsv or .parquet with paths.",
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder, local or s3://, gs://, hdfs://.")],
    *,
    files: FileOptions,
    cluster: ClusterOptions,
    model: ModelOptions,
    image: ImageOptions,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log decisions and their reasons.")] = False,
) -> None:
    """Enlarge any number of images on a Ray cluster; needs the extra 'batch'.

    Outputs mirror the inputs' names and are equal to those of 'onestepsr upscale'. OUTPUT/manifest.parquet has one row
    for each image: sizes, seconds, status, error. The same command goes on where an earlier one was stopped or killed.
    Exit code: 0 all made, 1 some failed (the others are done), 2 wrong usage.
    """
    from onestepsr.batch import UpscaleImages
    from onestepsr.batch.job import BatchJob
    from onestepsr.imaging.formats import MAX_PIXELS, format_named

    if verbose:
        logging.getLogger("onestepsr").setLevel(logging.INFO)
    if image.width is not None or image.height is not None:
        refuse(context, ["scale"], "--width and --height exclude it")
    file_format = files.file_format.lower()
    if file_format != "keep":
        with error_context("--format"):
            file_format = format_named(file_format)
    upscale = UpscaleImages(
        model.model,
        model.device,
        model.dtype,
        image.checked(),
        # what one machine has measured is no reason for the others
        loading=model.loading | ({"engine": "torch"} if model.engine == "auto" else {}),
        max_pixels=files.max_pixels or MAX_PIXELS,
        strip_metadata=files.strip_metadata,
    )
    job = BatchJob(
        source=source,
        output=output,
        upscale=upscale,
        cluster=cluster.checked(),
        file_format=file_format,
        column=files.column,
        overwrite=files.overwrite,
    )
    counts = dict.fromkeys(("written", "found", "failed"), 0)
    started = told = time.monotonic()

    def summary() -> str:
        passed = time.monotonic() - started
        rate = counts["written"] / passed if passed else 0.0
        done = job.done + counts["written"] + counts["found"]
        return f"{done} of {job.total} images done, {counts['failed']} failed, {rate:.2f} images/s"

    try:
        with closing(job.run()) as rows:
            for row in progress(rows, "images"):
                counts[row["status"]] += 1
                if row["status"] == "failed":
                    typer.echo(f"failed: {row['error']}", err=True)
                if not sys.stderr.isatty() and time.monotonic() - told > LINE_S:
                    told = time.monotonic()
                    typer.echo(summary(), err=True)
    except KeyboardInterrupt:
        typer.echo(f"{summary()}; the same command goes on", err=True)
        raise
    typer.echo(summary(), err=True)
    typer.echo(f"{job.output.partition('?')[0].rstrip('/')}/manifest.parquet")
    if counts["failed"]:
        raise typer.Exit(1)

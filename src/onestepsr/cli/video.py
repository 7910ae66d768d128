"""``onestepsr video``: a film, an animation or an image sequence in, an enlarged one out."""

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
from onestepsr.core.errors import UserError
from onestepsr.core.progress import progress

if TYPE_CHECKING:
    from onestepsr.video.sinks import VideoOptions


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """Destination, codec and segments."""

    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            help="Output: .mp4, .m4v, .mov, .mkv, .webm; an animated .gif, .webp or .png; a folder, or a pattern such "
            "as out/%06d.png for images. Default: film_x4.mp4 beside film.mp4.",
        ),
    ] = None
    codec: Annotated[
        str | None, typer.Option(help="h264, hevc, vp9, av1, prores or ffv1; by default h264, in WebM vp9.")
    ] = None
    crf: Annotated[
        int | None,
        typer.Option(
            help="Constant quality: 0 (no visible loss, large) to 51, for vp9 and av1 to 63. Default: 17 to 24."
        ),
    ] = None
    segment: Annotated[
        int, typer.Option(help="Frames in a segment: what a killed run repeats at most; each begins with a key frame.")
    ] = 120
    fps: Annotated[str, typer.Option(help="Frames per second of an image sequence, such as 25 or 30000/1001.")] = "24"
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False

    def checked(self) -> VideoOptions:
        """Options for the job; UserError for values out of range."""
        from fractions import Fraction

        from onestepsr.video.sinks import VideoOptions

        try:
            fps = Fraction(self.fps)
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"fps '{self.fps}': accepted: a number, or two with a slash such as 30000/1001") from error
        return VideoOptions(codec=self.codec, crf=self.crf, segment=self.segment, fps=fps)


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("video")(grouped(video))


def video(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT", help="A film, an animated GIF, WebP or PNG, a folder of frames, or 'in/%04d.png'."
        ),
    ],
    *,
    encoding: EncodingOptions,
    model: ModelOptions,
    image: ImageOptions,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log decisions and their reasons.")] = False,
) -> None:
    """Enlarge a film frame by frame; needs the extra 'video'.

    Sound, subtitles, chapters, rotation, colour description and the time of every frame are kept. Memory does not grow
    with length. A run that was stopped or killed goes on where it was when the same command is given again. Exit code:
    0 done, 1 done but the input was damaged, 2 wrong usage or nothing could be made.
    """
    from onestepsr.video.job import VideoJob, default_target

    if verbose:
        logging.getLogger("onestepsr").setLevel(logging.INFO)
    if image.width is not None or image.height is not None:
        refuse(context, ["scale"], "--width and --height exclude it")
    options, settings = image.checked(), encoding.checked()
    target = encoding.out or default_target(source, image.suffix)
    upscaler = model.load(options.seed)
    job = VideoJob(source, target, upscaler, options, settings, overwrite=encoding.overwrite, loading=model.loading)
    done, resumed = 0, False
    started = time.monotonic()
    try:
        with closing(job.run()) as states:
            for state in progress(states, "frames", total=job.source.count):
                if not resumed and job.goes_on and state.frame > done + 1:
                    typer.echo(f"{target}: goes on after frame {state.frame}", err=True)
                resumed, done = True, state.frame
                if state.segment_ended and not sys.stderr.isatty():
                    of = "" if state.count is None else f" of {state.count}"
                    typer.echo(f"{done}{of} frames, {time.monotonic() - started:.0f} s", err=True)
    except KeyboardInterrupt:
        typer.echo(f"{target}: {done} frames made; the same command goes on after the last whole segment", err=True)
        raise
    typer.echo(target)
    if job.problem is not None:
        typer.echo(f"damaged: {job.problem}", err=True)
        raise typer.Exit(1)

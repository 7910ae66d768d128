"""One film, animation or sequence enlarged into another, from its first check to the finished file."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onestepsr import __version__
from onestepsr.core.errors import UserError
from onestepsr.core.files import locked, read_text, write_text
from onestepsr.imaging.folders import is_image_name
from onestepsr.imaging.image import LoadedImage
from onestepsr.imaging.write import check_writable, format_of
from onestepsr.inference.memory_plan import smallest_side
from onestepsr.inference.options import UpscaleOptions, target_size
from onestepsr.inference.pipeline import Limits, bounded_map
from onestepsr.inference.upscaler import Upscaler
from onestepsr.video.sinks import (
    CONTAINERS,
    TURNING,
    AnimationSink,
    FilmSink,
    SequenceSink,
    Sink,
    VideoOptions,
    image_name,
)
from onestepsr.video.sources import ANIMATIONS, Frame, SequenceSource, open_source


@dataclass(frozen=True, kw_only=True)
class Progressed:
    """State of a run after one frame."""

    frame: int
    """Frames that are finished, those of an earlier run included."""
    count: int | None
    """Frames in all, if the source says so."""
    segment_ended: bool


class VideoJob:
    """One film, animation or sequence to be enlarged into another."""

    def __init__(
        self,
        source: str,
        target: str,
        upscaler: Upscaler,
        options: UpscaleOptions | None = None,
        video: VideoOptions | None = None,
        *,
        overwrite: bool = False,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        """Check everything that can be checked before any work; :class:`UserError` in one line.

        ``target`` is a film, an animation, a folder or a pattern with ``%d``, by its ending. ``loading`` are the other
        arguments of :meth:`Upscaler.from_pretrained`: a stopped run goes on with the same ones only.
        """
        self.video, self.upscaler = video or VideoOptions(), upscaler
        self._loading = dict(loading or {})
        self.target = Path(target)
        self.source = open_source(source, self.video.fps)
        options = options or UpscaleOptions()
        self.size = target_size(self.source.width, self.source.height, options)
        self.kind: Literal["film", "animation", "sequence"] = kind_of(self.target)
        if not self.target.name:
            raise UserError(f"{target}: expected a name; -o chooses a film, an animation, a folder or a pattern")
        if self.target.resolve() == Path(source).resolve():
            raise UserError(f"{target}: the output is the input; -o chooses another name")
        if self.kind == "sequence":
            self._refuse_inputs(Path(source))
        self.work = self.target.with_name(f".onestepsr-video-{self.target.name.replace('%', '')}")
        plan = upscaler.plan(self.source.height, self.source.width, options)
        self.options = replace(options, tile=_fixed_tile(plan.tile, plan.tiles, plan.multiple, options))
        self._identity = self._description(source)
        state = self._read_state()
        self.goes_on = state is not None and state["job"] == self._identity
        if self.goes_on and state is not None:
            self.options = replace(self.options, tile=state["tile"])  # the free memory may be another today
        elif not overwrite and (there := self._existing()) is not None:
            raise UserError(f"{there}: already exists; give --overwrite")
        self.problem: str | None = None
        """The reason that some frames are missing; known after the last one."""

    def _refuse_inputs(self, source: Path) -> None:
        """UserError if images of the output would replace those of the input, or each other."""
        numbered = "%" in self.target.name
        folder = self.target.parent if numbered else self.target
        whole = isinstance(self.source, SequenceSource)
        files = self.source.files if isinstance(self.source, SequenceSource) else [source]
        if (whole or is_image_name(source.name)) and folder.resolve() in {path.parent.resolve() for path in files}:
            raise UserError(f"{self.target}: the output's folder is that of the input; -o chooses another")
        if numbered or not isinstance(self.source, SequenceSource):
            return
        taken: dict[str, Path] = {}
        for path, name in zip(files, self.source.names, strict=True):
            other = taken.setdefault(image_name(name), path)
            if other is not path:
                raise UserError(f"{path}: its output has the name of that of {other}; -o takes a pattern: out/%06d.png")

    def _existing(self) -> Path | None:
        """A file or folder that the output would replace."""
        if "%" in self.target.name:
            before, width, after = re.split(r"%0?(\d*)d", self.target.name)
            digits = re.compile(rf"{re.escape(before)}\s*\d{{{int(width or 1)},}}{re.escape(after)}")
            folder = self.target.parent
            return next((p for p in folder.iterdir() if digits.fullmatch(p.name)), None) if folder.is_dir() else None
        if self.kind == "sequence" and self.target.is_dir() and not any(self.target.iterdir()):
            return None
        return self.target if self.target.exists() else None

    def run(self) -> Generator[Progressed, None, None]:
        """Enlarge frame by frame; the result is in its place when the generator ends. Close it to stop early."""
        self._sink(self.work / "none")  # options that cannot be are refused before the segments of others go
        check_writable(self.work / "state")
        with locked(self.work / "lock", wait=False) as free:
            if not free:
                raise UserError(f"{self.target}: another process is making it")
            if not self.goes_on:
                for path in self.work.iterdir():
                    if path.name != "lock":
                        path.unlink()
                write_text(self.work / "state.json", json.dumps({"job": self._identity, "tile": self.options.tile}))
            sink = self._sink(self.work)
            yield from self._through(sink)
            self.problem = self.source.problem
            sink.finish()
            (self.work / "state.json").unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)  # what is left is no state, and goes with the next run

    def _through(self, sink: Sink) -> Iterator[Progressed]:
        turn = self._turn()

        def read(numbered: tuple[int, Frame]) -> tuple[int, Frame, LoadedImage]:
            image = numbered[1].load()
            return (*numbered, image if turn is None else turn(image))

        def run(loaded: tuple[int, Frame, LoadedImage]) -> tuple[int, Frame, LoadedImage]:
            return (*loaded[:2], self.upscaler.upscale_image(loaded[2], self.options))

        def write(made: tuple[int, Frame, LoadedImage]) -> int:
            sink.write(made[0], made[2], made[1])
            return made[0] + 1

        def nbytes(loaded: tuple[int, Frame, LoadedImage]) -> int:
            return int(loaded[2].pixels.nbytes) * (1 + self.upscaler.scale**2)

        frames = ((index, frame) for index, frame in enumerate(self.source.frames()) if index >= sink.done)
        one_each = Limits(images=4, readers=1, writers=1)  # frames are encoded in their order, by one thread
        made = bounded_map(frames, read, run, write, nbytes=nbytes, limits=one_each)
        if sink.done:
            yield Progressed(frame=sink.done, count=self.source.count, segment_ended=False)
        with contextlib.closing(made) as numbers:
            for number in numbers:
                ended = number % self.video.segment == 0
                yield Progressed(frame=number, count=self.source.count, segment_ended=ended)

    def _sink(self, work: Path) -> Sink:
        if self.kind == "film":
            return FilmSink(self.target, work, self.source, self.video)
        if self.kind == "animation":
            return AnimationSink(self.target, work, self.source)
        return SequenceSink(self.target, work, self.source)

    def _turn(self) -> Callable[[LoadedImage], LoadedImage] | None:
        """Turn frames upright where the output cannot say that players have to."""
        display = self.source.look.display
        if display is None or (self.kind == "film" and CONTAINERS[self.target.suffix.lower()] in TURNING):
            return None
        # The matrix is (a b u; c d v; x y w) with 16.16 fixed point a to d: (x, y) -> (ax + cy, bx + dy).
        a, b, c, d = (round(display[index] / 65536) for index in (0, 1, 3, 4))

        def turn(image: LoadedImage) -> LoadedImage:
            def moved(samples: Any) -> Any:
                if b or c:
                    samples, down, right = np.swapaxes(samples, 0, 1), b, c
                else:
                    down, right = d, a
                return np.ascontiguousarray(samples[:: 1 if down > 0 else -1, :: 1 if right > 0 else -1])

            return replace(image, pixels=moved(image.pixels), alpha=None if image.alpha is None else moved(image.alpha))

        return turn

    def _description(self, source: str) -> dict[str, Any]:
        """Everything that decides the bytes of the result."""
        files = self.source.files if isinstance(self.source, SequenceSource) else [Path(source)]
        stats = [path.stat() for path in files]
        options = {
            key: value for key, value in vars(self.options).items() if key not in ("prompt_embedding", "tile", "memory")
        }
        return {
            "files": [
                [str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in zip(files, stats, strict=True)
            ],
            "model": [self.upscaler.name, str(self.upscaler.dtype), str(self.upscaler.device), self.upscaler.engine],
            "loading": self._loading,
            "options": options,
            "video": {**asdict(self.video), "fps": str(self.video.fps)},
            "version": __version__,
        }

    def _read_state(self) -> dict[str, Any] | None:
        path = self.work / "state.json"
        if not path.exists():
            return None
        try:
            state = json.loads(read_text(path, 100_000_000, "state of a run"))
            return state if isinstance(state, dict) and set(state) == {"job", "tile"} else None
        except (UserError, ValueError):
            return None


def kind_of(target: Path) -> Literal["film", "animation", "sequence"]:
    """The kind of output that a name stands for; UserError for an ending that is none."""
    suffix = target.suffix.lower()
    if "%" in target.name:
        if not re.search(r"%0?\d*d", target.name) or target.name.count("%") != 1:
            raise UserError(f"{target}: expected one number in the pattern, such as frame_%06d.png")
        format_of(target)
        return "sequence"
    if target.is_dir() or not suffix:
        return "sequence"
    if suffix in ANIMATIONS:
        return "animation"
    if suffix in CONTAINERS:
        return "film"
    known = ", ".join([*CONTAINERS, *ANIMATIONS])
    raise UserError(f"{target}: the ending '{suffix}' cannot be written; accepted: {known}, a folder, or %06d.png")


def default_target(source: str, suffix: str) -> str:
    """Name of the output beside the input: NAME_x4.mp4 for a film that can be read only, else the input's ending."""
    path = Path(source)
    if path.is_dir():
        return str(path.resolve().with_name(path.resolve().name + suffix))
    if not path.exists():
        raise UserError(f"{source}: give -o, the name of the output")
    ending = path.suffix if path.suffix.lower() in {**CONTAINERS, **ANIMATIONS} else ".mp4"
    return str(path.with_name(path.stem + suffix + ending))


def _fixed_tile(tile: tuple[int, int], tiles: int, multiple: int, options: UpscaleOptions) -> int | Literal["off"]:
    """One side for the tiles of all frames, whatever memory is free later: that of a square as large as planned."""
    if isinstance(options.tile, int):
        return options.tile
    if tiles == 1:
        return "off"
    return max(math.isqrt(tile[0] * tile[1]) // multiple * multiple, smallest_side(options))

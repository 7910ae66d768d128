"""Frames with exact time stamps: of a film, of an animation, of an image sequence."""

from __future__ import annotations

import contextlib
import glob
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from PIL import Image

from onestepsr.core.errors import UserError, first_line
from onestepsr.imaging.folders import is_image_name, list_images
from onestepsr.imaging.formats import MAX_PIXELS
from onestepsr.imaging.image import LoadedImage, from_array
from onestepsr.imaging.read import read_image

logger = logging.getLogger(__name__)

ANIMATIONS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG", ".apng": "PNG"}
"""Endings of animated images, and Pillow's names of their formats."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame, before it is converted."""

    load: Callable[[], LoadedImage]
    pts: int
    """Presentation time in the source's time base; strictly increasing."""
    duration: int
    """In the same unit; 0 if the source does not say."""
    name: str | None = None
    """Path of the file in its folder, of a sequence."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """Everything about a film's samples that its frames do not hold themselves; code points of ITU-T H.273."""

    pixel_format: str | None = None
    """FFmpeg's name, such as yuv420p."""
    matrix: int = 2
    full_range: bool = False
    primaries: int = 2
    transfer: int = 2
    display: tuple[int, ...] | None = None
    """The nine entries of FFmpeg's display matrix, if the film is to be turned or mirrored."""
    aspect: Fraction | None = None
    """Width of a pixel / its height."""
    rate: Fraction = Fraction(25)
    """Frames per second, on average."""


class Source:
    """Frames of one film, animation or sequence, each time in the same order."""

    time_base = Fraction(1, 1000)
    """Seconds in one unit of time stamps."""
    width = height = 0
    count: int | None = None
    """Number of frames that the file states."""
    look = Look()
    problem: str | None = None
    """The reason that some frames could not be had; known after the last one."""

    def frames(self) -> Iterator[Frame]:
        """All frames, from the first one."""
        raise NotImplementedError


class FilmSource(Source):
    """A film in any container that FFmpeg reads."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`UserError` for a file without a video stream that can be decoded."""
        self.path = path
        with self._opened() as container:
            stream = self._stream(container)
            self.time_base = stream.time_base or Fraction(1, 90_000)
            self.count = stream.frames or None
            self.rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            first = next(self._decoded(container, stream), None)
            if first is None:
                raise UserError(
                    f"{path}: no frame of its video can be decoded; {self.problem or 'the stream is empty'}"
                )
            context = stream.codec_context
            self.width, self.height = first.width, first.height
            self.problem = None
            if self.width * self.height > MAX_PIXELS:
                raise UserError(f"{path}: {self.width} x {self.height} pixels are more than {MAX_PIXELS:,}")
            name = first.format.name
            known = int(first.colorspace or context.colorspace or 2)
            display = first.side_data.get(SideDataType.DISPLAYMATRIX)
            self.look = Look(
                pixel_format=name.replace("yuvj", "yuv"),
                # Players take a film that does not say so for BT.601 if it is small and for BT.709 if it is large,
                # and the enlarged one is large: it says which.
                matrix=known if known != 2 else 6 if self.height <= 576 else 1,
                full_range=int(first.color_range) == 2 or name.startswith("yuvj"),
                primaries=int(first.color_primaries),
                transfer=int(first.color_trc),
                display=None if display is None else tuple(int(v) for v in np.frombuffer(bytes(display), "<i4")),
                aspect=stream.sample_aspect_ratio,
                rate=self.rate,
            )
            self.deep = max(part.bits for part in first.format.components) > 8
            self.alpha = any(part.is_alpha for part in first.format.components)
            if first.interlaced_frame:
                logger.warning("%s: interlaced; its lines are enlarged as they are, deinterlace it first", path)

    def frames(self) -> Iterator[Frame]:
        """Frames as the decoder gives them; one that cannot be decoded is left out and counted in ``problem``."""
        last: int | None = None
        seen = 0
        step = max(1, round(1 / (self.rate * self.time_base)))
        with self._opened() as container:
            stream = self._stream(container)
            for frame in self._decoded(container, stream):
                if (frame.width, frame.height) != (self.width, self.height):
                    size = f"{frame.width} x {frame.height}"
                    raise UserError(
                        f"{self.path}: frame {seen} has {size} pixels, those before it {self.width} x {self.height}"
                    )
                pts = frame.pts if frame.pts is not None else 0 if last is None else last + step
                last = pts if last is None else max(pts, last + 1)
                seen += 1
                yield Frame(load=partial(self._image, frame), pts=last, duration=frame.duration or 0)
            stated = str(stream.metadata.get("DURATION", ""))
        if self.problem is None:
            self.problem = self._missing(seen, last, stated)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[InputContainer]:
        try:
            with av.open(str(self.path.absolute()), "r") as container:
                yield container
        except av.error.FFmpegError as error:
            raise UserError(f"{self.path}: cannot be read as a film ({error.strerror})") from error

    def _stream(self, container: InputContainer) -> Any:
        stream = main_stream(container)
        if stream is None:
            raise UserError(f"{self.path}: holds no video")
        stream.thread_type = "AUTO"
        return stream

    def _decoded(self, container: InputContainer, stream: Any) -> Iterator[Any]:
        bad, reason = 0, ""
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                yield from packet.decode()
            except av.error.InvalidDataError as error:
                bad, reason = bad + 1, error.strerror
                if packet is None:
                    break
            except av.error.EOFError:
                break
            if bad:
                self.problem = f"{self.path}: {bad} packets could not be decoded ({reason})"

    def _missing(self, seen: int, last: int | None, stated: str) -> str | None:
        """The line about a film that ends before the end that it states."""
        if self.count is not None and seen < self.count:
            return f"{self.path}: ends after {seen} of {self.count} frames"
        match = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stated)
        if match is None or last is None:
            return None
        hours, minutes, seconds = match.groups()
        end, whole = (
            float((last + 1) * self.time_base + 1 / self.rate),
            3600 * int(hours) + 60 * int(minutes) + float(seconds),
        )
        return f"{self.path}: ends after {end:.2f} of {whole:.2f} s" if end < whole - 2 / self.rate - 0.01 else None

    def _image(self, frame: Any) -> LoadedImage:
        """Full-range RGB of 8 or 16 bits, in the film's own primaries and with its own transfer curve."""
        rgb = frame.reformat(
            format=RGB[self.deep, self.alpha],
            src_colorspace=swscale(self.look.matrix),
            src_color_range=2 if self.look.full_range else 1,
            dst_color_range=2,
            interpolation="BICUBIC",
        )
        return from_array(rgb.to_ndarray())


class AnimationSource(Source):
    """An animated GIF, WebP or PNG; an image that stands still has one frame."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`UserError` for a file that is none."""
        self.path = path
        with self._opened() as image:
            self.width, self.height = image.size
            self.count = int(getattr(image, "n_frames", 1))
            self.plays = _plays(image.info.get("loop"), image.format or "")
        if self.width * self.height > MAX_PIXELS:
            raise UserError(f"{path}: {self.width} x {self.height} pixels are more than {MAX_PIXELS:,}")

    def frames(self) -> Iterator[Frame]:
        """Whole frames, as a browser shows them."""
        pts = 0
        with self._opened() as image:
            for number in range(self.count or 1):
                try:
                    image.seek(number)
                    rgba = np.array(image.convert("RGBA"))
                except (OSError, EOFError, SyntaxError, ValueError) as error:
                    self.problem = f"{self.path}: ends after {number} of {self.count} frames ({first_line(error)})"
                    return
                # Browsers show frames of no duration for a tenth of a second.
                duration = round(float(image.info.get("duration", 0))) or 100
                loaded = from_array(rgba if rgba[..., 3].min() < 255 else np.ascontiguousarray(rgba[..., :3]))
                yield Frame(load=partial(_same, loaded), pts=pts, duration=duration)
                pts += duration

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with Image.open(self.path) as image:
                yield image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.path}: cannot be read as an animation ({first_line(error)})") from error


class SequenceSource(Source):
    """Images of one size in the order of their numbers."""

    def __init__(self, files: Sequence[Path], names: Sequence[str], fps: Fraction) -> None:
        """``names`` are those of the outputs, relative to their folder."""
        self.files, self.names = files, names
        self.time_base, self.count = 1 / fps, len(files)
        self.look = Look(rate=fps)
        first = read_image(files[0])
        self.width, self.height = first.width, first.height

    def frames(self) -> Iterator[Frame]:
        """One frame per file; one that cannot be read is an error, since a film cannot go without it."""
        for number, (path, name) in enumerate(zip(self.files, self.names, strict=True)):
            yield Frame(load=partial(self._load, path), pts=number, duration=1, name=name)

    def _load(self, path: Path) -> LoadedImage:
        image = read_image(path)
        if (image.width, image.height) != (self.width, self.height):
            size = f"{image.width} x {image.height}"
            raise UserError(f"{path}: {size} pixels, but the first frame has {self.width} x {self.height}")
        return image


def open_source(text: str, fps: Fraction) -> Source:
    """The frames that ``text`` stands for: a film, an animation, a folder, or a pattern such as ``in/%04d.png``.

    Raises :class:`UserError` if there are none.
    """
    path = Path(text)
    if path.is_dir():
        found = [path / name for name in sorted(list_images(path, False).names, key=_natural)]
        if not found:
            raise UserError(f"{path}: the folder holds no images")
        return SequenceSource(found, [own.name for own in found], fps)
    if path.is_file():
        return AnimationSource(path) if path.suffix.lower() in ANIMATIONS else FilmSource(path)
    numbered = re.sub(r"%0?\d*d", "*", text)
    if numbered != text or glob.has_magic(text):
        matches = [Path(match) for match in glob.glob(numbered)]
        if numbered != text:
            digits = re.compile(r"(\d+)".join(re.escape(part) for part in re.split(r"%0?\d*d", path.name)))
            matches = [match for match in matches if digits.fullmatch(match.name)]
        matches = sorted((m for m in matches if is_image_name(m.name)), key=lambda match: _natural(match.name))
        if not matches:
            raise UserError(f"{text}: no image matches this pattern")
        return SequenceSource(matches, [match.name for match in matches], fps)
    raise UserError(f"{text}: no such file or folder")


def _plays(loop: int | None, kind: str) -> int:
    """Showings of an animation, 0 for endless ones: GIF counts repetitions, WebP and PNG count all showings."""
    return 1 if loop is None else int(loop) + (kind == "GIF" and loop > 0)


def _same(image: LoadedImage) -> LoadedImage:
    return image


def main_stream(container: InputContainer) -> Any:
    """The first video stream that is no cover image; None if there is none."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    return None


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def swscale(matrix: int) -> int:
    """FFmpeg's scaler's number for a matrix of H.273."""
    return {1: 1, 4: 4, 7: 7, 9: 9, 10: 9}.get(matrix, 5)


WITH_ALPHA = ("yuva", "gbrap", "rgba", "bgra")
"""Beginnings of the names of pixel formats that hold transparency."""
RGB = {(False, False): "rgb24", (False, True): "rgba", (True, False): "rgb48le", (True, True): "rgba64le"}


def pixel_format(wanted: str | None, known: Sequence[str], *, deep: bool, alpha: bool) -> str:
    """The encoder's pixel format nearest to that of the source: the same, else as deep, else 8 bits, and of these the
    one with as many colour samples."""
    if wanted in known and wanted is not None:
        return wanted
    choices = [
        *("yuv420p", "yuv422p", "yuv444p"),
        *("yuv420p10le", "yuv422p10le", "yuv444p10le", "yuv420p16le", "yuv444p16le"),
    ]
    chroma = re.search("4[1-4][0-4]", wanted or "")
    choices.sort(key=lambda name: (("p1" in name) != deep, chroma is not None and chroma.group() not in name))
    if alpha:
        deep_first = ("yuva444p10le", "yuva444p16le", "yuva420p") if deep else ("yuva420p", "bgra", "yuva444p10le")
        choices = [*deep_first, *choices]
    return next((name for name in choices if name in known), known[0])


def fineness(name: str) -> tuple[int, int, int]:
    """Bits of a sample of a pixel format, and colour samples for every two pixels across and down."""
    parts = av.VideoFormat(name, 2, 2).components
    return parts[0].bits, parts[min(1, len(parts) - 1)].width, parts[min(1, len(parts) - 1)].height

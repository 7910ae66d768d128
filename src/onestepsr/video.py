"""Video: films, animations and image sequences, enlarged frame by frame in memory of constant size.

A :class:`Source` gives frames with exact time stamps, a :class:`Sink` takes the enlarged ones. Films are encoded in
segments that are kept until the last one is there and are then joined, beside the copied audio, into the result: a run
that was killed goes on after its last whole segment, and ends in the same bytes as one that was not. The tiles are
planned once, and every frame is drawn with the same seed, so that nothing but the film itself changes between frames.
"""

from __future__ import annotations

import contextlib
import glob
import heapq
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from onestepsr import __version__
from onestepsr.core.errors import MissingExtra, UserError, first_line
from onestepsr.core.files import locked, read_text, replacing, write_text, writing
from onestepsr.imaging.folders import is_image_name, list_images
from onestepsr.imaging.formats import MAX_PIXELS
from onestepsr.imaging.image import LoadedImage, from_array, interleaved, to_eight_bits
from onestepsr.imaging.read import read_image
from onestepsr.imaging.write import check_size, check_writable, format_of, write_image
from onestepsr.inference.memory_plan import smallest_side
from onestepsr.inference.options import UpscaleOptions, target_size
from onestepsr.inference.pipeline import Limits, bounded_map
from onestepsr.inference.upscaler import Upscaler

try:
    import av
    from av.container import InputContainer, OutputContainer
    from av.sidedata.sidedata import Type as SideDataType
except ImportError as error:
    raise MissingExtra("onestepsr video", "video") from error

logger = logging.getLogger(__name__)
os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder prints a page about itself otherwise

ANIMATIONS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG", ".apng": "PNG"}
"""Endings of animated images, and Pillow's names of their formats."""
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
"""Endings of the films that can be written, and FFmpeg's names of their containers."""
TURNING = ("mp4", "mov", "matroska")
"""Containers that hold a display matrix; for others the frames themselves are turned."""
SEGMENT = 120
"""Frames in one segment. Each begins with a key frame, and is what a killed run has to repeat at most."""
PART = "part-{:06d}"
HOLDS = {
    "mp4": ("h264", "hevc", "vp9", "av1"),
    "mov": ("h264", "hevc", "prores"),
    "matroska": ("h264", "hevc", "vp9", "av1", "prores", "ffv1"),
    "webm": ("vp9", "av1"),
}
"""Codecs that a container holds, as FFmpeg writes and players read it; the first is the default."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """An encoder of FFmpeg's, by the name of what it makes."""

    encoder: str
    crf: int | None
    """Constant quality if none is given: hardly a loss to be seen. None where there is no such scale."""
    worst: int = 51
    """End of that scale."""
    options: tuple[tuple[str, str], ...] = ()
    segments: str = "nut"
    """Container of the segments."""
    says_range: bool = True
    """False if players take its samples for those of limited range whatever a file says."""


CODECS = {
    "h264": Codec(encoder="libx264", crf=17, options=(("preset", "medium"),)),
    "hevc": Codec(
        encoder="libx265",
        crf=19,
        options=(("preset", "medium"), ("x265-params", "log-level=error:pools=none:frame-threads=1")),
    ),
    "vp9": Codec(encoder="libvpx-vp9", crf=24, worst=63, options=(("b", "0"),)),
    "av1": Codec(encoder="libsvtav1", crf=24, worst=63, options=(("preset", "7"),)),
    "prores": Codec(encoder="prores_ks", crf=None, segments="mov", says_range=False),
    "ffv1": Codec(encoder="ffv1", crf=None, options=(("level", "3"),)),
}


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Options of the encoder and of the run."""

    codec: str | None = None
    """A key of :data:`CODECS`; None is h264, or vp9 in WebM."""
    crf: int | None = None
    """Constant quality: 0 is without loss or nearly so, higher is smaller; None is the codec's default."""
    segment: int = SEGMENT
    """Frames in one segment, which is what a killed run repeats at most."""
    fps: Fraction = Fraction(24)
    """Frames per second of an image sequence."""

    def __post_init__(self) -> None:
        if self.codec is not None and self.codec not in CODECS:
            raise UserError(f"codec '{self.codec}': accepted: {', '.join(CODECS)}")
        if self.segment < 1:
            raise UserError(f"segment {self.segment}: accepted: 1 frame and more")
        if self.fps <= 0:
            raise UserError(f"fps {self.fps}: accepted: more than 0")


# ---- frames and their sources ------------------------------------------------------------------------------------


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
            format=_RGB[self.deep, self.alpha],
            src_colorspace=_swscale(self.look.matrix),
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


def _swscale(matrix: int) -> int:
    """FFmpeg's scaler's number for a matrix of H.273."""
    return {1: 1, 4: 4, 7: 7, 9: 9, 10: 9}.get(matrix, 5)


# ---- sinks -------------------------------------------------------------------------------------------------------


class Sink:
    """Destination of enlarged frames, written in order; what is done survives a kill."""

    done = 0
    """Frames that an earlier run has finished."""

    def write(self, index: int, image: LoadedImage, frame: Frame) -> None:
        """Take one frame."""
        raise NotImplementedError

    def finish(self) -> None:
        """Make the result visible, once the last frame is written."""
        raise NotImplementedError


class FilmSink(Sink):
    """A film: segments in a folder beside it, joined with the streams that are copied from the source."""

    def __init__(self, target: Path, work: Path, source: Source, options: VideoOptions) -> None:
        """UserError for a codec that the container cannot hold, or a quality that it does not have."""
        self.target, self.work, self.source = target, work, source
        self.container = CONTAINERS[target.suffix.lower()]
        holds = HOLDS[self.container]
        name = options.codec or holds[0]
        self.codec, self.segment = CODECS[name], options.segment
        if name not in holds:
            raise UserError(
                f"{target}: this container holds {', '.join(holds)}, not {name}; one that ends in .mkv does"
            )
        try:
            av.Codec(self.codec.encoder, "w")
        except ValueError as error:
            raise UserError(f"codec {name}: FFmpeg's libraries here were built without {self.codec.encoder}") from error
        self.full_range = source.look.full_range and self.codec.says_range
        self.crf = self.codec.crf if options.crf is None else options.crf
        if options.crf is not None and not (self.codec.crf is not None and 0 <= options.crf <= self.codec.worst):
            takes = "takes none" if self.codec.crf is None else f"accepted: 0 to {self.codec.worst}"
            raise UserError(f"crf {options.crf}: {name} {takes}")
        self.parts: list[dict[str, Any]] = []
        while (record := work / f"{PART.format(len(self.parts))}.json").exists():
            self.parts.append(json.loads(read_text(record, 100_000_000, "record of a segment")))
        self.done = sum(len(part["frames"]) for part in self.parts)
        self._output: OutputContainer | None = None
        self._stream: Any = None
        self._frames: list[tuple[int, int]] = []
        self._order: list[int] = []

    def write(self, index: int, image: LoadedImage, frame: Frame) -> None:
        """Encode one frame into the current segment."""
        with self._writing():
            if self._output is None:
                path = self.work / f"{PART.format(len(self.parts))}.film"
                self._output = av.open(str(path.absolute()), "w", format=self.codec.segments)
                self._stream = self._new_stream(self._output, image)
            self._mux(self._stream.encode(self._converted(image, frame)))
            self._frames.append((frame.pts, frame.duration))
            if len(self._frames) == self.segment:
                self._end_segment()

    def finish(self) -> None:
        """Join the segments, copy the other streams, and put the film in its place."""
        with self._writing():
            if self._output is not None:
                self._end_segment()
            with replacing(self.target) as partial:
                self._join(partial)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors of the disk, the encoder and the container as one line."""
        try:
            with writing(self.target):
                yield
        except av.error.FFmpegError as error:
            raise UserError(
                f"{self.target}: {self.codec.encoder} or the container failed ({error.strerror})"
            ) from error

    def _end_segment(self) -> None:
        assert self._output is not None
        self._mux(self._stream.encode(None))
        self._output.close()
        self._output = None
        record = {"frames": self._frames, "order": self._order}
        write_text(self.work / f"{PART.format(len(self.parts))}.json", json.dumps(record))
        self.parts.append(record)
        self._frames, self._order = [], []

    def _mux(self, packets: Sequence[Any]) -> None:
        assert self._output is not None
        for packet in packets:
            self._order.append(packet.pts)
            self._output.mux(packet)

    def _new_stream(self, output: OutputContainer, image: LoadedImage) -> Any:
        look = self.source.look
        crf = {} if self.crf is None else {"crf": str(self.crf)}
        stream: Any = output.add_stream(self.codec.encoder, rate=look.rate, options={**dict(self.codec.options), **crf})
        context = stream.codec_context
        deep, alpha = image.pixels.dtype == np.uint16, image.alpha is not None
        formats = [entry.name for entry in context.codec.video_formats or ()]
        stream.pix_fmt = pixel_format(look.pixel_format, formats, deep=deep, alpha=alpha)
        bits, across, down = _fineness(stream.pix_fmt)
        if look.pixel_format is not None and any(map(int.__lt__, (bits, across, down), _fineness(look.pixel_format))):
            logger.warning("%s: %s has no %s: %s", self.target, self.codec.encoder, look.pixel_format, stream.pix_fmt)
        if (image.width % 2 and across == 1) or (image.height % 2 and down == 1):
            raise UserError(
                f"{self.target}: {image.width} x {image.height} pixels; {self.codec.encoder} with halved colour "
                "resolution needs even sides: choose another --scale, or --width and --height"
            )
        if alpha and not stream.pix_fmt.startswith(WITH_ALPHA):
            logger.warning("%s: %s cannot hold transparency; it is laid over black", self.target, self.codec.encoder)
        stream.width, stream.height = image.width, image.height
        context.time_base = self.source.time_base
        # Several threads of x264 decide by how fast they come along, so that the bytes would not be the same twice.
        context.thread_count = 1
        self._describe(context, stream.pix_fmt)
        return stream

    def _describe(self, context: Any, pix_fmt: str) -> None:
        """Write down what the samples mean: some codecs say it themselves, for others the container does."""
        look = self.source.look
        context.color_range = 2 if self.full_range else 1
        if not pix_fmt.startswith(("rgb", "bgr", "gbr")):
            context.colorspace = look.matrix if look.matrix != 2 else 1
        context.color_primaries, context.color_trc = look.primaries, look.transfer
        if look.aspect is not None:
            context.sample_aspect_ratio = look.aspect

    def _converted(self, image: LoadedImage, frame: Frame) -> Any:
        """The frame in the encoder's pixel format."""
        look, wanted = self.source.look, self._stream.pix_fmt
        image = image.gray_as_rgb() if image.gray else image
        if image.alpha is not None and not wanted.startswith(WITH_ALPHA):
            peak = np.iinfo(image.pixels.dtype).max
            laid = (image.pixels.astype(np.uint64) * image.alpha[..., None] + peak // 2) // peak
            image = replace(image, pixels=laid.astype(image.pixels.dtype), alpha=None)
        kind = _RGB[image.pixels.dtype == np.uint16, image.alpha is not None]
        samples = np.ascontiguousarray(interleaved(image))
        converted: Any = av.VideoFrame.from_ndarray(samples, format=kind).reformat(
            format=wanted,
            dst_colorspace=_swscale(look.matrix if look.matrix != 2 else 1),
            src_color_range=2,
            dst_color_range=2 if self.full_range else 1,
            interpolation="BICUBIC",
        )
        converted.colorspace = self._stream.codec_context.colorspace
        converted.color_primaries, converted.color_trc = look.primaries, look.transfer
        converted.pts, converted.time_base, converted.duration = frame.pts, self.source.time_base, frame.duration
        return converted

    def _join(self, path: Path) -> None:
        look = self.source.look
        options = {"movflags": "faststart"} if self.container in ("mp4", "mov") else {}
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(self._segment(0))
            output = stack.enter_context(
                av.open(str(path.absolute()), "w", format=self.container, container_options=options)
            )
            output.flags |= av.container.Flags.bitexact.value  # no random numbers in the file
            stream: Any = output.add_stream_from_template(first.streams.video[0], opaque=True)
            stream.time_base = self.source.time_base
            context = stream.codec_context
            self._describe(context, str(first.streams.video[0].codec_context.pix_fmt))
            if self.codec.encoder == "libx265" and self.container in ("mp4", "mov"):
                context.codec_tag = "hvc1"  # without which Apple's players show nothing
            if look.display is not None and self.container in TURNING:
                stream.set_display_matrix(look.display)
            copied: Iterator[tuple[float, Any]] = iter(())
            if isinstance(self.source, FilmSource):
                source = stack.enter_context(av.open(str(self.source.path.absolute()), "r"))
                copied = self._copied(source, output, stream)
            for _, packet in heapq.merge(self._packets(stream), copied, key=lambda entry: entry[0]):
                output.mux(packet)

    def _segment(self, index: int) -> InputContainer:
        path = self.work.absolute() / f"{PART.format(index)}.film"
        opened: InputContainer = av.open(str(path), "r", format=self.codec.segments)
        return opened

    def _packets(self, stream: Any) -> Iterator[tuple[float, Any]]:
        """Packets of all segments in the order of decoding, with time stamps for the whole film.

        Packet i is decoded at the time at which frame i - d is shown, where d is the most by which the encoder has put
        a frame before its turn: in that order, of frames at any distance, none is shown before it is decoded. The first
        d packets are as far apart as the frames are that they would follow.
        """
        order = [pts for part in self.parts for pts in part["order"]]
        shown = sorted(order)
        rank = {pts: number for number, pts in enumerate(shown)}
        ahead = max((number - rank[pts] for number, pts in enumerate(order)), default=0)
        step = shown[1] - shown[0] if len(shown) > 1 else round(1 / (self.source.look.rate * self.source.time_base))
        lead = shown[ahead] - shown[0]
        durations = {pts: duration for part in self.parts for pts, duration in part["frames"]}
        number = 0
        for index in range(len(self.parts)):
            with self._segment(index) as part:
                for packet in part.demux(video=0):
                    if packet.size == 0:
                        continue
                    pts = order[number]
                    packet.pts = pts
                    packet.dts = shown[number - ahead] if number >= ahead else shown[number] - lead
                    after = rank[pts] + 1
                    gap = shown[after] - pts if after < len(shown) else shown[-1] - shown[-2] if after > 1 else step
                    packet.duration = durations[pts] or gap
                    packet.time_base, packet.stream = self.source.time_base, stream
                    number += 1
                    yield float(packet.dts * self.source.time_base), packet
        if number != len(order):
            raise UserError(f"{self.work}: {number} of {len(order)} packets in the segments; delete this folder")

    def _copied(self, source: InputContainer, output: OutputContainer, video: Any) -> Iterator[tuple[float, Any]]:
        """Add all that is not the film itself to ``output``; packets of audio, subtitles and covers in their order."""
        output.metadata.update({key: text for key, text in source.metadata.items() if key not in _CONTAINER_TAGS})
        main = main_stream(source)
        video.metadata.update({key: text for key, text in main.metadata.items() if key in ("language", "title")})
        output.set_chapters(source.chapters())
        streams: dict[int, Any] = {}
        for stream in source.streams:
            if stream.index == main.index or stream.type == "data":  # chapters of QuickTime, and marks of cameras
                continue
            try:
                added: Any = output.add_stream_from_template(stream, opaque=True)
            except (ValueError, av.error.FFmpegError) as error:
                codec = stream.codec_context.name if stream.codec_context is not None else "data"
                logger.warning("%s: %s stream %s left out (%s)", self.target, stream.type, codec, first_line(error))
                continue
            added.metadata.update({key: text for key, text in stream.metadata.items() if key not in _STREAM_TAGS})
            if stream.type != "attachment":
                added.disposition = stream.disposition
            streams[stream.index] = added

        def packets() -> Iterator[tuple[float, Any]]:
            wanted = [source.streams[index] for index in streams if source.streams[index].type != "attachment"]
            last: dict[int, int] = {}
            packets = source.demux(wanted) if wanted else iter(())
            while True:
                try:
                    packet = next(packets, None)
                except av.error.InvalidDataError as error:
                    logger.warning("%s: audio and subtitles end early (%s)", self.target, error.strerror)
                    return
                if packet is None:
                    return
                stamp = packet.dts if packet.dts is not None else packet.pts
                if packet.size == 0 or stamp is None or stamp < last.get(packet.stream.index, stamp):
                    continue
                last[packet.stream.index] = stamp
                seconds = float(stamp * packet.time_base)
                packet.stream = streams[packet.stream.index]
                yield seconds, packet

        return packets()


WITH_ALPHA = ("yuva", "gbrap", "rgba", "bgra")
"""Beginnings of the names of pixel formats that hold transparency."""
_RGB = {(False, False): "rgb24", (False, True): "rgba", (True, False): "rgb48le", (True, True): "rgba64le"}
_CONTAINER_TAGS = ("major_brand", "minor_version", "compatible_brands", "encoder")
_STREAM_TAGS = ("encoder", "vendor_id", "DURATION", "NUMBER_OF_FRAMES", "NUMBER_OF_BYTES", "BPS")


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


def _fineness(name: str) -> tuple[int, int, int]:
    """Bits of a sample of a pixel format, and colour samples for every two pixels across and down."""
    parts = av.VideoFormat(name, 2, 2).components
    return parts[0].bits, parts[min(1, len(parts) - 1)].width, parts[min(1, len(parts) - 1)].height


class AnimationSink(Sink):
    """An animated GIF, WebP or PNG: its frames lie beside it as PNG files until all of them are there."""

    def __init__(self, target: Path, work: Path, source: Source) -> None:
        self.target, self.work, self.source = target, work, source
        self.durations: list[int] = []
        while (record := work / f"{PART.format(len(self.durations))}.json").exists():
            self.durations.append(int(json.loads(read_text(record, 1000, "record of a frame"))))
        self.done = len(self.durations)

    def write(self, index: int, image: LoadedImage, frame: Frame) -> None:
        """Keep one frame."""
        with writing(self.target):
            write_image(to_eight_bits(image), self.work / f"{PART.format(index)}.png", sweep=False)
            # The end of a frame is rounded, not its length, so that the whole does not run away.
            end = round((frame.pts + (frame.duration or 1)) * self.source.time_base * 1000)
            start = round(frame.pts * self.source.time_base * 1000)
            write_text(self.work / f"{PART.format(index)}.json", str(end - start))
            self.durations.append(end - start)

    def finish(self) -> None:
        """Encode the animation."""
        files = [self.work / f"{PART.format(index)}.png" for index in range(len(self.durations))]
        modes = set()
        for path in files:
            with Image.open(path) as image:
                modes.add(image.mode)
        mode = "RGBA" if any(name.endswith("A") for name in modes) else "RGB"
        kind = ANIMATIONS[self.target.suffix.lower()]
        plays = self.source.plays if isinstance(self.source, AnimationSource) else 0
        params: dict[str, Any] = {"loop": plays}
        if kind == "GIF":
            params = {} if plays == 1 else {"loop": max(plays - 1, 0)}
        if kind == "WEBP":
            params |= {"quality": 95, "method": 4}
        elif kind == "GIF":
            params |= {"disposal": 2} if mode == "RGBA" else {}
        durations: list[int] | int = self.durations if len(self.durations) > 1 else self.durations[0]
        with writing(self.target), replacing(self.target) as partial, partial.open("w+b") as stream:
            hard = kind == "GIF"  # which knows no half-transparent pixels
            first, others = _opened_as(files[0], mode, hard), _Frames(files[1:], mode, hard)
            first.save(stream, kind, save_all=True, append_images=others, duration=durations, **params)


@dataclass(frozen=True)
class _Frames:
    """Images in files as often as a writer asks for them, one in memory at a time."""

    files: Sequence[Path]
    mode: str
    hard: bool

    def __iter__(self) -> Iterator[Image.Image]:
        return (_opened_as(path, self.mode, self.hard) for path in self.files)

    def __len__(self) -> int:
        return len(self.files)


def _opened_as(path: Path, mode: str, hard: bool) -> Image.Image:
    with Image.open(path) as image:
        converted = image.convert(mode)
    if not hard or mode != "RGBA":
        return converted
    samples = np.array(converted)
    samples[samples[..., 3] < 128] = 0  # all of one colour, or quantisation would mix them with seen ones
    samples[..., 3] = np.where(samples[..., 3], 255, 0)
    return Image.fromarray(samples)


def _image_name(name: str) -> str:
    """Name of the output of an image of a sequence."""
    return name if Path(name).suffix.lower() != ".gif" else str(Path(name).with_suffix(".png"))


class SequenceSink(Sink):
    """Images in a folder, one per frame, each under its final name as soon as it is complete."""

    def __init__(self, target: Path, work: Path, source: Source) -> None:
        self.target, self.work, self.source = target, work, source
        self.numbered = "%" in target.name
        self.folder = target.parent if self.numbered else target
        record = work / "done.json"
        self.done = int(json.loads(read_text(record, 1000, "record of frames"))) if record.exists() else 0

    def path_of(self, index: int, frame: Frame) -> Path:
        """File of one frame; a sequence keeps its names unless a pattern is given."""
        if self.numbered:
            return self.folder / (self.target.name % (index + 1))
        if frame.name is None:
            return self.folder / f"frame_{index + 1:06d}.png"
        return self.folder / _image_name(frame.name)

    def write(self, index: int, image: LoadedImage, frame: Frame) -> None:
        """Write one file."""
        path = self.path_of(index, frame)
        check_size(format_of(path), image.width, image.height, str(path))
        write_image(image, path, sweep=True)
        write_text(self.work / "done.json", str(index + 1))

    def finish(self) -> None:
        """All files are in place."""


# ---- one run -----------------------------------------------------------------------------------------------------


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
            other = taken.setdefault(_image_name(name), path)
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
            "model": [self.upscaler.name, str(self.upscaler.dtype), str(self.upscaler.device)],
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

"""Enlarged frames as a film, encoded in segments that outlive a killed run; as an animation; as an image sequence."""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from PIL import Image

from onestepsr.core.errors import UserError, first_line
from onestepsr.core.files import read_text, replacing, write_text, writing
from onestepsr.imaging.image import LoadedImage, interleaved, to_eight_bits
from onestepsr.imaging.write import check_size, format_of, write_image
from onestepsr.video.sources import (
    ANIMATIONS,
    RGB,
    WITH_ALPHA,
    AnimationSource,
    FilmSource,
    Frame,
    Source,
    fineness,
    main_stream,
    pixel_format,
    swscale,
)

logger = logging.getLogger(__name__)
os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder prints a page about itself otherwise

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
        bits, across, down = fineness(stream.pix_fmt)
        if look.pixel_format is not None and any(map(int.__lt__, (bits, across, down), fineness(look.pixel_format))):
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
        kind = RGB[image.pixels.dtype == np.uint16, image.alpha is not None]
        samples = np.ascontiguousarray(interleaved(image))
        converted: Any = av.VideoFrame.from_ndarray(samples, format=kind).reformat(
            format=wanted,
            dst_colorspace=swscale(look.matrix if look.matrix != 2 else 1),
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


_CONTAINER_TAGS = ("major_brand", "minor_version", "compatible_brands", "encoder")
_STREAM_TAGS = ("encoder", "vendor_id", "DURATION", "NUMBER_OF_FRAMES", "NUMBER_OF_BYTES", "BPS")


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


def image_name(name: str) -> str:
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
        return self.folder / image_name(frame.name)

    def write(self, index: int, image: LoadedImage, frame: Frame) -> None:
        """Write one file."""
        path = self.path_of(index, frame)
        check_size(format_of(path), image.width, image.height, str(path))
        write_image(image, path, sweep=True)
        write_text(self.work / "done.json", str(index + 1))

    def finish(self) -> None:
        """All files are in place."""

"""Films, animations and sequences through ``onestepsr.video``: what is kept, resuming, and bad input."""

from __future__ import annotations

import resource
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onestepsr.core.errors import UserError
from onestepsr.inference.options import UpscaleOptions
from onestepsr.inference.upscaler import Upscaler
from small import Nearest

av = pytest.importorskip("av")

from onestepsr.video.job import VideoJob, default_target  # noqa: E402
from onestepsr.video.sinks import CODECS, VideoOptions  # noqa: E402
from onestepsr.video.sources import FilmSource, open_source, pixel_format  # noqa: E402

WIDTH, HEIGHT, FRAMES = 32, 24, 25
TICK = Fraction(1, 12800)


@pytest.fixture(scope="module")
def upscaler() -> Upscaler:
    return Upscaler(Nearest(), "cpu", "float32", "nearest")


def make_film(path: Path, *, rotation: int | None = None, frames: int = FRAMES, options: Any = None) -> Path:
    """A film of moving coloured blocks at uneven times, with a tone and two chapters."""
    with av.open(str(path), "w", container_options=options or {}) as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "12", "g": "5"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        context = video.codec_context
        context.time_base = TICK
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 1, 1, 1, 1
        if rotation is not None:
            video.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=48000)
        sound.layout = "mono"
        chapters = [(0, 400, "one"), (400, 1000, "two")]
        container.set_chapters(
            [
                {"id": n, "start": a, "end": b, "time_base": Fraction(1, 1000), "metadata": {"title": title}}
                for n, (a, b, title) in enumerate(chapters, 1)
            ]
        )
        container.metadata["title"] = "a film"
        blocks = np.random.default_rng(0).integers(30, 220, (HEIGHT // 4, WIDTH // 2, 3), dtype=np.uint8)
        wide = blocks.repeat(4, axis=0).repeat(4, axis=1)
        pts = 0
        for number in range(frames):
            own = np.ascontiguousarray(wide[:, number : number + WIDTH])
            frame = av.VideoFrame.from_ndarray(own, format="rgb24").reformat(format="yuv420p", dst_colorspace=1)
            frame.pts, frame.time_base = pts, TICK
            container.mux(video.encode(frame))
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32) + 0.1, format="fltp", layout="mono")
            tone.sample_rate, tone.pts, tone.time_base = 48000, number * 1024, Fraction(1, 48000)
            container.mux(sound.encode(tone))
            pts += 640 if number % 3 else 512
        container.mux(video.encode(None))
        container.mux(sound.encode(None))
    return path


def stamps(path: Path, kind: str) -> list[Fraction]:
    """Times at which packets are shown, and at last the end of the stream."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        times = sorted(packet.pts * packet.time_base for packet in container.demux(stream) if packet.size)
        return [*times, *([] if stream.duration is None else [stream.duration * stream.time_base])]


def content(path: Path, kind: str) -> bytes:
    with av.open(str(path)) as container:
        return b"".join(bytes(packet) for packet in container.demux(getattr(container.streams, kind)[0]))


def decoded(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def made(source: Path | str, target: Path, upscaler: Upscaler, **changes: Any) -> VideoJob:
    job = VideoJob(str(source), str(target), upscaler, UpscaleOptions(color_fix="none"), VideoOptions(**changes))
    assert [state.frame for state in job.run()][-1:] != [0]
    assert not list(target.parent.glob(".onestepsr-*"))
    return job


@pytest.mark.parametrize("ending", [".mp4", ".mov", ".mkv"])
def test_a_film_keeps_times_sound_rotation_chapters_and_colours(
    tmp_path: Path, upscaler: Upscaler, ending: str
) -> None:
    source, target = make_film(tmp_path / "in.mp4", rotation=90), tmp_path / f"out{ending}"
    assert made(source, target, upscaler, segment=10).problem is None
    if ending == ".mkv":  # which has milliseconds
        ours, theirs = stamps(target, "video"), stamps(source, "video")
        assert len(ours) == FRAMES
        shift = ours[0] - theirs[0]  # there are no negative times, and the sound begins before the first frame
        assert all(abs(a - b - shift) <= Fraction(1, 1000) for a, b in zip(ours, theirs, strict=False))
    else:
        assert stamps(target, "video") == stamps(source, "video")
        assert stamps(target, "audio") == stamps(source, "audio")
    assert content(target, "audio") == content(source, "audio")
    before, after = decoded(source), decoded(target)
    assert len(after) == FRAMES
    assert (after[0].width, after[0].height) == (4 * WIDTH, 4 * HEIGHT)
    assert after[0].rotation == before[0].rotation == 90
    for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
        assert getattr(after[0], name) == getattr(before[0], name) == 1
    with av.open(str(target)) as container:
        assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["one", "two"]
        assert container.metadata["title"] == "a film"
        order = [p.dts for p in container.demux(video=0) if p.size and p.dts is not None]
        assert order == sorted(set(order))


def test_colours_pass_through_the_decoder_and_the_encoder(tmp_path: Path, upscaler: Upscaler) -> None:
    source, target = make_film(tmp_path / "in.mp4"), tmp_path / "out.mkv"
    made(source, target, upscaler, codec="ffv1")
    for before, after in zip(decoded(source), decoded(target), strict=True):
        small, large = (frame.to_ndarray(format="rgb24").astype(float) for frame in (before, after))
        means = large.reshape(HEIGHT, 4, WIDTH, 4, 3).mean(axis=(1, 3))
        assert abs(means.mean(axis=(0, 1)) - small.mean(axis=(0, 1))).max() < 1.5


def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(tmp_path: Path, upscaler: Upscaler) -> None:
    source = make_film(tmp_path / "in.mp4")
    whole, broken = tmp_path / "whole.mp4", tmp_path / "broken.mp4"
    made(source, whole, upscaler, segment=10)
    options, video = UpscaleOptions(color_fix="none"), VideoOptions(segment=10)
    with closing(VideoJob(str(source), str(broken), upscaler, options, video).run()) as states:
        for state in states:
            if state.frame == 14:
                break
    assert not broken.exists()
    again = VideoJob(str(source), str(broken), upscaler, options, video)
    assert again.goes_on
    assert next(iter([state.frame for state in again.run()])) == 10
    assert broken.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".onestepsr-*"))


def test_other_options_begin_anew(tmp_path: Path, upscaler: Upscaler) -> None:
    source, target = make_film(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    with closing(VideoJob(str(source), str(target), upscaler, None, VideoOptions(segment=5)).run()) as states:
        for state in states:
            if state.frame == 7:
                break
    other = VideoJob(str(source), str(target), upscaler, UpscaleOptions(scale=2), VideoOptions(segment=5))
    assert not other.goes_on
    assert [state.frame for state in other.run()] == list(range(1, FRAMES + 1))
    assert decoded(target)[0].width == 2 * WIDTH


def test_rotation_is_drawn_where_the_output_cannot_say_it(tmp_path: Path, upscaler: Upscaler) -> None:
    source = make_film(tmp_path / "in.mp4", rotation=90, frames=2)
    made(source, tmp_path / "f_%03d.png", upscaler)
    turned = np.asarray(Image.open(tmp_path / "f_001.png")).astype(int)
    assert turned.shape == (4 * WIDTH, 4 * HEIGHT, 3)
    upright = decoded(source)[0].to_ndarray(format="rgb24")
    # Counter-clockwise, as FFmpeg and PyAV count.
    assert np.abs(turned[::4, ::4] - np.rot90(upright)).mean() < 3


@pytest.mark.parametrize(("ending", "alpha"), [(".gif", True), (".webp", True), (".png", True), (".webp", False)])
def test_animations(tmp_path: Path, upscaler: Upscaler, ending: str, alpha: bool) -> None:
    frames = []
    for number in range(4):
        samples = np.zeros((10, 12, 4), np.uint8)
        samples[..., 3] = 0 if alpha else 255
        samples[2:8, number : number + 5] = (200, 40 * number, 30, 255)
        frames.append(Image.fromarray(samples))
    source, target = tmp_path / f"in{ending}", tmp_path / f"out{ending}"
    times = [100, 50, 200, 70]
    more: dict[str, Any] = {"disposal": 2} if ending == ".gif" else {}
    frames[0].save(source, save_all=True, append_images=frames[1:], duration=times, loop=3, lossless=True, **more)
    made(source, target, upscaler)
    with Image.open(source) as before, Image.open(target) as after:
        assert after.n_frames == before.n_frames == 4
        assert after.size == (48, 40)
        assert after.info["loop"] == before.info["loop"]
        for number in range(4):
            for image in (before, after):
                image.seek(number)
                image.load()
            assert after.info["duration"] == before.info["duration"]
            small = np.asarray(before.convert("RGBA")).repeat(4, 0).repeat(4, 1).astype(int)
            large = np.asarray(after.convert("RGBA")).astype(int)
            assert np.abs(small[..., 3] - large[..., 3]).mean() < 12
            seen = (small[..., 3] > 0) & (large[..., 3] > 0)
            assert np.abs(small - large)[seen][:, :3].mean() < 8


def test_an_animation_becomes_a_film_and_back(tmp_path: Path, upscaler: Upscaler) -> None:
    frames = [Image.new("RGB", (16, 12), (60 * number, 90, 120)) for number in range(4)]
    frames[0].save(
        tmp_path / "in.webp", save_all=True, append_images=frames[1:], duration=[40, 60, 40, 80], lossless=True
    )
    made(tmp_path / "in.webp", tmp_path / "film.mkv", upscaler)
    assert stamps(tmp_path / "film.mkv", "video") == [
        0,
        Fraction(1, 25),
        Fraction(1, 10),
        Fraction(7, 50),
    ]
    made(tmp_path / "film.mkv", tmp_path / "back.gif", upscaler)
    with Image.open(tmp_path / "back.gif") as image:
        assert image.n_frames == 4


def test_sequences(tmp_path: Path, upscaler: Upscaler) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in (1, 2, 10):
        Image.new("RGB", (8, 6), (20 * number, 50, 90)).save(folder / f"f{number}.png")
    made(folder, tmp_path / "out", upscaler)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["f1.png", "f10.png", "f2.png"]
    assert Image.open(tmp_path / "out" / "f10.png").size == (32, 24)
    made(f"{folder}/f%d.png", tmp_path / "film.mp4", upscaler, fps=Fraction(10))
    reds = [frame.to_ndarray(format="rgb24")[..., 0].mean() for frame in decoded(tmp_path / "film.mp4")]
    assert reds == sorted(reds)  # 2 before 10
    assert stamps(tmp_path / "film.mp4", "video") == [0, Fraction(1, 10), Fraction(1, 5), Fraction(3, 10)]


def test_a_truncated_film_is_made_as_far_as_it_goes(tmp_path: Path, upscaler: Upscaler) -> None:
    source = make_film(tmp_path / "in.mp4", options={"movflags": "faststart"})
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 6 // 10])
    job = made(source, tmp_path / "out.mp4", upscaler)
    assert job.problem is not None
    assert "in.mp4" in job.problem
    assert 3 < len(decoded(tmp_path / "out.mp4")) < FRAMES


def test_memory_is_that_of_a_few_frames(tmp_path: Path, upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0
    original = FilmSource._image

    def counted(self: FilmSource, frame: Any) -> Any:
        nonlocal alive, most
        import weakref

        image = original(self, frame)
        alive += 1
        most = max(most, alive)

        def gone() -> None:
            nonlocal alive
            alive -= 1

        weakref.finalize(image, gone)
        return image

    monkeypatch.setattr(FilmSource, "_image", counted)
    made(make_film(tmp_path / "in.mp4", frames=40), tmp_path / "out.mp4", upscaler)
    assert most <= 6


def test_bad_input_is_one_line(tmp_path: Path, upscaler: Upscaler) -> None:
    source = make_film(tmp_path / "in.mp4", frames=3)
    (tmp_path / "text.mp4").write_text("no film")
    (tmp_path / "there.mp4").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")

    def refused(name: Path | str, target: str, options: UpscaleOptions | None = None, **video: Any) -> str:
        def attempt() -> None:
            list(VideoJob(str(name), str(tmp_path / target), upscaler, options, VideoOptions(**video)).run())

        with pytest.raises(UserError) as error:
            attempt()
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such file" in refused(tmp_path / "none.mp4", "out.mp4")
    assert "cannot be read as a film" in refused(tmp_path / "text.mp4", "out.mp4")
    assert "cannot be read as an animation" in refused(tmp_path / "broken.gif", "out.gif")
    assert "no images" in refused(tmp_path / "empty", "out")
    assert "no image matches" in refused(tmp_path / "x%d.png", "out")
    assert "--overwrite" in refused(source, "there.mp4")
    assert "the output is the input" in refused(source, "in.mp4")
    assert "'.avi' cannot be written" in refused(source, "out.avi")
    assert "accepted: h264" in refused(source, "out.mp4", codec="divx")
    assert "accepted: 0 to 51" in refused(source, "out.mp4", crf=52)
    assert "takes none" in refused(source, "out.mkv", codec="ffv1", crf=5)
    assert "this container holds vp9, av1" in refused(source, "out.webm", codec="h264")
    assert "even sides" in refused(source, "out.mp4", UpscaleOptions(width=75))
    assert "expected one number" in refused(source, "f_%s.png")
    assert not (tmp_path / "out.mp4").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path, upscaler: Upscaler) -> None:
    source = make_film(tmp_path / "in.mp4", frames=3)
    first = VideoJob(str(source), str(tmp_path / "out.mp4"), upscaler).run()
    next(first)
    with pytest.raises(UserError, match="another process"):
        list(VideoJob(str(source), str(tmp_path / "out.mp4"), upscaler).run())
    first.close()


def test_tiles_are_planned_once(tmp_path: Path, upscaler: Upscaler) -> None:
    source = make_film(tmp_path / "in.mp4", frames=2)
    job = VideoJob(str(source), str(tmp_path / "out.mp4"), upscaler)
    assert job.options.tile == "off"
    fixed = VideoJob(str(source), str(tmp_path / "out.mp4"), upscaler, UpscaleOptions(tile=16))
    assert fixed.options.tile == 16


def test_names_and_pixel_formats(tmp_path: Path) -> None:
    for name in ("a.mov", "b.wmv"):
        (tmp_path / name).touch()
    assert default_target(str(tmp_path / "a.mov"), "_x4") == str(tmp_path / "a_x4.mov")
    assert default_target(str(tmp_path / "b.wmv"), "_x4") == str(tmp_path / "b_x4.mp4")
    known = ["yuv420p", "yuv444p", "yuv420p10le"]
    assert pixel_format("yuv444p", known, deep=False, alpha=False) == "yuv444p"
    assert pixel_format("yuv420p12le", known, deep=True, alpha=False) == "yuv420p10le"
    assert pixel_format("rgb24", known, deep=False, alpha=False) == "yuv420p"
    with pytest.raises(UserError):
        open_source(str(tmp_path / "none*.png"), Fraction(24))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from onestepsr.cli.main import main

    Image.new("RGB", (8, 8), (200, 50, 90)).save(tmp_path / "in.gif")

    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(["video", *words])
        return int(stopped.value.code or 0)

    assert run(str(tmp_path / "in.gif"), "--scale", "2") == 0
    assert capsys.readouterr().out == f"{tmp_path}/in_x2.gif\n"
    assert Image.open(tmp_path / "in_x2.gif").size == (16, 16)
    assert run(str(tmp_path / "in.gif"), "--scale", "2") == 2
    assert run(str(tmp_path / "in.gif"), "--fps", "a") == 2
    assert run(str(tmp_path / "none.mp4")) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_sequence_replaces_no_image(tmp_path: Path, upscaler: Upscaler) -> None:
    for number in (1, 2):
        (tmp_path / f"m{number}").mkdir()
        Image.new("RGB", (8, 6)).save(tmp_path / f"m{number}" / "00001.png")
    with pytest.raises(UserError, match="that of the input"):
        VideoJob(f"{tmp_path}/m1", f"{tmp_path}/m1/%05d.png", upscaler, overwrite=True)
    with pytest.raises(UserError, match="already exists"):
        VideoJob(f"{tmp_path}/m1", f"{tmp_path}/m2/%05d.png", upscaler)
    with pytest.raises(UserError, match="has the name of that of"):
        VideoJob(f"{tmp_path}/m*/*.png", f"{tmp_path}/out", upscaler)
    with pytest.raises(UserError, match="expected a name"):
        VideoJob(f"{tmp_path}/m1", ".", upscaler)
    made(tmp_path / "m1", tmp_path / "out" / "x%03d.png", upscaler)


def test_other_options_of_the_model_begin_anew(tmp_path: Path, upscaler: Upscaler) -> None:
    source, target = make_film(tmp_path / "in.mp4", frames=3), tmp_path / "out.mp4"
    with closing(VideoJob(str(source), str(target), upscaler, loading={"fidelity": 0.5}).run()) as states:
        next(states)
    assert VideoJob(str(source), str(target), upscaler, loading={"fidelity": 0.5}).goes_on
    assert not VideoJob(str(source), str(target), upscaler, loading={"fidelity": None}).goes_on


def test_another_engine_begins_anew(tmp_path: Path, upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = make_film(tmp_path / "in.mp4", frames=3), tmp_path / "out.mp4"
    with closing(VideoJob(str(source), str(target), upscaler).run()) as states:
        next(states)
    assert VideoJob(str(source), str(target), upscaler).goes_on
    monkeypatch.setattr(upscaler, "engine", "openvino")  # what "auto" becomes once doctor has measured it
    assert not VideoJob(str(source), str(target), upscaler).goes_on


def test_a_refused_option_leaves_segments_alone(tmp_path: Path, upscaler: Upscaler) -> None:
    source, target = make_film(tmp_path / "in.mp4", frames=6), tmp_path / "out.mp4"
    with closing(VideoJob(str(source), str(target), upscaler, None, VideoOptions(segment=2)).run()) as states:
        while next(states).frame < 4:
            pass
    with pytest.raises(UserError, match="crf 99"):
        list(VideoJob(str(source), str(target), upscaler, None, VideoOptions(segment=2, crf=99)).run())
    assert VideoJob(str(source), str(target), upscaler, None, VideoOptions(segment=2)).goes_on


def test_names_with_colons(tmp_path: Path, upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    make_film(tmp_path / "in:1.mp4", frames=3)
    monkeypatch.chdir(tmp_path)
    made("in:1.mp4", Path("out:1.mp4"), upscaler)
    assert len(decoded(tmp_path / "out:1.mp4")) == 3


@pytest.mark.parametrize(("loop", "plays"), [(None, 1), (0, 0), (2, 3)])
def test_an_animation_is_shown_as_often_as_before(
    tmp_path: Path, upscaler: Upscaler, loop: int | None, plays: int
) -> None:
    frames = [Image.new("RGB", (8, 8), (90 * number, 0, 0)) for number in range(2)]
    more = {} if loop is None else {"loop": loop}
    frames[0].save(tmp_path / "in.gif", save_all=True, append_images=frames[1:], duration=50, **more)
    for ending in ("webp", "png"):
        made(tmp_path / "in.gif", tmp_path / f"out.{ending}", upscaler)
        assert Image.open(tmp_path / f"out.{ending}").info["loop"] == plays
    made(tmp_path / "out.webp", tmp_path / "back.gif", upscaler)
    assert Image.open(tmp_path / "back.gif").info.get("loop") == loop


# ---- codecs, and a full disk ----


def raw_film(path: Path, pixel_format: str, *, full_range: bool = False, matrix: int = 1) -> Path:
    """Five frames of moving blocks, coded without loss."""
    swscale = {1: 1, 6: 5, 9: 9}[matrix]
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=25)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, pixel_format
        context = video.codec_context
        context.color_range, context.colorspace = 1 + full_range, matrix
        context.color_primaries, context.color_trc = matrix, 16 if matrix == 9 else matrix
        blocks = np.random.default_rng(0).integers(30, 220, (HEIGHT // 4, WIDTH // 2, 3), dtype=np.uint8)
        wide = blocks.repeat(4, axis=0).repeat(4, axis=1)
        for number in range(5):
            own = np.ascontiguousarray(wide[:, number : number + WIDTH])
            frame = av.VideoFrame.from_ndarray(own, format="rgb24")
            frame = frame.reformat(
                format=pixel_format, dst_colorspace=swscale, src_color_range=2, dst_color_range=1 + full_range
            )
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


CODED = [
    ("h264", "mov", "yuv422p10le", "yuv422p10le"),
    ("hevc", "mp4", "yuv420p10le", "yuv420p10le"),
    ("hevc", "mkv", "yuv444p", "yuv444p"),
    ("vp9", "webm", "yuv444p", "yuv444p"),
    ("vp9", "mp4", "yuv420p10le", "yuv420p"),
    ("av1", "webm", "yuv420p10le", "yuv420p10le"),
    ("av1", "mp4", "yuv444p", "yuv420p"),
    ("prores", "mov", "yuv420p", "yuv422p10le"),
    ("prores", "mkv", "yuv444p", "yuv444p10le"),
    ("ffv1", "mkv", "yuv422p10le", "yuv422p10le"),
]


@pytest.mark.parametrize(("codec", "ending", "given", "expected"), CODED)
@pytest.mark.parametrize(("full_range", "matrix"), [(False, 9), (True, 6)])
def test_codecs_keep_samples_and_their_meaning(
    tmp_path: Path,
    upscaler: Upscaler,
    *,
    caplog: pytest.LogCaptureFixture,
    codec: str,
    ending: str,
    given: str,
    expected: str,
    full_range: bool,
    matrix: int,
) -> None:
    source = raw_film(tmp_path / "in.mkv", given, full_range=full_range, matrix=matrix)
    target = tmp_path / f"out.{ending}"
    made(source, target, upscaler, codec=codec, segment=3)
    before, after = decoded(source), decoded(target)
    assert len(after) == 5
    assert after[0].format.name.replace("yuvj", "yuv") == expected
    assert after[0].color_range == 1 + (full_range and codec != "prores")  # whose players know one range only
    assert (after[0].colorspace, after[0].color_primaries) == (matrix, matrix)
    assert after[0].color_trc == before[0].color_trc
    for small, large in zip(before, after, strict=True):
        own, theirs = (frame.to_ndarray(format="rgb24").astype(float) for frame in (small, large))
        assert abs(own.mean((0, 1)) - theirs.mean((0, 1))).max() < 3
    with av.open(str(target)) as container:
        if (codec, ending) == ("hevc", "mp4"):
            assert container.streams.video[0].codec_context.codec_tag == "hvc1"
    lost = expected in ("yuv420p",) and given != expected
    assert (f"has no {given}: {expected}" in caplog.text) == lost


@pytest.mark.parametrize(
    ("codec", "ending"), [("h264", "webm"), ("vp9", "mov"), ("av1", "mov"), ("prores", "mp4"), ("ffv1", "mov")]
)
def test_containers_refuse_what_they_do_not_hold(
    tmp_path: Path, upscaler: Upscaler, codec: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = raw_film(tmp_path / "in.mkv", "yuv420p")
    with pytest.raises(UserError, match=rf"this container holds .*, not {codec}; one that ends in .mkv does"):
        made(source, tmp_path / f"out.{ending}", upscaler, codec=codec)
    monkeypatch.setitem(CODECS, codec, replace(CODECS[codec], encoder="libnone"))
    with pytest.raises(UserError, match=f"codec {codec}: FFmpeg's libraries here were built without libnone"):
        made(source, tmp_path / "out.mkv", upscaler, codec=codec)


@pytest.mark.parametrize("limit", [1500, 4000])  # in a segment, and where they are joined
def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path: Path, upscaler: Upscaler, limit: int) -> None:
    source, target = raw_film(tmp_path / "in.mkv", "yuv420p"), tmp_path / "out.mkv"
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"out.mkv: .*\(File too large\)"):
            made(source, target, upscaler, codec="ffv1", segment=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".onestepsr-video-out.mkv", "in.mkv"]
    made(source, target, upscaler, codec="ffv1", segment=2)
    assert len(decoded(target)) == 5

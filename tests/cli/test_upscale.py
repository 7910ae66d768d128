"""The upscale command as people use it: what lands where, what is refused, what survives a kill."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from onestepsr.cli.upscale import command
from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.files import PARTIAL_PREFIX
from onestepsr.inference.upscaler import Upscaler
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyConfig
from onestepsr.weights.files import save_model

SMALL = TinyConfig(
    encoder_width=8, decoder_width=8, widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16
)

PROGRAM = [sys.executable, "-m", "onestepsr"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = TinyGeneratorConfig(model=SMALL, timestep=120)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    state = tiny_generator(config).state_dict()
    save_model(path, architecture="tiny-latent-diffusion", config=to_mapping(config), state_dict=state)
    return path


def build() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    return app


class Outcome:
    def __init__(self, result: object) -> None:
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr
        self.error = str(result.exception) if isinstance(result.exception, UserError) else ""
        if result.exception is not None and not isinstance(result.exception, (UserError, SystemExit)):
            raise result.exception


@pytest.fixture
def run(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, model: object = weights, stdin: bytes | None = None) -> Outcome:
        words = ["upscale", *map(str, arguments), "--model", str(model), "--device", "cpu", "--dtype", "float32"]
        return Outcome(CliRunner().invoke(build(), words, input=stdin))

    return call


def put(path: Path, seed: int = 0, size: tuple[int, int] = (9, 6), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)
    return path


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_one_file_lands_beside_the_input(run, tmp_path: Path, weights: Path) -> None:
    put(tmp_path / "a.png")
    outcome = run("a.png")
    assert (outcome.code, outcome.out) == (0, "a_x4.png\n")
    expected = Upscaler.from_pretrained(weights, "cpu", "float32")("a.png")
    assert np.array_equal(np.asarray(Image.open("a_x4.png")), np.asarray(expected))


@pytest.mark.parametrize(
    ("options", "name", "size"),
    [
        (["--scale", 2.5], "a_x2.5.png", (23, 15)),
        (["--width", 20], "a_w20.png", (20, 13)),
        (["--height", 12, "--width", 9], "a_w9h12.png", (9, 12)),
        (["--format", "jpg"], "a_x4.jpg", (36, 24)),
        (["-o", "new/b.webp"], "new/b.webp", (36, 24)),
        (["-o", "new/"], "new/a.png", (36, 24)),
        (["--tile", 16, "--color-fix", "adain"], "a_x4.png", (36, 24)),
        (["--tile", 64, "--tile-blend", "average"], "a_x4.png", (36, 24)),
    ],
)
def test_sizes_names_and_formats(run, tmp_path: Path, options: list, name: str, size: tuple[int, int]) -> None:
    put(tmp_path / "a.png")
    assert run("a.png", *options).code == 0
    assert size_of(tmp_path / name) == size
    assert len(tree(tmp_path)) == 2


def test_folder_keeps_its_tree_and_ignores_what_is_no_input(run, tmp_path: Path) -> None:
    put(tmp_path / "in/b.jpg")
    put(tmp_path / "in/deep/c.png", 1)
    put(tmp_path / "in" / f"{PARTIAL_PREFIX}1", format="PNG")
    (tmp_path / "in/notes.txt").write_text("no image")
    assert run("in").code == 0
    assert list(tree(tmp_path / "in_x4")) == ["b.jpg"]
    assert run("in", "--recursive", "-o", "in/out").code == 0
    assert list(tree(tmp_path / "in/out")) == ["b.jpg", "deep/c.png"]
    assert run("in", "--recursive", "-o", "in/out", "--overwrite").code == 0
    assert list(tree(tmp_path / "in/out")) == ["b.jpg", "deep/c.png"]  # outputs inside the input are no inputs


def test_patterns_and_repeated_inputs(run, tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "b.png", 1)
    assert run("*.png", "a.png", "-o", "out").out.splitlines() == ["out/a.png", "out/b.png"]


def test_existing_outputs(run, tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "b.png", 1)
    (tmp_path / "a_x4.png").write_bytes(b"mine")
    refused = run("a.png", "b.png")
    assert refused.error == "a_x4.png: already exists; give --skip-existing or --overwrite"
    assert not (tmp_path / "b_x4.png").exists()
    assert run("a.png", "b.png", "--skip-existing").out == "b_x4.png\n"
    assert (tmp_path / "a_x4.png").read_bytes() == b"mine"
    assert run("a.png", "--overwrite").code == 0
    assert size_of(tmp_path / "a_x4.png") == (36, 24)


def test_a_pattern_that_matches_the_outputs_of_its_first_run(run, tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    assert run("*.png").out == "a_x4.png\n"
    made = tree(tmp_path)
    assert "a_x4.png: this output is also an input; --skip-existing leaves it out" in run("*.png", "--overwrite").error
    assert (run("*.png", "--skip-existing").code, tree(tmp_path)) == (0, made)
    put(tmp_path / "b.png", 1)
    assert run("*.png", "--skip-existing").out == "b_x4.png\n"


def test_one_bad_file_does_not_stop_the_others(run, tmp_path: Path) -> None:
    put(tmp_path / "in/a.png")
    (tmp_path / "in/b.png").write_bytes(b"nonsense")
    put(tmp_path / "in/c.png", 1)
    outcome = run("in", "--json")
    assert outcome.code == 1
    document = json.loads(outcome.out)
    assert (document["schema"], document["failed"]) == (1, 1)
    good, bad, _ = document["results"]
    assert (good["input_size"], good["output_size"], good["status"]) == ([9, 6], [36, 24], "written")
    assert bad["status"] == "failed"
    assert "in/b.png: not an image" in bad["error"]
    made = [f"written: {tmp_path / 'in_x4' / name}" for name in ("a.png", "c.png")]
    assert outcome.err.splitlines() == [made[0], f"failed: {bad['error']}", made[1], "1 of 3 images failed"]
    assert list(tree(tmp_path / "in_x4")) == ["a.png", "c.png"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["none.png"], "none.png: no such file or folder"),
        ([""], "an empty name; expected a file, a folder or a pattern"),
        (["/"], "give -o FOLDER"),
        (["a.png", "-o", 300 * "n" + ".png"], "too long"),
        (["*.webp"], "*.webp: no image matches"),
        (["empty"], "empty: the folder holds no images"),
        (["zero.png"], "zero.png: the file is empty (0 bytes)"),
        (["cut.png"], "cut.png: truncated or damaged PNG"),
        (["text.png"], "text.png: not an image"),
        (["a.png", "-o", "a.png"], "a.png: this output is also an input"),
        (["a.png", "-o", "text.png/x.png"], "text.png/x.png: cannot be written"),
        (["a.png", "sub/a.png", "-o", "out.png"], "out.png: several images need a folder"),
        (["a.png", "-o", "a.xyz"], "the ending '.xyz' is no image format"),
        (["a.png", "-o", "b.png", "--format", "jpg"], "b.png: the ending does not agree"),
        (["a.png", "--format", "gif"], "--format: 'gif' is no image format that can be written; accepted: jpg"),
        (["a.png", "--max-pixels", "20"], "a.png: claims 9 x 6 = 54 pixels, the limit is 20"),
        (["a.png", "--width", "200"], "a.png: width 200: the input has 9"),
        (["a.png", "--alpha", "hard"], "alpha 'hard': accepted: bicubic, network"),
        (["-", "--keep-times"], "--keep-times: stdin"),
        (["a.png", "--scale", "20"], "scale 20: accepted: 1 to 8"),
        (["a.png", "--scale", "2", "--width", "20"], "--scale: --width and --height exclude it"),
        (["a.png", "--scale", "4", "--height", "20"], "--scale: --width and --height exclude it"),
        (["a.png", "--text-encoder", "sd21-base"], "--text-encoder: there is no prompt"),
        (["-", "--overwrite"], "--overwrite: stdout is no file"),
        (["-", "-o", "b.png", "--recursive"], "--recursive: there is no folder"),
        (["a.png", "--skip-existing", "--overwrite"], "exclude each other"),
        (["a.png", "--tile", "3"], "tile 3: accepted"),
        (["a.png", "--tile", "much"], "tile 'much': accepted"),
        (["a.png", "--color-fix", "x"], "color fix 'x': accepted"),
        (["a.png", "--steps", "4"], "--steps 4: "),
        (["a.png", "--sampler", "ancestral"], "takes no steps"),
        (["a.png", "--tile-blend", "mean"], "tile blend 'mean': accepted: smooth, average"),
        (["long.png", "--format", "webp"], "holds at most 16383 a side"),
        (["a.png", "--tile", "²"], "tile '²': accepted"),
        (["-", "a.png"], "must be the only input"),
        (["a.png", "sub/a.png", "-o", "-"], "takes one input"),
        (["a.png", "-o", "-", "--json"], "--json needs -o FILE"),
        (["empty", "-o", "-"], "empty: is a folder"),
        (["-", "-o", "b.png", "--format", "jpg"], "b.png: the ending does not agree"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(run, tmp_path: Path, arguments: list[str], part: str) -> None:
    whole = put(tmp_path / "a.png").read_bytes()
    put(tmp_path / "sub/a.png")
    put(tmp_path / "long.png", size=(4200, 1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.png").touch()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("text")
    before = tree(tmp_path)
    outcome = run(*arguments)
    assert part in outcome.error
    assert "\n" not in outcome.error
    assert tree(tmp_path) == before


def test_unknown_model_device_and_dtype(run, tmp_path: Path, weights: Path) -> None:
    put(tmp_path / "a.png")
    assert "d3sr-tinny" in run("a.png", model="d3sr-tinny").error
    for arguments, part in ((["--device", "gpu"], "device 'gpu'"), (["--dtype", "int8"], "dtype 'int8'")):
        words = ["upscale", "a.png", "--model", str(weights), *arguments]
        assert part in Outcome(CliRunner().invoke(build(), words)).error
    assert Outcome(CliRunner().invoke(build(), ["upscale", "a.png", "--nonsense"])).code == 2


def test_stdin_to_stdout_and_to_a_file(run, tmp_path: Path, weights: Path) -> None:
    data = put(tmp_path / "a.jpg").read_bytes()
    words = ["upscale", "-", "--model", str(weights), "--device", "cpu", "--dtype", "float32"]
    result = CliRunner().invoke(build(), words, input=data)
    with Image.open(io.BytesIO(result.stdout_bytes)) as image:
        assert (image.format, image.size) == ("JPEG", (36, 24))
    assert run("-", "-o", "b.png", stdin=data).code == 0
    assert size_of(tmp_path / "b.png") == (36, 24)
    assert "already exists" in run("-", "-o", "b.png", stdin=data).error
    assert run("-", "-o", "b.png", "--skip-existing", stdin=data).code == 0
    outcome = run("-", "-o", "b.png", "--overwrite", "--json", stdin=data)
    (result,) = json.loads(outcome.out)["results"]
    assert (result["input"], result["output"], result["status"]) == ("-", "b.png", "written")
    assert (result["output_size"], result["plan"]["tiles"]) == ([36, 24], 1)
    assert "<stdin>: the file is empty" in run("-", stdin=b"").error


def test_a_file_to_stdout(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.png")
    words = ["upscale", "a.png", "-o", "-", "--model", str(weights), "--device", "cpu", "--dtype", "float32"]
    result = CliRunner().invoke(build(), words)
    with Image.open(io.BytesIO(result.stdout_bytes)) as image:
        assert (image.format, image.size) == ("PNG", (36, 24))
    assert list(tree(tmp_path)) == ["a.png"]


def test_a_slash_makes_any_name_a_folder(run, tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    assert run("a.png", "-o", "large.v2/").code == 0
    assert size_of(tmp_path / "large.v2/a.png") == (36, 24)


def test_a_killed_run_continues_to_the_same_bytes(weights: Path, tmp_path: Path, run) -> None:
    for index in range(6):
        put(tmp_path / f"in/{index}.png", index, (64, 64))
    assert run("in", "-o", "straight").code == 0
    script = (
        "import typer; from onestepsr.cli.upscale import command as upscale;"
        "app = typer.Typer(); app.callback()(lambda: None);"
        "upscale.register(app); app()"
    )
    words = [sys.executable, "-c", script, "upscale", "in", "-o", "broken", "--model", str(weights), "--device", "cpu"]
    process = subprocess.Popen([*words, "--dtype", "float32"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "broken/0.png").exists():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "broken/5.png").unlink(missing_ok=True)
    assert run("in", "-o", "broken", "--skip-existing").code == 0
    assert tree(tmp_path / "broken") == tree(tmp_path / "straight")


def test_memory_is_limited_and_the_plan_is_told(run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "a.png", size=(130, 110))
    outcome = run("a.png", "--memory", 0.2, "-v", "--json")
    plan = json.loads(outcome.out)["results"][0]["plan"]
    assert (plan["batch"], plan["dtype"], plan["device"], plan["retries"]) == (1, "float32", "cpu", 0)
    height, width = plan["tile"]
    assert plan["tiles"] > 1
    assert plan["expected_peak"] <= 200_000_000
    assert f"{plan['tiles']} tiles of {height}x{width} pixels, float32 on cpu" in caplog.text
    refused = run("a.png", "-o", "b.png", "--memory", 0.001)
    assert "memory 0.001 GB: " in refused.error
    assert refused.error.endswith("accepted: 0.2 and more")


# ---- files as people have them ----


def test_a_failure_names_its_file_whatever_is_wrong(run, tmp_path: Path) -> None:
    put(tmp_path / "in/big.png", size=(40, 30))
    put(tmp_path / "in/small.png")
    outcome = run("in", "-o", "out", "--width", 30)
    assert (outcome.code, outcome.out) == (1, "out/small.png\n")
    assert outcome.err.splitlines() == [
        "failed: in/big.png: width 30: the input has 40, accepted: 40 to 320",
        "1 of 2 images failed",
    ]


def test_endings_of_all_formats_are_found_and_the_rest_is_counted(run, tmp_path: Path) -> None:
    put(tmp_path / "in/a.jfif", format="JPEG")
    put(tmp_path / "in/b.gif")
    for name in ("c.psd", "d.PSD", "e.mp4", "noending", "caption.txt"):
        (tmp_path / "in" / name).write_bytes(b"8BPS")
    outcome = run("in", "-o", "out")
    assert (outcome.code, outcome.out) == (0, "out/a.jfif\nout/b.png\n")
    assert outcome.err.splitlines()[-1] == "left out: 4 files of other kinds: 2 .psd, 1 without ending, 1 .mp4"
    with Image.open(tmp_path / "out/a.jfif") as image:
        assert image.format == "JPEG"
    put(tmp_path / "only/x.png").rename(tmp_path / "only/x.psd")
    assert (
        "only: the folder holds no images (subfolders are read with --recursive); left out: 1 file" in run("only").error
    )


@pytest.mark.parametrize(("name", "ending"), [("JPG", ".jpg"), ("jpeg", ".jpg"), ("tif", ".tif"), (".WebP", ".webp")])
def test_synonyms_of_formats(run, tmp_path: Path, name: str, ending: str) -> None:
    put(tmp_path / "a.png")
    assert run("a.png", "--format", name).out == f"a_x4{ending}\n"


def test_gif_on_stdin_becomes_png(weights: Path, tmp_path: Path) -> None:
    words = ["upscale", "-", "--model", str(weights), "--device", "cpu", "--dtype", "float32"]
    result = CliRunner().invoke(build(), words, input=put(tmp_path / "a.gif").read_bytes())
    with Image.open(io.BytesIO(result.stdout_bytes)) as image:
        assert (image.format, image.size) == ("PNG", (36, 24))


def test_a_pipe_is_one_image(run, tmp_path: Path) -> None:
    data = put(tmp_path / "a.png").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    outcome = run("pipe", "-o", "b.png")
    writer.join()
    assert (outcome.code, outcome.out, size_of(tmp_path / "b.png")) == (0, "b.png\n", (36, 24))


def test_links_are_done_or_mentioned(run, tmp_path: Path) -> None:
    put(tmp_path / "in/a.png")
    put(tmp_path / "elsewhere/z.png", 1)
    (tmp_path / "in/b.png").symlink_to("a.png")
    (tmp_path / "in/gone.png").symlink_to("nowhere.png")
    (tmp_path / "in/more").symlink_to("../elsewhere")
    outcome = run("in", "-o", "out", "--recursive")
    assert outcome.out.splitlines() == ["out/a.png", "out/b.png"]
    assert outcome.err.splitlines() == [
        "left out: in/gone.png: a link that leads nowhere",
        "left out: in/more: a link to a folder, which is not followed; name the folder itself",
    ]
    assert run("in/a.png", "./in/a.png", "in/b.png").out.splitlines() == ["in/a_x4.png", "in/b_x4.png"]


def test_two_inputs_of_one_name_do_not_stop_the_others(run, tmp_path: Path) -> None:
    for name in ("img.jpg", "img.png", "other.png"):
        put(tmp_path / "in" / name)
    outcome = run("in", "-o", "out", "--format", "png")
    assert (outcome.code, outcome.out.splitlines()) == (1, ["out/img.png", "out/other.png"])
    failed = "failed: in/img.png: its output out/img.png is that of in/img.jpg already; rename one of them"
    assert outcome.err.startswith(failed)
    again = run("in", "-o", "out", "--format", "png", "--skip-existing")
    assert (again.code, again.out) == (1, "")


def test_a_name_that_becomes_too_long_does_not_stop_the_others(run, tmp_path: Path) -> None:
    put(tmp_path / "ok.png")
    put(tmp_path / f"{'x' * 251}.png", 1)
    outcome = run(*sorted(path.name for path in tmp_path.iterdir()))
    assert (outcome.code, outcome.out) == (1, "ok_x4.png\n")
    assert "cannot be written (File name too long)" in outcome.err


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs a program that drops the rights of root")
def test_a_subfolder_that_may_not_be_read_is_mentioned(weights: Path, tmp_path: Path) -> None:
    put(tmp_path / "in/ok/a.png")
    put(tmp_path / "in/lost/b.png")
    (tmp_path / "in/lost").chmod(0)
    drop = "-dac_override,-dac_read_search"
    prefix = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}"] if os.geteuid() == 0 else []
    words = [*prefix, *PROGRAM, "upscale", "in", "-o", "out", "--recursive", "--model", str(weights)]
    try:
        result = subprocess.run([*words, "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True, check=False)
    finally:
        (tmp_path / "in/lost").chmod(0o755)
    assert (result.returncode, result.stdout) == (0, "out/ok/a.png\n")
    assert "left out: in/lost: cannot be listed (Permission denied)" in result.stderr


def test_patterns_in_folders_named_with_brackets(run, tmp_path: Path) -> None:
    put(tmp_path / "set [1]/a.png")
    assert run("set [1]/*.png", "-o", "out").out == "out/a.png\n"


def test_metadata_and_times_are_kept_or_dropped_as_asked(run, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "a cat")
    put(tmp_path / "a.png", pnginfo=info, dpi=(300, 300))
    os.utime(tmp_path / "a.png", (978307200, 978307200))
    assert run("a.png", "-o", "kept.png", "--keep-times").code == 0
    assert (tmp_path / "kept.png").stat().st_mtime == 978307200
    assert run("a.png", "-o", "bare.png", "--strip-metadata").code == 0
    assert (tmp_path / "bare.png").stat().st_mtime > 978307200
    with Image.open(tmp_path / "kept.png") as kept, Image.open(tmp_path / "bare.png") as bare:
        assert kept.text == {"parameters": "a cat"}
        assert (bare.text, "dpi" in bare.info, "dpi" in kept.info) == ({}, False, True)


def test_transparency_can_go_through_the_network(run, tmp_path: Path) -> None:
    mask = np.zeros((12, 12), np.uint8)
    mask[3:9, 3:9] = 255
    Image.fromarray(np.dstack([np.full((12, 12, 3), 200, np.uint8), mask])).save(tmp_path / "a.png")
    planes = {}
    for way in ("bicubic", "network"):
        assert run("a.png", "-o", f"{way}.png", "--alpha", way).code == 0
        planes[way] = np.asarray(Image.open(tmp_path / f"{way}.png"))
    assert np.array_equal(planes["bicubic"][..., :3], planes["network"][..., :3])
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert run("mask.png", "-o", "gray.png").code == 0
    assert np.array_equal(planes["network"][..., 3], np.asarray(Image.open(tmp_path / "gray.png")))
    assert not np.array_equal(planes["bicubic"][..., 3], planes["network"][..., 3])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_batch_says_what_is_done_and_how_to_go_on(
    weights: Path, tmp_path: Path, number: int, code: int
) -> None:
    for index in range(40):
        put(tmp_path / f"in/{index:02d}.png", index, (96, 96))
    words = [*PROGRAM, "upscale", "in", "-o", "out", "--model", str(weights), "--device", "cpu"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "out/00.png\n"  # a line comes when its image is done
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert re.search(r"\d+ of 40 images written; the same command with --skip-existing goes on\n", err)
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(PARTIAL_PREFIX)]

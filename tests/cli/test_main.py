"""The command line as a whole: one line and exit code 2 for a mistake, a traceback only on request."""

import io
import os
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

from onestepsr import __version__
from onestepsr.cli.main import main
from onestepsr.core.config import from_mapping
from onestepsr.core.errors import UserError
from onestepsr.data.datasets import DataConfig
from onestepsr.inference.upscaler import Upscaler


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"onestepsr {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("upscale", "a.jpg", "--colour"), "No such option: --colour"),
        (("upscale", "a.jpg", "--scale", "big"), "--scale"),
        (("upscale", "missing.jpg"), "missing.jpg: no such file"),
        (("enlarge",), "No such command 'enlarge'"),
        (("models", "info", "d3sr-tny"), "did you mean 'd3sr-tiny'"),
        (("train", "d3sr", "--recipe", "d3sr-tny"), "did you mean 'd3sr-tiny'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("error: ")


def test_nothing_at_all_shows_the_help(capsys):
    code, out, err = run(capsys)
    assert code == 2
    assert "upscale" in out + err


def test_debug_raises_anywhere_on_the_line():
    with pytest.raises(UserError, match=r"missing\.jpg"):
        main(["upscale", "missing.jpg", "--debug"])


def test_a_tilde_stands_for_the_home_folder_wherever_a_path_does(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = f"{tmp_path}/"
    assert f"{home}m.safetensors: no such weights file" in run(capsys, "models", "info", "~/m.safetensors")[2]
    assert f"{home}none.png: no such file" in run(capsys, "upscale", "~/none.png", "--model=~/m.safetensors")[2]
    words = ("train", "autoencoder", "--recipe", "autoencoder-tiny", "data.paths=[~/photos]", "--dry-run", "--out=~/r")
    assert f"{home}photos: no such folder" in run(capsys, *words)[2]
    with pytest.raises(UserError, match=rf"^{home}m\.safetensors: no such weights file"):
        Upscaler.from_pretrained("~/m.safetensors")
    assert from_mapping(DataConfig, {"paths": ["~/a", "b~"]}).paths == (tmp_path / "a", Path("b~"))


def test_an_interrupt_is_one_word_and_its_own_exit_code(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("onestepsr.cli.upscale.command.plan_jobs", interrupt)
    assert run(capsys, "upscale", "a.jpg") == (130, "", "interrupted\n")


def test_a_name_that_the_encoding_lacks_is_printed_all_the_same(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("onestepsr.cli.main.app", lambda **_: typer.echo("\u7167 \udcff \xe9"))
    with pytest.raises(SystemExit) as stopped:
        main([])
    stream.flush()
    assert stopped.value.code == 0
    assert stream.buffer.getvalue().split() == [b"\\u7167", b"\\udcff", b"\xe9"]


@pytest.mark.parametrize(
    "line",
    [
        "upscale photo.png -o out.png --model {name}.safetensors",
        "upscale photo.png -o {name}/out.png",
        "train d3sr --recipe {name}.yaml --dry-run",
        "train d3sr --recipe {name} --dry-run",
        "degrade photos {name}",
        "models info {name}",
        "evaluate {name}",
    ],
)
def test_a_name_that_is_too_long_is_one_short_line(capsys, monkeypatch, tmp_path, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for path in ("photo.png", "photos/photo.png"):
        Image.new("RGB", (8, 8)).save(path)
    code, out, err = run(capsys, *line.format(name="x" * 5000).split())
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="devices of Linux")
def test_a_device_is_no_output_but_stdout_has_a_name(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("photo.png")
    code, _, err = run(capsys, "upscale", "photo.png", "-o", "/dev/full")
    assert (code, err) == (2, "error: /dev/full: neither a file nor a folder; -o - writes to stdout\n")
    code, _, err = run(capsys, "upscale", "photo.png", "-o", "/dev/stdout", "--overwrite")
    assert (code, err) == (2, "error: --overwrite: stdout is no file\n")

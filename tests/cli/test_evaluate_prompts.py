"""Prompts for ``onestepsr evaluate --model``: each image gets the one that ``onestepsr upscale`` gives it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from small_text_model import WIDTH, write_tagger, write_text_encoder
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from onestepsr.cli.evaluate import command as evaluate
from onestepsr.core.errors import UserError
from onestepsr.evaluate.result import read_result
from onestepsr.inference.upscaler import Upscaler
from onestepsr.models import loading
from onestepsr.models.generators import Generator
from onestepsr.weights import download


class Reader(Generator):
    """Enlarges, and makes the image as bright as its prompt says."""

    prompt_width = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))

    def forward(self, lr: Tensor, *, prompt: Tensor | None = None, **others: Any) -> Tensor:
        level = 0.5 if prompt is None else prompt.abs().sum().frac()
        return functional.interpolate(lr, scale_factor=4) * 0 + level


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("text") / "sd")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_folder: Path) -> Callable[..., tuple[int, str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(download.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(download.OFFLINE, "1")
    monkeypatch.setattr(loading, "load_generator", lambda name, **options: Reader())
    (tmp_path / "reader.safetensors").write_bytes(b"whatever it holds, a reader is loaded")
    (tmp_path / "lr").mkdir()
    for number, name in enumerate("abc"):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).save(tmp_path / "lr" / f"{name}.png")
    app = typer.Typer()
    app.callback()(lambda: None)
    evaluate.register(app)

    def call(*arguments: object) -> tuple[int, str]:
        words = ["evaluate", "--model", "reader.safetensors", "--metrics", "grid"]
        words += ["--text-encoder", str(text_folder)] if any(str(a).startswith("--prompt") for a in arguments) else []
        words += ["--device", "cpu", "--dtype", "float32", "--color-fix", "none", *map(str, arguments)]
        result = CliRunner().invoke(app, words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stderr

    return call


def level(path: Path) -> int:
    with Image.open(path) as image:
        return int(np.asarray(image)[0, 0, 0])


def expected(text_folder: Path, text: str) -> int:
    """The brightness that the reader gives to a prompt."""
    from onestepsr.prompts.embedder import PromptEmbedder

    picture = np.zeros((8, 12, 3), np.uint8)
    embedding = PromptEmbedder(text_folder).embed([text])
    upscaled = Upscaler(Reader(), "cpu", "float32")(picture, color_fix="none", prompt_embedding=embedding)
    return int(np.asarray(upscaled)[0, 0, 0])


def test_every_image_has_its_own_text_and_one_without_fails_alone(run, tmp_path: Path, text_folder: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps({"a": "a cat", "c": "a blue tree"}))
    code, said = run("--lr", "lr", "--prompt-file", "texts.json", "--out", "kept", "--json", "scores.json")
    assert code == 1
    assert "texts.json: no prompt for b.png" in said
    for name, text in (("a", "a cat"), ("c", "a blue tree")):
        assert level(tmp_path / "kept" / "SR" / f"{name}.png") == expected(text_folder, text)
    result = read_result(tmp_path / "scores.json")
    assert set(result.images) == {"a", "c"}
    assert result.model is not None
    assert result.model.options["prompt_file"] == "texts.json"
    assert "prompt" not in result.model.options


def test_one_text_for_all_and_none(run, tmp_path: Path, text_folder: Path) -> None:
    assert run("--lr", "lr", "--prompt", "", "--out", "empty")[0] == 0
    assert {level(path) for path in (tmp_path / "empty").rglob("*.png")} == {expected(text_folder, "")}
    assert run("--lr", "lr", "--out", "none", "--json", "none.json")[0] == 0
    assert {level(path) for path in (tmp_path / "none").rglob("*.png")} == {128}
    model = read_result(tmp_path / "none.json").model
    assert model is not None
    assert not {"prompt", "text_encoder"} & set(model.options)


def test_an_extractor_sees_what_the_model_gets(run, tmp_path: Path, text_folder: Path, monkeypatch) -> None:
    """Images in files in groups; those that are made from photos one by one."""
    from onestepsr.prompts.sources import load_extractor

    sizes: list[tuple[int, int]] = []
    extractor = load_extractor(str(write_tagger(tmp_path / "tagger")), "cpu")
    plain = type(extractor).describe
    monkeypatch.setattr(type(extractor), "describe", lambda self, p: sizes.append(p.size) or plain(self, p))
    tags = expected(text_folder, "cat, tree, blue, ,")
    assert run("--lr", "lr", "--prompt-from", "tagger", "--out", "files")[0] == 0
    assert {level(path) for path in (tmp_path / "files").rglob("*.png")} == {tags}
    assert sizes == [(12, 8)] * 3
    arguments = ["--data", "lr", "--degradation", "bicubic", "--prompt-from", "tagger", "--out", "made"]
    assert run(*arguments)[0] == 0
    assert {level(path) for path in (tmp_path / "made" / "SR").rglob("*.png")} == {tags}
    assert sizes[3:] == [(3, 2)] * 3


def test_mistakes_are_one_line(run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--prompt-file: holds whole prompts"):
        run("--lr", "lr", "--prompt", "a", "--prompt-file", "x.txt")
    with pytest.raises(UserError, match="90 tokens, at most 75"):
        run("--lr", "lr", "--prompt", "cat " * 90)
    monkeypatch.setattr(Reader, "prompt_width", 0)
    with pytest.raises(UserError, match="reads no text, so it takes no prompt"):
        run("--lr", "lr", "--prompt", "a cat")
    result = CliRunner().invoke(_app(), ["evaluate", "lr", "--prompt", "a cat"])
    assert str(result.exception) == "--prompt: needs --model"


def _app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    evaluate.register(app)
    return app

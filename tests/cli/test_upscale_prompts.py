"""Prompts on the command line: where they come from, what they change, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_diffusion import AUTOENCODER, UNET
from small_text_model import WIDTH, write_tagger, write_text_encoder
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from onestepsr.cli.upscale import command
from onestepsr.cli.upscale.prompts import PromptOptions
from onestepsr.core.errors import UserError
from onestepsr.inference.upscaler import Upscaler
from onestepsr.models import loading
from onestepsr.models.generators import Generator
from onestepsr.prompts import sources
from onestepsr.prompts.embedder import PromptEmbedder
from onestepsr.prompts.ram import RamTagger
from onestepsr.weights import download, files


class Reader(Generator):
    """Enlarges, and makes the image as bright as its prompt says."""

    def __init__(self, prompt_width: int = WIDTH) -> None:
        super().__init__()
        self.prompt_width = prompt_width
        self.anything = nn.Parameter(torch.zeros(1))

    def forward(self, lr: Tensor, *, prompt: Tensor | None = None, **others: Any) -> Tensor:
        level = 0.5 if prompt is None else prompt.abs().sum().frac()
        return functional.interpolate(lr, scale_factor=4) * 0 + level


class Deaf(Reader):
    def __init__(self) -> None:
        super().__init__(prompt_width=0)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("text") / "sd")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_folder: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(download.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(download.OFFLINE, "1")
    models = {"reader": Reader, "deaf": Deaf, "wide": lambda: Reader(WIDTH + 1)}
    monkeypatch.setattr(loading, "load_generator", lambda name, **options: models[str(name)]())
    for number, name in enumerate("ab"):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(coarse).save(tmp_path / f"{name}.png")

    def call(*arguments: object, model: str = "reader", stdin: bytes | None = None) -> str:
        import typer

        app = typer.Typer()
        app.callback()(lambda: None)
        command.register(app)
        words = ["upscale", *map(str, arguments), "--model", model, "--device", "cpu", "--dtype", "float32"]
        words += ["--color-fix", "none"]
        # Refused where they would do nothing: for stdout, and without a prompt.
        words += ["--overwrite"] if arguments[0] != "-" or "-o" in arguments else []
        words += ["--text-encoder", str(text_folder)] if any(str(a).startswith("--prompt") for a in arguments) else []
        result = CliRunner().invoke(app, words, input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout

    return call


def level(path: str) -> int:
    with Image.open(path) as image:
        return int(np.asarray(image)[0, 0, 0])


def test_a_prompt_changes_the_image_and_the_empty_one_is_a_prompt_too(run) -> None:
    run("a.png")
    none = level("a_x4.png")
    run("a.png", "--prompt", "")
    empty = level("a_x4.png")
    run("a.png", "--prompt", "a cat")
    assert len({none, empty, level("a_x4.png")}) == 3
    run("a.png", "--prompt", "A  cat")
    words = level("a_x4.png")
    run("a.png", "--prompt", "a cat")
    assert level("a_x4.png") == words  # upper case and spaces mean nothing to the text encoder


def test_every_image_gets_its_own_text(run, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name, text in (("a", "a cat"), ("b", "a blue tree")):
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    document = json.loads(run("a.png", "b.png", "--prompt-file", "texts", "-o", "out", "--json"))
    assert [entry["prompt"] for entry in document["results"]] == ["a cat", "a blue tree"]
    for name, text in (("a", "a cat"), ("b", "a blue tree")):
        run(f"{name}.png", "--prompt", text)
        assert level(f"{name}_x4.png") == level(f"out/{name}.png")


def test_one_image_without_a_text_does_not_stop_the_others(run, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(json.dumps({"a": "cat " * 90, "b": "a cat"}))
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    words = ["a.png", "b.png", "c.png", "--prompt-file", "table.json", "-o", "out", "--json"]
    results = json.loads(run(*words))["results"]
    assert [entry["status"] for entry in results] == ["failed", "written", "failed"]
    assert "90 tokens, at most 75" in results[0]["error"]
    assert results[2]["error"] == "table.json: no prompt for c.png"
    results = json.loads(run(*words, "--truncate-prompt"))["results"]
    assert [entry["status"] for entry in results] == ["written", "written", "failed"]


def test_a_tagger_looks_at_the_image(run, tmp_path: Path) -> None:
    tagger = write_tagger(tmp_path / "tagger")
    document = json.loads(run("a.png", "--prompt-from", tagger, "--json"))
    assert document["results"][0]["prompt"] == "cat, tree, blue, ,"
    document = json.loads(run("a.png", "--prompt-from", tagger, "--prompt", "dog", "--json"))
    assert document["results"][0]["prompt"] == "cat, tree, blue, dog,"
    run("-", "-o", "piped.png", "--prompt-from", tagger, "--prompt", "dog", stdin=Path("a.png").read_bytes())
    assert level("piped.png") == level("a_x4.png")


@pytest.mark.parametrize(
    ("arguments", "model", "message"),
    [
        (["--prompt", "a cat"], "deaf", "deaf: reads no text, so it takes no prompt"),
        (["--prompt", "a cat"], "wide", f"wide: reads prompts of {WIDTH + 1} channels, the text encoder gives {WIDTH}"),
        (["--prompt", "cat " * 80], "reader", "80 tokens, at most 75 are read"),
        (["--prompt-file", "x", "--prompt", "a"], "reader", "--prompt-file: holds whole prompts"),
        (["--prompt-file", "nowhere.txt"], "reader", r"nowhere.txt: cannot be read"),
        (["--prompt-from", "nowhere"], "reader", "prompt extractor 'nowhere': no such folder"),
        (["--truncate-prompt"], "reader", "--truncate-prompt: there is no prompt"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    run, tmp_path: Path, arguments: list[str], model: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run("a.png", *arguments, model=model)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*_x4*"))


def test_a_generator_of_osediff_follows_the_prompt_in_every_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_folder: Path
) -> None:
    from onestepsr.core.config import to_mapping
    from onestepsr.models.osediff.generator import OSEDiffGeneratorConfig, osediff_generator

    monkeypatch.setenv(download.CACHE, str(tmp_path / "cache"))
    config = OSEDiffGeneratorConfig(unet=UNET, autoencoder=AUTOENCODER)
    torch.manual_seed(0)
    weights = osediff_generator(config).state_dict()
    path = tmp_path / "osediff.safetensors"
    files.save_model(path, architecture="osediff", config=to_mapping(config), state_dict=weights)
    upscaler = Upscaler.from_pretrained(path, "cpu", "float32")
    assert upscaler.prompt_width == WIDTH
    samples = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    cat, none = PromptEmbedder(text_folder).embed(["a cat", ""])[:, None]
    images = [
        np.asarray(upscaler(samples, tile=24, prompt_embedding=embedding)).astype(int) for embedding in (cat, none, cat)
    ]
    assert (images[0] == images[2]).all()
    changed = (images[0] != images[1]).any(2)
    assert changed[:, :60].any()
    assert changed[:, 100:].any()


def test_seesr_reads_tags_and_tokens_of_each_image(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_folder: Path
) -> None:
    class Seer(Reader):
        image_tokens, added_prompt = 3, "cat"

        def forward(self, lr: Tensor, *, prompt: Tensor | None = None, **others: Any) -> Tensor:
            assert prompt is not None
            given.append(prompt)
            return super().forward(lr, prompt=prompt)

    class Tagger(RamTagger):
        def __init__(self) -> None:
            self.enlarges = True

        def see(self, image: Image.Image) -> tuple[str, Tensor]:
            assert not self.enlarges, "the tagger sees the LR image itself"
            return "tree", torch.full((1, 3, WIDTH - 4), float(image.width))

        def release(self) -> None: ...

    given: list[Tensor] = []
    monkeypatch.setattr(loading, "load_generator", lambda name, **options: Seer())
    monkeypatch.setattr(sources, "load_extractor", lambda name, device: Tagger())
    document = json.loads(run("a.png", "--prompt-from", "dape", "--json"))
    assert document["results"][0]["prompt"] == "tree, ,cat"
    with Image.open("a.png") as image:
        width = image.width
    assert given[0].shape == (1, 80, WIDTH)
    assert torch.equal(given[0][0, :77], PromptEmbedder(text_folder).embed(["tree, ,cat"])[0])
    assert (given[0][:, 77:, : WIDTH - 4] == width).all()
    assert not given[0][:, 77:, WIDTH - 4 :].any()
    with pytest.raises(UserError, match="what RAM sees in each image; give --prompt-from dape"):
        run("b.png", "--prompt", "x")


def test_nothing_of_prompts_is_imported_without_one() -> None:
    import subprocess

    program = (
        "import sys; from onestepsr.inference.upscaler import Upscaler; import onestepsr.cli.upscale.command; "
        "Upscaler.from_pretrained('d3sr-tiny', 'cpu'); "
        "sys.exit(any(name.startswith(('onestepsr.prompts', 'transformers')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize(("model", "said"), [("osediff", True), ("d3sr-tiny", False)])
def test_a_published_model_without_its_prompts_is_reported(
    caplog: pytest.LogCaptureFixture, model: str, said: bool
) -> None:
    assert PromptOptions().load(Upscaler(Reader(), "cpu", "float32", name=model)) is None
    assert ("--prompt-from dape" in caplog.text) is said


def test_an_embedding_can_be_given_in_python() -> None:
    upscaler = Upscaler(Reader(), "cpu", "float32")
    samples = np.full((5, 7, 3), 90, np.uint8)
    brightness = {
        int(np.asarray(upscaler(samples, color_fix="none", prompt_embedding=embedding))[0, 0, 0])
        for embedding in (None, torch.full((1, 77, WIDTH), 0.101), torch.full((1, 77, WIDTH), 0.1003))
    }
    assert len(brightness) == 3
    with pytest.raises(UserError, match="reads no text"):
        Upscaler(Deaf(), "cpu", "float32")(samples, prompt_embedding=torch.zeros(1, 77, WIDTH))

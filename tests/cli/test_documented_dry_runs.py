"""Every ``train`` and ``ablate`` that a page, a recipe or a suite shows, as a dry run with stand-ins for weights."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from onestepsr.cli.main import app
from onestepsr.models.architectures import describe, random_generator
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyAutoencoder, TinyConfig
from onestepsr.train import ablation, recipes
from onestepsr.weights.files import save_model
from test_documented_commands import COMMANDS
from weights_by_name import published_efficientnet

DRY = sorted(
    {text.partition(" #")[0].strip() for _, text in COMMANDS if re.match(r"train .*--recipe|ablate [\w-]+ ", text)}
)
TINY = [name for name in recipes.recipe_names() if "-tiny" in name]
DRY += [f"train {recipes.read_recipe(name)['method']} --recipe {name}" for name in TINY]
"""Recipes at the papers' scale have a test of their own, ``test_published_settings``."""
QUICK_RECIPES = (
    "autoencoder-tiny",
    "diffusion-tiny",
    "resshift-tiny",
    "d3sr-tiny-shallow",
    "osediff-tiny",
    "tadsr-tiny",
)
QUICK = {f"train {recipe.split('-')[0]} --recipe {recipe}" for recipe in QUICK_RECIPES}
FOLDERS = ("PHOTOS", "photos", "data/LSDIR", "data/FFHQ", "data/own", "ImageNet/train", "FFHQ256", "FFHQ512", "DIV2K")
FOLDERS += ("Flickr2K", "LSDIR", "FFHQ", "BSDS500", "IMAGENET_SAMPLE", "BSDS500_TEST", "DRAWINGS")
TEXTS = ("TAGS", "texts", "texts/tags", "texts/captions", "texts/held-out-tags", "texts/held-out-captions")
STAND_INS = (
    (r"\b(backbone|teacher|model): (sd21-base|sdxl-base|seesr|resshift-[a-z][\w-]*)\b", r'\1: "random:\2"'),
    (r"tagger: dape", "tagger: random"),
    (r"first: \[0, 10000\]", "first: []"),
    (r"features: vgg16", "features: oriented"),
    (r"model: realesrgan-x4plus", "model: bicubic"),
    (r"(\n  lpips_weight: 0\.5)", r"\1\n  perceptual: {features: efficientnet-lite0, efficientnet_weights: lite0.pth}"),
)
"""In recipes and suites: random weights, or none, in the place of those that someone has to fetch."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all that the commands name: photos, pairs, texts, and the models of earlier runs."""
    folder = tmp_path_factory.mktemp("place")
    for number, (name, side) in enumerate([("first", 512), ("second", 512), ("low", 128)]):
        (folder / name).mkdir()
        Image.linear_gradient("L").rotate(30 * number).resize((side, side)).convert("RGB").save(folder / name / "a.png")
    names = dict.fromkeys(FOLDERS, "first") | {"pairs/HR": "first", "pairs/taught": "first", "pairs/LR": "low"}
    for name, source in (names | dict.fromkeys(("OTHER_PHOTOS", "REALSR_HR"), "second") | {"REALSR_LR": "low"}).items():
        shutil.copytree(folder / source, folder / name)
    for name in TEXTS:
        (folder / name).mkdir()
        (folder / name / "a.txt").write_text("a cat")
    torch.save(published_efficientnet(), folder / "lite0.pth")
    sizes = {"widths": (64, 96, 160), "down_blocks": (1, 1, 2), "up_blocks": (2, 2, 1)}
    shallow = TinyConfig(decoder_width=64, refine_width=16, **sizes)
    networks: dict[str, nn.Module] = {kind: random_generator(f"random:{kind}-tiny") for kind in ("d3sr", "resshift")}
    networks |= {
        "autoencoder": TinyAutoencoder(shallow),
        "diffusion": tiny_generator(TinyGeneratorConfig(model=shallow)),
    }
    for kind, network in networks.items():
        architecture, config = describe(network)
        path = folder / f"{kind}.safetensors"
        save_model(path, architecture=architecture, config=config, state_dict=network.state_dict())
    texts = "".join(path.read_text() for path in ablation.PACKAGED.parent.glob("*/*.yaml"))
    for name in {*re.findall(r"(runs/[\w-]+)/model", texts), "runs/diffusion-tiny-long"}:
        (folder / name).mkdir(parents=True)
        kind = name.removeprefix("runs/").partition("-")[0]
        kind = {"distillation": "d3sr"}.get(kind, "diffusion" if "shallow" in name else kind)
        (folder / name / "model.safetensors").symlink_to(folder / f"{kind}.safetensors")
    for kind in ("recipes", "suites"):
        (folder / kind).mkdir()
        for path in (ablation.PACKAGED.parent / kind).glob("*.yaml"):
            text = path.read_text()
            for pattern, stand_in in STAND_INS:
                text = re.sub(pattern, stand_in, text)
            (folder / kind / path.name).write_text(text)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "command", [pytest.param(text, marks=() if text in QUICK else pytest.mark.slow) for text in dict.fromkeys(DRY)]
)
def test_a_documented_command_dry_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("ONESTEPSR_OFFLINE", raising=False)  # texts: what training would fetch is told
    monkeypatch.setenv("ONESTEPSR_CACHE", str(place / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(recipes, "PACKAGED", place / "recipes")
    monkeypatch.setattr(ablation, "PACKAGED", place / "suites")
    before = sorted(place.rglob("*"))
    out = ["--out", "runs/new"]  # the run's own folder may hold the model that a later command needs
    result = CliRunner().invoke(app, [*shlex.split(command), *out, "--dry-run"])
    assert result.exit_code == 0, result.exception or result.output
    if command.startswith("train"):
        shown = yaml.safe_load(result.stdout[result.stdout.index("\nmethod:") :])
        assert shown["method"] == command.split()[1]
        assert re.search(r"memory per device: [\d.,]+ GB", result.stdout)
    else:
        suite = ablation.load_suite(command.split()[1], ["validation=OTHER_PHOTOS"])
        chosen = re.search(r"--only (\S+)", command)
        for name in chosen[1].split(",") if chosen else suite.config.variants:
            assert re.search(rf"^\W*{name}\W", result.stdout, re.MULTILINE), name
    assert sorted(place.rglob("*")) == before, "a dry run writes nothing"

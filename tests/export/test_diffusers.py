"""The diffusers folder: loaded by stock diffusers where onestepsr cannot be imported, it gives the same image."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_diffusion import GENERATOR

from onestepsr import Upscaler
from onestepsr.export.formats import TOLERANCES, compare, export_generator
from onestepsr.models.generators import Generator
from onestepsr.models.osediff.generator import OSEDiffGenerator
from onestepsr.models.stable_diffusion.networks import stable_diffusion_generator

ROOT = Path(__file__).parents[2]
ALONE = """
import sys
sys.modules["onestepsr"] = None  # an import of it fails
from PIL import Image
from diffusers import DiffusionPipeline
folder, photo, again, result = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipe.to("cpu").save_pretrained(again)
pipe = DiffusionPipeline.from_pretrained(again, custom_pipeline=again, trust_remote_code=True)
pipe(image=Image.open(photo)).images[0].save(result)
"""


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    return stable_diffusion_generator(replace(GENERATOR, scale=2)).eval().requires_grad_(False)


def test_the_folder_gives_the_same_image(generator: Generator, tmp_path: Path) -> None:
    exported = export_generator(generator, "small", "diffusers", tmp_path, licence="Apache-2.0")
    assert {path.name for path in exported.files} >= {"model_index.json", "pipeline.py", "scheduler_config.json"}
    assert not re.search(r"^\s*(import|from) onestepsr", (tmp_path / "pipeline.py").read_text(), re.MULTILINE)
    found = compare(exported, generator)
    assert max(one.difference for one in found) <= TOLERANCES["diffusers", torch.float32]


@pytest.mark.slow
def test_the_folder_gives_the_same_image_without_onestepsr(generator: Generator, tmp_path: Path) -> None:
    export_generator(generator, "small", "diffusers", tmp_path / "folder", licence="Apache-2.0")
    photo, again, result = tmp_path / "photo.png", tmp_path / "again", tmp_path / "result.png"
    with Image.open(ROOT / "examples" / "cat.jpg") as image:
        image.crop((10, 20, 47, 45)).save(photo)
    command = [sys.executable, "-c", ALONE, *map(str, (tmp_path / "folder", photo, again, result))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = np.asarray(Upscaler(generator, "cpu", "float32")(photo, scale=2)).astype(int)
    theirs = np.asarray(Image.open(result)).astype(int)
    assert ours.shape == theirs.shape == (50, 74, 3)
    assert np.abs(ours - theirs).max() <= 1
    assert (ours == theirs).mean() > 0.99  # where rounding of the last digit decides
    index = json.loads((again / "model_index.json").read_text())
    assert index["timestep"] == GENERATOR.timestep
    assert index["_class_name"] == ["pipeline", "OneStepSRPipeline"]


def test_osediff_keeps_its_step_and_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator = OSEDiffGenerator.of(stable_diffusion_generator(GENERATOR), timestep=999, scale=1)
    generator.eval().requires_grad_(False)
    exported = export_generator(generator, "osediff-face", "diffusers", tmp_path)
    assert max(one.difference for one in compare(exported, generator)) <= TOLERANCES["diffusers", torch.float32]
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["timestep"], index["scale"]) == (999, 1)

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_text_model import WORDS, write_captioner, write_tagger

from onestepsr.core.errors import MissingExtra, UserError
from onestepsr.prompts import sources
from onestepsr.prompts.sources import Captioner, ClassTagger, load_extractor


def image(seed, size=(48, 40)):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size)


@pytest.fixture(scope="module")
def captioner_folder(tmp_path_factory):
    return write_captioner(tmp_path_factory.mktemp("captioner") / "blip")


@pytest.fixture(scope="module")
def tagger_folder(tmp_path_factory):
    return write_tagger(tmp_path_factory.mktemp("tagger") / "vit")


def test_captions_are_what_the_network_says_about_the_image(captioner_folder):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    captioner = load_extractor(captioner_folder)
    assert isinstance(captioner, Captioner)
    captions = [captioner.describe(image(seed)) for seed in range(4)]
    assert len(set(captions)) > 1
    assert all(set(caption.split()) <= {*WORDS, "[UNK]"} for caption in captions)
    network = BlipForConditionalGeneration.from_pretrained(captioner_folder)
    processor = BlipProcessor.from_pretrained(captioner_folder)
    pixels = processor(images=image(1), return_tensors="pt")["pixel_values"]
    expected = processor.decode(network.generate(pixels, max_new_tokens=40, do_sample=False)[0], True)
    assert captions[1] == expected


def test_weights_are_in_memory_only_between_the_first_image_and_release(captioner_folder):
    captioner = load_extractor(captioner_folder)
    assert captioner._loaded is None
    first = captioner.describe(image(0))
    assert captioner._loaded is not None
    captioner.release()
    assert captioner._loaded is None
    assert captioner.describe(image(0)) == first


def test_tags_are_the_classes_above_their_thresholds(tagger_folder, tmp_path):
    tagger = load_extractor(tagger_folder)
    assert isinstance(tagger, ClassTagger)
    assert tagger.describe(image(0)) == "cat, tree, blue"
    strict = shutil.copytree(tagger_folder, tmp_path / "strict")
    (strict / "thresholds.txt").write_text("0.95\n0.05\n0.5\n0.85\n")
    assert load_extractor(strict).describe(image(0)) == "dog, tree"
    (strict / "thresholds.txt").write_text("0.95\n")
    with pytest.raises(UserError, match="1 thresholds for 4 tags"):
        load_extractor(strict).describe(image(0))


def test_images_of_any_kind_and_size(tagger_folder, captioner_folder):
    for other in (Image.new("L", (1, 1)), Image.new("RGBA", (300, 7)), image(0, (5, 90))):
        assert load_extractor(tagger_folder).describe(other) == "cat, tree, blue"
        assert isinstance(load_extractor(captioner_folder).describe(other), str)


def test_folders_that_are_of_no_use_are_named(tagger_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config.json"):
        load_extractor(tmp_path / "empty")
    pickled = shutil.copytree(tagger_folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights are not read"):
        load_extractor(pickled)
    other = shutil.copytree(tagger_folder, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "architectures": ["ViTModel"]}))
    with pytest.raises(UserError, match="holds a ViTModel, which gives no text"):
        load_extractor(other)
    with pytest.raises(UserError, match="prompt extractor 'salesforce/blip': no such folder here"):
        load_extractor("salesforce/blip")


def test_code_in_a_folder_is_never_run(tagger_folder, tmp_path):
    folder = shutil.copytree(tagger_folder, tmp_path / "code")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="does not load"):
        load_extractor(folder).describe(image(0))
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_extra_is_named(tagger_folder, monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'onestepsr\[prompts\]'"):
        load_extractor(tagger_folder).describe(image(0))


def test_an_extractor_runs_where_it_is_told_to(tagger_folder):
    tagger = load_extractor(tagger_folder, torch.device("cpu"))
    tagger.describe(image(0))
    assert next(tagger._loaded[1].parameters()).device == torch.device("cpu")

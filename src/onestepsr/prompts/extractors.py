"""Captioners and taggers in transformers' layout, as extractors of prompts."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from onestepsr.core.config import read_mapping
from onestepsr.core.errors import UserError
from onestepsr.prompts.base import PromptExtractor, require_transformers
from onestepsr.prompts.hub import load_network, load_preprocessing, model_folder
from onestepsr.prompts.ram.tagger import RamTagger, is_tagger, read_thresholds, select_tags, usual_folder

FILES = ("*.json", "*.txt", "*.safetensors")
"""Files of a repository that are downloaded: configuration, vocabulary, weights."""
CAPTION_TOKENS = 40
"""Longest caption; the text encoder reads 75 tokens."""
DAPE = "dape"
"""Name of OSEDiff's tagger."""
THRESHOLDS = "thresholds.txt"
"""Beside a tagger's weights: one probability per class."""


class _TransformersExtractor:
    """A network and its preprocessing from one folder, loaded for the first image."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = folder, device
        self._loaded: tuple[Any, Any] | None = None

    @abstractmethod
    def _load(self) -> tuple[Any, Any]:
        """Preprocessing and network."""

    def release(self) -> None:
        """Drop preprocessing and network until the next image."""
        self._loaded = None

    def _parts(self) -> tuple[Any, Any]:
        if self._loaded is None:
            require_transformers("reading prompts from images")
            self._loaded = self._load()
        return self._loaded


class Captioner(_TransformersExtractor):
    """A network of the image-text-to-text kind that needs no question, such as BLIP: one sentence about an image."""

    def _load(self) -> tuple[Any, Any]:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        network = load_network(AutoModelForImageTextToText, self.folder, self.device)
        return load_preprocessing(AutoProcessor, self.folder), network

    def describe(self, image: Image.Image) -> str:
        """The most probable caption, word by word; always the same for the same image."""
        processor, network = self._parts()
        inputs = processor(images=image.convert("RGB"), return_tensors="pt").to(self.device)
        with torch.no_grad():
            tokens = network.generate(**inputs, max_new_tokens=CAPTION_TOKENS, do_sample=False, num_beams=1)
        caption: str = processor.batch_decode(tokens, skip_special_tokens=True)[0]
        return " ".join(caption.split())


class ClassTagger(_TransformersExtractor):
    """A classifier whose classes do not exclude each other: the names of those above their thresholds.

    Thresholds come from ``thresholds.txt`` in the folder, one number per class, or are 0.5.
    """

    def _load(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        network = load_network(AutoModelForImageClassification, self.folder, self.device)
        return load_preprocessing(AutoImageProcessor, self.folder), network

    def describe(self, image: Image.Image) -> str:
        """Tags joined with ", "; nothing if no class is above its threshold."""
        processor, network = self._parts()
        names = [network.config.id2label[number] for number in range(network.config.num_labels)]
        inputs = processor(images=image.convert("RGB"), return_tensors="pt").to(self.device)
        with torch.no_grad():
            probabilities = network(**inputs).logits[0].float().sigmoid().cpu()
        path = self.folder / THRESHOLDS
        thresholds = read_thresholds(path, len(names)) if path.is_file() else 0.5
        return ", ".join(select_tags(probabilities, thresholds, names))


def load_extractor(name_or_path: str | Path, device: torch.device | str = "cpu") -> PromptExtractor:
    """The captioner or tagger in a folder, or called by an alias or ``owner/name[@revision]`` of the hub.

    A folder with RAM's files, or ``dape`` for the usual one, is the tagger of OSEDiff; the kind of any other follows
    from its ``config.json``. No weights are loaded yet. :class:`UserError` if it is neither.
    """
    if str(name_or_path) == DAPE:
        return RamTagger(usual_folder(), device)
    folder = model_folder(name_or_path, FILES, "prompt extractor")
    if is_tagger(folder):
        return RamTagger(folder, device)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; expected a captioner or tagger in transformers' layout")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no .safetensors weights; pickled weights are not read, convert them first")
    kinds = read_mapping(folder / "config.json").get("architectures") or ["none"]
    kind = str(kinds[0]) if isinstance(kinds, list) else str(kinds)
    if kind.endswith("ForImageClassification"):
        return ClassTagger(folder, device)
    if kind.endswith(("ForConditionalGeneration", "ForCausalLM", "ForImageTextToText")):
        return Captioner(folder, device)
    raise UserError(f"{folder}: holds a {kind}, which gives no text; expected a captioner such as BLIP, or a tagger")

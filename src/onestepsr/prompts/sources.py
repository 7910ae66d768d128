"""Texts about images, from which embeddings are made.

1. A :class:`PromptSource` gives the text of an image: fixed, from a file beside it, or from a :class:`PromptExtractor`
   (a captioner or a tagger).
2. :class:`~onestepsr.prompts.embedder.PromptEmbedder` turns texts into embeddings by the text encoder of a diffusers
   folder: ``embed(["a cat", ""]) -> (2, 77, C)``, float32 on the CPU, C = 1024 for Stable Diffusion 2.1.
3. A generator that reads text takes them as ``prompt``, (1 or N, 77, C).

transformers is imported only where it is needed (the extra ``prompts``). Docs: ``docs/prompts.md``.
"""

from __future__ import annotations

from abc import abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from onestepsr.core.config import read_mapping
from onestepsr.core.errors import MissingExtra, UserError
from onestepsr.core.files import read_text
from onestepsr.prompts.hub import load_network, load_preprocessing, model_folder
from onestepsr.prompts.ram import RamTagger, format_tags, is_tagger, read_thresholds, select_tags, usual_folder

# ---- Interfaces ------------------------------------------------------------------------------------------------------

TOKENS = 77
"""Length to which Stable Diffusion's text encoders pad every prompt, with its first and last token."""


class PromptExtractor(Protocol):
    """A captioner or tagger."""

    def describe(self, image: Image.Image) -> str:
        """The part of a prompt that describes ``image`` (RGB, 8 bit, any size); weights are loaded when needed."""
        ...

    def release(self) -> None:
        """Drop the weights from memory until they are needed again."""
        ...


class PromptSource(Protocol):
    """The texts of images."""

    @property
    def needs_image(self) -> bool:
        """True if :meth:`text` needs the image and not only its name."""
        ...

    def text(self, path: Path, image: Image.Image | None) -> str:
        """The prompt of the image at ``path``, whose content (RGB, 8 bit) is given if ``needs_image``."""
        ...

    def release(self) -> None:
        """Drop from memory what the next :meth:`text` can load again."""
        ...


def require_transformers(feature: str) -> None:
    """Raise :class:`MissingExtra` unless transformers can be imported."""
    if find_spec("transformers") is None:
        raise MissingExtra(feature, "prompts")


# ---- Sources ---------------------------------------------------------------------------------------------------------

MAX_PROMPT_BYTES = 16_384
"""Larger files are no prompts."""


class FixedPrompt:
    """The same text for every image; the empty text is Stable Diffusion's null prompt."""

    needs_image = False

    def __init__(self, prompt: str = "") -> None:
        self.prompt = prompt

    def text(self, path: Path, image: Image.Image | None = None) -> str:
        """The text, whatever the image."""
        return self.prompt

    def release(self) -> None:
        """Nothing to drop."""


class FilePrompts:
    """Texts from a folder with ``NAME.txt`` for ``NAME.jpg``, from one text file, or from a table.

    A single ``.txt`` holds the prompt of all images; a ``.json`` or ``.yaml`` maps names, with or without suffix, to
    prompts.
    """

    needs_image = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table: dict[str, str] | None = None
        if path.suffix in (".json", ".yaml", ".yml"):
            self._table = {str(name): prompt for name, prompt in read_mapping(path).items()}
            for name, prompt in self._table.items():
                if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT_BYTES:
                    raise UserError(f"{path}: the prompt of '{name}' is {str(prompt)[:40]!r}, expected a text")
        elif not path.is_dir():
            _read_prompt(path)

    def text(self, path: Path, image: Image.Image | None = None) -> str:
        """The text that belongs to ``path`` by its name; :class:`UserError` if there is none."""
        if self._table is not None:
            found = self._table.get(path.name, self._table.get(path.stem))
            if found is None:
                raise UserError(f"{self.path}: no prompt for {path.name}")
            return found
        return _read_prompt(self.path / f"{path.stem}.txt" if self.path.is_dir() else self.path)

    def release(self) -> None:
        """Nothing to drop."""


class ExtractedPrompts:
    """The description of each image by an extractor, followed by the user's words, in the format of OSEDiff."""

    needs_image = True

    def __init__(self, extractor: PromptExtractor, user_prompt: str = "") -> None:
        self.extractor, self.user_prompt = extractor, user_prompt

    def text(self, path: Path, image: Image.Image | None) -> str:
        """``<what is seen>, <the user's words>,``, which without any words ends in ", ,"."""
        if image is None:
            raise ValueError("an extractor needs the image")
        return format_tags([self.extractor.describe(image)], self.user_prompt)

    def release(self) -> None:
        """Drop the extractor's weights."""
        self.extractor.release()


class TaggedImages:
    """SeeSR's prompts: the tags, the user's words and those that belong behind them, and RAM's tokens of the image."""

    needs_image = True
    tokens: Tensor | None = None
    """Tokens (1, K, W) of the last image whose :meth:`text` was asked for."""

    def __init__(self, extractor: PromptExtractor, user_prompt: str, added: str) -> None:
        """:class:`UserError` for an extractor that is not RAM."""
        if not isinstance(extractor, RamTagger):
            raise UserError(
                "--prompt-from: SeeSR was trained with the tokens of RAM's image encoder: dape, or a folder"
            )
        extractor.enlarges = False
        self.extractor, self.user_prompt, self.added = extractor, user_prompt, added

    def text(self, path: Path, image: Image.Image | None) -> str:
        """``<tags>, <the user's words>,<added>``, as in SeeSR's script."""
        if image is None:
            raise ValueError("an extractor needs the image")
        tags, self.tokens = self.extractor.see(image)
        return format_tags([tags], self.user_prompt) + self.added

    def release(self) -> None:
        """Drop the extractor's weights."""
        self.extractor.release()


def _read_prompt(path: Path) -> str:
    prompt = " ".join(read_text(path, MAX_PROMPT_BYTES, "prompt").split())
    if not prompt:
        raise UserError(f"{path}: empty; for images without a prompt, give --prompt ''")
    return prompt


# ---- Captioners and taggers ------------------------------------------------------------------------------------------

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


def load_extractor(name_or_path: str | Path, device: torch.device | str = "cpu", *, scale: int = 4) -> PromptExtractor:
    """The captioner or tagger in a folder, or called by an alias or ``owner/name[@revision]`` of the hub.

    A folder with RAM's files, or ``dape`` for the usual one, is the tagger of OSEDiff; the kind of any other follows
    from its ``config.json``. RAM and DAPE see images enlarged by ``scale``: 4 for LR images, 1 for photos. No weights
    are loaded yet. :class:`UserError` if it is neither.
    """
    if str(name_or_path) == DAPE:
        return RamTagger(usual_folder(), device, scale=scale)
    folder = model_folder(name_or_path, FILES, "prompt extractor")
    if is_tagger(folder):
        return RamTagger(folder, device, scale=scale)
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

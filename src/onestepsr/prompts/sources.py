"""Sources of prompts: a fixed text, files, or an extractor."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from onestepsr.core.config import read_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.files import read_text
from onestepsr.prompts.base import PromptExtractor
from onestepsr.prompts.ram.tagger import format_tags

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
            self._table = _read_table(path)
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


def _read_prompt(path: Path) -> str:
    prompt = " ".join(read_text(path, MAX_PROMPT_BYTES, "prompt").split())
    if not prompt:
        raise UserError(f"{path}: empty; for images without a prompt, give --prompt ''")
    return prompt


def _read_table(path: Path) -> dict[str, str]:
    table = read_mapping(path)
    for name, prompt in table.items():
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT_BYTES:
            raise UserError(f"{path}: the prompt of '{name}' is {str(prompt)[:40]!r}, expected a text")
    return {str(name): prompt for name, prompt in table.items()}

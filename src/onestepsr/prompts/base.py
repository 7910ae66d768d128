"""Interfaces between images, texts and embeddings.

1. A :class:`PromptSource` gives the text of an image: fixed, from a file beside it, or from a :class:`PromptExtractor`
   (a captioner or a tagger).
2. :class:`~onestepsr.prompts.embedder.PromptEmbedder` turns texts into embeddings by the text encoder of a diffusers
   folder: ``embed(["a cat", ""]) -> (2, 77, C)``, float32 on the CPU, C = 1024 for Stable Diffusion 2.1.
3. A generator that reads text takes them as ``prompt``, (1 or N, 77, C).

transformers is imported only where it is needed (the extra ``prompts``). Docs: ``docs/prompts.md``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from PIL import Image

from onestepsr.core.errors import MissingExtra

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

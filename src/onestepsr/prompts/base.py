"""The seams between images, texts and embeddings."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from onestepsr.core.errors import MissingExtra

TOKENS = 77
"""Length to which Stable Diffusion's text encoders pad every prompt, with its first and last token."""


class PromptExtractor(Protocol):
    """Sees what an image shows."""

    def describe(self, image: Image.Image) -> str:
        """The part of a prompt that is about ``image`` (RGB, 8 bit, any size); weights are loaded when needed."""
        ...

    def release(self) -> None:
        """Drop the weights from memory until they are needed again."""
        ...


class PromptSource(Protocol):
    """Knows the text of every image."""

    @property
    def needs_image(self) -> bool:
        """Whether :meth:`text` looks at the image itself and not only at its name."""
        ...

    def text(self, path: Path, image: Image.Image | None) -> str:
        """The prompt of the image at ``path``, whose content (RGB, 8 bit) is given if ``needs_picture``."""
        ...

    def release(self) -> None:
        """Drop from memory what the next :meth:`text` can load again."""
        ...


class Embedder(Protocol):
    """Turns texts into what a diffusion UNet reads."""

    @property
    def width(self) -> int:
        """Channels C of an embedding."""
        ...

    def embed(self, texts: list[str]) -> Tensor:
        """Embeddings (N, 77, C) of N texts, float32 on the CPU; equal texts give equal embeddings."""
        ...


def require_transformers(feature: str) -> None:
    """Raise :class:`MissingExtra` unless transformers can be imported."""
    if find_spec("transformers") is None:
        raise MissingExtra(feature, "prompts")

"""Embeddings of photos' texts on disk: as many as there are photos, of which each sample needs one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from onestepsr.errors import UserError
from onestepsr.prompts.embedder import PromptEmbedder
from onestepsr.prompts.sources import FilePrompts

GROUP = 512
"""So many embeddings are in memory at once while they are made: 160 MB for Stable Diffusion 2.1."""


def photo_texts(path: Path, names: Sequence[str]) -> list[str]:
    """The texts in ``path`` (see :class:`FilePrompts`) of photos called ``names``; :class:`UserError` if one lacks."""
    source = FilePrompts(path)
    return [source.text(Path(name)) for name in names]


class PhotoPrompts:
    """The embedding of each photo's text."""

    def __init__(self, texts: Sequence[str], embedder: PromptEmbedder) -> None:
        """Make the embeddings that ``embedder``'s cache, which must keep all, lacks."""
        self.texts, self.embedder = texts, embedder
        # Looked for, not read: those of a large set would be tens of gigabytes.
        distinct = [text for text in dict.fromkeys(texts) if not embedder.path(text).is_file()]
        for start in range(0, len(distinct), GROUP):
            embedder.embed(distinct[start : start + GROUP])

    def __getitem__(self, photo: int) -> Tensor:
        """The embedding (77, C) of photo number ``photo``, float32."""
        text = self.texts[photo]
        embedding = self.embedder.find(text)
        if embedding is None:
            path = self.embedder.path(text)
            state = "is damaged: remove it and start again" if path.is_file() else "is gone, or could not be written"
            raise UserError(f"{path}: the embedding of a photo's text {state}")
        return embedding

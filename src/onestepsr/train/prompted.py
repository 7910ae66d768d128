"""Samples with the embedding of their photo's text, for methods whose networks read one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from onestepsr.core.errors import UserError
from onestepsr.core.files import locked
from onestepsr.data.config import DataConfig
from onestepsr.data.datasets import PHOTO, Sample
from onestepsr.methods.base import Method

if TYPE_CHECKING:
    pass
from collections.abc import Sequence
from pathlib import Path

from onestepsr.prompts.embedder import PromptEmbedder
from onestepsr.prompts.sources import FilePrompts

# Embeddings of photos' texts on disk: as many as there are photos, of which each sample needs on ----------------------

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


LOCK = ".lock"


class Prompted(Dataset[Sample]):
    """A dataset whose samples name their photo, with ``prompt`` (L, C) in its place."""

    def __init__(self, source: Any, prompts: PhotoPrompts | None) -> None:
        """Without ``prompts`` the samples carry none: a dry run makes no embeddings."""
        self.source, self.prompts = source, prompts

    def __len__(self) -> int:
        """Photos."""
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` of the endless stream."""
        sample: Mapping[str, Tensor] = self.source[index]
        images = {name: tensor for name, tensor in sample.items() if name != PHOTO}
        return images if self.prompts is None else images | {"prompt": self.prompts[int(sample[PHOTO])]}


def with_prompts(source: Any, data: DataConfig, method: Method, where: str, *, dry: bool) -> Any:
    """``source`` as it is, or with the embeddings of ``data.prompts``, which are made now and kept in its cache folder.

    ``where`` names the data in messages. Raises :class:`UserError` for photos without a text, texts that are too long,
    and methods that read none or learn their prompt.
    """
    if data.prompts is None:
        return source
    if method.embedder is None:
        raise UserError(f"{where}.prompts: the networks of this run read no texts of photos")
    from onestepsr.prompts.embedder import EmbeddingCache

    pass

    texts = photo_texts(data.prompts, source.names())
    cache = EmbeddingCache(data.cache_dir / "prompts", limit=None)
    if dry:
        if method.check_texts is not None:
            method.check_texts(texts, cache)
        return Prompted(source, None)
    # Several processes start at once: the first one makes the embeddings, the others wait and find them there.
    with suppress(OSError):
        cache.folder.mkdir(parents=True, exist_ok=True)
    with locked(cache.folder / LOCK, wait=True):
        return Prompted(source, PhotoPrompts(texts, method.embedder(cache)))

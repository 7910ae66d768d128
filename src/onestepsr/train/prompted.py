"""Samples with the embedding of their photo's text, for methods whose networks read one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from onestepsr.data.config import DataConfig
from onestepsr.data.hr_folder import PHOTO, Sample
from onestepsr.errors import UserError
from onestepsr.methods.base import Method
from onestepsr.train.locking import locked

if TYPE_CHECKING:
    from onestepsr.prompts.photos import PhotoPrompts


LOCK = ".lock"


class Prompted(Dataset[Sample]):
    """A data set whose samples name their photo, with ``prompt`` (L, C) in its place."""

    def __init__(self, source: Any, prompts: PhotoPrompts | None) -> None:
        """Without ``prompts`` the samples carry none: a dry run makes no embeddings."""
        self.source, self.prompts = source, prompts

    def __len__(self) -> int:
        """Photos."""
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` of the endless stream."""
        sample: Mapping[str, Tensor] = self.source[index]
        pictures = {name: tensor for name, tensor in sample.items() if name != PHOTO}
        return pictures if self.prompts is None else pictures | {"prompt": self.prompts[int(sample[PHOTO])]}


def with_prompts(source: Any, data: DataConfig, method: Method, where: str, *, dry: bool) -> Any:
    """``source`` as it is, or with the embeddings of ``data.prompts``, which are made now and kept in its cache folder.

    ``where`` names the data in messages. Raises :class:`UserError` for photos without a text, texts that are too long,
    and methods that read none or learn their prompt.
    """
    if data.prompts is None:
        return source
    if method.embedder is None:
        raise UserError(f"{where}.prompts: the networks of this run read no texts of photos")
    from onestepsr.prompts.cache import EmbeddingCache
    from onestepsr.prompts.photos import PhotoPrompts, photo_texts

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

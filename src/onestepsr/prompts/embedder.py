"""Texts to embeddings: from the cache, or by a text encoder that is in memory only meanwhile."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from onestepsr.errors import UserError
from onestepsr.prompts.base import TOKENS
from onestepsr.prompts.cache import EmbeddingCache
from onestepsr.prompts.text_encoder import TextEncoder, TextEncoderFolder, count_tokens

logger = logging.getLogger(__name__)

DEFAULT_TEXT_ENCODER = "sd21-base"
BATCH = 16
SHOWN_CHARACTERS = 60


class PromptEmbedder:
    """The embedder of a diffusers folder."""

    def __init__(
        self,
        name_or_path: str | Path = DEFAULT_TEXT_ENCODER,
        *,
        device: torch.device | str = "cpu",
        truncate: bool = False,
        cache: EmbeddingCache | None = None,
        fetch: bool = True,
    ) -> None:
        """``name_or_path``: a diffusers folder, ``sd21-base`` or ``owner/name[@revision]`` of the hub.

        A text of more than 77 tokens is an error, or is cut off as the published code does if ``truncate``. ``cache``
        defaults to :class:`EmbeddingCache` in its usual place. Without ``fetch``, a text encoder that would have to be
        fetched is :class:`onestepsr.prompts.hub.NotHere`.
        """
        self.source = TextEncoderFolder(name_or_path, fetch=fetch)
        self.device, self.truncate = device, truncate
        self.cache = EmbeddingCache() if cache is None else cache
        self._identity = self.source.identity()

    @property
    def width(self) -> int:
        """Channels C of an embedding."""
        return self.source.width

    def embed(self, texts: list[str]) -> Tensor:
        """Embeddings (N, 77, C) of N texts, float32 on the CPU.

        The text encoder is loaded if the cache lacks one of them, and dropped before this returns. Raises
        :class:`UserError` for a text that is too long.
        """
        found = self.try_embed(texts)
        for embedding in found:
            if isinstance(embedding, UserError):
                raise embedding
        good = [embedding for embedding in found if not isinstance(embedding, UserError)]
        return torch.stack(good) if good else torch.empty(0, TOKENS, self.width)

    def check(self, texts: list[str]) -> None:
        """Raise what :meth:`embed` would, as far as that can be told without loading the text encoder's weights."""
        missing = [text for text in dict.fromkeys(texts) if not self.path(text).is_file()]
        if not missing:
            return
        tokenizer = self.source.load_tokenizer()
        for text in missing:
            length = count_tokens(tokenizer, text)
            if length > TOKENS and not self.truncate:
                raise _too_long(text, length)

    def try_embed(self, texts: list[str]) -> list[Tensor | UserError]:
        """:meth:`embed` with the error of a text in its place, so that the others are not lost; (77, C) each."""
        known: dict[str, Tensor | UserError] = {}
        for text in dict.fromkeys(texts):
            embedding = self.find(text)
            if embedding is not None:
                known[text] = embedding
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            encoder = self.source.load(self.device)
            known |= self._encoded(missing, encoder)
            del encoder
            gc.collect()
        return [known[text] for text in texts]

    def path(self, text: str) -> Path:
        """Where the cache keeps the embedding of ``text``, or would."""
        return self.cache.path(self._identity, text)

    def find(self, text: str) -> Tensor | None:
        """The embedding (77, C) of ``text`` if the cache has it; no text encoder is loaded."""
        return self.cache.get(self._identity, text, self.width)

    def _encoded(self, texts: list[str], encoder: TextEncoder) -> dict[str, Tensor | UserError]:
        known: dict[str, Tensor | UserError] = {}
        lengths = {text: encoder.length(text) for text in texts}
        for text, length in lengths.items():
            if length > TOKENS and not self.truncate:
                known[text] = _too_long(text, length)
            elif length > TOKENS:
                logger.info("prompt '%s': %d of its %d tokens are cut off", _shown(text), length - TOKENS, length - 2)
        readable = [text for text in texts if text not in known]
        for start in range(0, len(readable), BATCH):
            batch = readable[start : start + BATCH]
            known |= dict(zip(batch, encoder.encode(batch), strict=True))
        for text in readable:
            if lengths[text] <= TOKENS:  # the cache answers without counting, so what needs leave is not kept there
                self.cache.put(self._identity, text, cast(Tensor, known[text]))
        return known


def _too_long(text: str, length: int) -> UserError:
    return UserError(
        f"prompt '{_shown(text)}': {length - 2} tokens, at most {TOKENS - 2} are read; shorten it, or have the rest "
        "cut off (--truncate-prompt)"
    )


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"

"""Texts to embeddings: from the cache, or by a text encoder that is in memory only meanwhile."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import torch
from torch import Tensor

from onestepsr.errors import UserError
from onestepsr.prompts.base import TOKENS
from onestepsr.prompts.cache import EmbeddingCache
from onestepsr.prompts.text_encoder import TextEncoder, TextEncoderFolder

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
    ) -> None:
        """``name_or_path``: a diffusers folder, ``sd21-base`` or ``owner/name[@revision]`` of the hub.

        A text of more than 77 tokens is an error, or is cut off as the published code does if ``truncate``. ``cache``
        defaults to :class:`EmbeddingCache` in its usual place.
        """
        self.source = TextEncoderFolder(name_or_path)
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
        if not texts:
            return torch.empty(0, TOKENS, self.width)
        found = {text: self.cache.get(self._identity, text, self.width) for text in dict.fromkeys(texts)}
        missing = [text for text, embedding in found.items() if embedding is None]
        known = {text: embedding for text, embedding in found.items() if embedding is not None}
        if missing:
            known |= self._encoded(missing)
        return torch.stack([known[text] for text in texts])

    def _encoded(self, texts: list[str]) -> dict[str, Tensor]:
        encoder = self.source.load(self.device)
        try:
            cut = [text for text in texts if self._is_too_long(text, encoder)]
            known: dict[str, Tensor] = {}
            for start in range(0, len(texts), BATCH):
                batch = texts[start : start + BATCH]
                known |= dict(zip(batch, encoder.encode(batch), strict=True))
        finally:
            del encoder
            gc.collect()
        for text, embedding in known.items():
            if text not in cut:  # the cache answers without counting tokens, so it must not hold what needs leave
                self.cache.put(self._identity, text, embedding)
        return known

    def _is_too_long(self, text: str, encoder: TextEncoder) -> bool:
        length = encoder.length(text)
        if length <= TOKENS:
            return False
        shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
        if not self.truncate:
            raise UserError(
                f"prompt '{shown}': {length - 2} tokens, at most {TOKENS - 2} are read; shorten it, or have the rest "
                "cut off (--truncate-prompt)"
            )
        logger.info("prompt '%s': the last %d of %d tokens are cut off", shown, length - TOKENS, length - 2)
        return True

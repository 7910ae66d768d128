"""Texts to embeddings: from the cache, or by a text encoder that is in memory only meanwhile."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.core.files import replacing
from onestepsr.prompts.base import TOKENS
from onestepsr.prompts.text_encoder import TextEncoder, TextEncoderFolder, count_tokens
from onestepsr.weights.download import cache_folder

# Embeddings of prompts on disk, so that a text encoder of a gigabyte is not loaded for a text it ----------------------

CACHE_BYTES = 256 * 2**20
"""Default limit: about 800 prompts of Stable Diffusion 2.1."""
MAX_ENTRY_BYTES = 8 * 2**20


class EmbeddingCache:
    """One file per text, named by a hash of the encoder's identity and the text; the least recently used go first.

    Files that are damaged or of another shape count as absent, and a folder that cannot be written to only costs time:
    both are logged, neither is an error. Several processes may share a folder.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = CACHE_BYTES) -> None:
        """``folder`` defaults to ``prompts`` beside the downloaded weights; ``limit`` is in bytes, 0 keeps nothing and
        None everything."""
        self.folder = cache_folder() / "prompts" if folder is None else folder
        self.limit = limit

    def path(self, identity: str, text: str) -> Path:
        """Where the embedding of ``text`` by the encoder ``identity`` lies, or would."""
        digest = hashlib.sha256(f"{identity}\x1f{text}".encode()).hexdigest()
        return self.folder / f"{digest[:40]}.safetensors"

    def get(self, identity: str, text: str, width: int) -> Tensor | None:
        """The embedding (77, ``width``), float32, if a good one is there."""
        path = self.path(identity, text)
        try:
            if path.stat().st_size > MAX_ENTRY_BYTES:
                return None
            with safe_open(path, framework="pt") as handle:
                embedding: Tensor = handle.get_tensor("embedding").clone()
            with suppress(OSError):  # others may only read a folder that is shared
                os.utime(path)  # marks it as used
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            logger.info("%s: left aside (%s)", path, error)
            return None
        is_good = embedding.shape == (TOKENS, width) and embedding.dtype == torch.float32 and embedding.isfinite().all()
        return embedding if is_good else None

    def put(self, identity: str, text: str, embedding: Tensor) -> None:
        """Keep ``embedding`` (77, C) float32, and remove the oldest entries beyond the limit."""
        if self.limit is not None and self.limit <= 0:
            return
        path = self.path(identity, text)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file({"embedding": embedding.contiguous()}, temporary)
            if self.limit is not None:
                self._shrink(self.limit)
        except OSError as error:
            logger.info("%s: prompt embeddings are not kept (%s)", self.folder, error)

    def _shrink(self, limit: int) -> None:
        entries = [(path, path.stat()) for path in self.folder.glob("*.safetensors")]
        excess = sum(entry.st_size for _, entry in entries) - limit
        for path, entry in sorted(entries, key=lambda item: item[1].st_mtime_ns):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= entry.st_size


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

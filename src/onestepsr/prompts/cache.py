"""Embeddings of prompts on disk, so that a text encoder of a gigabyte is not loaded for a text it has read before."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onestepsr.files import replacing
from onestepsr.models.sources import cache_folder
from onestepsr.prompts.base import TOKENS

logger = logging.getLogger(__name__)

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

"""Embeddings of texts: from the cache, or by a text encoder that is in memory only meanwhile.

The text encoder is that of a diffusers folder, tokenizer and CLIP text model, through transformers. Stable Diffusion
2.1 reads the last but one layer of OpenCLIP ViT-H/14. Its ``text_encoder`` folder holds just the 23 layers up to there,
so that the output of the last layer, normalised, is the embedding.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onestepsr.core.config import read_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.files import file_sha256, replacing
from onestepsr.prompts.hub import load_network, load_preprocessing, model_folder
from onestepsr.prompts.sources import TOKENS, require_transformers
from onestepsr.weights.download import cache_folder

logger = logging.getLogger(__name__)

DEFAULT_TEXT_ENCODER = "sd21-base"
BATCH = 16
SHOWN_CHARACTERS = 60
CACHE_BYTES = 256 * 2**20
"""Default limit of the cache: about 800 prompts of Stable Diffusion 2.1."""
MAX_ENTRY_BYTES = 8 * 2**20
FILES = ("text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/*.json", "tokenizer/*.txt")
"""Files of a diffusers repository that are needed."""
WEIGHTS = "model.safetensors"
SAMPLES, SAMPLE_BYTES = 256, 4096
SMALL_FILE = 16 * 2**20


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
        defaults to :class:`EmbeddingCache` in its default folder. Without ``fetch``, a text encoder that would have to
        be downloaded raises :class:`onestepsr.prompts.hub.NotHere`.
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
        missing = []
        for text in dict.fromkeys(texts):
            embedding = self.find(text)
            if embedding is None:
                missing.append(text)
            else:
                known[text] = embedding
        if missing:
            encoder = self.source.load(self.device)
            known |= self._encode(missing, encoder)
            del encoder
            gc.collect()
        return [known[text] for text in texts]

    def path(self, text: str) -> Path:
        """Where the cache keeps the embedding of ``text``, or would."""
        return self.cache.path(self._identity, text)

    def find(self, text: str) -> Tensor | None:
        """The embedding (77, C) of ``text`` if the cache has it; no text encoder is loaded."""
        return self.cache.get(self._identity, text, self.width)

    def _encode(self, texts: list[str], encoder: TextEncoder) -> dict[str, Tensor | UserError]:
        lengths = {text: encoder.length(text) for text in texts}
        results: dict[str, Tensor | UserError] = {text: _too_long(text, length) for text, length in lengths.items()}
        readable = [text for text, length in lengths.items() if length <= TOKENS or self.truncate]
        for start in range(0, len(readable), BATCH):
            batch = readable[start : start + BATCH]
            for text, embedding in zip(batch, encoder.encode(batch), strict=True):
                results[text] = embedding
                if lengths[text] <= TOKENS:  # the cache is read without counting, so it holds no text that was cut off
                    self.cache.put(self._identity, text, embedding)
                else:
                    cut = lengths[text] - TOKENS
                    logger.info("prompt '%s': %d of its %d tokens are cut off", _shown(text), cut, lengths[text] - 2)
        return results


def _too_long(text: str, length: int) -> UserError:
    return UserError(
        f"prompt '{_shown(text)}': {length - 2} tokens, at most {TOKENS - 2} are read; shorten it, or have the rest "
        "cut off (--truncate-prompt)"
    )


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


# ---- cache ----------------------------------------------------------------------------------------------------------


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


# ---- text encoder ---------------------------------------------------------------------------------------------------


class TextEncoderFolder:
    """``text_encoder`` and ``tokenizer`` of a diffusers folder, checked but not loaded."""

    def __init__(self, name_or_path: str | Path, *, fetch: bool = True) -> None:
        """``name_or_path`` is a folder, an alias or ``owner/name[@revision]`` of the hub; UserError if unusable.

        Without ``fetch``, what would have to be fetched is ``NotHere``.
        """
        self.folder = model_folder(name_or_path, FILES, "text encoder", fetch=fetch)
        self.model, self.tokenizer = self.folder / "text_encoder", self.folder / "tokenizer"
        for path in (self.model / "config.json", self.model / WEIGHTS, self.tokenizer):
            if not path.exists():
                raise UserError(
                    f"{self.folder}: no {path.relative_to(self.folder)}; expected a diffusers folder of Stable "
                    f"Diffusion with text_encoder/{WEIGHTS} and tokenizer/"
                )
        config = read_mapping(self.model / "config.json")
        self.width = self._whole(config, "hidden_size")
        if config.get("architectures") not in (None, ["CLIPTextModel"]):
            raise UserError(f"{self.model}: holds {config['architectures']}, expected a CLIPTextModel")
        if self._whole(config, "max_position_embeddings") != TOKENS:
            raise UserError(f"{self.model}: reads {config['max_position_embeddings']} tokens, expected {TOKENS}")

    def _whole(self, config: dict[str, Any], name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int) or not 1 <= value <= 1 << 16:
            raise UserError(f"{self.model / 'config.json'}: {name} is {value!r}, expected a whole number")
        return value

    def identity(self) -> str:
        """A hash of vocabulary, configuration and weights; of large files, 256 samples spread over them."""
        digest = hashlib.sha256(b"1")
        for path in sorted([*self.tokenizer.iterdir(), self.model / "config.json", self.model / WEIGHTS]):
            if path.is_file():
                digest.update(f"{path.name}:{path.stat().st_size}:{_content(path)}\n".encode())
        return digest.hexdigest()

    def load(self, device: torch.device | str = "cpu") -> TextEncoder:
        """Tokenizer and model in memory, float32; :class:`UserError` if they do not load."""
        tokenizer = self.load_tokenizer()
        from transformers import CLIPTextModel

        return TextEncoder(tokenizer, load_network(CLIPTextModel, self.model, device))

    def load_tokenizer(self) -> Any:
        """The tokenizer alone; :class:`UserError` if it does not load."""
        require_transformers("reading prompts")
        from transformers import CLIPTokenizer

        return load_preprocessing(CLIPTokenizer, self.tokenizer)


class TextEncoder:
    """Texts to embeddings."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.model = tokenizer, model

    def length(self, text: str) -> int:
        """Tokens of ``text`` with the first and the last that every prompt has."""
        return count_tokens(self.tokenizer, text)

    def encode(self, texts: list[str]) -> Tensor:
        """Embeddings (N, 77, C), float32 on the CPU; what goes beyond 77 tokens is cut off, the last one is kept."""
        tokens = self.tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        with torch.no_grad():
            embedding: Tensor = self.model(tokens["input_ids"].to(self.model.device))[0]
        return embedding.float().cpu()


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of ``text`` with the first and the last that every prompt has."""
    return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])


def _content(path: Path) -> str:
    """SHA-256 of a file, or of samples spread evenly over it if it is large."""
    size = path.stat().st_size
    if size <= SMALL_FILE:
        return file_sha256(path)
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for sample in range(SAMPLES):
            handle.seek(sample * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()

"""The text encoder of a diffusers folder: tokenizer and CLIP text model, through transformers.

Stable Diffusion 2.1 reads the last but one layer of OpenCLIP ViT-H/14. Its ``text_encoder`` folder holds just the 23
layers up to there, so that the output of the last layer, normalised, is the embedding.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestepsr.core.config import read_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.files import file_sha256
from onestepsr.prompts.base import TOKENS, require_transformers
from onestepsr.prompts.hub import load_network, load_preprocessing, model_folder

FILES = ("text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/*.json", "tokenizer/*.txt")
"""What is needed of a diffusers repository."""
WEIGHTS = "model.safetensors"
SAMPLES, SAMPLE_BYTES = 256, 4096
SMALL_FILE = 16 * 2**20


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
        """A hash of vocabulary, configuration and weights; of large files 256 places spread over them are read."""
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
    """SHA-256 of a file, or of its beginning and of places spread evenly over it if it is large."""
    size = path.stat().st_size
    if size <= SMALL_FILE:
        return file_sha256(path)
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for sample in range(SAMPLES):
            handle.seek(sample * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()

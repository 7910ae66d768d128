"""The prompt embeddings under which networks on a text-to-image backbone are trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.models.backbones import read_prompt
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.stable_diffusion.config import PromptConfig

if TYPE_CHECKING:
    from onestepsr.prompts.embedder import EmbeddingCache, PromptEmbedder


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """The condition of all networks, for images that bring no prompt embedding of their own."""

    kind: Literal["none", "learnable", "text", "file"] = "none"
    """``none``: the embedding that a backbone of ours was trained with; zeros for a Stable Diffusion, which is not its
    embedding of an empty text. ``learnable``: trained with the generator. ``text``: of one text for all images.
    ``file``: read from a file."""
    text: str = ""
    """With ``text``: the prompt; empty is what Stable Diffusion was trained with where there was no text."""
    negative: str | None = None
    """With ``text``: the negative prompt, which guides the teacher; null for no guidance."""
    text_encoder: str = "sd21-base"
    """With ``text``, and for photos that have texts (``data.prompts``): a diffusers folder with tokenizer and text
    encoder, or the name of one on the hub; it is in memory only before training."""
    file: Path | None = None
    """With ``file``: safetensors file of one embedding (L, C)."""
    negative_file: Path | None = None
    """Likewise, of the negative prompt; null for no guidance."""
    start: PromptConfig = field(default_factory=PromptConfig)
    """How a learnable embedding starts on a backbone that brings none."""

    def __post_init__(self) -> None:
        if (self.kind == "file") != (self.file is not None):
            raise ValueError(
                f"kind '{self.kind}' with file {self.file}: a file belongs to the kind 'file', and only to it"
            )
        if self.negative is not None and self.kind != "text":
            raise ValueError(f"negative: belongs to the kind 'text', not to '{self.kind}' (negative_file is for any)")

    @property
    def initial(self) -> PromptConfig:
        """How the embedding of a backbone that brings none starts."""
        return self.start if self.kind == "learnable" else PromptConfig(std=0.0)

    def put_on(self, generator: OneStepLatentGenerator) -> Tensor | None:
        """Give ``generator`` its prompt, trainable if it is to be learnt; returns the negative one (1, L, C), if any.

        Raises :class:`UserError` in one line for embeddings of another width.
        """
        width, negative = generator.prompt.shape[2], None
        if self.kind == "text":
            texts = [self.text] if self.negative is None else [self.text, self.negative]
            prompt, *others = self._embedded(texts, width)[:, None]
            generator.set_prompt(prompt)
            negative = others[0] if others else None
        elif self.file is not None:
            generator.set_prompt(read_prompt(self.file, width))
        if self.negative_file is not None:
            negative = read_prompt(self.negative_file, width)
        generator.prompt.requires_grad_(self.kind == "learnable")
        return negative

    def _embedded(self, texts: list[str], width: int) -> Tensor:
        if torch.empty(0).device.type == "meta":  # a dry run has no use for values
            from onestepsr.prompts.base import TOKENS

            with torch.device("cpu"):  # whatever importing transformers makes has values
                self.check(width, texts)
            return torch.empty(len(texts), TOKENS, width)
        return self.embedder(width).embed(texts)

    def check(self, width: int, texts: Sequence[str], cache: EmbeddingCache | None = None) -> None:
        """What a dry run does instead of embedding ``texts``: raise what that would, and tell what it would fetch."""
        from onestepsr.prompts.hub import NotHere

        try:
            self.embedder(width, cache, fetch=False).check(list(texts))
        except NotHere as error:
            logger.warning("config.prompt.text_encoder: %s; training begins by fetching it", error)

    def embedder(self, width: int, cache: EmbeddingCache | None = None, *, fetch: bool = True) -> PromptEmbedder:
        """Who turns texts into embeddings of ``width`` channels; :class:`UserError` if the text encoder gives others.

        ``cache`` defaults to the one of prompts in general. Without ``fetch``, a text encoder that would have to be
        fetched is :class:`onestepsr.prompts.hub.NotHere`.
        """
        from onestepsr.prompts.embedder import PromptEmbedder

        embedder = PromptEmbedder(self.text_encoder, cache=cache, fetch=fetch)
        if embedder.width != width:
            raise UserError(
                f"config.prompt.text_encoder: '{self.text_encoder}' gives embeddings of width {embedder.width}, the "
                f"backbone takes {width}"
            )
        return embedder

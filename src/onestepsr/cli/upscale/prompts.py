"""Prompts for ``onestepsr upscale``: from the options to one embedding per image."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from onestepsr.core.errors import UserError
from onestepsr.weights.catalog import OSEDIFF_SCALES

if TYPE_CHECKING:
    from torch import Tensor

    from onestepsr.imaging.read import LoadedImage
    from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
    from onestepsr.prompts.base import PromptSource
from dataclasses import field

if TYPE_CHECKING:
    from onestepsr.inference.options import UpscaleOptions
    from onestepsr.inference.upscaler import Upscaler


logger = logging.getLogger(__name__)

GROUP = 32
"""So many images get their prompts in one go: extractor and text encoder are in memory once for them, not beside the
upscaling."""


@dataclass(frozen=True, kw_only=True)
class PromptChoice:
    """What the command line says about prompts."""

    text: str | None = None
    """The user's words."""
    file: Path | None = None
    """A folder of texts, one text or a table."""
    extractor: str | None = None
    """A captioner or tagger."""
    text_encoder: str = "sd21-base"
    """Who turns texts into embeddings."""
    truncate: bool = False
    """Whether texts that are too long are cut off."""

    def __post_init__(self) -> None:
        if self.file is not None and (self.text is not None or self.extractor is not None):
            raise UserError(
                "--prompt-file: holds whole prompts, so --prompt and --prompt-from cannot be given beside it"
            )
        if self.truncate and not self.is_given:
            raise UserError("--truncate-prompt: there is no prompt; give --prompt, --prompt-file or --prompt-from")

    @property
    def is_given(self) -> bool:
        """Whether images get a prompt at all."""
        return (self.text, self.file, self.extractor) != (None, None, None)

    def warn_if_unused(self, model: str) -> None:
        """Say so where a published model of OSEDiff goes without the prompts that it was trained with."""
        if not self.is_given and model in OSEDIFF_SCALES:
            logger.warning(
                "%s: reads prompts and is given none; --prompt-from dape makes what it was trained with", model
            )


@dataclass(frozen=True, kw_only=True)
class PreparedPrompt:
    """The prompt of one image, or why there is none."""

    text: str | None = None
    embedding: Tensor | None = None
    error: UserError | None = None

    def applied_to(self, options: UpscaleOptions) -> UpscaleOptions:
        """``options`` with this prompt."""
        return options if self.embedding is None else replace(options, prompt_embedding=self.embedding)


class Prompts:
    """Source and embedder of a command's prompts."""

    def __init__(self, choice: PromptChoice, upscaler: Upscaler) -> None:
        """:class:`UserError` if the model reads no prompts, or others than the text encoder gives."""
        from onestepsr.prompts.embedder import PromptEmbedder

        upscaler.require_prompt_width(upscaler.prompt_width or 0)
        # What an extractor finds is cut off as in the published code: nobody could shorten it.
        truncate = choice.truncate or choice.extractor is not None
        self.embedder = PromptEmbedder(choice.text_encoder, device=upscaler.device, truncate=truncate)
        upscaler.require_prompt_width(self.embedder.width)
        self.source = _source(choice, upscaler)
        if choice.text is not None and choice.extractor is None:
            self.embedder.embed([choice.text])  # too long a text for all is an error before any work

    def of_files(self, paths: Sequence[Path]) -> list[PreparedPrompt]:
        """The prompts of images in files."""
        return self._embedded([self._text(path, None) for path in paths])

    def of_image(self, path: Path, image: LoadedImage) -> PreparedPrompt:
        """The prompt of an image that is not, or no longer, in a file; errors are raised."""
        prepared = self._embedded([self._text(path, image)])[0]
        if prepared.error is not None:
            raise prepared.error
        return prepared

    def _text(self, path: Path, image: LoadedImage | None) -> str | UserError:
        from onestepsr.imaging.read import read_image, to_pil

        try:
            if not self.source.needs_image:
                return self.source.text(path, None)
            content = read_image(path) if image is None else image
            return self.source.text(path, to_pil(content).convert("RGB"))
        except UserError as error:
            return error

    def _embedded(self, texts: list[str | UserError]) -> list[PreparedPrompt]:
        self.source.release()
        found = iter(self.embedder.try_embed([text for text in texts if isinstance(text, str)]))
        return [_prepared(text, None if isinstance(text, UserError) else next(found)) for text in texts]


def prompted(paths: Sequence[Path], prompts: Prompts | None) -> Iterator[PreparedPrompt]:
    """The prompt of each image in turn, made a group at a time; without prompts, nothing for each."""
    if prompts is None:
        yield from (PreparedPrompt() for _ in paths)
        return
    for start in range(0, len(paths), GROUP):
        yield from prompts.of_files(paths[start : start + GROUP])


def _source(choice: PromptChoice, upscaler: Upscaler) -> PromptSource:
    from onestepsr.prompts.extractors import load_extractor
    from onestepsr.prompts.sources import ExtractedPrompts, FilePrompts, FixedPrompt

    if choice.file is not None:
        return FilePrompts(choice.file)
    if choice.extractor is not None:
        return ExtractedPrompts(load_extractor(choice.extractor, upscaler.device), choice.text or "")
    return FixedPrompt(choice.text or "")


def _prepared(text: str | UserError, embedding: Tensor | UserError | None) -> PreparedPrompt:
    if isinstance(text, UserError):
        return PreparedPrompt(error=text)
    if isinstance(embedding, UserError):
        return PreparedPrompt(text=text, error=embedding)
    return PreparedPrompt(text=text, embedding=None if embedding is None else embedding[None])


# What an ``upscale`` command works with: the model, its options and its prompts, as one value th ----------------------


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Which model runs, and how."""

    model: str
    """Alias or file."""
    options: UpscaleOptions
    """How every image is upscaled; the memory is for all processes together."""
    device: str = "auto"
    """As ``Upscaler`` takes it."""
    dtype: str = "auto"
    """As ``Upscaler`` takes it."""
    steps: int | None = None
    """Network evaluations of ResShift's family."""
    sampler: str | None = None
    """Sampler of ResShift's family."""
    fidelity: float | None = None
    """Between ``d3sr-tiny`` and its faithful counterpart."""
    compiled: bool = False
    """Whether through ``torch.compile``."""
    prompts: PromptChoice = field(default_factory=PromptChoice)
    """What models that read text are told."""

    def load(self) -> tuple[Upscaler, Prompts | None]:
        """The model, and the source of its prompts if there are any; UserError if they do not go together."""
        from onestepsr.inference.upscaler import Upscaler

        upscaler = Upscaler.from_pretrained(
            self.model,
            self.device,
            self.dtype,
            steps=self.steps,
            sampler=self.sampler,
            fidelity=self.fidelity,
            compiled=self.compiled,
        )
        self.prompts.warn_if_unused(self.model)
        logger.info("%s on %s in %s", self.model, upscaler.device, upscaler.dtype)
        return upscaler, Prompts(self.prompts, upscaler) if self.prompts.is_given else None

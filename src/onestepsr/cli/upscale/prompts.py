"""Prompts of ``onestepsr upscale`` and ``onestepsr evaluate``: from the options to one embedding per image."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from onestepsr.cli.options import refuse
from onestepsr.core.errors import UserError
from onestepsr.weights.catalog import OSEDIFF_SCALES

if TYPE_CHECKING:
    from torch import Tensor

    from onestepsr.imaging.read import LoadedImage
    from onestepsr.inference.options import UpscaleOptions
    from onestepsr.inference.upscaler import Upscaler
    from onestepsr.prompts.sources import PromptSource

logger = logging.getLogger(__name__)

GROUP = 32
"""Images whose prompts are made together, so that extractor and text encoder are not in memory during upscaling."""


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Prompt options of every command that runs a model."""

    prompt: Annotated[
        str | None, typer.Option(help="For models that read text: what the image shows; '' is the empty prompt.")
    ] = None
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Folder with NAME.txt for NAME.jpg, one text file for all, or a JSON/YAML table of prompts."),
    ] = None
    prompt_from: Annotated[
        str | None,
        typer.Option(
            help="Captioner or tagger that looks at each image: a folder, blip, dape, or owner/name of the hub."
        ),
    ] = None
    text_encoder: Annotated[
        str, typer.Option(help="Encoder of the prompts: a diffusers folder, sd21-base, or owner/name of the hub.")
    ] = "sd21-base"
    truncate_prompt: Annotated[
        bool, typer.Option("--truncate-prompt", help="Cut prompts off after 75 tokens instead of refusing them.")
    ] = False

    def __post_init__(self) -> None:
        if self.prompt_file is not None and (self.prompt is not None or self.prompt_from is not None):
            raise UserError(
                "--prompt-file: holds whole prompts, so --prompt and --prompt-from cannot be given beside it"
            )
        if self.truncate_prompt and not self.are_given:
            raise UserError("--truncate-prompt: there is no prompt; give --prompt, --prompt-file or --prompt-from")

    def refuse_unused(self, context: typer.Context) -> None:
        """Raise UserError for --text-encoder without a prompt."""
        if not self.are_given:
            refuse(context, ["text_encoder"], "there is no prompt; give --prompt, --prompt-file or --prompt-from")

    @property
    def are_given(self) -> bool:
        """True if images get a prompt at all."""
        return (self.prompt, self.prompt_file, self.prompt_from) != (None, None, None)

    def load(self, upscaler: Upscaler) -> Prompts | None:
        """Source and embedder of the prompts, or None; a warning if OSEDiff or SeeSR goes without."""
        if self.are_given:
            return Prompts(self, upscaler)
        if upscaler.name in OSEDIFF_SCALES or upscaler.image_tokens:
            logger.warning(
                "%s: reads prompts and is given none; --prompt-from dape makes what it was trained with", upscaler.name
            )
        return None


@dataclass(frozen=True, kw_only=True)
class PreparedPrompt:
    """The prompt of one image, or the error that left it without one."""

    text: str | None = None
    embedding: Tensor | None = None
    error: UserError | None = None

    def applied_to(self, options: UpscaleOptions) -> UpscaleOptions:
        """``options`` with this prompt."""
        return options if self.embedding is None else replace(options, prompt_embedding=self.embedding)


class Prompts:
    """Source and embedder of a command's prompts."""

    def __init__(self, options: PromptOptions, upscaler: Upscaler) -> None:
        """UserError if the model reads no prompts, or others than the text encoder gives."""
        from onestepsr.prompts.embedder import PromptEmbedder

        upscaler.require_prompt_width(upscaler.prompt_width or 0)
        # Extracted words are truncated as in the published code: the user cannot shorten them.
        truncate = options.truncate_prompt or options.prompt_from is not None
        self.embedder = PromptEmbedder(options.text_encoder, device=upscaler.device, truncate=truncate)
        upscaler.require_prompt_width(self.embedder.width)
        self.source = _source(options, upscaler)
        if options.prompt is not None and options.prompt_from is None:
            self.embedder.embed([options.prompt])  # a text that is too long is an error before any work

    def of_files(self, paths: Sequence[Path]) -> list[PreparedPrompt]:
        """The prompts of images in files."""
        return self._embedded([self._read(path, None) for path in paths])

    def of_image(self, path: Path, image: LoadedImage) -> PreparedPrompt:
        """The prompt of an image that is not, or no longer, in a file; errors are raised."""
        prepared = self._embedded([self._read(path, image)])[0]
        if prepared.error is not None:
            raise prepared.error
        return prepared

    def _read(self, path: Path, image: LoadedImage | None) -> _Read | UserError:
        from onestepsr.imaging.read import read_image, to_pil

        try:
            if not self.source.needs_image:
                return _Read(self.source.text(path, None))
            content = read_image(path) if image is None else image
            text = self.source.text(path, to_pil(content).convert("RGB"))
            return _Read(text, getattr(self.source, "tokens", None))
        except UserError as error:
            return error

    def _embedded(self, images: list[_Read | UserError]) -> list[PreparedPrompt]:
        self.source.release()
        found = iter(self.embedder.try_embed([image.text for image in images if isinstance(image, _Read)]))
        prepared = []
        for image in images:
            if isinstance(image, UserError):
                prepared.append(PreparedPrompt(error=image))
            elif isinstance(embedding := next(found), UserError):
                prepared.append(PreparedPrompt(text=image.text, error=embedding))
            else:
                prepared.append(PreparedPrompt(text=image.text, embedding=image.joined(embedding[None])))
        return prepared


class _Read(NamedTuple):
    """The text of an image, and where a model wants them the tokens (1, K, W) that a tagger sees in it."""

    text: str
    tokens: Tensor | None = None

    def joined(self, embedding: Tensor) -> Tensor:
        """Embedding (1, L, C) of the text, followed by the tokens."""
        from onestepsr.models.seesr.networks import joined_prompt

        return embedding if self.tokens is None else joined_prompt(embedding, self.tokens)


def prompted(paths: Sequence[Path], prompts: Prompts | None) -> Iterator[PreparedPrompt]:
    """The prompt of each image in turn, made a group at a time; empty ones if there are no prompts."""
    if prompts is None:
        yield from (PreparedPrompt() for _ in paths)
        return
    for start in range(0, len(paths), GROUP):
        yield from prompts.of_files(paths[start : start + GROUP])


def _source(options: PromptOptions, upscaler: Upscaler) -> PromptSource:
    from onestepsr.prompts.sources import ExtractedPrompts, FilePrompts, FixedPrompt, TaggedImages, load_extractor

    if upscaler.image_tokens:
        if options.prompt_from is None:
            raise UserError(
                f"{upscaler.name}: reads beside the text what RAM sees in each image; give --prompt-from dape, or a "
                "folder with RAM's files"
            )
        extractor = load_extractor(options.prompt_from, upscaler.device)
        return TaggedImages(extractor, options.prompt or "", upscaler.added_prompt)
    if options.prompt_file is not None:
        return FilePrompts(options.prompt_file)
    if options.prompt_from is not None:
        return ExtractedPrompts(load_extractor(options.prompt_from, upscaler.device), options.prompt or "")
    return FixedPrompt(options.prompt or "")

"""Prompts for ``onestepsr evaluate --model``: those that ``onestepsr upscale`` would give to the same pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestepsr.apps.upscale_prompts import Prepared, PromptChoice, Prompts, prompted

if TYPE_CHECKING:
    from onestepsr.image import Picture
    from onestepsr.upscaler import UpscaleOptions, Upscaler

PromptOption = Annotated[
    str | None,
    typer.Option(help="For --model that reads text: the words for all pictures; '' is the empty prompt."),
]
PromptFileOption = Annotated[
    Path | None, typer.Option(help="A folder of NAME.txt, one .txt for all pictures, or a table of names and prompts.")
]
PromptFromOption = Annotated[
    str | None, typer.Option(help="Who looks at the pictures: a captioner or tagger, such as blip or dape.")
]
TextEncoderOption = Annotated[
    str, typer.Option(help="Who turns words into embeddings: a diffusers folder, or a name on the hub.")
]
TruncateOption = Annotated[
    bool, typer.Option("--truncate-prompt", help="Cut texts off after 75 tokens instead of refusing them.")
]


def prompt_settings(choice: PromptChoice) -> dict[str, str | bool]:
    """What a result says of its prompts."""
    given = {
        "prompt": choice.text,
        "prompt_file": None if choice.file is None else str(choice.file),
        "prompt_from": choice.extractor,
        "text_encoder": choice.text_encoder if choice.is_given else None,
        "truncate_prompt": choice.truncate or None,
    }
    return {name: value for name, value in given.items() if value is not None}


@dataclass(kw_only=True)
class CasePrompts:
    """One prompt after the other, for pictures that come in the order of ``paths``; some may be left out."""

    choice: PromptChoice
    paths: Sequence[Path]
    """The files of all pictures."""
    changed: bool
    """Whether the model gets other pictures than those in the files: made of them, or cut."""
    _waiting: Iterator[tuple[Path, Prepared]] = field(init=False, default_factory=lambda: iter(()))
    _prompts: Prompts | None = field(init=False, default=None)

    def start(self, upscaler: Upscaler) -> None:
        """Check the prompts against the model; those of files are made in groups, as they are asked for."""
        self.choice.miss(upscaler.name)
        if self.choice.is_given:
            self._prompts = Prompts(self.choice, upscaler)
            self._waiting = zip(self.paths, prompted(self.paths, self._prompts), strict=True)

    def added_to(self, options: UpscaleOptions, picture: Picture, path: Path) -> UpscaleOptions:
        """``options`` with the prompt of ``picture``; :class:`UserError` if it has none."""
        if self._prompts is None:
            return options
        if self.changed and self._prompts.source.needs_picture:
            return self._prompts.of_picture(path, picture).added_to(options)
        prepared = next(prepared for own, prepared in self._waiting if own == path)
        if prepared.error is not None:
            raise prepared.error
        return prepared.added_to(options)

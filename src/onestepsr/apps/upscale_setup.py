"""What an ``upscale`` command works with: the model, its options and its prompts, as one value that processes can be
sent."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onestepsr.apps.upscale_prompts import PromptChoice, Prompts

if TYPE_CHECKING:
    from onestepsr.upscale_options import UpscaleOptions
    from onestepsr.upscaler import Upscaler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Which model runs, and how."""

    model: str
    """Alias or file."""
    options: UpscaleOptions
    """How every picture is upscaled; the memory is for all processes together."""
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
        from onestepsr.upscaler import Upscaler

        upscaler = Upscaler.from_pretrained(
            self.model,
            self.device,
            self.dtype,
            steps=self.steps,
            sampler=self.sampler,
            fidelity=self.fidelity,
            compiled=self.compiled,
        )
        self.prompts.miss(self.model)
        logger.info("%s on %s in %s", self.model, upscaler.device, upscaler.dtype)
        return upscaler, Prompts(self.prompts, upscaler) if self.prompts.is_given else None

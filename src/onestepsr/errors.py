"""Errors that end in one clear line for the person at the keyboard.

Everything a user can cause derives from :class:`UserError`; the command line turns it into a single line on stderr and
exit code 2. Anything else that escapes is a defect of the package.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class OneStepSRError(Exception):
    """Base of every error raised on purpose by this package."""


class UserError(OneStepSRError):
    """A bad file, size, option or setting: the message names it, the value seen and what is accepted."""


class UnknownModel(UserError):
    """A model name that is neither an alias nor an existing path."""


class MissingExtra(UserError):
    """An optional dependency is not installed; the message says which ``pip install`` brings it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency: pip install 'onestepsr[{extra}]'")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suffix that suggests the nearest known name, or lists the known names when none is near."""
    choices = sorted(known)
    near = get_close_matches(name, choices, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(choices)}"

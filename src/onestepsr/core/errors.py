"""Errors that end in one clear line for the user.

Everything a user can cause derives from :class:`UserError`; the command line turns it into a single line on stderr and
exit code 2. Anything else that escapes is a defect of the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches


class OneStepSRError(Exception):
    """Base of every error raised on purpose by this package."""


class UserError(OneStepSRError):
    """A bad file, size, option or setting: the message names it, the value seen and what is accepted."""


class TooLarge(UserError):
    """An image beyond the limit of pixels."""


class UnknownModel(UserError):
    """A model name that is neither an alias nor an existing path."""


class MissingWeights(UserError):
    """Weights that are not on this machine and could not be, or were not to be, downloaded."""


class DamagedWeights(UserError):
    """A weights file whose size or checksum is not the expected one."""


class MissingExtra(UserError):
    """An optional dependency is not installed; the message says which ``pip install`` brings it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency: pip install 'onestepsr[{extra}]'")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suffix that suggests the nearest known name, or lists the known names when none is near."""
    choices = sorted(known)
    near = get_close_matches(name, choices, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(choices)}"


def join_names(names: Sequence[str], limit: int) -> str:
    """The first ``limit`` names with commas between them, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, at most ``limit`` characters; its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


@contextmanager
def error_context(prefix: str) -> Iterator[None]:
    """Put ``prefix`` (a setting, file or variant) before the message of a :class:`UserError` raised in the block."""
    try:
        yield
    except UserError as error:
        error.args = (f"{prefix}: {error}",)  # it keeps its type, by which callers tell what is wrong
        raise

"""Errors that end in one clear line for the person at the keyboard.

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


def join_names(names: Sequence[str], limit: int) -> str:
    """The first ``limit`` names with commas between them, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def first_line(error: BaseException, limit: int = 200) -> str:
    """What an error of another library says in at most ``limit`` characters of its first line, else its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


@contextmanager
def error_context(what: str) -> Iterator[None]:
    """Inside, the line of a :class:`UserError` begins with ``what``: the setting, file or variant that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error

"""Image files in folders: one search for all commands, which says what it leaves out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onestepsr.core.errors import UserError
from onestepsr.imaging.formats import READABLE

_TEXTS = (".txt", ".json", ".yaml", ".yml", ".csv", ".md", ".html")
"""Endings of what lies beside images on purpose: prompts, records, reports."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Images in a folder, and what else is there."""

    names: list[str] = field(default_factory=list)
    """Paths relative to the folder, with forward slashes, sorted."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of other files by ending, without those of text."""
    notes: list[str] = field(default_factory=list)
    """One line for each thing that looked like an image or a folder of them, and could not be used."""

    @property
    def left_out(self) -> list[str]:
        """All that is left out, one line each; the last one counts other files by ending."""
        return [*self.notes, *counted(self.others)]


def counted(others: Mapping[str, int]) -> list[str]:
    """The line that counts files by ending, if there are any."""
    if not others:
        return []
    total, endings = sum(others.values()), sorted(others.items(), key=lambda entry: (-entry[1], entry[0]))
    kinds = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in endings)
    return [f"{total} {'file' if total == 1 else 'files'} of other kinds: {kinds}"]


def is_image_name(name: str) -> bool:
    """True if the ending is that of a format that is read, and the file is not hidden."""
    return os.path.splitext(name)[1].lower() in READABLE and not name.startswith(".")


def list_images(folder: Path, recursive: bool) -> Listing:
    """The images in ``folder``; UserError if it cannot be listed.

    Links to files count. Links to folders are noted and not followed, since they may lead back; so are folders below
    that cannot be listed, links that lead nowhere, and pipes. Hidden files and folders are passed over.
    """
    found = Listing()
    try:
        _collect(found, folder, "", recursive)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from error
    found.names.sort()
    return found


def _collect(found: Listing, folder: Path, prefix: str, recursive: bool) -> None:
    below: list[str] = []
    with os.scandir(folder / prefix) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            path = folder / prefix / entry.name
            if entry.is_dir(follow_symlinks=False):
                below.append(f"{prefix}{entry.name}/")
            elif _is_folder(entry):
                if recursive:
                    found.notes.append(f"{path}: a link to a folder, which is not followed; name the folder itself")
            elif not is_image_name(entry.name):
                ending = os.path.splitext(entry.name)[1].lower()
                if ending not in _TEXTS:
                    found.others[ending] += 1
            elif _is_file(entry):
                found.names.append(prefix + entry.name)
            else:
                kind = "a link that leads nowhere" if entry.is_symlink() else "no regular file"
                found.notes.append(f"{path}: {kind}")
    for name in below if recursive else ():
        try:
            _collect(found, folder, name, recursive)
        except OSError as error:
            found.notes.append(f"{folder / name}: cannot be listed ({error.strerror})")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link in a circle
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def literal_prefix(pattern: str) -> tuple[str, str]:
    """A glob pattern's leading folders that exist by that very name, brackets and all, and the rest of it."""
    parts: Iterable[str] = Path(pattern).parts
    root, rest = Path(), list(parts)
    while len(rest) > 1 and (root / rest[0]).is_dir():
        root /= rest.pop(0)
    return str(root), str(Path(*rest))

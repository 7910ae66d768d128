"""Networks of transformers from a folder: safetensors only, no code from the folder, no weight missing, no noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from onestepsr.errors import UserError, first_line

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
    """The tokenizer or picture preprocessing in ``folder`` by ``kind``, a class of transformers."""
    with _loading(folder):
        return kind.from_pretrained(folder, **_LOCAL)


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Without progress bars; whatever transformers raises about a folder becomes one line."""
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

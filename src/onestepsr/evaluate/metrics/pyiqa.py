"""Metrics of IQA-PyTorch (pyiqa): learned quality without references, from an optional package.

pyiqa is under the PolyForm Noncommercial licence, hence an optional extra and a notice when it is used. Some of its
metrics draw random crops from global generators, and creating one sets their seeds: here every image starts from the
same seed, so that a value does not depend on the images before it, and the generators are restored afterwards.
"""

from __future__ import annotations

import importlib
import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onestepsr.core.errors import MissingExtra, UserError, first_line
from onestepsr.evaluate.metrics.fidelity import check_image

logger = logging.getLogger(__name__)

SEED = 123
"""Seed that pyiqa sets when it creates a metric."""
NOTICE = (
    "pyiqa is under the PolyForm Noncommercial License 1.0.0 (https://polyformproject.org/licenses/noncommercial/1.0.0):"
    " commercial use needs its author's permission; its metrics bring weights under licences of their own"
)
_lock = threading.Lock()


def load_iqa(name: str) -> Callable[[Tensor], Tensor]:
    """The function RGB (N, 3, H, W) in [0, 1] -> (N,) float64 of pyiqa's metric ``name``.

    Raises MissingExtra without pyiqa, and UserError in one line when it cannot be imported or fetch its weights.
    """
    package = _package()
    made: dict[torch.device, Any] = {}

    def on(device: torch.device) -> Any:
        if device not in made:
            with _lock, _seeded():
                made[device] = package.create_metric(name, device=device)
        return made[device]

    try:
        on(torch.device("cpu"))
    except Exception as error:  # an error of one metric must not stop the others
        version = getattr(package, "__version__", "of unknown version")
        raise UserError(f"pyiqa {version} cannot create '{name}': {first_line(error)}") from error

    def measure(image: Tensor) -> Tensor:
        check_image(image)
        try:
            metric = on(image.device)
            with _lock, torch.no_grad():
                values = [_one(metric, single[None].float()) for single in image]
        except Exception as error:
            raise UserError(f"pyiqa's {name}: {first_line(error)}") from error
        return torch.tensor(values, dtype=torch.float64)

    return measure


def _one(metric: Any, image: Tensor) -> float:
    with _seeded():
        return float(metric(image))


@cache
def _package() -> Any:
    """pyiqa; its licence is shown the first time."""
    try:
        package = importlib.import_module("pyiqa")
    except ModuleNotFoundError as error:
        if error.name == "pyiqa":
            raise MissingExtra("this metric of pyiqa", "iqa") from error
        raise UserError(f"pyiqa is installed but cannot be imported: {first_line(error)}") from error
    except Exception as error:  # torchvision beside another build of PyTorch raises RuntimeError
        raise UserError(f"pyiqa is installed but cannot be imported: {first_line(error)}") from error
    logger.warning("%s", NOTICE)
    return package


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed the global generators that pyiqa draws from, and put them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(SEED)
    np.random.seed(SEED)
    torch.default_generator.manual_seed(SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])

"""One-step diffusion super-resolution of real-world images.

Importing this package is cheap: PyTorch and everything above it load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onestepsr.core.errors import MissingExtra, OneStepSRError, UnknownModel, UserError

if TYPE_CHECKING:
    from onestepsr.inference.upscaler import Upscaler
    from onestepsr.weights.catalog import list_models

__version__ = "0.1.0"
__all__ = ["MissingExtra", "OneStepSRError", "UnknownModel", "Upscaler", "UserError", "__version__", "list_models"]

_LAZY = {"Upscaler": "onestepsr.inference.upscaler", "list_models": "onestepsr.weights.catalog"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'onestepsr' has no attribute {name!r}")

"""One-step diffusion super-resolution of real-world images.

Importing this package is cheap: PyTorch and everything above it load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onestepsr.errors import MissingExtra, OneStepSRError, UnknownModel, UserError

if TYPE_CHECKING:
    from onestepsr.models.catalog import list_models
    from onestepsr.upscaler import Upscaler

__version__ = "0.1.0"
__all__ = ["MissingExtra", "OneStepSRError", "UnknownModel", "Upscaler", "UserError", "__version__", "list_models"]

_LAZY = {"Upscaler": "onestepsr.upscaler", "list_models": "onestepsr.models.catalog"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'onestepsr' has no attribute {name!r}")

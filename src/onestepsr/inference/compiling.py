"""Networks through ``torch.compile``, for many tiles of one shape: the first of them takes a minute, the others less
than without."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from onestepsr.core.errors import OneStepSRError, UserError

COMPILERS = ("g++", "clang++", "c++", "cl")
"""Where the C++ compiler is looked for if ``CXX`` does not name it."""

PARTS = ("encode", "decode")
"""Methods of an autoencoder that are compiled."""


def require_compiler(device: torch.device) -> None:
    """Raise :class:`UserError` where ``torch.compile`` lacks what it needs: a C++ compiler, for CUDA Triton too."""
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        looked = named or ", ".join(COMPILERS)
        raise UserError(f"compile: needs a C++ compiler, found none ({looked}); install g++, or leave --compile out")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("compile: needs Triton for a CUDA GPU; pip install triton, or leave --compile out")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"compile: device '{device}'; accepted: cpu, cuda")


def compile_networks(generator: nn.Module) -> None:
    """Let the networks of ``generator`` be compiled when they are first called, and again for another shape.

    What surrounds them stays as it is: noise that depends on a tile's place would have every tile compiled anew.
    Weights keep their names. A generator that does not consist of ``autoencoder`` and ``unet`` is compiled as a whole.
    """
    unet, autoencoder = getattr(generator, "unet", None), getattr(generator, "autoencoder", None)
    if not isinstance(unet, nn.Module) or not isinstance(autoencoder, nn.Module):
        generator.compile()
        return
    unet.compile()
    for name in PARTS:
        setattr(autoencoder, name, torch.compile(getattr(autoencoder, name)))


def without_compiling(copied: nn.Module) -> nn.Module:
    """``copied``, the copy of a generator, without what :func:`compile_networks` did to the original: compiled methods
    would reach back to it."""
    autoencoder = getattr(copied, "autoencoder", None)
    for name in PARTS if isinstance(autoencoder, nn.Module) else ():
        vars(autoencoder).pop(name, None)
    return copied


@contextmanager
def compiler_errors_named(name: str) -> Iterator[None]:
    """Inside, what a compiler fails with becomes one :class:`OneStepSRError`; ``name`` is the model's."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        raise OneStepSRError(f"{name}: cannot be compiled here ({lines[0]}); leave --compile out") from error

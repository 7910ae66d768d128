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
from onestepsr.models.generators import Generator, LatentGenerator

COMPILERS = ("g++", "clang++", "c++", "cl")
"""Names of C++ compilers to look for if ``CXX`` names none."""
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


def compile_networks(generator: Generator) -> None:
    """Let the networks of ``generator`` be compiled when they are first called, and again for another shape.

    The code around them stays as it is: noise that depends on a tile's origin would have every tile compiled anew.
    Weights keep their names. A generator that does not consist of ``autoencoder`` and ``unet`` is compiled as a whole.
    """
    if not isinstance(generator, LatentGenerator):
        generator.compile()
        return
    generator.unet.compile()
    for name in PARTS:
        setattr(generator.autoencoder, name, torch.compile(getattr(generator.autoencoder, name)))


def without_compiling(copied: nn.Module) -> nn.Module:
    """``copied``, the copy of a generator, without the changes of :func:`compile_networks` to the original: compiled
    methods would reach back to it."""
    for name in PARTS if isinstance(copied, LatentGenerator) else ():
        vars(copied.autoencoder).pop(name, None)
    return copied


@contextmanager
def compiler_errors_named(name: str) -> Iterator[None]:
    """Inside, a compiler's failure becomes one :class:`OneStepSRError`; ``name`` is the model's."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        raise OneStepSRError(f"{name}: cannot be compiled here ({lines[0]}); leave --compile out") from error

"""Every method of the package; importing a method's module registers it."""

from __future__ import annotations


def load_methods() -> None:
    """Import the modules of all methods."""
    from onestepsr.methods import autoencoder, d3sr, diffusion, osediff, resshift, sinsr, tadsr  # noqa: F401

"""Generators of the residual-shifting family as training starts from them: teachers, students, new networks."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from onestepsr.errors import UserError
from onestepsr.models.architectures import is_random, random_generator, repeatable
from onestepsr.models.registry import load_network
from onestepsr.models.residual_generator import ResidualShiftGenerator, Sampler
from onestepsr.models.tiny import TinyAutoencoder
from onestepsr.models.tiny_decoder import FACTOR
from onestepsr.models.tiny_denoiser import TinyDenoiser, TinyDenoiserConfig
from onestepsr.residual_schedule import ResidualShiftConfig, ResidualShiftSchedule


def load_residual_generator(name_or_path: str | Path) -> ResidualShiftGenerator:
    """The generator called ``name_or_path``, in float32 on the CPU (``random:ALIAS`` also on "meta"), trainable.

    That is an alias, a safetensors file of ours or ``random:`` with one of resshift-realsr, resshift-face, sinsr,
    resshift-tiny and resshift-micro. Raises :class:`UserError` in one line.
    """
    generator = _load(name_or_path)
    if not isinstance(generator, ResidualShiftGenerator):
        raise UserError(f"{name_or_path}: holds a {type(generator).__name__}, expected a model of the ResShift family")
    return generator.eval()


def residual_generator_on(
    autoencoder: str | Path,
    denoiser: TinyDenoiserConfig | None = None,
    *,
    schedule: ResidualShiftConfig | None = None,
    sampler: Sampler = "ancestral",
) -> ResidualShiftGenerator:
    """An untrained denoising network on a trained tiny autoencoder; its weights are the same at every call.

    ``autoencoder`` is the file that ``train autoencoder`` writes, or a model whose autoencoder that is. ``denoiser``
    are the network's sizes, by default those for its latents. Every step of ``schedule`` is run.
    """
    network = _load(autoencoder)
    trained = network if isinstance(network, TinyAutoencoder) else getattr(network, "autoencoder", None)
    if not isinstance(trained, TinyAutoencoder):
        raise UserError(f"{autoencoder}: holds a {type(network).__name__} without a tiny autoencoder")
    sizes = denoiser or TinyDenoiserConfig(latent_channels=trained.latent_channels)
    if sizes.latent_channels != trained.latent_channels:
        raise UserError(
            f"{autoencoder}: latents of {trained.latent_channels} channels, the denoiser is for {sizes.latent_channels}"
        )
    with repeatable():
        unet = TinyDenoiser(sizes)
    return ResidualShiftGenerator(trained, unet, ResidualShiftSchedule(schedule), sampler=sampler, scale=FACTOR).eval()


def _load(name_or_path: str | Path) -> nn.Module:
    return random_generator(str(name_or_path)) if is_random(name_or_path) else load_network(name_or_path)

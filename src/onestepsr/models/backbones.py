"""Pretrained backbones from a file of ours, a diffusers folder or a single-file checkpoint.

A backbone is a generator that has not been trained for super-resolution yet; of a discriminator's backbone only the
half UNet is ever built and read.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from onestepsr.core.config import from_mapping
from onestepsr.core.errors import UserError, first_line
from onestepsr.models.architectures import is_random, load_native, no_larger_than, random_backbone, random_encoder
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.stable_diffusion import checkpoints
from onestepsr.models.stable_diffusion.config import (
    PromptConfig,
    SDXLConditioning,
    StableDiffusionEncoderConfig,
    StableDiffusionGeneratorConfig,
    UNetConfig,
)
from onestepsr.models.stable_diffusion.networks import (
    StableDiffusionAutoencoder,
    StableDiffusionUNet,
    StableDiffusionUNetEncoder,
    initial_prompt,
    stable_diffusion_generator,
)
from onestepsr.models.tiny.networks import TinyUNet
from onestepsr.weights.catalog import resolve
from onestepsr.weights.files import LazyTensors, architecture_of, fill, materialize, read_tensors, read_weights

logger = logging.getLogger(__name__)

LEAST_CORRELATION = 0.5
"""Below this, a UNet is reported not to predict noise."""
OTHER_HALF = ("up_blocks.", "conv_norm_out.", "conv_out.")
"""Names of a UNet's tensors that a discriminator has no use for."""
WHOLE = "unet.unet."
"""Prefix of those names in a generator of ours."""
MAX_PROMPT_BYTES = 64 * 2**20


def load_backbone(
    name_or_path: str | Path,
    *,
    prompt: PromptConfig | None = None,
    prompt_file: Path | None = None,
    for_training: bool = False,
) -> OneStepLatentGenerator:
    """A generator that starts from a pretrained backbone, in float32 on the CPU (``random:ALIAS`` also on "meta").

    ``name_or_path`` is an alias, a safetensors file of ours, a diffusers folder, a single-file checkpoint or
    ``random:ALIAS``. Foreign backbones have no prompt embedding: it starts as ``prompt`` says. ``prompt_file`` (see
    :func:`read_prompt`) replaces the prompt of any of them. Raises :class:`UserError` in one line; a UNet that predicts
    velocity is such an error, but in a single-file checkpoint, which cannot say so, only ``for_training`` and for
    a file of ours to train from, because the losses of all methods assume noise and go to nan after a while.
    """
    generator = _load_generator(name_or_path, prompt or PromptConfig(), for_training)
    if prompt_file is not None:
        generator.set_prompt(read_prompt(prompt_file, generator.prompt.shape[2]))
    return generator


def load_discriminator_backbone(
    name_or_path: str | Path, *, prompt: PromptConfig | None = None, sdxl: SDXLConditioning | None = None
) -> tuple[nn.Module, Tensor]:
    """The half UNet of a pretrained backbone, and a prompt (1, L, C) to start from; the other half is not read.

    Accepts what :func:`load_backbone` does, and SDXL beside it. The prompt is that of a generator of ours; for a
    foreign backbone it starts as ``prompt`` says, for SDXL as ``sdxl`` does.
    """
    encoder, own = _load_encoder(name_or_path, sdxl)
    if own is not None or not isinstance(encoder, StableDiffusionUNetEncoder):
        return encoder, cast(Tensor, own)
    start = prompt or PromptConfig()
    unet, conditioning = encoder.config.unet, encoder.config.sdxl
    if unet.addition_embed_type:
        start = PromptConfig(tokens=conditioning.prompt_tokens, std=conditioning.prompt_std)
    return encoder, initial_prompt(unet, start)


def unet_encoder_of(generator: OneStepLatentGenerator) -> nn.Module:
    """A copy of the down and middle blocks of a generator's own UNet, with its weights."""
    if isinstance(generator.unet, TinyUNet):
        return copy.deepcopy(generator.unet.encoder)
    if not isinstance(generator.unet, StableDiffusionUNet):
        raise UserError(f"a {type(generator.unet).__name__} has no half that a discriminator could use")
    encoder = _empty_encoder(generator.unet.config, None)
    tensors = generator.unet.unet.state_dict()
    state = {key: tensors[key].detach().clone() for key in encoder.unet.state_dict()}
    encoder.unet.load_state_dict(state, assign=True)
    return encoder


def read_prompt(path: Path, width: int) -> Tensor:
    """Prompt embedding (1, L, ``width``) from a file that holds it as its only tensor, (L, width) or (1, L, width)."""
    tensors = list(read_tensors(path, limit=MAX_PROMPT_BYTES).values())
    shape = tuple(tensors[0].shape)
    prompt = tensors[0].float()
    prompt = prompt[None] if prompt.ndim == 2 else prompt
    if len(tensors) != 1 or prompt.ndim != 3 or prompt.shape[0] != 1 or prompt.shape[2] != width:
        found = f"{len(tensors)} tensors" if len(tensors) != 1 else f"shape {shape}"
        raise UserError(f"{path}: {found}, expected one prompt embedding of shape (tokens, {width})")
    if not prompt.isfinite().all():
        raise UserError(f"{path}: the prompt embedding holds values that are not finite")
    return prompt


def _load_generator(name_or_path: str | Path, prompt: PromptConfig, for_training: bool) -> OneStepLatentGenerator:
    if is_random(name_or_path):
        return random_backbone(str(name_or_path))
    if Path(name_or_path).is_dir():
        folder = Path(name_or_path)
        config = replace(checkpoints.read_generator_config(folder), prompt=prompt)
        unet, autoencoder = (checkpoints.read_folder_weights(folder / part) for part in ("unet", "vae"))
        return _assemble(config, unet, autoencoder, str(folder))
    path = resolve(name_or_path)
    if not architecture_of(path):
        return _generator_from_file(path, prompt, for_training)
    generator = load_native(path)
    if not isinstance(generator, OneStepLatentGenerator):
        raise UserError(f"{path}: holds a {type(generator).__name__}, expected a latent-diffusion backbone")
    return generator


def _generator_from_file(path: Path, prompt: PromptConfig, for_training: bool) -> OneStepLatentGenerator:
    tensors = checkpoints.open_checkpoint(path)
    unet_sizes, autoencoder_sizes = checkpoints.detect(path, tensors)
    try:
        config = StableDiffusionGeneratorConfig(unet=unet_sizes, autoencoder=autoencoder_sizes, prompt=prompt)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    unet = checkpoints.unet_weights(tensors, config.unet)
    autoencoder = checkpoints.autoencoder_weights(path, tensors, config.autoencoder)
    generator = _assemble(config, unet, autoencoder, str(path))
    correlation = noise_correlation(generator)
    if for_training and not correlation >= LEAST_CORRELATION:
        raise UserError(
            f"{path}: prediction type is not 'epsilon' (on pure noise its output correlates {correlation:.2f} "
            f"with its input, at least {LEAST_CORRELATION} for noise predictors; Stable Diffusion 2.1 for 768 pixels "
            "predicts velocity)"
        )
    if correlation < LEAST_CORRELATION:
        logger.warning(
            "%s: the UNet does not seem to predict noise; such a file cannot say what it predicts, and one that "
            "predicts velocity, as Stable Diffusion 2.1 for 768 pixels does, is of no use here",
            path,
        )
    return generator


@torch.no_grad()
def noise_correlation(generator: OneStepLatentGenerator) -> float:
    """Correlation of the UNet's prediction with its input at the last step, where that is noise and hardly more.

    A network that predicts noise has to give back what it sees (near 1); one that predicts velocity gives the negative
    of an image (near 0).
    """
    noise = torch.randn(1, generator.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    predicted = generator.unet(noise, torch.tensor([generator.schedule.steps - 1]), generator.prompt)
    return float(torch.corrcoef(torch.stack([noise.flatten(), predicted.flatten()]))[0, 1])


def _assemble(
    config: StableDiffusionGeneratorConfig, unet: LazyTensors, autoencoder: LazyTensors, where: str
) -> OneStepLatentGenerator:
    with _sizes_of(where, unet, autoencoder), torch.device("meta"):  # nothing is initialised only to be overwritten
        generator = stable_diffusion_generator(config)
    fill(cast(StableDiffusionUNet, generator.unet).unet, unet, f"{where}: unet")
    fill(cast(StableDiffusionAutoencoder, generator.autoencoder).vae, autoencoder, f"{where}: vae")
    generator.prompt = nn.Parameter(initial_prompt(config.unet, config.prompt))
    return generator.eval()


@contextmanager
def _sizes_of(where: str, *parts: LazyTensors) -> Iterator[None]:
    """Inside, no network is built that is far larger than the files of weights that it is for."""
    most = sum(map(len, parts))
    try:
        with no_larger_than({str(number): (2**31,) for number in range(4 * most + 16)}):  # half a UNet is cut from one
            yield
    except UserError:
        raise
    except Exception as error:  # of a constructor, for sizes that do not go together
        raise UserError(f"{where}: the sizes of its networks do not go together ({first_line(error)})") from error


def _load_encoder(name_or_path: str | Path, sdxl: SDXLConditioning | None) -> tuple[nn.Module, Tensor | None]:
    """The half UNet, and the prompt that its file holds, if any."""
    if is_random(name_or_path):
        random = random_encoder(str(name_or_path), sdxl)
        if random is not None:
            return random, None
        generator = random_backbone(str(name_or_path))
        return unet_encoder_of(generator), generator.prompt.detach()
    if Path(name_or_path).is_dir():
        folder = Path(name_or_path)
        config = checkpoints.read_unet_config(folder)
        tensors = checkpoints.read_folder_weights(checkpoints.unet_folder(folder))
        return _filled_encoder(config, sdxl, tensors, f"{folder}: unet"), None
    path = resolve(name_or_path)
    if architecture_of(path):
        return _own_encoder(path, sdxl)
    checkpoint = checkpoints.open_checkpoint(path)
    config, _ = checkpoints.detect(path, checkpoint)
    return _filled_encoder(config, sdxl, checkpoints.unet_weights(checkpoint, config), f"{path}: unet"), None


def _own_encoder(path: Path, sdxl: SDXLConditioning | None) -> tuple[nn.Module, Tensor | None]:
    """The half UNet in a file of ours; of a Stable Diffusion generator only that half is read."""
    architecture, values, tensors = read_weights(path, _belongs_to_half)
    if architecture == "stable-diffusion":
        config = from_mapping(StableDiffusionGeneratorConfig, values, str(path))
        half = {
            key.removeprefix(WHOLE): partial(materialize, value) for key, value in tensors.items() if key != "prompt"
        }
        return _filled_encoder(config.unet, sdxl, half, f"{path}: unet"), tensors["prompt"].float()
    network = load_native(path)
    if isinstance(network, StableDiffusionUNetEncoder):
        network.config = replace(network.config, sdxl=sdxl or network.config.sdxl)
        return network, None
    if isinstance(network, OneStepLatentGenerator):
        return unet_encoder_of(network), network.prompt.detach()
    raise UserError(f"{path}: holds a {type(network).__name__}, expected a latent-diffusion backbone")


def _belongs_to_half(key: str) -> bool:
    name = key.removeprefix(WHOLE)
    return key == "prompt" or (name != key and not name.startswith(OTHER_HALF))


def _filled_encoder(
    config: UNetConfig, sdxl: SDXLConditioning | None, tensors: LazyTensors, where: str
) -> StableDiffusionUNetEncoder:
    with _sizes_of(where, tensors):
        encoder = _empty_encoder(config, sdxl)
    fill(encoder.unet, tensors, where, ignored=OTHER_HALF)
    return encoder.eval()


def _empty_encoder(config: UNetConfig, sdxl: SDXLConditioning | None) -> StableDiffusionUNetEncoder:
    """The half UNet on the meta device, but for what no file holds."""
    with torch.device("meta"):
        encoder = StableDiffusionUNetEncoder(StableDiffusionEncoderConfig(unet=config, sdxl=sdxl or SDXLConditioning()))
    if config.addition_embed_type:
        encoder.pooled_prompt = nn.Parameter(torch.zeros(1, config.pooled_width))
    return encoder

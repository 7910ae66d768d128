"""OSEDiff (Wu et al., "One-Step Effective Diffusion Network for Real-World Image Super-Resolution", 2024).

Generator: MSE + 2 LPIPS + variational score distillation of its latents. Every iteration updates the generator, then
the regulariser, which learns to predict the noise on the latents that the generator's phase has made.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.methods.base import (
    Batch,
    Exported,
    LossFn,
    Method,
    Networks,
    SampleRandom,
    check_timestep,
    checkpoint_gradients,
    exported,
    preview_columns,
    register,
)
from onestepsr.methods.shared.adversarial import (
    DISCRIMINATOR,
    AdversarialTerm,
    DiscriminatorConfig,
    GeneratorOutput,
    adversarial_phases,
    build_discriminator,
    latent_discriminator_term,
)
from onestepsr.methods.shared.image_loss import PerceptualConfig, SpatialLoss, SpatialWeights
from onestepsr.methods.shared.residual_shift import FrozenAutoencoder
from onestepsr.methods.shared.vsd import (
    REGULARIZER,
    TEACHER,
    AdapterConfig,
    VariationalConfig,
    build_pair,
    unet_adapters,
    variational_term,
)
from onestepsr.models.backbones import load_backbone, read_prompt
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.lora import LoraConfig, add_lora, copy_sharing_weights
from onestepsr.models.osediff.checkpoints import (
    ARCHITECTURE,
    can_be_published,
    collect,
    content_of,
    copy_into_adapters,
    read_any,
)
from onestepsr.models.osediff.generator import (
    DECODER_LAYERS,
    ENCODER_LAYERS,
    FIRST_LAYER,
    TIMESTEP,
    OSEDiffGenerator,
    Posterior,
)
from onestepsr.models.stable_diffusion.config import PromptConfig

if TYPE_CHECKING:
    from onestepsr.prompts.embedder import EmbeddingCache, PromptEmbedder

logger = logging.getLogger(__name__)

ENCODER = "encoder"
"""Name of the frozen encoder in :class:`onestepsr.methods.base.Method`, where one is needed."""
Part = Literal["encoder", "unet", "decoder"]


@dataclass(frozen=True, kw_only=True)
class OSEDiffPerceptualConfig(PerceptualConfig):
    """The perceptual distance: LPIPS."""

    distance: Literal["ea_dists", "dists", "ea_lpips", "lpips"] = "lpips"
    """OSEDiff's LPIPS, or one of those that D3SR compares."""


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """The condition of all networks, for images that bring no prompt embedding of their own."""

    kind: Literal["none", "learnable", "text", "file"] = "none"
    """``none``: the embedding that a backbone of ours was trained with; zeros for a Stable Diffusion, which is not its
    embedding of an empty text. ``learnable``: trained with the generator. ``text``: of one text for all images.
    ``file``: read from a file."""
    text: str = ""
    """With ``text``: the prompt; empty is what Stable Diffusion was trained with where there was no text."""
    negative: str | None = None
    """With ``text``: the negative prompt, which guides the teacher; null for no guidance."""
    text_encoder: str = "sd21-base"
    """With ``text``, and for photos that have texts (``data.prompts``): a diffusers folder with tokenizer and text
    encoder, or the name of one on the hub; it is in memory only before training."""
    file: Path | None = None
    """With ``file``: safetensors file of one embedding (L, C)."""
    negative_file: Path | None = None
    """Likewise, of the negative prompt; null for no guidance."""
    start: PromptConfig = field(default_factory=PromptConfig)
    """Start of a learnable embedding on a backbone that brings none."""

    def __post_init__(self) -> None:
        if (self.kind == "file") != (self.file is not None):
            raise ValueError(
                f"kind '{self.kind}' with file {self.file}: a file belongs to the kind 'file', and only to it"
            )
        if self.negative is not None and self.kind != "text":
            raise ValueError(f"negative: belongs to the kind 'text', not to '{self.kind}' (negative_file is for any)")

    @property
    def initial(self) -> PromptConfig:
        """Start of the embedding of a backbone that brings none."""
        return self.start if self.kind == "learnable" else PromptConfig(std=0.0)

    def put_on(self, generator: OneStepLatentGenerator) -> Tensor | None:
        """Give ``generator`` its prompt, trainable if it is to be learnt; returns the negative one (1, L, C), if any.

        Raises :class:`UserError` in one line for embeddings of another width.
        """
        width, negative = generator.prompt.shape[2], None
        if self.kind == "text":
            texts = [self.text] if self.negative is None else [self.text, self.negative]
            prompt, *others = self._embedded(texts, width)[:, None]
            generator.set_prompt(prompt)
            negative = others[0] if others else None
        elif self.file is not None:
            generator.set_prompt(read_prompt(self.file, width))
        if self.negative_file is not None:
            negative = read_prompt(self.negative_file, width)
        generator.prompt.requires_grad_(self.kind == "learnable")
        return negative

    def _embedded(self, texts: list[str], width: int) -> Tensor:
        if torch.empty(0).device.type == "meta":  # a dry run has no use for values
            from onestepsr.prompts.sources import TOKENS

            with torch.device("cpu"):  # whatever importing transformers makes has values
                self.check(width, texts)
            return torch.empty(len(texts), TOKENS, width)
        return self.embedder(width).embed(texts)

    def check(self, width: int, texts: Sequence[str], cache: EmbeddingCache | None = None) -> None:
        """Raise what embedding ``texts`` would, and log what it would fetch: all that a dry run does."""
        from onestepsr.prompts.hub import NotHere

        try:
            self.embedder(width, cache, fetch=False).check(list(texts))
        except NotHere as error:
            logger.warning("config.prompt.text_encoder: %s; training begins by fetching it", error)

    def embedder(self, width: int, cache: EmbeddingCache | None = None, *, fetch: bool = True) -> PromptEmbedder:
        """The embedder of texts into ``width`` channels; :class:`UserError` if the text encoder gives another width.

        ``cache`` defaults to the one of prompts in general. Without ``fetch``, a text encoder that would have to be
        fetched is :class:`onestepsr.prompts.hub.NotHere`.
        """
        from onestepsr.prompts.embedder import PromptEmbedder

        embedder = PromptEmbedder(self.text_encoder, cache=cache, fetch=fetch)
        if embedder.width != width:
            raise UserError(
                f"config.prompt.text_encoder: '{self.text_encoder}' gives embeddings of width {embedder.width}, the "
                f"backbone takes {width}"
            )
        return embedder


@dataclass(frozen=True, kw_only=True)
class OSEDiffConfig:
    """Backbone, trained parts, losses. The defaults are the published code's but for ``posterior``."""

    backbone: str
    """Pretrained latent-diffusion backbone: a name, a diffusers folder, a single-file checkpoint, or weights of ours
    from the ``diffusion`` method or an earlier generator; ``random:NAME`` needs no file and is untrained."""
    scale: int = 4
    """Upscaling factor; 1 restores without enlarging, as the face model does."""
    timestep: int = TIMESTEP
    """The step at which the UNet is evaluated."""
    posterior: Posterior = "mean"
    """Latent that the encoder gives to the UNet: the mean, or a sample as the published code draws it. The mean by
    default, because one image then has one result."""
    prompt: ConditionConfig = field(default_factory=ConditionConfig)
    """The text condition of all three UNets."""
    parts: tuple[Part, ...] = ("encoder", "unet")
    """Trained parts of the generator; the paper compares encoder and decoder, each with and without."""
    tuning: Literal["lora", "full"] = "lora"
    """Training of these parts: adapters, and the UNet's whole first convolution beside them; or all parameters."""
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    """The UNet's adapters."""
    autoencoder_lora: AdapterConfig = field(default_factory=AdapterConfig)
    """The adapters of encoder and decoder; the paper compares the ranks 2, 4 and 8."""
    adapters: Path | None = None
    """Published weights, or a file of adapters of ours, to start from."""
    share_frozen: bool = True
    """Keep one copy of the layers that generator, regulariser and teacher have in common and do not train. The
    published code keeps three; results are the same."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: about a third slower, far less memory."""
    mse_weight: float = 1.0
    """Weight of the squared error of images in [-1, 1]."""
    perceptual_weight: float = 2.0
    """Weight of the perceptual distance; 0 leaves it out."""
    lattice_weight: float = 0.0
    """Weight of the penalty on patterns locked to the latent grid, in [-1, 1]; not in the paper."""
    clamp_output: bool = True
    """Clamp the output to [-1, 1] before the losses, as published: no loss, and no gradient, beyond black and white."""
    perceptual: OSEDiffPerceptualConfig = field(default_factory=OSEDiffPerceptualConfig)
    """The perceptual distance, LPIPS in the paper."""
    regularization: Literal["vsd", "vsd_image", "gan", "none"] = "vsd"
    """Term that makes images natural: distillation of latents; the same of images, which pass through the decoder and
    the untrained encoder first (our reading of what the paper calls the image domain); D3SR's discriminator instead;
    nothing."""
    vsd: VariationalConfig = field(default_factory=VariationalConfig)
    """Variational score distillation."""
    adversarial_weight: float = 0.5
    """Weight of the discriminator's term with ``gan``. The paper gives none; this is D3SR's first default."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The discriminator of ``gan``."""

    def __post_init__(self) -> None:
        if min(self.mse_weight, self.perceptual_weight, self.lattice_weight, self.adversarial_weight) < 0:
            raise ValueError("loss weights must not be negative")
        if not self.mse_weight + self.perceptual_weight:
            raise ValueError("mse_weight and perceptual_weight are both 0: nothing ties the output to the photo")
        if not self.parts or len(set(self.parts)) != len(self.parts):
            raise ValueError(f"parts is {list(self.parts)}: expected one or more of encoder, unet, decoder, each once")
        if not 1 <= self.scale <= 16:
            raise ValueError(f"scale is {self.scale}: expected 1 to 16")
        if self.adapters is not None and (self.tuning != "lora" or set(self.parts) != {"encoder", "unet"}):
            raise ValueError("adapters: published weights need tuning 'lora' and the parts encoder and unet")


class TrainableOSEDiff(nn.Module):
    """A generator as training calls it: through ``forward`` alone, which also returns the latents to be judged."""

    def __init__(self, generator: OSEDiffGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, lr: Tensor, prompt: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """SR image (N, 3, s h, s w) and its float32 latent, for LR (N, 3, h, w) with sides multiples of
        ``lr_multiple``; ``noise``, shaped like the latent, samples the encoder's posterior, whose mean is taken
        without."""
        z_h = self.generator.step(self.generator.encode_with(lr, noise), prompt)
        return self.generator.decode(z_h), z_h


@register("osediff", OSEDiffConfig)
def build(config: OSEDiffConfig) -> Method:
    """Generator phase, then that of the regulariser or the discriminator."""
    generator = _prepare_generator(config)
    negative = config.prompt.put_on(generator)
    spatial = SpatialLoss(
        SpatialWeights(mse=config.mse_weight, perceptual=config.perceptual_weight, lattice=config.lattice_weight),
        config.perceptual,
    )
    networks: dict[str, nn.Module] = {"generator": TrainableOSEDiff(generator)}
    frozen = dict(spatial.frozen)
    terms = _add_adversarial_terms(generator, config, negative, networks, frozen)
    _tune(generator, config)  # after the adversarial terms have copied the plain networks
    learnt = config.prompt.kind == "learnable"
    return Method(
        networks=networks,
        optional=frozenset({REGULARIZER, DISCRIMINATOR}),
        frozen=frozen,
        phases=adversarial_phases(partial(_generator_loss, generator, spatial, config), terms),
        ema=("generator",),
        preview=lambda networks, batch: preview_columns(
            networks["generator"](batch["lr"], batch.get("prompt"))[0], batch, generator.scale
        ),
        export=_export,
        embedder=None if learnt else partial(config.prompt.embedder, generator.prompt_width),
        check_texts=None if learnt else partial(config.prompt.check, generator.prompt_width),
        scale=generator.scale,
        hr_multiple=generator.scale * generator.lr_multiple,
    )


def _prepare_generator(config: OSEDiffConfig) -> OSEDiffGenerator:
    backbone = load_backbone(config.backbone, prompt=config.prompt.initial, for_training=True)
    check_timestep(config.timestep, backbone, config.backbone)
    generator = OSEDiffGenerator.of(backbone, timestep=config.timestep, scale=config.scale, posterior=config.posterior)
    generator.requires_grad_(False)
    if config.gradient_checkpointing:
        checkpoint_gradients(generator.unet, generator.autoencoder)
    return generator


def _add_adversarial_terms(
    generator: OSEDiffGenerator,
    config: OSEDiffConfig,
    negative: Tensor | None,
    networks: dict[str, nn.Module],
    frozen: dict[str, nn.Module],
) -> list[AdversarialTerm]:
    """Add the networks of the adversarial terms."""
    if config.regularization == "none":
        return []
    share = config.share_frozen and config.tuning == "lora"
    if config.regularization != "vsd":
        autoencoder = generator.autoencoder
        frozen[ENCODER] = FrozenAutoencoder(copy_sharing_weights(autoencoder) if share else copy.deepcopy(autoencoder))
    if config.regularization == "gan":
        networks[DISCRIMINATOR], noise = build_discriminator(
            generator, config.discriminator, name=config.backbone, checkpointing=config.gradient_checkpointing
        )
        return [latent_discriminator_term(noise, config.adversarial_weight, config.discriminator.start)]
    networks[REGULARIZER], frozen[TEACHER] = build_pair(generator, config.vsd, negative, share=share)
    return [variational_term(generator, config.vsd)]


def _tune(generator: OSEDiffGenerator, config: OSEDiffConfig) -> None:
    """Make the parts that are trained trainable."""
    layers = "|".join(
        pattern for part, pattern in (("encoder", ENCODER_LAYERS), ("decoder", DECODER_LAYERS)) if part in config.parts
    )
    if config.tuning == "full":
        _require_gradients(generator.autoencoder, rf"({layers})" if layers else "(?!)")
        generator.unet.requires_grad_("unet" in config.parts)
        return
    if layers:
        own = config.autoencoder_lora
        add_lora(generator.autoencoder, LoraConfig(rank=own.rank, alpha=own.alpha, targets=own.targets or layers))
    if "unet" in config.parts:
        add_lora(generator.unet, unet_adapters(generator.unet, config.lora))
        _require_gradients(generator.unet, rf"{FIRST_LAYER}\.base_layer")
    if config.adapters is not None:
        copy_into_adapters(generator, read_any(config.adapters), str(config.adapters))


def _require_gradients(network: nn.Module, layers: str) -> None:
    """Train the parameters of the layers whose whole name ``layers`` matches."""
    for name, parameter in network.named_parameters():
        if re.fullmatch(layers, name.rpartition(".")[0]):
            parameter.requires_grad_(True)


def _generator_loss(
    generator: OSEDiffGenerator, spatial: SpatialLoss, config: OSEDiffConfig, terms: list[AdversarialTerm]
) -> LossFn:
    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        for term in terms:
            term.begin_iteration()
        lr, prompt = batch["lr"], batch.get("prompt")
        noise = random.normal(generator.latent_like(lr)) if config.posterior == "sample" else None
        sr, z_sr = networks["generator"](lr, prompt, noise)
        sr = sr.clamp(0, 1) if config.clamp_output else sr  # [-1, 1] in the published code
        if terms and config.regularization == "vsd_image":
            z_sr = networks[ENCODER](sr)
        output = GeneratorOutput(sr=sr, z_sr=z_sr, prompt=prompt)
        if terms:
            batch["z_sr"] = z_sr.detach()
        if terms and config.regularization == "gan":
            batch["z_hr"] = networks[ENCODER](batch["hr"])  # frozen, so without a graph
        return spatial(sr, batch["hr"]) | {term.name: term.generator_loss(networks, output, random) for term in terms}

    return loss


def _export(networks: Mapping[str, nn.Module]) -> Exported:
    generator = cast(TrainableOSEDiff, networks["generator"]).generator
    if not can_be_published(generator):
        return exported(generator, {})
    # The adapters as they are, from which the published layout can be written and another run can start.
    described, state = content_of(collect(generator))
    beside = Exported(state_dict=state, architecture=ARCHITECTURE, config=described)
    return exported(generator, {"adapters": beside})

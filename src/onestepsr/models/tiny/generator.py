"""The tiny backbone as a one-step generator: configuration, construction, and changes to a trained one."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace
from typing import Self, cast

import torch
from torch import nn

from onestepsr.core.errors import UserError
from onestepsr.models.generators import OneStepConfig, OneStepLatentGenerator, one_step_generator
from onestepsr.models.tiny.networks import ResidualBlock, TinyAutoencoder, TinyConfig, TinyUNet


@dataclass(frozen=True, kw_only=True)
class TinyGeneratorConfig(OneStepConfig):
    """Everything that fixes a generator on the tiny backbone, apart from its weights."""

    model: TinyConfig = field(default_factory=TinyConfig)
    """Sizes of autoencoder and UNet."""

    def with_prompt_tokens(self, tokens: int) -> Self:
        """The same with a prompt embedding of another length."""
        return replace(self, model=replace(self.model, prompt_tokens=tokens))


def tiny_generator(config: TinyGeneratorConfig) -> OneStepLatentGenerator:
    """Autoencoder, UNet and prompt embedding, freshly initialised, as one generator."""
    shape = (1, config.model.prompt_tokens, config.model.prompt_width)
    prompt = torch.empty(shape)  # on the default device
    if not prompt.is_meta:
        prompt = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(prompt.device)
    generator = one_step_generator(TinyAutoencoder(config.model), TinyUNet(config.model), prompt, config)
    generator.color_fix = "drift"
    return generator


def _tiny_config(generator: nn.Module, message: str) -> TinyGeneratorConfig:
    """Configuration of a generator on the tiny backbone; UserError with ``message`` for any other network."""
    if isinstance(generator, OneStepLatentGenerator) and isinstance(generator.config, TinyGeneratorConfig):
        return generator.config
    raise UserError(message)


# ---- more residual blocks ----


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Residual blocks of a tiny generator; None leaves a part as it is."""

    down_blocks: tuple[int, ...] | None = None
    """In the UNet by level on the way down, the finest first."""
    up_blocks: tuple[int, ...] | None = None
    """In the UNet by level on the way up, the finest first."""
    decoder_blocks: int | None = None
    """In the decoder, at twice the latent's resolution."""
    refine_blocks: int | None = None
    """In the decoder, at the resolution of the image; for models whose decoder has convolutions there."""


def deepened(generator: OneStepLatentGenerator, depth: Depth) -> OneStepLatentGenerator:
    """A generator of that depth with the weights, and so exactly the images, of a shallower one.

    Every new block starts as the identity, so that training goes on from where the shallow network stands (Chen et al.,
    "Net2Net", 2016). Raises UserError for another backbone and for a depth that would take blocks away.
    """
    config = _tiny_config(generator, "only models on the tiny backbone can be deepened")
    wanted = {name: count for name, count in asdict(depth).items() if count is not None}
    present = asdict(config.model)
    for name, count in wanted.items():
        now = present[name]
        pairs = ([now], [count]) if isinstance(now, int) or isinstance(count, int) else (now, count)
        if len(pairs[0]) != len(pairs[1]) or any(after < before for before, after in zip(*pairs, strict=True)):
            raise UserError(f"{name}: {count}, expected at least {now}, which the model has already")
    result = tiny_generator(replace(config, model=replace(config.model, **wanted)))
    own = generator.state_dict()
    for name, module in result.named_modules():
        if isinstance(module, ResidualBlock) and f"{name}.conv1.weight" not in own:
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(cast(torch.Tensor, module.conv2.bias))
    result.load_state_dict(result.state_dict() | own)
    return result.train(generator.training)


# ---- even contrast, and the line between two models ----


def equalize_subpixel_contrast(generator: nn.Module) -> OneStepLatentGenerator:
    """A tiny generator of the same weights whose output passes :class:`onestepsr.models.tiny.networks.EvenContrast`.

    Raises UserError for a generator of another kind.
    """
    config = _tiny_config(generator, "even contrast is for models on the tiny backbone")
    result = tiny_generator(replace(config, model=replace(config.model, even_contrast=True)))
    result.load_state_dict(generator.state_dict())
    return result.train(generator.training)


def match_architecture(first: nn.Module, second: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both generators, with even contrast if one of them has it: their weights can be set side by side."""
    configs = [network.config for network in (first, second) if isinstance(network, OneStepLatentGenerator)]
    even = [config.model.even_contrast for config in configs if isinstance(config, TinyGeneratorConfig)]
    if sum(even) == 1 and len(even) == 2:
        return (first, equalize_subpixel_contrast(second)) if even[0] else (equalize_subpixel_contrast(first), second)
    return first, second


def blend(first: nn.Module, second: nn.Module, share: float) -> nn.Module:
    """A copy of ``first`` whose weights lie the part ``share`` (0 to 1) of the way to those of ``second``.

    At 0 and 1 the weights are exactly those of one network. What is not a weight, such as counters, comes from
    ``first``. Raises UserError for a share out of range and for networks of different shapes.
    """
    if not 0.0 <= share <= 1.0:
        raise UserError(f"share between two models: {share:g}, accepted: 0 (the first) to 1 (the second)")
    ours, theirs = first.state_dict(), second.state_dict()
    different = sorted(ours.keys() ^ theirs.keys())
    different += [key for key in ours.keys() & theirs.keys() if ours[key].shape != theirs[key].shape]
    if different:
        raise UserError(f"the two models differ in shape, first at '{different[0]}'")
    blended = copy.deepcopy(first)
    mixed = {
        key: torch.lerp(value, theirs[key].to(value), share) if value.is_floating_point() else value
        for key, value in ours.items()
    }
    blended.load_state_dict(mixed)
    return blended

"""Both networks of variational score distillation: what they share, are shown and learn; layers with adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_diffusion import GENERATOR
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.methods.base import SampleRandom
from onestepsr.methods.shared.adversarial import GeneratorOutput
from onestepsr.methods.shared.vsd import (
    GuidedTeacher,
    VariationalConfig,
    build_pair,
    unet_adapters,
    variational_term,
)
from onestepsr.models.architectures import random_backbone
from onestepsr.models.lora import LoraConfig
from onestepsr.models.osediff.generator import UNET_LAYERS, OSEDiffGenerator
from onestepsr.models.stable_diffusion.networks import stable_diffusion_generator
from small import small_generator


def small_osediff() -> OSEDiffGenerator:
    return OSEDiffGenerator.of(small_generator(), timestep=999, scale=4, posterior="mean")


class Prompted(nn.Module):
    """A UNet whose prediction is its input times the mean of the prompt, plus the step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, z_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        self.seen.append(len(z_t))
        return z_t * prompt.mean(dim=(1, 2)).reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1)


def test_osediffs_layers_where_a_stable_diffusion_is_told_none() -> None:
    unet, tiny = stable_diffusion_generator(GENERATOR).unet, random_backbone("random:d3sr-tiny").unet
    own = LoraConfig(rank=2, alpha=3.0, targets="mine")
    assert unet_adapters(unet, own) is own
    assert unet_adapters(unet, LoraConfig(rank=2, alpha=3.0)) == LoraConfig(rank=2, alpha=3.0, targets=UNET_LAYERS)
    assert unet_adapters(tiny, LoraConfig(rank=2)) == LoraConfig(rank=2)


@pytest.mark.parametrize(
    ("scale", "negative", "factor", "evaluated"),
    [(2.0, True, 2 * 3 - 1 * 5, 6), (4.0, True, 4 * 3 - 3 * 5, 6), (1.0, True, 3, 3), (4.0, False, 3, 3)],
)
@pytest.mark.parametrize("prompts", [1, 3])
def test_guidance_leads_away_from_the_negative_prompt(
    scale: float, negative: bool, factor: float, evaluated: int, prompts: int
) -> None:
    """Under a prompt of 3 and a negative one of 5 the prediction is scale * 3 - (scale - 1) * 5 times the latent."""
    unet = Prompted()
    teacher = GuidedTeacher(unet, torch.full((1, 2, 4), 5.0) if negative else None, scale)
    z = torch.ones(3, 1, 3, 3, requires_grad=True)
    eps = teacher(z, torch.tensor([10, 20, 30]), torch.full((prompts, 2, 4), 3.0))
    expected = factor + torch.tensor([10.0, 20.0, 30.0]).reshape(3, 1, 1, 1).expand(3, 1, 3, 3)
    torch.testing.assert_close(eps, expected)
    assert unet.seen == [evaluated], "one evaluation, of twice the samples under guidance"
    eps.sum().backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, factor))
    assert not teacher.state_dict(), "the negative prompt is not the teacher's own"


@pytest.mark.parametrize(("share", "tuning"), [(True, "lora"), (True, "full"), (False, "lora"), (False, "full")])
def test_regularizer_is_trained_and_shares_frozen_layers_as_asked(share: bool, tuning: Any) -> None:
    generator = small_osediff()
    regularizer, teacher = build_pair(generator, VariationalConfig(tuning=tuning), None, share=share)

    def own(network: nn.Module) -> set[int]:
        return {parameter.data_ptr() for parameter in network.parameters()}

    assert bool(own(teacher) & own(generator.unet)) is share
    assert bool(own(regularizer) & own(generator.unet)) is (share and tuning == "lora")
    trained = {name for name, parameter in regularizer.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in regularizer.named_parameters() if tuning == "full" or "lora" in name}
    assert not any(parameter.requires_grad for parameter in (*teacher.parameters(), *generator.unet.parameters()))


def test_steps_that_the_diffusion_does_not_have_are_refused() -> None:
    for name in ("t_max", "regularizer_t_max"):
        with pytest.raises(UserError, match=r"config\.vsd: steps up to 1000, the last one is 999"):
            build_pair(small_osediff(), VariationalConfig(**{name: 1000}), None, share=False)
    build_pair(small_osediff(), VariationalConfig(t_max=999, tuning="full"), None, share=False)


def test_both_networks_see_latents_noised_to_steps_of_the_range_without_a_graph() -> None:
    generator, seen = small_osediff(), list[tuple[Tensor, ...]]()
    generator.prompt.requires_grad_()
    term = variational_term(generator, VariationalConfig(t_min=300, t_max=301))
    z = torch.full((64, 4, 2, 2), 2.0, requires_grad=True)

    def network(*arguments: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(arguments)
        return torch.zeros_like(arguments[0])

    draws = [SampleRandom("vsd", samples=range(64)) for _ in range(2)]
    term.generator_loss({"teacher": network, "regularizer": network}, GeneratorOutput(sr=z, z_sr=z), draws[0])
    t = draws[1].integers(300, 302)
    assert set(t.tolist()) == {300, 301}
    alpha_bar = generator.schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
    z_t = alpha_bar.sqrt() * 2 + (1 - alpha_bar).sqrt() * draws[1].normal(z)
    assert len(seen) == 2
    for arguments in seen:
        torch.testing.assert_close(arguments[0], z_t)
        assert torch.equal(arguments[1], t)
        assert torch.equal(arguments[2], generator.prompt)


def test_regularizer_learns_on_noised_latents_under_the_prompts_of_the_images() -> None:
    """Its prediction is a trained number, 3 at first: the gradient is 2 * 0.5 * (3 - mean noise)."""
    generator, number = small_osediff(), torch.tensor(3.0, requires_grad=True)
    generator.prompt.requires_grad_()
    config = VariationalConfig(regularizer_t_min=300, regularizer_t_max=301, regularizer_weight=0.5)
    term, seen = variational_term(generator, config), list[tuple[Tensor, ...]]()
    z = torch.full((64, 4, 2, 2), 2.0)

    def network(*arguments: Tensor) -> Tensor:
        seen.append(arguments)
        return number.expand_as(arguments[0])

    own = torch.rand(64, 5, 16)
    for batch in ({"z_sr": z}, {"z_sr": z, "prompt": own}):
        number.grad = None
        random, again = (SampleRandom("vsd", samples=range(64)) for _ in range(2))
        term.discriminator_loss({"regularizer": network}, batch, random)["eps"].backward()
        t, noise = again.integers(300, 302), again.normal(z)
        alpha_bar = generator.schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
        z_t, told, prompt = seen.pop()
        torch.testing.assert_close(z_t, alpha_bar.sqrt() * 2 + (1 - alpha_bar).sqrt() * noise)
        assert torch.equal(told, t)
        assert torch.equal(prompt, batch.get("prompt", generator.prompt))
        assert not prompt.requires_grad, "the generator's prompt is not the regulariser's to train"
        assert number.grad is not None
        assert number.grad.item() == pytest.approx(2 * 0.5 * (3 - noise.mean().item()), rel=1e-4)

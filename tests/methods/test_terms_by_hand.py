"""Loss terms of the methods with numbers worked out by hand: signs, weights, noise, and where gradients go."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from residual_pairs import MICRO, networks_of
from torch import Tensor, nn

from onestepsr.core.config import to_mapping
from onestepsr.diffusion.schedule import DiffusionSchedule
from onestepsr.methods import d3sr, osediff, tadsr
from onestepsr.methods.base import Method, SampleRandom
from onestepsr.methods.osediff import OSEDiffConfig
from onestepsr.methods.shared.adversarial import (
    CRITIC,
    DISCRIMINATOR,
    CriticConfig,
    DiscriminatorConfig,
    GeneratorOutput,
    ImageCritic,
    LatentNoise,
    NoiseConfig,
    latent_discriminator_term,
)
from onestepsr.methods.shared.vsd import AdapterConfig, VariationalConfig, variational_term
from onestepsr.models.discriminators import HeadConfig
from onestepsr.models.lora import LoraConfig
from onestepsr.models.osediff.generator import OSEDiffGenerator
from onestepsr.models.tiny.generator import TinyGeneratorConfig
from onestepsr.weights import files
from small import SMALL, added_noise, small_generator

SCHEDULE = DiffusionSchedule()


def random_of(samples: int = 2) -> SampleRandom:
    return SampleRandom("by hand", samples=range(samples))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def mean_logit(z: Tensor, t: Tensor) -> Tensor:
    """A discriminator that can be worked out by hand: one region, its logit the mean of the latent."""
    return z.mean(dim=(1, 2, 3), keepdim=True)


def pair() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {"hr": torch.rand(2, 3, 32, 32, generator=rng), "lr": torch.rand(2, 3, 8, 8, generator=rng)}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    config, state = TinyGeneratorConfig(model=SMALL), small_generator().state_dict()
    files.save_model(path, architecture="tiny-latent-diffusion", config=to_mapping(config), state_dict=state)
    return str(path)


def generator_terms(method: Method) -> dict[str, Tensor]:
    """Terms of the generator's first phase."""
    return method.phases[0].loss(networks_of(method), pair(), random_of())


def reaches(term: Tensor, network: nn.Module) -> bool:
    network.zero_grad()
    term.backward(retain_graph=True)
    return any(p.grad is not None and p.grad.any() for name, p in network.named_parameters() if "unet" in name)


# ---- D3SR ------------------------------------------------------------------------------------------------------------


def test_generators_adversarial_term_judges_noised_latents_with_weight_lambda_1() -> None:
    """0.25 softplus(-mean z_t) at t = 999, where alpha_bar is 0.0046601: the logit is 0.068266 z + 0.997667 noise."""
    noise = LatentNoise.of(SCHEDULE, NoiseConfig(t_min=999, t_max=999))
    term = latent_discriminator_term(noise, 0.25, 7)
    z = torch.full((1, 1, 1, 1), 2.0, requires_grad=True)
    random = random_of(1)
    assert random.integers(999, 1000).item() == 999
    logit = 0.068265 * 2.0 + 0.997667 * random.normal(z).item()
    loss = term.generator_loss({DISCRIMINATOR: mean_logit}, GeneratorOutput(sr=z, z_sr=z), random_of(1))
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * softplus(-logit), rel=1e-4)
    assert z.grad.item() == pytest.approx(-0.25 * 0.068265 / (1 + math.exp(logit)), rel=1e-4)
    assert (term.network, term.name, term.start) == (DISCRIMINATOR, "adversarial", 7)


def test_discriminator_calls_photos_real_and_restored_images_fake() -> None:
    """softplus(fake) + softplus(-real) with real logits of 1 and fake ones of -2, all raised by a trained number."""
    noise = LatentNoise.of(SCHEDULE, NoiseConfig(kind="vanilla"))
    term = latent_discriminator_term(noise, 0.25, 0)
    raised = torch.zeros((), requires_grad=True)
    batch = {"z_hr": torch.ones(3, 1, 2, 2), "z_sr": torch.full((3, 1, 2, 2), -2.0)}
    networks = {DISCRIMINATOR: lambda z, t: mean_logit(z, t) + raised}
    loss = term.discriminator_loss(networks, batch, random_of(3))["discriminator"]
    loss.backward()
    assert loss.item() == pytest.approx(softplus(-2) + softplus(-1))
    assert raised.grad is not None
    assert raised.grad.item() == pytest.approx(1 / (1 + math.exp(2)) - 1 / (1 + math.exp(1)))


def test_real_and_fake_latents_have_draws_of_their_own() -> None:
    seen: list[Tensor] = []

    def network(z: Tensor, t: Tensor) -> Tensor:
        seen.extend((z, t))
        return mean_logit(z, t)

    term = latent_discriminator_term(LatentNoise.of(SCHEDULE, NoiseConfig()), 1.0, 0)
    z = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    term.discriminator_loss({DISCRIMINATOR: network}, {"z_hr": z, "z_sr": z}, random_of())
    (real, fake), (of_real, of_fake) = seen[0].chunk(2), seen[1].chunk(2)
    assert not torch.equal(real, fake)
    assert of_real.tolist() != of_fake.tolist()


def test_adaptive_noise_follows_the_verdict_on_real_latents() -> None:
    noise = LatentNoise.of(SCHEDULE, NoiseConfig(kind="diffusion_gan"))
    term = latent_discriminator_term(noise, 1.0, 0)
    batch = {"z_hr": torch.full((2, 1, 2, 2), 50.0), "z_sr": torch.full((2, 1, 2, 2), -50.0)}
    term.discriminator_loss({DISCRIMINATOR: mean_logit}, batch, random_of())
    assert noise.observed.tolist() == [2.0, 2.0], "two real latents, both called real"


def test_adversarial_term_of_d3sr_teaches_the_generator_in_proportion_to_lambda_1(backbone: str) -> None:
    values = []
    for weight in (0.5, 1.5):
        torch.manual_seed(0)
        method = d3sr.build(d3sr.D3SRConfig(backbone=backbone, tuning="full", adversarial_weight=weight))
        term = generator_terms(method)["adversarial"]
        assert reaches(term, method.networks["generator"])
        values.append(term.item())
    assert values[1] == pytest.approx(3 * values[0], rel=1e-5)


def test_weights_of_d3srs_spatial_loss_multiply_their_terms(backbone: str) -> None:
    once, more = (
        generator_terms(
            d3sr.build(
                d3sr.D3SRConfig(
                    backbone=backbone,
                    tuning="full",
                    mse_weight=weight,
                    perceptual_weight=2 * weight,
                    adversarial_weight=0,
                    extras=d3sr.ExtrasConfig(lattice_weight=3 * weight),
                )
            )
        )
        for weight in (0.5, 1.5)
    )
    assert set(once) == {"mse", "ea_dists", "lattice"}
    assert {name: (more[name] / once[name]).item() for name in once} == pytest.approx(dict.fromkeys(once, 3), rel=1e-4)


def test_every_term_of_d3sr_teaches_the_generator(backbone: str) -> None:
    torch.manual_seed(0)
    extras = d3sr.ExtrasConfig(lattice_weight=0.5, critic=CriticConfig(weight=0.1))
    method = d3sr.build(d3sr.D3SRConfig(backbone=backbone, tuning="full", extras=extras))
    terms = generator_terms(method)
    assert set(terms) == {"mse", "ea_dists", "lattice", "adversarial", "critic_adversarial"}
    assert all(reaches(term, method.networks["generator"]) for term in terms.values())


# ---- Critic of images ------------------------------------------------------------------------------------------------


def test_critic_calls_photos_real_and_weighs_its_term() -> None:
    critic = ImageCritic(CriticConfig(weight=0.1))
    networks = {CRITIC: lambda images: (images.mean(dim=(1, 2, 3), keepdim=True),)}
    hr, sr = torch.ones(2, 3, 16, 16), torch.full((2, 3, 16, 16), -2.0, requires_grad=True)
    loss = critic.discriminator_loss(networks, {"hr": hr, "sr": sr.detach()}, random_of())["critic"]
    assert loss.item() == pytest.approx(softplus(-2) + softplus(-1))
    term = critic.generator_loss(networks, GeneratorOutput(sr=sr, z_sr=sr), random_of())
    assert term.item() == pytest.approx(0.1 * softplus(2), rel=1e-5)
    (gradient,) = torch.autograd.grad(term, sr)
    assert gradient.sum().item() == pytest.approx(-0.1 / (1 + math.exp(-2)), rel=1e-5)


def test_matching_adds_the_distance_of_features_to_the_photos() -> None:
    """0.1 (softplus(2) + 0.5 mean(|-2 - 1|, |-4 - 2|)): logits and features of the restored images come first."""
    critic = ImageCritic(CriticConfig(weight=0.1, matching=0.5))
    networks = {CRITIC: lambda images: (images.mean(dim=(1, 2, 3), keepdim=True), images, 2 * images)}
    hr, sr = torch.ones(2, 3, 16, 16, requires_grad=True), torch.full((2, 3, 16, 16), -2.0, requires_grad=True)
    term = critic.generator_loss(networks, GeneratorOutput(sr=sr, z_sr=sr, hr=hr, lr=hr), random_of())
    assert term.item() == pytest.approx(0.1 * (softplus(2) + 0.5 * 4.5), rel=1e-5)
    term.backward()
    assert hr.grad is None or not hr.grad.any(), "the photo is a target"


# ---- OSEDiff ---------------------------------------------------------------------------------------------------------


def test_regularizer_is_taught_the_noise_that_was_added() -> None:
    generator = OSEDiffGenerator.of(small_generator(), timestep=999, scale=4, posterior="mean")
    term = variational_term(generator, VariationalConfig(regularizer_t_min=400, regularizer_weight=0.5))
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def informed(z_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        assert t.min() >= 400
        return added_noise(generator.schedule, z_t, z, t)

    def even(z_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return torch.full_like(z_t, 3.0)

    random = random_of()
    random.integers(400, 1000)
    expected = 0.5 * (3 - random.normal(z)).square().mean().item()
    losses = [term.discriminator_loss({"regularizer": n}, {"z_sr": z}, random_of())["eps"] for n in (informed, even)]
    assert losses[0].item() == pytest.approx(0, abs=1e-6), "whoever knows the clean latent knows the noise"
    assert losses[1].item() == pytest.approx(expected, rel=1e-5)


def test_distillation_term_pushes_the_latent_from_the_regularizers_estimate_to_the_teachers() -> None:
    """Estimates of 1 and 3 for z = 0: the gradient is weight 2 (3 - 1) / |0 - 1| / numel."""
    generator = OSEDiffGenerator.of(small_generator(), timestep=999, scale=4, posterior="mean")
    term = variational_term(generator, VariationalConfig(weight=0.5, t_min=300, t_max=300))
    z = torch.zeros(2, 4, 4, 4, requires_grad=True)

    def believing(estimate: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda z_t, t, prompt: added_noise(generator.schedule, z_t, torch.full_like(z_t, estimate), t)

    networks = {"teacher": believing(1.0), "regularizer": believing(3.0)}
    loss = term.generator_loss(networks, GeneratorOutput(sr=z, z_sr=z), random_of())
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 4, rel=1e-3)
    torch.testing.assert_close(z.grad, torch.full_like(z, 0.5 * 2 * 2 / z.numel()), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("kind", "name"), [("vsd", "vsd"), ("vsd_image", "vsd"), ("gan", "adversarial")])
def test_regularization_of_osediff_teaches_the_generator(backbone: str, kind: str, name: str) -> None:
    torch.manual_seed(0)
    vsd = VariationalConfig(tuning="full")
    discriminator = DiscriminatorConfig(tuning="full")
    config = OSEDiffConfig(backbone=backbone, tuning="full", regularization=kind, vsd=vsd, discriminator=discriminator)
    method = osediff.build(config)
    if "regularizer" in method.networks:  # it starts as the teacher, and equal networks teach nothing
        for parameter in method.networks["regularizer"].parameters():
            parameter.data.mul_(1.5)
    terms = generator_terms(method)
    assert set(terms) == {"mse", "lpips", name}
    assert all(reaches(term, method.networks["generator"]) for term in terms.values())


@pytest.mark.parametrize("clamped", [True, False])
def test_osediff_clamps_its_output_before_the_losses_as_published(backbone: str, clamped: bool) -> None:
    """Against 0.25 everywhere, an image of 1.5 costs 4 * 1.25^2, or 4 * 0.75^2 clamped, and one of -0.5 4 * 0.75^2, or
    4 * 0.25^2 clamped."""
    config = OSEDiffConfig(
        backbone=backbone, tuning="full", regularization="none", perceptual_weight=0, clamp_output=clamped
    )
    method = osediff.build(config)
    low = torch.full((1, 3, 32, 32), -0.5, requires_grad=True)
    sr = torch.cat([torch.full((1, 3, 32, 32), 1.5), low])
    batch = {"hr": torch.full((2, 3, 32, 32), 0.25), "lr": torch.zeros(2, 3, 8, 8)}
    (phase,) = method.phases
    terms = phase.loss({"generator": lambda lr, prompt, noise: (sr, sr)}, batch, random_of())
    expected = (4 * (0.75 if clamped else 1.25) ** 2 + 4 * (0.25 if clamped else 0.75) ** 2) / 2
    assert terms["mse"].item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(terms["mse"], low)
    assert gradient.sum().item() == pytest.approx(0.0 if clamped else 4 * 2 * -0.75 / 2)


# ---- TAD-SR ----------------------------------------------------------------------------------------------------------


def test_hinge_of_tadsr_calls_real_latents_real() -> None:
    """Logits of 2 on real and -2 on restored latents are beyond both margins and cost nothing; swapped they cost 6."""
    torch.manual_seed(0)
    discriminator = tadsr.TimeAwareConfig(architecture="paper", head=HeadConfig(width=4, norm_groups=4))
    method = tadsr.build(tadsr.TADSRConfig(teacher=MICRO, teacher_steps=1, discriminator=discriminator))
    batch = {"hr": torch.rand(2, 3, 64, 64), "lr": torch.rand(2, 3, 16, 16)}
    networks = networks_of(method)
    (phase,) = (phase for phase in method.phases if phase.network == "discriminator")
    for real, cost in ((2.0, 0.0), (-2.0, 6.0)):
        verdict = torch.tensor([real, real, -real, -real]).reshape(4, 1, 1, 1)
        terms = phase.loss({**networks, "discriminator": lambda *_, v=verdict: [v, v]}, dict(batch), random_of())
        assert sum(terms.values()).item() == pytest.approx(cost)


# ---- Defaults --------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    """What a recipe leaves out is the paper's number, or, where the paper has none, that of docs/methods.md."""
    ours = d3sr.D3SRConfig(backbone="x")
    assert (ours.timestep, ours.tuning, ours.lora) == (399, "lora", LoraConfig(rank=16, alpha=16.0))
    assert (ours.mse_weight, ours.perceptual_weight, ours.adversarial_weight) == (1.0, 1.0, 0.5)
    assert (ours.perceptual.distance, ours.perceptual.texture_share) == ("ea_dists", 0.5)
    judge = ours.discriminator
    assert (judge.kind, judge.t_min, judge.t_max, judge.start, judge.hidden) == ("noise_aware", 0, 999, 0, (128,))
    assert (judge.tuning, judge.lora, judge.backbone) == ("lora", LoraConfig(rank=16, alpha=16.0), None)
    extras = ours.extras
    assert (extras.deepen, extras.even_contrast, extras.train_decoder, extras.lattice_weight) == (None, False, False, 0)
    critic = extras.critic
    assert (critic.weight, critic.start, critic.matching, critic.widths) == (0, 0, 0, (48, 96, 128))
    assert (critic.conditional, critic.lattice, critic.contrast_floor) == (False, False, None)
    adaptive = judge.adaptive
    assert (adaptive.t_initial, adaptive.target, adaptive.clean_share, adaptive.prior) == (5, 0.6, 0.5, "priority")
    assert adaptive.images == 100_000
    theirs = OSEDiffConfig(backbone="x")
    assert (theirs.timestep, theirs.scale, theirs.parts, theirs.tuning) == (999, 4, ("encoder", "unet"), "lora")
    assert (theirs.lora, theirs.autoencoder_lora, theirs.vsd.lora) == (AdapterConfig(rank=4, alpha=8.0),) * 3
    assert (theirs.vsd.weight, theirs.vsd.regularizer_weight, theirs.vsd.regularizer_t_min) == (1.0, 1.0, 0)
    assert (theirs.vsd.t_min, theirs.vsd.t_max, theirs.vsd.guidance, theirs.vsd.regularizer_t_max) == (
        20,
        979,
        7.5,
        999,
    )
    assert (theirs.vsd.start, theirs.lattice_weight, theirs.regularization) == (0, 0.0, "vsd")
    assert (theirs.adversarial_weight, theirs.clamp_output, theirs.share_frozen) == (0.5, True, True)
    assert (ours.gradient_checkpointing, theirs.gradient_checkpointing) == (False, False)
    student = tadsr.TADSRConfig(teacher="x")
    assert (student.score_weight, student.adversarial_weight, student.teacher_steps) == (1.0, 0.02, None)
    assert (student.score.kind, student.discriminator.kind, student.tuning) == ("hsd", "time_aware", "full")

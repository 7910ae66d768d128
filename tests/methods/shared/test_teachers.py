"""All kinds of teachers: what the networks are shown, where sampling leads, what a student becomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from residual_pairs import MICRO
from small_seesr import CONFIG, small_seesr
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.methods.base import SampleRandom
from onestepsr.methods.shared import teachers
from onestepsr.methods.shared.teachers import (
    HR_TOKENS,
    LR_TOKENS,
    RAM,
    TEXT,
    LatentDiffusionConfig,
    LatentDiffusionTeacher,
    ResidualShiftTeacher,
    SeeSRTeacher,
    SeeSRTeacherConfig,
    Teacher,
)
from onestepsr.models.backbones import load_backbone
from onestepsr.models.loading import load_residual_generator
from onestepsr.models.seesr.networks import SeeSRCondition
from onestepsr.prompts.ram import tagger_pixels
from small import added_noise

pytestmark = pytest.mark.numeric

TINY = "random:d3sr-tiny"


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_diffusion(start: int | None = 399, steps: int | None = 4) -> LatentDiffusionTeacher:
    return LatentDiffusionTeacher(TINY, steps, LatentDiffusionConfig(start=start))


@pytest.fixture
def seesr(monkeypatch: pytest.MonkeyPatch) -> SeeSRTeacher:
    """SeeSR whose RAM has 3 x 3 places beside their mean."""
    return seesr_of(monkeypatch)


def seesr_of(monkeypatch: pytest.MonkeyPatch, *, tokens: int = 10, **settings: Any) -> SeeSRTeacher:
    generator = small_seesr(replace(CONFIG, image_tokens=tokens))
    monkeypatch.setattr(teachers, "load_network", lambda name: generator)
    return SeeSRTeacher("seesr", SeeSRTeacherConfig(**{"tagger": "random", **settings}))


def parts(teacher: Teacher) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents z_0 and z_y, to differentiate by, noise and steps."""
    shape = (2, teacher.generator.latent_channels, 4, 4)
    z_0, z_y = (noise(seed, *shape).requires_grad_() for seed in (0, 1))
    return z_0, z_y, noise(2, *shape), torch.tensor([1, 3])


def check(found: Tensor, expected: Tensor, *by: Tensor) -> None:
    """Compare values and derivatives."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(value.square().sum(), by, retain_graph=True) for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_residual_shifting_by_hand() -> None:
    """kappa is 2 and sqrt(eta_t) 0.1 * 9.9^((t / 3)^0.3); the network triples what it sees."""
    teacher = ResidualShiftTeacher(MICRO, None)
    z_0, z_y, drawn, t = parts(teacher)
    root = (0.1 * 9.9 ** ((t / 3) ** 0.3)).reshape(2, 1, 1, 1)
    z_t = z_0 + root**2 * (z_y - z_0) + 2 * root * drawn
    check(teacher.noised(z_0, z_y, drawn, t), z_t, z_0, z_y)
    check(teacher.start(z_y, drawn), z_y + 1.98 * drawn, z_y)
    scaled = z_0 / (1 + 4 * root**2).sqrt()
    check(teacher.scale_input(z_0, t), scaled, z_0)
    for evaluated in (teacher.evaluate, teacher.estimate):
        check(evaluated(lambda x, t, lq: 3 * x, z_0, t, z_y), 3 * scaled, z_0)
    torch.testing.assert_close(teacher.score_weight(t), ((1 - root**2) / (2 * root)).flatten())


@pytest.mark.parametrize("kind", ["latent diffusion", "SeeSR"])
def test_diffusion_by_hand(kind: str, seesr: SeeSRTeacher) -> None:
    """The noise that the network predicts is 0.3 times its input, for SeeSR plus its condition."""
    teacher: Teacher = latent_diffusion(start=None) if kind == "latent diffusion" else seesr
    assert (teacher.steps, teacher.largest_score_step) == (1000, 199)
    z_0, z_y, drawn, t = parts(teacher)
    table = seesr.schedule.alpha_bar
    last, alpha_bar = table[999], table[t].reshape(2, 1, 1, 1)
    check(teacher.start(z_y, drawn), last.sqrt() * z_y + (1 - last).sqrt() * drawn, z_y)
    check(teacher.noised(z_0, z_y, drawn, t), alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * drawn, z_0)
    assert teacher.scale_input(z_0, t) is z_0
    y = 0.0 if kind == "latent diffusion" else 0.25

    def network(z_t: Tensor, told: Tensor, *condition: float) -> Tensor:
        assert torch.equal(told, t)
        return 0.3 * z_t + sum(condition)

    eps = 0.3 * z_0 + y
    check(teacher.evaluate(network, z_0, t, y), eps, z_0)
    estimate = (z_0 - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    check(teacher.estimate(network, z_0, t, y), estimate, z_0)
    torch.testing.assert_close(teacher.score_weight(t), (table[t] / (1 - table[t])).sqrt())


@pytest.mark.parametrize(("steps", "largest"), [(2, 1), (3, 2), (4, 2)])
def test_residual_shifting_distils_scores_at_its_first_steps(
    steps: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load_residual_generator(MICRO)
    generator.configure(replace(generator.config, schedule=replace(generator.config.schedule, steps=steps)))
    monkeypatch.setattr(teachers, "load_residual_generator", lambda name: generator)
    assert ResidualShiftTeacher("micro", None).largest_score_step == largest


def test_plain_teachers_start_from_the_lr_latent_without_the_published_codes_ways() -> None:
    residual, diffusion = ResidualShiftTeacher(MICRO, None), latent_diffusion()
    for teacher in (residual, diffusion):
        assert not teacher.starts_from_hr
        assert not teacher.features.official  # type: ignore[union-attr]
    assert residual.schedule.sqrt_eta[0].item() == pytest.approx(0.1), "not capped"


def test_a_backbone_is_one_to_train_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a checkpoint cannot say what it predicts, one that predicts velocity is refused then."""

    def load(name: str, *, for_training: bool, **settings: Any) -> Any:
        assert for_training
        return load_backbone(name, **settings)

    monkeypatch.setattr(teachers, "load_backbone", load)
    assert latent_diffusion().steps == 400


def test_student_of_residual_shifting_takes_the_last_step_alone() -> None:
    teacher = ResidualShiftTeacher(MICRO, None)
    student = teacher.student()
    generator = teacher.student_generator(student)
    assert generator.unet is student
    assert generator.autoencoder is teacher.generator.autoencoder
    assert (generator.schedule.kept, generator.sampler) == ([3], "deterministic")


def test_sampling_builds_no_graph() -> None:
    factor = torch.tensor(0.3, requires_grad=True)
    for teacher in (ResidualShiftTeacher(MICRO, None), latent_diffusion()):
        z = noise(0, 1, teacher.generator.latent_channels, 4, 4)
        assert not teacher.sample(lambda z_t, t, *condition: factor * z_t, z, z, z).requires_grad


def test_ddim_takes_fifty_steps_where_none_are_asked_for() -> None:
    teacher, told = latent_diffusion(start=999, steps=None), list[int]()

    def network(z_t: Tensor, t: Tensor) -> Tensor:
        told.append(int(t[0]))
        return z_t

    z = noise(0, 1, 20, 1, 1)
    teacher.sample(network, z, z, z)
    assert (len(told), told[0], told[-1]) == (50, 999, 0)


def test_seesr_looks_at_clamped_images_and_leaves_texts_out_below_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = torch.tensor(3.0, requires_grad=True)
    sharp = torch.randint(0, 2, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()

    class Drawn(SampleRandom):
        def uniform(self) -> Tensor:
            return torch.tensor([0.5, 0.4375])

    for judge in ("hr", "lr"):
        teacher = seesr_of(monkeypatch, judge=judge)
        hr, text = torch.rand(2, 3, 16, 16), noise(1, 2, 5, 16)
        batch = {"lr": sharp, "hr": hr, "prompt": text}
        teacher.look({RAM: lambda pixels: factor * pixels}, batch, Drawn(samples=range(2)))
        enlarged = teacher.generator.enlarge(sharp)
        assert enlarged.min() < 0
        assert enlarged.max() > 1
        tokens = {LR_TOKENS: enlarged.clamp(0, 1)} | ({HR_TOKENS: hr} if judge == "hr" else {})
        assert batch.keys() - {"lr", "hr", "prompt", TEXT} == tokens.keys()
        for name, image in tokens.items():
            torch.testing.assert_close(batch[name], 3 * tagger_pixels(image, side=24))
            assert not batch[name].requires_grad
        assert torch.equal(batch[TEXT], torch.stack([text[0], teacher.generator.prompt[0]]))
        of_lr = SeeSRCondition(enlarged.clamp(0, 1), batch[TEXT], batch[LR_TOKENS])
        of_hr = SeeSRCondition(hr, batch[TEXT], batch[HR_TOKENS]) if judge == "hr" else of_lr
        for judging, expected in ((False, of_lr), (True, of_hr)):
            for found, wanted in zip(teacher.sees(batch, judging=judging), expected, strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize(("tokens", "side", "parameters"), [(2, 8, 6447), (10, 24, 6495)])
def test_untrained_stand_in_for_ram_is_small_and_gives_as_many_tokens_as_seesr_reads(
    tokens: int, side: int, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean and a square of places, of 8 pixels each."""
    teacher = seesr_of(monkeypatch, tokens=tokens)
    ram = teacher.frozen[RAM]
    assert ram(torch.rand(2, 3, side, side)).shape == (2, tokens, 12)
    assert teacher.side == side
    assert sum(p.numel() for p in ram.parameters()) == parameters
    assert not any(p.requires_grad for p in ram.parameters())


def test_ram_is_looked_for_in_the_named_folder_or_in_the_usual_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path))
    for tagger, folder in (("nowhere", "nowhere"), ("dape", str(tmp_path / "dape"))):
        with pytest.raises(UserError, match=rf"DAPE: {folder} must hold"):
            seesr_of(monkeypatch, tagger=tagger)


def test_residual_shifting_shows_scaled_latents_and_the_lr_image() -> None:
    teacher = ResidualShiftTeacher(MICRO, None)
    z_t, t, lr = noise(0, 2, 3, 16, 16), torch.tensor([0, 3]), torch.rand(2, 3, 16, 16)
    seen: list[Tensor] = []

    def spy(*arguments: Tensor) -> Tensor:
        seen.extend(arguments)
        return arguments[0]

    teacher.estimate(spy, z_t, t, lr)
    scale = (1 + 4 * teacher.schedule.eta[t]).sqrt().float().reshape(2, 1, 1, 1)
    torch.testing.assert_close(seen[0], z_t / scale)
    assert torch.equal(seen[1], t)
    assert torch.equal(seen[2], lr * 2 - 1)
    assert teacher.steps == 4


def test_residual_shifting_starts_without_the_real_latent_and_samples_with_as_many_steps_as_asked() -> None:
    z_y, drawn, lr = noise(0, 1, 3, 16, 16), noise(1, 1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    for steps in (1, 3, None):
        teacher = ResidualShiftTeacher(MICRO, steps)
        z_T = teacher.start(z_y, drawn)
        torch.testing.assert_close(z_T, z_y + 2 * 0.99 * drawn)
        told: list[int] = []

        def network(x: Tensor, t: Tensor, lq: Tensor, told: list[int] = told) -> Tensor:
            told.append(int(t))
            return torch.zeros_like(x)

        assert torch.equal(teacher.sample(network, z_T, z_y, lr), torch.zeros_like(z_T))
        assert len(told) == (steps or 4)
        assert told[0] == 3, "the last step of the schedule, whatever their number"


def test_two_steps_of_residual_shifting_are_the_papers() -> None:
    """Eq. 3 with an estimate of 0: z_0 = m z_T + j z_y, where sqrt(eta) is 0.99 at first and 0.1 then."""
    teacher, seen = ResidualShiftTeacher(MICRO, 2), list[Tensor]()

    def network(x: Tensor, t: Tensor, lq: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    z_T, z_y = noise(0, 1, 3, 16, 16), noise(1, 1, 3, 16, 16)
    teacher.sample(network, z_T, z_y, torch.rand(1, 3, 16, 16))
    torch.testing.assert_close(seen[0], z_T / (1 + 4 * 0.99**2) ** 0.5)
    z = 0.1 / 0.99 * z_T + (0.1**2 - 0.1 * 0.99) * z_y
    torch.testing.assert_close(seen[1], z / (1 + 4 * 0.1**2) ** 0.5)


def test_ddim_of_a_network_that_knows_the_answer_gives_the_answer() -> None:
    """If the predicted noise always points to one z_0, every deterministic path ends there."""
    teacher = latent_diffusion(start=None, steps=7)
    answer, z_y = noise(0, 2, 20, 4, 4), noise(1, 2, 20, 4, 4)
    told: list[int] = []

    def network(z_t: Tensor, t: Tensor) -> Tensor:
        told.append(int(t[0]))
        return added_noise(teacher.schedule, z_t, answer, t)

    z_T = teacher.start(z_y, noise(2, 2, 20, 4, 4))
    torch.testing.assert_close(teacher.sample(network, z_T, z_y, z_y), answer, rtol=1e-3, atol=1e-3)
    assert (told[0], told[-1], len(told)) == (999, 0, 7)
    assert told == sorted(told, reverse=True)
    t = torch.tensor([300, 900])
    z_t = teacher.noised(answer, z_y, noise(3, 2, 20, 4, 4), t)
    torch.testing.assert_close(teacher.estimate(network, z_t, t, z_y), answer, rtol=1e-3, atol=1e-3)


def test_ddim_step_is_the_papers() -> None:
    """Two steps by hand: z_s = sqrt(alpha_bar_s) z_0 + sqrt(1 - alpha_bar_s) eps."""
    teacher = latent_diffusion(start=399, steps=2)
    alpha_bar = teacher.schedule.alpha_bar
    z_T = noise(0, 1, 20, 4, 4)
    eps = 0.3 * z_T
    z_0 = (z_T - (1 - alpha_bar[399]).sqrt() * eps) / alpha_bar[399].sqrt()
    z_s = alpha_bar[0].sqrt() * z_0 + (1 - alpha_bar[0]).sqrt() * eps
    expected = (z_s - (1 - alpha_bar[0]).sqrt() * 0.3 * z_s) / alpha_bar[0].sqrt()
    torch.testing.assert_close(teacher.sample(lambda z, t: 0.3 * z, z_T, z_T, z_T), expected)


def test_latent_diffusion_starts_from_the_noised_lr_latent() -> None:
    teacher = latent_diffusion(start=399)
    assert teacher.steps == 400
    z_y, drawn = noise(0, 1, 20, 4, 4), noise(1, 1, 20, 4, 4)
    alpha_bar = teacher.schedule.alpha_bar[399]
    torch.testing.assert_close(teacher.start(z_y, drawn), alpha_bar.sqrt() * z_y + (1 - alpha_bar).sqrt() * drawn)
    assert latent_diffusion(start=None).steps == 1000
    student = teacher.student()
    generator = teacher.student_generator(student)
    assert (generator.timestep, generator.config.noised) == (399, True)
    assert generator.unet is student.unet
    assert generator.autoencoder is teacher.generator.autoencoder
    assert torch.equal(generator.prompt, student.prompt)


def test_students_are_copies() -> None:
    for teacher in (ResidualShiftTeacher(MICRO, None), latent_diffusion()):
        teacher.network.requires_grad_(False)
        student = teacher.student()
        for (name, own), (_, taught) in zip(
            student.named_parameters(), teacher.network.named_parameters(), strict=True
        ):
            assert torch.equal(own, taught), name
            assert own.data_ptr() != taught.data_ptr(), name
            assert own.requires_grad, name


@pytest.mark.parametrize(("start", "steps"), [(0, 4), (1000, 4), (20, 50), (399, 401)])
def test_starts_and_steps_that_a_backbone_does_not_have(start: int, steps: int) -> None:
    with pytest.raises(UserError, match=r"has steps from 1 to 999|this schedule has"):
        latent_diffusion(start, steps)


def test_teachers_of_the_other_kind_are_refused() -> None:
    with pytest.raises(UserError, match="expected a model of the ResShift family"):
        ResidualShiftTeacher(TINY, None)
    with pytest.raises(UserError, match="is no latent-diffusion backbone"):
        LatentDiffusionTeacher(MICRO, None, LatentDiffusionConfig())
    with pytest.raises(UserError, match=r"config\.teacher_steps: 9 steps: this schedule has 4"):
        ResidualShiftTeacher(MICRO, 9)

"""TAD-SR as the trainer sees it: Algorithm 1's order, what each phase touches, the switches of Table V."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from residual_pairs import MICRO, evaluations_of, filled, networks_of, pair, saved, with_gradient
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.diffusion.residual_shift import ResidualShiftSchedule
from onestepsr.methods import tadsr as method_module
from onestepsr.methods.base import Method, SampleRandom
from onestepsr.methods.tadsr import (
    LatentDiffusionConfig,
    ScoreConfig,
    StepRange,
    TADSRConfig,
    TimeAwareConfig,
    build,
    step_range,
)
from onestepsr.models import loading
from onestepsr.models.discriminators import HeadConfig, OfficialHeadConfig
from onestepsr.models.lora import LoraConfig
from onestepsr.train.ablation import load_suite, plan_runs
from onestepsr.train.recipes import load_run

TINY = "random:d3sr-tiny"
HEAD = HeadConfig(width=4, norm_groups=4)
OFFICIAL = OfficialHeadConfig(logit_maps=2, norm_groups=4)
ARCHITECTURES = ("official", "paper")
LORA = LoraConfig(rank=2, alpha=2.0)


def method_of(
    teacher: str = MICRO, *, score: dict[str, Any] | None = None, judge: dict[str, Any] | None = None, **settings: Any
) -> Method:
    torch.manual_seed(0)
    judge = {"architecture": "paper", "noise": "start", "head": HEAD, "official": OFFICIAL, **(judge or {})}
    parts = {"score": ScoreConfig(**(score or {})), "discriminator": TimeAwareConfig(**judge)}
    return build(TADSRConfig(teacher=teacher, **parts, **settings))


Terms = dict[str, dict[str, Tensor]]


def run(method: Method, batch: dict[str, Tensor], networks: dict[str, Any] | None = None) -> Terms:
    """Terms of every phase in turn, each with gradients for its own network alone, as the loop does it."""
    found = {}
    for index, phase in enumerate(method.phases):
        for name, network in method.networks.items():
            network.requires_grad_(name == phase.network)
        random = SampleRandom("test", index, samples=range(len(batch["lr"])))
        found[phase.network] = phase.loss(networks or networks_of(method), batch, random)
        sum(found[phase.network].values()).backward()
        for name, tensor in batch.items():
            batch[name] = tensor.detach()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_discriminator_first_then_student(architecture: str) -> None:
    method = method_of(judge={"architecture": architecture})
    assert [phase.network for phase in method.phases] == ["discriminator", "student"]
    terms = run(filled(method), pair())
    assert {network: list(found) for network, found in terms.items()} == {
        "discriminator": ["hinge"],
        "student": ["distillation", "hsd", "adversarial"],
    }
    assert all(torch.isfinite(value) for found in terms.values() for value in found.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_phase_trains_its_own_network_and_nothing_frozen(architecture: str) -> None:
    method, batch = filled(method_of(judge={"architecture": architecture})), pair()
    frozen = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in method.frozen.items()}
    assert set(frozen) == {"autoencoder", "teacher", "features"}
    discriminator, student = method.phases
    for network in method.networks.values():
        network.requires_grad_(False)
    method.networks["discriminator"].requires_grad_(True)
    sum(discriminator.loss(networks_of(method), batch, SampleRandom(0, samples=range(2))).values()).backward()
    judge = method.networks["discriminator"]
    assert with_gradient(judge) == {name for name, _ in judge.named_parameters()}
    assert not with_gradient(method.networks["student"])
    judge.zero_grad()
    judge.requires_grad_(False)
    method.networks["student"].requires_grad_(True)
    sum(student.loss(networks_of(method), batch, SampleRandom(1, samples=range(2))).values()).backward()
    assert not with_gradient(judge)
    learns = with_gradient(method.networks["student"])
    assert len(learns) > 0.9 * len(list(method.networks["student"].named_parameters()))
    for name, network in method.frozen.items():
        assert not with_gradient(network), name
        assert all(torch.equal(value, frozen[name][key]) for key, value in network.state_dict().items())


def test_adversarial_term_reaches_the_student_through_the_teachers_features() -> None:
    method, batch = filled(method_of(score={"kind": "none"})), pair()
    run(method, batch)
    student = method.networks["student"]
    student.zero_grad()
    terms = method.phases[1].loss(networks_of(method), batch, SampleRandom("again", samples=range(2)))
    terms["adversarial"].backward()
    assert with_gradient(student)


@pytest.mark.parametrize("score", ["hsd", "sds"])
def test_every_term_teaches_the_student_by_itself(score: str) -> None:
    method, batch = filled(method_of(score={"kind": score})), pair()
    student = method.networks["student"]
    with torch.no_grad():
        student.out[2].weight.mul_(1.5)  # a student that has moved away from its teacher
    _, phase = method.phases
    run(method, batch)
    terms = phase.loss(networks_of(method), batch, SampleRandom("again", samples=range(2)))
    assert list(terms) == ["distillation", score, "adversarial"]
    for name, term in terms.items():
        student.zero_grad()
        term.backward(retain_graph=True)
        assert "out.2.weight" in with_gradient(student), name


def test_discriminators_phase_asks_no_gradient_of_the_student() -> None:
    """Though its parameters would take one here."""
    method, batch = filled(method_of()), pair()
    phase, _ = method.phases
    phase.loss(networks_of(method), batch, SampleRandom("test", samples=range(2)))["hinge"].backward()
    assert with_gradient(method.networks["discriminator"])
    assert all(p.requires_grad and p.grad is None for p in method.networks["student"].parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("count", [1, 3])
def test_discriminator_judges_as_many_real_as_restored_latents(architecture: str, count: int) -> None:
    method = filled(method_of(judge={"architecture": architecture}))
    batch = {name: image[:1].repeat(count, 1, 1, 1) for name, image in pair().items()}
    networks, seen = spied(method)
    terms = run(method, batch, networks)
    assert [len(found[0]) for found in seen["features"]] == [2 * count, count]
    judged = [len(found[0]) for found in seen["discriminator"]]
    assert judged == ([count, count, count] if architecture == "official" else [2 * count, count])
    assert torch.isfinite(terms["discriminator"]["hinge"])


def test_gradient_checkpointing_changes_no_number_of_student_and_features() -> None:
    """The teacher's encoder passes the gradient of the adversarial term on to the student."""
    found, evaluated = [], []
    for again in (False, True):
        method = filled(method_of(gradient_checkpointing=again))
        counts = [evaluations_of(network) for network in (method.networks["student"], method.frozen["teacher"])]
        terms = run(method, pair())["student"]
        gradients = {name: p.grad for name, p in method.networks["student"].named_parameters() if p.grad is not None}
        found.append({name: term.detach() for name, term in terms.items()} | gradients)
        evaluated.append([len(count) for count in counts])
    assert evaluated == [[2, 4 + 2 + 2], [2 + 1, 4 + 2 + 2 + 1]]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name, rtol=1e-4, atol=1e-6)


def spied(method: Method) -> tuple[dict[str, Any], dict[str, list[tuple[Tensor, ...]]]]:
    """Networks that note what they are shown."""
    seen: dict[str, list[tuple[Tensor, ...]]] = {}

    def spy(name: str, network: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Tensor, **options: Any) -> Any:
            seen.setdefault(name, []).append(tuple(argument.detach().clone() for argument in arguments))
            return network(*arguments, **options)

        return call

    return {name: spy(name, network) for name, network in networks_of(method).items()}, seen


def test_both_phases_see_the_same_draws() -> None:
    method = filled(method_of())
    networks, seen = spied(method)
    run(method, pair(), networks)
    first, second = seen["student"]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other), "z_T, step and LR image of both evaluations of the student"
    assert torch.equal(seen["teacher"][0][0], first[0]), "the teacher starts where the student does"
    assert len(seen["autoencoder"]) == 1, "latents are made once"
    assert len(seen["teacher"]) == 4 + 2, "all steps once, and two scores"
    judged, again = seen["features"]
    torch.testing.assert_close(judged[0][2:], again[0], msg="the same noised latents of the student")
    assert torch.equal(judged[1], torch.cat([again[1]] * 2)), "real and fake at one step"
    assert len(seen["discriminator"]) == 2


def test_real_and_fake_are_noised_with_the_noise_of_the_start() -> None:
    method, batch = filled(method_of()), pair()
    networks, seen = spied(method)
    run(method, batch, networks)
    process = ResidualShiftSchedule(loading.load_generator(MICRO).schedule.config)
    torch.testing.assert_close(batch["z_T"], process.prior(batch["z_y"], batch["noise"]))
    real = process.scale_input(process.q_sample(batch["z_hr"], batch["z_y"], batch["noise"], batch["t"]), batch["t"])
    torch.testing.assert_close(seen["features"][0][0][:2], real)


def test_nothing_is_left_to_learn_from_a_teacher_of_one_step() -> None:
    """The student starts as its copy: distillation and HSD vanish, and SDS does not."""
    for kind, vanishes in (("hsd", True), ("sds", False)):
        method = filled(method_of(teacher_steps=1, score={"kind": kind}, judge={"kind": "none"}))
        terms = run(method, pair())["student"]
        assert terms["distillation"].item() < 1e-9, "up to the last bits, in which training and inference differ"
        assert (terms[kind].item() < 1e-9) == vanishes


@pytest.mark.parametrize("score", ["hsd", "sds", "none"])
@pytest.mark.parametrize("judge", ["time_aware", "plain", "none"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_switches_of_table_five(score: str, judge: str, architecture: str) -> None:
    method = filled(method_of(score={"kind": score}, judge={"kind": judge, "architecture": architecture}))
    terms = run(method, pair())
    expected = ["distillation", *([score] if score != "none" else []), *(["adversarial"] if judge != "none" else [])]
    assert list(terms["student"]) == expected
    assert set(method.networks) == ({"student"} if judge == "none" else {"student", "discriminator"})
    assert set(method.frozen) == {"autoencoder", "teacher"} | (set() if judge == "none" else {"features"})
    if judge != "none":
        names = method.networks["discriminator"].state_dict()
        modulated = any("modulation" in name or "emb_layers" in name for name in names)
        assert modulated == (judge == "time_aware")


def test_weights_multiply_their_terms() -> None:
    once, more = (
        run(filled(method_of(score_weight=weight, adversarial_weight=0.02 * weight)), pair())["student"]
        for weight in (1.0, 3.0)
    )
    assert more["hsd"].item() == pytest.approx(3 * once["hsd"].item())
    assert more["adversarial"].item() == pytest.approx(3 * once["adversarial"].item(), rel=1e-5)
    assert more["distillation"].item() == once["distillation"].item()
    thrice = run(filled(method_of(distillation_weight=3.0)), pair())["student"]
    assert thrice["distillation"].item() == pytest.approx(3 * once["distillation"].item())


def test_defaults_are_the_published_ones_for_photographs() -> None:
    config = TADSRConfig(teacher=MICRO)
    assert (config.distillation_weight, config.score_weight, config.adversarial_weight) == (1.0, 1.0, 0.02)
    assert (config.published_slips, config.gradient_checkpointing) == (False, False)
    assert (config.score.t_min, config.score.t_max, config.score.stride) == (0, None, 1)
    method = method_of()
    assert (method.scale, method.hr_multiple) == (4, 64), "latents of 16 x 16 positions, 4 pixels each"
    assert method.embedder is None


def test_checkpoints_hold_no_teacher() -> None:
    method = method_of(judge={"scales": (0,)})
    names = method.networks["discriminator"].state_dict()
    assert all(name.startswith("heads.0.") for name in names)
    teacher = {tensor.data_ptr() for tensor in method.frozen["teacher"].state_dict().values()}
    trained = {tensor.data_ptr() for net in method.networks.values() for tensor in net.state_dict().values()}
    assert not teacher & trained
    features = {tensor.data_ptr() for tensor in method.frozen["features"].state_dict().values()}
    assert features <= teacher, "the features are the teacher's own weights"


def test_steps_are_the_papers_unless_given() -> None:
    assert step_range(ScoreConfig(), 2, 14, "score") == range(3), "1 to 3 in the paper's counting"
    assert step_range(TimeAwareConfig(), 14, 14, "discriminator") == range(15)
    assert step_range(StepRange(t_min=2, t_max=5), 2, 14, "score") == range(2, 6)
    assert step_range(StepRange(t_min=4), 2, 14, "score") == range(4, 5)
    assert list(step_range(StepRange(t_min=20, t_max=60, stride=20), 2, 999, "score")) == [20, 40, 60]
    with pytest.raises(UserError, match=r"config\.score\.t_max: 15, but the steps of this teacher run from 0 to 14"):
        step_range(StepRange(t_max=15), 2, 14, "score")
    with pytest.raises(UserError, match=r"config\.score\.t_min: 20"):
        step_range(StepRange(t_min=20), 2, 14, "score")


def test_largest_steps_follow_the_teacher() -> None:
    found = {
        name: method_module.load_teacher(TADSRConfig(teacher=name)).largest_score_step
        for name in (MICRO, "random:resshift-tiny")
    }
    assert set(found.values()) == {2}, "three steps of 4 and of 15 alike"
    own = TADSRConfig(teacher=TINY, family="latent_diffusion", latent_diffusion=LatentDiffusionConfig(start=399))
    assert method_module.load_teacher(own).largest_score_step == 79, "before T/5"


def test_default_steps_of_a_teacher_with_fifteen() -> None:
    method = method_of("random:resshift-tiny", teacher_steps=1)
    networks, seen = spied(method)
    batch = {name: image[:1].repeat(60, 1, 1, 1) for name, image in pair(4).items()}
    run(method, batch, networks)
    assert set(seen["teacher"][-1][1].tolist()) == {0, 1, 2}, "score distillation"
    judged = set(batch["t"].tolist())
    assert {min(judged), max(judged)} == {0, 13}, "discriminator: all but the last"


def test_a_diffusion_of_two_steps_is_judged_at_the_first() -> None:
    """The last step alone is left out, and the first would be the only one where the next is the last."""
    own = {"family": "latent_diffusion", "latent_diffusion": LatentDiffusionConfig(start=1), "teacher_steps": 1}
    method = method_of(TINY, score={"kind": "none"}, **own)
    batch = {name: image[:1].repeat(20, 1, 1, 1) for name, image in pair(4).items()}
    run(method, batch)
    assert set(batch["t"].tolist()) == {0}


@pytest.mark.parametrize("part", ["score", "judge"])
def test_all_steps_of_the_teacher_may_be_drawn_and_no_others(part: str) -> None:
    last: dict[str, Any] = {part: {"t_min": 3, "t_max": 3}}
    networks, seen = spied(method := filled(method_of(**last)))
    run(method, pair(), networks)
    assert seen["teacher" if part == "score" else "features"][-1][1].tolist() == [3, 3]
    name = {"score": "score", "judge": "discriminator"}[part]
    beyond: dict[str, Any] = {part: {"t_max": 4}}
    with pytest.raises(UserError, match=rf"config\.{name}\.t_max: 4, but the steps of this teacher run from 0 to 3"):
        method_of(**beyond)


def test_score_distillation_uses_steps_of_its_range() -> None:
    method = filled(method_of(score={"t_min": 1, "t_max": 2}, judge={"kind": "none"}))
    networks, seen = spied(method)
    run(method, pair(), networks)
    *_, of_teacher, of_student = seen["teacher"]
    assert torch.equal(of_teacher[1], of_student[1])
    assert set(of_teacher[1].tolist()) <= {1, 2}


def test_fresh_noise_is_shared_by_both_phases_and_is_not_that_of_the_start() -> None:
    method, batch = filled(method_of(judge={"architecture": "official", "noise": "fresh"})), pair()
    networks, seen = spied(method)
    run(method, batch, networks)
    assert not torch.allclose(batch["judged_noise"], batch["noise"])
    judged, again = seen["features"]
    torch.testing.assert_close(judged[0][2:], again[0], msg="the same noised latents of the student")
    assert len(seen["discriminator"]) == 3, "real, fake, and the student's: a power iteration each"


def test_published_slips_change_noise_and_the_first_step() -> None:
    found = {}
    for slips in (False, True):
        method = filled(method_of(judge={"architecture": "official", "noise": "fresh"}, published_slips=slips))
        batch = pair()
        run(method, batch)
        found[slips] = batch["judged_noise"]
    clean, published = found[False], found[True]
    assert clean.min() < -1
    assert 0 <= published.min() < published.max() < 1, "uniform"
    generator = loading.load_generator(MICRO)
    teacher = method_module.load_teacher(TADSRConfig(teacher=MICRO, published_slips=True))
    assert teacher.schedule.sqrt_eta[0] == pytest.approx(0.001**0.5)
    assert generator.schedule.sqrt_eta[0] == pytest.approx(0.1)
    assert teacher.schedule.sqrt_eta[-1] == pytest.approx(float(generator.schedule.sqrt_eta[-1])), (
        "where inference starts"
    )
    untouched = method_module.load_teacher(TADSRConfig(teacher="random:resshift-tiny", published_slips=True))
    assert untouched.schedule.sqrt_eta[0] == pytest.approx(0.02), "15 steps start below the cap"
    with pytest.raises(ValueError, match="published_slips: the published code for Stable Diffusion has none"):
        TADSRConfig(teacher=TINY, family="latent_diffusion", published_slips=True)


@pytest.mark.parametrize("slips", [False, True])
def test_published_slips_scale_what_score_distillation_shows_the_teacher_twice(slips: bool) -> None:
    """A student's result of 0 at the last step, where sqrt(eta) is 0.99: z_t = 0.99^2 z_y + 2 * 0.99 noise."""
    score = {"kind": "sds", "t_min": 3, "t_max": 3}
    method, batch = method_of(score=score, judge={"kind": "none"}, published_slips=slips), pair()
    networks, seen = spied(method)
    networks["student"] = lambda x, t, lq: torch.zeros_like(x)
    (phase,) = method.phases
    phase.loss(networks, batch, SampleRandom("test", samples=range(2)))
    random, z_y = SampleRandom("test", samples=range(2)), batch["z_y"]
    random.normal(z_y)
    random.integers(0, 1)
    z_t = 0.99**2 * z_y + 2 * 0.99 * (random.uniform_noise(z_y) if slips else random.normal(z_y))
    deviation = (1 + 4 * 0.99**2) ** 0.5
    torch.testing.assert_close(seen["teacher"][-1][0], z_t / deviation ** (2 if slips else 1))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_student_of_latent_diffusion(tuning: str, tmp_path: Path) -> None:
    own = {"family": "latent_diffusion", "latent_diffusion": LatentDiffusionConfig(start=399), "teacher_steps": 3}
    method = method_of(TINY, tuning=tuning, lora=LORA, **own)
    trained = {name for name, p in method.networks["student"].named_parameters() if p.requires_grad}
    assert all("lora" in name or name == "prompt" for name in trained) == (tuning == "lora")
    for network in (method.networks["student"], method.frozen["teacher"]):
        torch.manual_seed(0)
        torch.nn.init.normal_(network.unet.conv_out.weight, std=0.1)  # it starts at zero
    terms = run(method, pair(8))
    assert list(terms["student"]) == ["distillation", "hsd", "adversarial"]
    assert with_gradient(method.networks["student"])
    exported = loading.load_generator(saved(method, tmp_path / "model.safetensors"))
    lr = pair(8)["lr"]
    with torch.no_grad():
        shown = method.preview(networks_of(method), {"lr": lr, "hr": pair(8)["hr"]})["SR"]
        torch.testing.assert_close(exported(lr).clamp(0, 1), shown, rtol=1e-3, atol=1e-3)


def test_exported_student_takes_one_step(tmp_path: Path) -> None:
    method = filled(method_of())
    generator = loading.load_generator(saved(method, tmp_path / "model.safetensors"))
    assert (generator.schedule.steps, generator.schedule.kept) == (1, [3])
    batch = pair()
    with torch.no_grad():
        columns = method.preview(networks_of(method), batch)
        torch.testing.assert_close(generator(batch["lr"]).clamp(0, 1), columns["SR"], rtol=1e-3, atol=1e-3)
    assert list(columns) == ["LR (bicubic)", "SR", "teacher", "HR"]
    assert not torch.allclose(columns["SR"], columns["teacher"], atol=1e-3)


def test_preview_shows_what_all_deterministic_steps_of_the_teacher_make_of_the_same_noise() -> None:
    method, batch = filled(method_of()), pair()
    generator = loading.load_residual_generator(MICRO)
    generator.unet.load_state_dict(method.frozen["teacher"].state_dict())
    generator.autoencoder.load_state_dict(method.frozen["autoencoder"].get_submodule("autoencoder").state_dict())
    generator.configure(replace(generator.config, steps=None, sampler="deterministic"))
    assert method.preview is not None
    with torch.no_grad():
        columns = method.preview(networks_of(method), batch)
        made, enlarged = generator(batch["lr"]), generator.enlarge(batch["lr"])
    assert made.min() < -0.1, "there is something to clamp"
    assert made.max() > 1.1
    torch.testing.assert_close(columns["teacher"], made.clamp(0, 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(columns["LR (bicubic)"], enlarged.clamp(0, 1))
    assert torch.equal(columns["HR"], batch["hr"])


def test_recipes_have_the_papers_weights_and_steps() -> None:
    photographs, faces = (load_run("tadsr", name).config for name in ("tadsr-realsr", "tadsr-face"))
    assert (photographs.score_weight, photographs.adversarial_weight) == (1.0, 0.02)
    assert (faces.score_weight, faces.adversarial_weight) == (0.1, 0.2)
    assert (photographs.score.kind, photographs.score.t_min, photographs.score.t_max) == ("hsd", 0, 2)
    for recipe, batch, last in (("tadsr-realsr", 8, 13), ("tadsr-face", 7, 2)):
        run_config = load_run("tadsr", recipe)
        config, train = run_config.config, run_config.train
        judge, student = config.discriminator, train.optimizer
        assert (judge.architecture, judge.noise, judge.t_min, judge.t_max) == ("official", "fresh", 0, last)
        assert (config.score.t_min, config.score.t_max, config.published_slips) == (0, 2, False)
        assert (train.steps, train.batch_size, train.accumulation, train.gradient_clip) == (30_000, batch, 1, None)
        assert (train.ema_decay, train.ema_warmup, train.schedule.warmup_steps) == (0.999, False, 5000)
        assert train.optimizers["discriminator"] == replace(student, warmup_steps=0)
        assert (student.lr, student.betas, student.eps, student.weight_decay) == (5e-5, (0.9, 0.999), 1e-8, 0.0)
        assert run_config.data.degradation == ("resshift" if batch == 8 else "face_resshift")
    assert load_run("tadsr", "tadsr-face").data.scale == 1
    assert load_run("tadsr", "tadsr-sd21").config.teacher_steps == 50


def test_the_suite_holds_table_five_and_its_neighbours() -> None:
    suite = load_suite("tadsr-tiny", ["data.paths=[photos]", "validation=[others]"])
    runs = {run.variant: run.config for run in plan_runs(suite, suite.chosen(), [0], Path("out"))}
    found = {
        name: (c.config.score.kind, c.config.discriminator.kind) for name, c in runs.items() if c.method == "tadsr"
    }
    assert found == {
        "distillation": ("none", "none"),
        "sds_gan": ("sds", "plain"),
        "sds_time_aware": ("sds", "time_aware"),
        "hsd_gan": ("hsd", "plain"),
        "hsd_time_aware": ("hsd", "time_aware"),
        "sds_gan_published": ("sds", "plain"),
        "sds_time_aware_published": ("sds", "time_aware"),
        "hsd_gan_published": ("hsd", "plain"),
        "hsd_time_aware_published": ("hsd", "time_aware"),
    }
    for name, run in runs.items():
        judge = run.config.discriminator if run.method == "tadsr" else None
        if judge is not None and judge.kind != "none":
            found_settings = (judge.architecture, judge.noise, judge.t_max)
            published = name.endswith("_published")
            assert found_settings == (("official", "fresh", 13) if published else ("paper", "start", 14)), name
    assert runs["sinsr"].method == "sinsr"
    assert len({config.config.teacher for config in runs.values()}) == 1
    assert suite.config.published is not None


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"unknown name 'random:nothing'"):
        method_of("random:nothing")
    with pytest.raises(UserError, match=r"config\.discriminator: scales must be different numbers from 0 to 1"):
        method_of(judge={"scales": (0, 7)})
    with pytest.raises(UserError, match=r"config\.discriminator: official\.norm_groups is 5, but the features have"):
        method_of(judge={"architecture": "official", "official": OfficialHeadConfig(norm_groups=5)})
    with pytest.raises(UserError, match=r"features of 1x1 are too small to judge; take larger crops"):
        run(method_of(TINY, judge={"architecture": "official"}, family="latent_diffusion", teacher_steps=1), pair(4))
    with pytest.raises(ValueError, match=r"score_weight must be above 0; score\.kind: none leaves the term out"):
        TADSRConfig(teacher=MICRO, score_weight=0.0)
    with pytest.raises(ValueError, match=r"adversarial_weight must be above 0; discriminator\.kind"):
        TADSRConfig(teacher=MICRO, adversarial_weight=-1.0)
    with pytest.raises(ValueError, match="t_min <= t_max"):
        StepRange(t_min=3, t_max=2)
    with pytest.raises(UserError, match="has no default, name them"):
        method_of(tuning="lora")

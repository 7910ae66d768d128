"""TAD-SR against the published code: discriminator, losses, features, score distillation, one step of both published
configurations, two whole iterations, and the losses of its Stable Diffusion variant."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onestepsr.diffusion.residual_shift import ResidualShiftConfig
from onestepsr.diffusion.schedule import DiffusionSchedule
from onestepsr.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss
from onestepsr.losses.distillation import diffusion_weight, distillation_loss, gradient_loss, hsd_gradient
from onestepsr.methods import tadsr
from onestepsr.methods.base import Networks
from onestepsr.methods.shared import teachers
from onestepsr.models.discriminators import OfficialDiscriminator, OfficialHeadConfig, ResidualShiftFeatures
from onestepsr.models.resshift.config import ResidualShiftGeneratorConfig
from onestepsr.models.resshift.generator import residual_shift_generator
from onestepsr.models.resshift.unet import SwinConfig, SwinUNet, SwinUNetConfig
from onestepsr.models.seesr.generator import SeeSRConfig
from onestepsr.models.tiny.networks import timestep_embedding
from onestepsr.train.networks import MovingAverage
from onestepsr.train.recipes import load_run
from weights_by_name import fill_by_name

GOLDEN = Path(__file__).parents[1] / "golden"
CHANNELS = (160, 320, 320, 640, 640)
SIDES = (8, 4, 2, 2, 2)
"""Of the features that the discriminator is given."""


def golden(name: str) -> dict[str, Any]:
    """Arrays, the numeric ones as tensors."""
    with np.load(GOLDEN / name) as file:
        return {key: file[key] if file[key].dtype.kind in "SU" else torch.from_numpy(file[key]) for key in file}


def drawn(name: str, *shape: int, uniform: bool = False, gain: float = 1.0, shift: float = 0.0) -> Tensor:
    """The inputs of the published run: normal values, or from U[0, 1), that follow from a name."""
    seed = int.from_bytes(hashlib.sha256(f"j_tadsr_{name}".encode()).digest()[:8], "little")
    rng = np.random.Generator(np.random.PCG64(seed))
    values = rng.random(shape) if uniform else rng.standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32)) * gain + shift


def close(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Compare within an absolute tolerance."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


def filled(network: nn.Module) -> Any:
    """With weights by name, the vectors of spectral norms at unit length."""
    fill_by_name(network)
    for name, vector in network.state_dict().items():
        if name.endswith(("weight_u", "weight_v")):
            vector.div_(vector.norm())
    return network


class Draws:
    """Stored random numbers in the place of a phase's own, in the order in which it must ask for them."""

    def __init__(self, *draws: tuple[str, Tensor]) -> None:
        self.draws = list(draws)

    def _next(self, kind: str) -> Tensor:
        expected, value = self.draws.pop(0)
        assert kind == expected
        return value

    def normal(self, like: Tensor) -> Tensor:
        return self._next("normal")

    def uniform_noise(self, like: Tensor) -> Tensor:
        return self._next("uniform")

    def integers(self, low: int, high: int) -> Tensor:
        value = self._next("integers")
        assert int(value.max()) < high
        return value - low


@pytest.mark.parametrize(
    ("name", "channels", "config"),
    [
        ("resshift", CHANNELS, OfficialHeadConfig()),
        ("seesr", (320, 640, 1280, 1280), OfficialHeadConfig(logit_maps=320)),
    ],
)
def test_names_and_shapes_of_the_discriminator(
    name: str, channels: tuple[int, ...], config: OfficialHeadConfig
) -> None:
    state = OfficialDiscriminator(channels, config).state_dict()
    found = {f"{key} {'x'.join(map(str, value.shape))}" for key, value in state.items()}
    assert found == set(golden("tadsr_discriminator.npz")[f"{name}.entries"].tolist())


@pytest.mark.slow
def test_the_discriminator_call_by_call() -> None:
    numbers = golden("tadsr_discriminator.npz")
    shapes = [(2, channels, side, side) for channels, side in zip(CHANNELS, SIDES, strict=True)]
    real = [drawn(f"disc.feat{k}", *shape, gain=1.5, shift=0.3) for k, shape in enumerate(shapes)]
    fake = [drawn(f"disc.fake{k}", *shape, gain=1.2, shift=-0.2) for k, shape in enumerate(shapes)]
    sizes = [64 * side**2 for side in SIDES]
    network, judged = filled(OfficialDiscriminator(CHANNELS)).train(), []
    for case in range(3):
        judge, t = copy.deepcopy(network), numbers[f"t_{case}"]
        if case == 0:
            judge.heads[0].register_forward_pre_hook(lambda _, given: judged.append(given[0]))
        with torch.no_grad():
            for k, logits in enumerate(judge(t, *real)[0].split(sizes, dim=1)):
                close(logits[:, ::16], numbers[f"logits_{case}_{k}"], 2e-5, f"logits {case}, {k}")
            if case == 0:
                close(judged[0][:, ::16], numbers["head_in"], 2e-5)
                for key in (key for key in numbers if key.startswith("after1.")):
                    close(judge.state_dict()[key.removeprefix("after1.")], numbers[key], 2e-6, key)
                for _ in range(7):
                    judge(t, *real)
                for k, logits in enumerate(judge.eval()(t, *real)[0].split(sizes, dim=1)):
                    close(logits[:, ::16], numbers[f"eval_{k}"], 2e-5, f"eval {k}")
    t, given = numbers["t_0"], [feature.clone().requires_grad_() for feature in fake]
    loss = hinge_discriminator_loss(network(t, *real), network(t, *fake))
    close(loss.detach(), numbers["loss_D"].mean(), 2e-6)
    loss.backward()
    norms = gradient_norms(network, numbers["order_D"])
    # the published norms are sums of up to 3.7 million squares in float32, which are 2e-4 off
    torch.testing.assert_close(norms, numbers["grad_norm_D"], rtol=3e-4, atol=1e-5 * float(norms.max()))
    generator = hinge_generator_loss(network(t, *given))
    close(generator.detach(), numbers["gen_unweighted"].mean(), 2e-6)
    generator.backward()
    for k, feature in enumerate(given):
        close(feature.grad[:, ::16], numbers[f"grad_fake{k}"], 1e-4 * float(numbers[f"grad_max{k}"]), f"gradient {k}")  # type: ignore[index]


def gradient_norms(network: nn.Module, names: Any) -> Tensor:
    """Norm of each parameter's gradient, in the order of ``names``."""
    parameters = dict(network.named_parameters())
    assert parameters.keys() == set(names.tolist())
    return torch.stack([parameters[name].grad.double().norm() for name in names])  # type: ignore[union-attr]


def test_the_step_as_the_discriminator_sees_it() -> None:
    expected = golden("tadsr_discriminator.npz")["sinusoid_160"]
    close(timestep_embedding(torch.arange(15), 160), expected, 1e-6)


def test_one_mean_over_all_logits_and_the_mean_of_scales() -> None:
    numbers = golden("tadsr_discriminator.npz")
    sizes = (4096, 1024, 256, 256, 256)
    real = [drawn(f"hinge.real{k}", 2, size, shift=0.5) for k, size in enumerate(sizes)]
    fake = [drawn(f"hinge.fake{k}", 2, size, shift=-0.4 * k) for k, size in enumerate(sizes)]
    for name, halves in (("published", [(torch.cat(half, dim=1),) for half in (real, fake)]), ("scales", [real, fake])):
        end, times = ("published", 1) if name == "published" else ("mean_of_scales", 5)
        for found, start in ((hinge_discriminator_loss(*halves), "loss_D"), (hinge_generator_loss(halves[1]), "gen")):
            close(found, numbers[f"hinge.{start}_{end}"].mean(), 1e-6)
            if name == "scales":
                torch.testing.assert_close(times * found, numbers[f"hinge.{start}_sum_of_scales"].mean())


@pytest.mark.slow
def test_features_behind_the_halvings_and_their_gradient() -> None:
    numbers, inputs = golden("tadsr_discriminator.npz"), golden("swin_unet.npz")
    network = ResidualShiftFeatures(filled(SwinUNet()).eval().requires_grad_(False), official=True)
    assert network.feature_channels == CHANNELS
    x, steps = inputs["x"].requires_grad_(), (0, 7, 13)
    step, *features = network(x.expand(3, -1, -1, -1), torch.tensor(steps), inputs["lq"].expand(3, -1, -1, -1))
    assert step.tolist() == list(steps)
    probe = torch.zeros(())
    for k, feature in enumerate(features):
        assert list(feature.shape[1:]) == numbers["shapes"][k].tolist()
        probe = probe + (feature[:1] * drawn(f"features.w{k}", 1, *feature.shape[1:])).mean()
        for index, t in enumerate(steps):
            one = feature[index : index + 1].detach()
            close(one[:, :4, :8, :8], numbers[f"crop_t{t}_{k}"], 1e-4, f"{t}, {k}")
            statistics = torch.stack([one.mean(), one.std(), one.abs().max()]).double()
            torch.testing.assert_close(statistics, numbers[f"stat_t{t}_{k}"], rtol=1e-5, atol=1e-5)
    close(probe.detach(), numbers["probe"], 1e-5)
    (gradient,) = torch.autograd.grad(probe, x)
    close(gradient[..., ::4, ::4], numbers["grad_x"], 1e-4 * float(numbers["grad_x"].std()))


@pytest.mark.slow
def test_score_distillation_as_published_and_without_its_slips() -> None:
    numbers, network, shape = golden("tadsr_score.npz"), None, (2, 3, 64, 64)
    z_y = drawn("hsd.z_y", *shape, gain=0.7)
    z_teacher = z_y + drawn("hsd.z_teacher", *shape, gain=0.5)
    lr = drawn("hsd.lq", *shape).tanh() / 2 + 0.5
    noises = (
        ("normal", drawn("hsd.noise_normal", *shape)),
        ("uniform", drawn("hsd.noise_uniform", *shape, uniform=True)),
    )
    for kind, slips in (("hsd", True), ("hsd", False), ("sds", True), ("sds", False)):
        score = tadsr.ScoreConfig(kind=kind)  # type: ignore[arg-type]
        config = tadsr.TADSRConfig(teacher="random:resshift-realsr", published_slips=slips, score=score)
        teacher = tadsr.load_teacher(config)
        network = filled(teacher.network) if network is None else network
        z = (z_teacher + drawn("hsd.z_student", *shape, gain=0.3)).requires_grad_()
        term, draws = tadsr._score_term(teacher, config), Draws(("integers", numbers["t"]), noises[slips])
        assert term is not None
        loss = term({"teacher": network}, {"z_y": z_y, "lr": lr}, draws, z, z_teacher)  # type: ignore[arg-type]
        loss.backward()
        name = f"{kind}_{'published' if slips else 'paper'}"
        close(loss.detach(), numbers[f"loss_{name}"].mean(), 2e-5, name)
        found = z.grad[..., ::4, ::4] * z.numel()  # type: ignore[index]
        for sample, tolerance in enumerate(1e-4 * numbers[f"std_{name}"]):
            least = 1e-3 if numbers["t"][sample] == 0 else 0.0  # there the weight is 25
            close(found[sample], numbers[f"grad_{name}"][sample], max(float(tolerance), least), f"{name}, {sample}")


class StoredLatents(nn.Module):
    """An autoencoder that gives the same latents for every image."""

    def __init__(self, *latents: Tensor) -> None:
        super().__init__()
        self.latents = torch.cat(latents)

    def forward(self, x: Tensor) -> Tensor:
        return self.latents


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "recipe", "teacher"),
    [("real", "tadsr-realsr", "random:resshift-realsr"), ("face", "tadsr-face", "random:resshift-face")],
)
def test_one_step_of_the_published_sizes(kind: str, recipe: str, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings of the recipes and all slips: starts, results, terms and gradients, before any update."""
    numbers = {
        key.removeprefix(f"{kind}."): value for key, value in golden("tadsr_step.npz").items() if key.startswith(kind)
    }
    run = load_run("tadsr", recipe)
    config = replace(run.config, teacher=teacher, published_slips=True)
    assert [config.score_weight, config.adversarial_weight] == numbers["weights"].tolist()
    method = tadsr.build(config)
    network = filled(method.frozen["teacher"])
    filled(method.networks["discriminator"]).train()
    shape, name = (1, 3 if kind == "real" else 8, 64, 64), f"step_{kind}"
    z_y = drawn(f"{name}.z_y", *shape, gain=0.8)
    lr = drawn(f"{name}.lq", 1, 3, 64, 64).tanh() / 2 + 0.5
    if kind == "face":
        lr = lr.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    networks = {**method.frozen, "student": network, "discriminator": method.networks["discriminator"]}
    networks["autoencoder"] = StoredLatents(z_y + drawn(f"{name}.z_gt", *shape, gain=0.5), z_y)
    seen = watched(monkeypatch, leaf=True)
    normal = ("normal", drawn(f"{name}.noise", *shape))
    first, second = (("uniform", drawn(f"{name}.noise_{key}", *shape, uniform=True)) for key in ("dis", "hsd"))
    draws = [Draws(normal, first, ("integers", numbers["t_dis"])), Draws(("integers", numbers["t_hsd"]), second)]
    batch = {"lr": lr, "hr": torch.zeros(1, 3, *(side * run.data.scale for side in lr.shape[2:]))}
    judged, terms = (phase.loss(networks, batch, own) for phase, own in zip(method.phases, draws, strict=True))  # type: ignore[arg-type]
    latents, small = 5e-5, 1e-5 if kind == "real" else 2e-6
    for key, value in (("z_T", batch["z_T"]), ("z_student", seen["z"].detach()), ("z_teacher", seen["target"])):
        close(value[..., ::4, ::4], numbers[key], latents, key)
    close(judged["hinge"].detach(), numbers["loss_D"].mean(), 2e-6)
    names = {"distillation": "mse", "hsd": "mse_hsd", "adversarial": "GAN_loss"}
    for term, published in names.items():
        close(terms[term].detach(), numbers[f"term_{published}"].mean(), small, term)
    total = terms["distillation"] + terms["hsd"] + terms["adversarial"]
    close(total.detach(), numbers["term_loss"].mean(), small)
    (adversarial,) = torch.autograd.grad(terms["adversarial"], seen["z"], retain_graph=True)
    (gradient,) = torch.autograd.grad(total, seen["z"])
    close(gradient[..., ::4, ::4], numbers["grad_z_student"], 2e-4 * float(numbers["grad_z_student.std"]))
    expected = numbers["grad_z_student_gan"]
    difference = (adversarial[:, : expected.shape[1], ::4, ::4] - expected) / numbers["grad_z_student_gan.std"]
    if kind == "real":  # an activation close to the kink of a leaky ReLU may fall to its other side
        assert difference.square().mean().sqrt() < 1e-2
    else:
        assert difference.abs().max() < 2e-4


@pytest.mark.slow
def test_two_iterations_equal_published_code(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, shape = golden("tadsr_iteration.npz"), (2, 3, 64, 64)
    sizes = ResidualShiftGeneratorConfig(
        unet=SwinUNetConfig(model_channels=32, swin=SwinConfig(width=64)), schedule=ResidualShiftConfig()
    )
    monkeypatch.setattr(teachers, "load_residual_generator", lambda name: residual_shift_generator(sizes))
    method = tadsr.build(tadsr.TADSRConfig(teacher="reduced", published_slips=True))
    for name in ("student", "discriminator"):
        filled(method.networks[name]).train()
    filled(method.frozen["teacher"])
    z_y = drawn("iteration.z_y", *shape, gain=0.8)
    stored = StoredLatents(z_y + drawn("iteration.z_gt", *shape, gain=0.5), z_y)
    networks: dict[str, Any] = {**method.networks, **method.frozen, "autoencoder": stored}
    seen = watched(monkeypatch)
    student, judge = method.networks["student"], method.networks["discriminator"]
    average = MovingAverage(dict(student.named_parameters()), 0.999, warmup=False)
    optimizers = {name: torch.optim.AdamW(net.parameters(), weight_decay=0) for name, net in method.networks.items()}
    lr = drawn("iteration.lq", *shape).tanh() / 2 + 0.5
    for index, result_tolerance in enumerate((5e-5, 3e-4)):
        of = {key.removeprefix(f"it{index + 1}."): value for key, value in numbers.items()}
        batch: dict[str, Tensor] = {"lr": lr, "hr": torch.zeros(2, 3, 256, 256)}
        noise = {
            key: drawn(f"iteration.{key}{index}", *shape, uniform=key != "noise")
            for key in ("noise", "noise_dis", "noise_hsd")
        }
        draws: dict[str, Any] = {
            "discriminator": Draws(
                ("normal", noise["noise"]), ("uniform", noise["noise_dis"]), ("integers", of["t_dis"])
            ),
            "student": Draws(("integers", of["t_hsd"]), ("uniform", noise["noise_hsd"])),
        }
        terms: dict[str, Tensor] = {}
        for phase in method.phases:
            for name, network in method.networks.items():
                network.requires_grad_(name == phase.network)
                network.zero_grad()
            found = phase.loss(networks, batch, draws[phase.network])
            sum(found.values()).backward()  # type: ignore[union-attr]
            letter = "D" if phase.network == "discriminator" else "G"
            norms = gradient_norms(method.networks[phase.network], numbers[f"order_{letter}"])
            expected = of[f"grad_norm_{letter}"]
            torch.testing.assert_close(norms, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
            optimizers[phase.network].param_groups[0]["lr"] = float(of[f"lr_{letter}"])
            optimizers[phase.network].step()
            batch = {name: tensor.detach() for name, tensor in batch.items()}
            terms |= {name: value.detach() for name, value in found.items()}
        average.update(index)
        for name, published, tolerance in (
            ("hinge", "D.loss", 2e-6),
            ("distillation", "G.mse", 2e-5),
            ("hsd", "G.mse_hsd", 1e-4),
            ("adversarial", "G.GAN_loss", 2e-6),
        ):
            close(terms[name], of[published].mean(), tolerance, f"{name}, iteration {index + 1}")
        close(seen["z"].detach()[..., ::4, ::4], of["z_student"], result_tolerance)
        close(seen["target"][..., ::4, ::4], of["z_teacher"], 1e-3)
        gradient = seen["z"].grad[..., ::4, ::4]  # type: ignore[index]
        close(gradient, of["grad_z_student"], 1e-2 * float(of["grad_z_student.std"]))
        states = {"G": student.state_dict(), "ema": average.values, "D": judge.state_dict()}
        updated = [key for key in of if key.startswith("after.")]
        assert len(updated) == 8
        for key in updated:
            _, network_name, name = key.split(".", 2)
            close(states[network_name][name][: len(of[key])], of[key], 2e-6, f"{key}, iteration {index + 1}")


@pytest.mark.slow
def test_losses_of_the_variant_for_stable_diffusion() -> None:
    """On given predictions: the start, both ways of noising, and every term of TAD-SeeSR."""
    numbers, shape = golden("tadsr_seesr.npz"), (2, 4, 16, 16)
    given = {
        name: drawn(f"seesr.{name}", *shape) for name in ("latents", "tch_latents", "noise", "pred_tch", "pred_stu")
    }
    schedule, config = DiffusionSchedule(SeeSRConfig().schedule), load_run("tadsr", "tadsr-sd2").config
    noise, t, judged_noise = given["noise"], numbers["t_hsd"], drawn("seesr.noise_dis", *shape)
    z_T = schedule.add_noise(given["latents"], noise, 999)
    close(z_T, numbers["noisy_999"], 1e-6)
    eps = noise + drawn("seesr.model_pred_stu", *shape, gain=0.05)
    z = schedule.x0_from_eps(z_T, eps, 999).requires_grad_()
    close(z.detach(), numbers["z0_stu"], 1e-4)
    close(schedule.add_noise(z.detach(), judged_noise, numbers["t_dis"]), numbers["z_t_stu"], 1e-4)
    close(schedule.add_noise(given["latents"], judged_noise, numbers["t_dis"]), numbers["z_t_gt"], 1e-6)
    steps = tadsr.step_range(config.score, 0, 999, "score")
    assert list(steps) == sorted(numbers["timesteps"].tolist())
    predictions = iter([given["pred_tch"], given["pred_stu"]])  # of the teacher's result, then of the student's
    gradient = hsd_gradient(
        z.detach(),
        given["tch_latents"],
        lambda z_0: schedule.add_noise(z_0, noise, t),
        lambda z_t: schedule.x0_from_eps(z_t, next(predictions), t),
        diffusion_weight(schedule, t),
    )
    hsd = config.score_weight * gradient_loss(z, gradient)
    distillation = config.distillation_weight * distillation_loss(z, given["tch_latents"])
    close(hsd.detach(), numbers["hsd_loss"].mean(), 1e-5)
    close(distillation.detach(), numbers["mse_loss_tch"].mean(), 1e-5)
    (found,) = torch.autograd.grad(hsd + distillation, z)
    close(2 * found, numbers["grad_z0"], 1e-6)
    channels, sides = (320, 640, 1280, 1280), (4, 2, 2, 2)
    real, fake = (
        [drawn(f"seesr.{half}{k}", 2, c, side, side) for k, (c, side) in enumerate(zip(channels, sides, strict=True))]
        for half in ("real", "fake")
    )
    judge = filled(OfficialDiscriminator(channels, config.discriminator.official)).train()
    with torch.no_grad():
        logits = [judge(numbers["t_dis"], *half)[0] for half in (real, fake)]
        close(logits[0][:, ::8], numbers["logits_real"], 2e-5)
        close(logits[1][:, ::8], numbers["logits_fake_second_call"], 2e-5)
        close(hinge_discriminator_loss(logits[:1], logits[1:]), numbers["loss_D"], 1e-6)
        adversarial = config.adversarial_weight * hinge_generator_loss(judge(numbers["t_dis"], *fake))
        close(adversarial, numbers["gan_loss"], 1e-6)


def watched(monkeypatch: pytest.MonkeyPatch, *, leaf: bool = False) -> dict[str, Tensor]:
    """The student's last result with its gradient, for which nothing before it is kept if it is a ``leaf``, and the
    target of its distillation."""
    seen: dict[str, Tensor] = {}
    one_step: Callable[..., Tensor] = tadsr._one_step

    def noted(teacher: teachers.Teacher, networks: Networks, batch: dict[str, Tensor]) -> Tensor:
        if not torch.is_grad_enabled():
            return one_step(teacher, networks, batch)
        if leaf:
            with torch.no_grad():
                z = one_step(teacher, networks, batch)
            z.requires_grad_()
        else:
            z = one_step(teacher, networks, batch)
            z.retain_grad()
        seen["z"] = z
        return z

    def compared(z: Tensor, target: Tensor) -> Tensor:
        seen["target"] = target
        return distillation_loss(z, target)

    monkeypatch.setattr(tadsr, "_one_step", noted)
    monkeypatch.setattr(tadsr, "distillation_loss", compared)
    return seen

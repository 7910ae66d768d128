"""TAD-SR against the published code: discriminator, features, score distillation, and one whole iteration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onestepsr.diffusion.residual_shift import ResidualShiftConfig
from onestepsr.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss
from onestepsr.methods import tadsr
from onestepsr.methods.base import Networks
from onestepsr.methods.shared import teachers
from onestepsr.models.discriminators import OfficialDiscriminator, OfficialHeadConfig, ResidualShiftFeatures
from onestepsr.models.resshift.config import ResidualShiftGeneratorConfig
from onestepsr.models.resshift.generator import residual_shift_generator
from onestepsr.models.resshift.unet import SwinConfig, SwinUNet, SwinUNetConfig
from onestepsr.train.networks import MovingAverage
from weights_by_name import fill_by_name

GOLDEN = Path(__file__).parents[1] / "golden"
CHANNELS = (160, 320, 320, 640, 640)


def golden(name: str) -> dict[str, Any]:
    """Arrays, the numeric ones as tensors."""
    with np.load(GOLDEN / name) as file:
        return {key: file[key] if file[key].dtype.kind in "SU" else torch.from_numpy(file[key]) for key in file}


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
def test_logits_and_losses_in_train_and_eval_mode() -> None:
    numbers = golden("tadsr_discriminator.npz")
    real, fake = ([numbers[f"{kind}{k}"] for k in range(5)] for kind in ("feat", "fake"))
    t, sizes = numbers["t"], [64 * feature[0, 0].numel() for feature in real]
    network = filled(OfficialDiscriminator(CHANNELS)).train()
    with torch.no_grad():
        judged = network(t, *real)
        for k, logits in enumerate(judged[0].split(sizes, dim=1)):
            torch.testing.assert_close(logits[:, ::16], numbers[f"logits{k}"], rtol=0, atol=2e-5)
        loss = hinge_discriminator_loss(judged, network(t, *fake))
        torch.testing.assert_close(loss[None], numbers["loss"], rtol=0, atol=2e-6)
        generator = hinge_generator_loss(network(t, *fake))
        torch.testing.assert_close(generator[None], numbers["generator"], rtol=0, atol=2e-6)
        for _ in range(5):
            network(t, *real)
        for k, logits in enumerate(network.eval()(t, *real)[0].split(sizes, dim=1)):
            torch.testing.assert_close(logits[:, ::16], numbers[f"eval{k}"], rtol=0, atol=2e-5)


@pytest.mark.slow
@torch.no_grad()
def test_features_behind_the_halvings() -> None:
    numbers, inputs = golden("tadsr_discriminator.npz"), golden("swin_unet.npz")
    network = ResidualShiftFeatures(filled(SwinUNet()).eval(), official=True)
    assert network.feature_channels == CHANNELS
    step, *features = network(inputs["x"], torch.tensor([7]), inputs["lq"])
    assert step.tolist() == [7]
    for k, feature in enumerate(features):
        assert list(feature.shape[1:]) == numbers["shapes"][k].tolist()
        torch.testing.assert_close(feature[:, :4, :8, :8], numbers[f"crop_t7_{k}"], rtol=0, atol=1e-4)
        statistics = torch.stack([feature.mean(), feature.std(), feature.abs().max()]).double()
        torch.testing.assert_close(statistics, numbers[f"stat_t7_{k}"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_score_distillation_as_published_and_without_its_slips() -> None:
    numbers, network = golden("tadsr_score.npz"), None
    for kind, slips in (("hsd", True), ("hsd", False), ("sds", True), ("sds", False)):
        score = tadsr.ScoreConfig(kind=kind)
        config = tadsr.TADSRConfig(teacher="random:resshift-realsr", published_slips=slips, score=score)
        teacher = tadsr.load_teacher(config)
        network = filled(teacher.network) if network is None else network
        noise = ("uniform", numbers["noise_uniform"]) if slips else ("normal", numbers["noise_normal"])
        z = numbers["z_student"].clone().requires_grad_()
        term = tadsr._score_term(teacher, config)
        networks, batch = {"teacher": network}, {"z_y": numbers["z_y"], "lr": numbers["lq"] / 2 + 0.5}
        loss = term(networks, batch, Draws(("integers", numbers["t"]), noise), z, numbers["z_teacher"])
        loss.backward()
        name = f"{kind}_{'published' if slips else 'paper'}"
        torch.testing.assert_close(loss[None], numbers[f"loss_{name}"], rtol=0, atol=2e-5)
        expected = numbers[f"grad_{name}"]
        found = z.grad[..., ::4, ::4] * z[0].numel()
        assert (found - expected).abs().max() < 1e-4 * expected.std(), name


class StoredLatents(nn.Module):
    """An autoencoder that gives the same latents for every image."""

    def __init__(self, *latents: Tensor) -> None:
        super().__init__()
        self.latents = torch.cat(latents)

    def forward(self, x: Tensor) -> Tensor:
        return self.latents


@pytest.mark.slow
def test_one_iteration_equals_published_code(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = golden("tadsr_iteration.npz")
    sizes = ResidualShiftGeneratorConfig(
        unet=SwinUNetConfig(model_channels=32, swin=SwinConfig(width=64)), schedule=ResidualShiftConfig()
    )
    monkeypatch.setattr(teachers, "load_residual_generator", lambda name: residual_shift_generator(sizes))
    method = tadsr.build(tadsr.TADSRConfig(teacher="reduced", published_slips=True))
    for name in ("student", "discriminator"):
        filled(method.networks[name]).train()
    filled(method.frozen["teacher"])
    networks = {**method.networks, **method.frozen, "autoencoder": StoredLatents(numbers["z_gt"], numbers["z_y"])}
    seen = watched(monkeypatch)
    student, judge = method.networks["student"], method.networks["discriminator"]
    average = MovingAverage(dict(student.named_parameters()), 0.999, warmup=False)
    batch = {"lr": numbers["lq"] / 2 + 0.5, "hr": torch.zeros(2, 3, 256, 256)}
    draws = {
        "discriminator": Draws(
            ("normal", numbers["noise"]), ("uniform", numbers["noise_dis"]), ("integers", numbers["t_dis"])
        ),
        "student": Draws(("integers", numbers["t_hsd"]), ("uniform", numbers["noise_hsd"])),
    }
    terms: dict[str, Tensor] = {}
    for phase in method.phases:
        for name, network in method.networks.items():
            network.requires_grad_(name == phase.network)
        found = phase.loss(networks, batch, draws[phase.network])
        sum(found.values()).backward()
        rate = numbers["lr_D" if phase.network == "discriminator" else "lr_G"]
        own = method.networks[phase.network].parameters()
        torch.optim.AdamW(own, lr=float(rate), weight_decay=0).step()
        batch = {name: tensor.detach() for name, tensor in batch.items()}
        terms |= {name: value.detach() for name, value in found.items()}
    average.update(0)
    tolerances = {"hinge": 2e-6, "distillation": 2e-5, "hsd": 1e-4, "adversarial": 2e-6}
    published = {"hinge": "D.loss", "distillation": "G.mse", "hsd": "G.mse_hsd", "adversarial": "G.GAN_loss"}
    for name, tolerance in tolerances.items():
        torch.testing.assert_close(terms[name], numbers[published[name]].mean(), rtol=0, atol=tolerance, msg=name)
    torch.testing.assert_close(seen["z"][..., ::4, ::4], numbers["z_student"], rtol=0, atol=5e-5)
    gradient = numbers["grad_z_student"]
    assert (seen["z"].grad[..., ::4, ::4] - gradient).abs().max() < 1e-2 * gradient.std()
    states = {"G": student.state_dict(), "ema": average.values, "D": judge.state_dict()}
    updated = [key for key in numbers if key.startswith("after.")]
    assert len(updated) == 8
    for key in updated:
        _, network_name, name = key.split(".", 2)
        value = states[network_name][name][: len(numbers[key])]
        torch.testing.assert_close(value, numbers[key], rtol=0, atol=2e-6, msg=key)


def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The student's last result with its gradient."""
    seen: dict[str, Tensor] = {}
    one_step: Callable[..., Tensor] = tadsr._one_step

    def noted(teacher: teachers.Teacher, networks: Networks, batch: dict[str, Tensor]) -> Tensor:
        z = one_step(teacher, networks, batch)
        if z.requires_grad:
            z.retain_grad()
            seen["z"] = z
        return z

    monkeypatch.setattr(tadsr, "_one_step", noted)
    return seen

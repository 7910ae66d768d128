"""Frozen weights in 16 bits: what changes, what does not, and what is exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_training import ToyImages, toy_config, toy_method

from onestepsr.methods.base import Batch, Exported, Method, Networks, Phase, SampleRandom
from onestepsr.models.lora import LoraConfig, add_lora, merged_state_dict
from onestepsr.models.perceptual_features import VGG16Features
from onestepsr.train.networks import NetworkSet, keep_frozen_in
from onestepsr.train.run import export
from onestepsr.train.trainer import Trainer

pytestmark = pytest.mark.numeric

TARGETS = LoraConfig(rank=2, alpha=2.0, targets=r"0|3")


def backbone() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))


def adapted() -> nn.Sequential:
    network = backbone()
    add_lora(network, TARGETS)
    torch.manual_seed(6)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return network


def lora_method() -> Method:
    def loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        sr = networks["generator"](F.interpolate(batch["lr"], scale_factor=2.0))
        return {"mse": F.mse_loss(sr, batch["hr"]), "teacher": 0.1 * networks["teacher"](sr).square().mean()}

    def exported(networks: Mapping[str, nn.Module]) -> Exported:
        return Exported(state_dict=merged_state_dict(networks["generator"]), architecture="toy", config={})

    return Method(
        networks={"generator": adapted()},
        frozen={"teacher": backbone()},
        phases=(Phase(network="generator", loss=loss),),
        ema=("generator",),
        export=exported,
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_those_of_float32_within_the_type(dtype: torch.dtype, autocast: bool) -> None:
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = {}
    for stored in (torch.float32, dtype):
        network = adapted()
        keep_frozen_in(network, stored)
        kinds = {name: parameter.dtype for name, parameter in network.named_parameters()}
        assert all(kind == (stored if "base_layer" in name else torch.float32) for name, kind in kinds.items())
        picture = image.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = network(picture)
        output.float().square().sum().backward()
        gradients = [parameter.grad for parameter in network.parameters() if parameter.requires_grad]
        assert picture.grad is not None
        found[stored] = [picture.grad, *(gradient for gradient in gradients if gradient is not None)]
        assert len(found[stored]) == 5
        assert all(gradient.dtype == torch.float32 for gradient in found[stored])
        assert autocast or output.dtype == torch.float32
    for exact, near in zip(found[torch.float32], found[dtype], strict=True):
        assert 0 < (near - exact).norm() < 0.03 * exact.norm() or (autocast and torch.equal(near, exact))


def test_only_frozen_layers_are_converted() -> None:
    network = backbone()
    network[0].weight.requires_grad_(False)
    keep_frozen_in(network, torch.bfloat16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}, "its bias is trained"
    network.requires_grad_(False)
    for _ in range(2):  # a layer that two networks share is met twice
        keep_frozen_in(network, torch.bfloat16)
    kinds = [next(layer.parameters(), torch.zeros(())).dtype for layer in network]
    assert kinds == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert len(network[0]._forward_pre_hooks) == 1


def test_features_of_a_loss_stay_in_float32() -> None:
    network = VGG16Features().requires_grad_(False)
    keep_frozen_in(network, torch.bfloat16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_trains_adapters_and_exports_what_it_trained(tmp_path: Path, precision: str) -> None:
    method = lora_method()
    config = toy_config(steps=4, frozen_dtype="bfloat16", mixed_precision=precision)
    trainer = Trainer(method, ToyImages(), config, tmp_path)
    before = {name: value.clone() for name, value in method.networks["generator"].state_dict().items()}
    trainer.run()
    after = method.networks["generator"].state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if "lora" in name}
    assert next(method.frozen["teacher"].parameters()).dtype == torch.bfloat16

    export(method, trainer.networks, tmp_path / "model.safetensors", {})
    saved = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    plain = backbone()
    plain.load_state_dict(saved)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    unmerged = adapted()
    with trainer.networks.evaluating() as networks, torch.no_grad():
        unmerged.load_state_dict(trainer.networks.modules["generator"].state_dict())
        torch.testing.assert_close(plain(image), unmerged(image), rtol=1e-5, atol=1e-6)
        assert (plain(image) - networks["generator"](image)).abs().max() < 0.02


def test_fingerprints_tell_backbones_apart_and_not_types(tmp_path: Path) -> None:
    digests = []
    for number, dtype in enumerate(("float32", "bfloat16", "float16")):
        trainer = Trainer(lora_method(), ToyImages(), toy_config(frozen_dtype=dtype), tmp_path / str(number))
        digests.append(trainer.networks.fingerprints)
    assert digests[0] == digests[1] == digests[2]
    method = lora_method()
    with torch.no_grad():  # less than bfloat16 can tell
        method.networks["generator"].get_parameter("0.base_layer.weight").mul_(1 + 1e-5)
    assert (
        Trainer(method, ToyImages(), toy_config(frozen_dtype="bfloat16"), tmp_path / "x").networks.fingerprints
        != (digests[0])
    )


def test_resume_with_frozen_16_bits_is_exact(tmp_path: Path) -> None:
    def run(folder: Path, steps: int) -> NetworkSet:
        config = toy_config(steps=steps, frozen_dtype="bfloat16")
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, kind="constant"))
        trainer = Trainer(lora_method(), ToyImages(), config, folder)
        latest = trainer.checkpoints.latest()
        if latest is not None:
            trainer.resume(latest)
        trainer.run()
        return trainer.networks

    whole = run(tmp_path / "whole", 6).modules["generator"].state_dict()
    run(tmp_path / "cut", 4)
    resumed = run(tmp_path / "cut", 6).modules["generator"].state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_type_for_frozen_weights_changes_little_where_nothing_is_frozen(tmp_path: Path) -> None:
    trainer = Trainer(toy_method(), ToyImages(), toy_config(steps=1, frozen_dtype="bfloat16"), tmp_path)
    trainer.run()
    kinds = {name: value.dtype for name, value in trainer.networks.modules["generator"].state_dict().items()}
    assert kinds.pop("fixed.weight") == kinds.pop("fixed.bias") == torch.bfloat16
    assert set(kinds.values()) == {torch.float32}

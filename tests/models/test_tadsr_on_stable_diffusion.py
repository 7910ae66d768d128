"""TAD-SR with a Stable Diffusion of a few ten thousand parameters as teacher and student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_diffusion import write_folder
from torch import Tensor

from onestepsr.core.config import from_mapping
from onestepsr.methods.base import Method, SampleRandom
from onestepsr.methods.tadsr import TADSRConfig, build
from onestepsr.models.generators import NoisedLatentGenerator
from onestepsr.models.loading import load_generator
from onestepsr.weights.files import save_model

OWN: dict[str, Any] = {
    "family": "latent_diffusion",
    "latent_diffusion": {"start": 399, "prompt": {"tokens": 4}},
    "teacher_steps": 3,
    "lora": {"rank": 2, "alpha": 2.0},
    "discriminator": {"official": {"logit_maps": 4, "norm_groups": 8}, "head": {"width": 8, "norm_groups": 8}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd")
    write_folder(path)
    return path


def method_on(folder: Path, **settings: Any) -> Method:
    torch.manual_seed(0)
    return build(from_mapping(TADSRConfig, {"teacher": str(folder), **OWN, **settings}))


def gradients(method: Method) -> dict[str, Tensor]:
    """Of both networks after one iteration without optimiser steps."""
    rng = torch.Generator().manual_seed(1)
    batch = {"hr": torch.rand(2, 3, 64, 64, generator=rng), "lr": torch.rand(2, 3, 16, 16, generator=rng)}
    networks = {**method.networks, **method.frozen}
    for index, phase in enumerate(method.phases):
        own = {name: p for name, p in method.networks[phase.network].named_parameters() if p.requires_grad}
        sum(phase.loss(networks, batch, SampleRandom(index, samples=range(2))).values()).backward(
            inputs=[*own.values()]
        )
    named = [(f"{key}.{name}", p) for key, net in method.networks.items() for name, p in net.named_parameters()]
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def test_all_of_the_student_learns_with_and_without_keeping_activations(folder: Path) -> None:
    method = method_on(folder)
    found, again = gradients(method), gradients(method_on(folder, gradient_checkpointing=True))
    assert {f"student.{name}" for name, _ in method.networks["student"].named_parameters()} <= found.keys()
    assert found.keys() == again.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, again[name], msg=name)
    assert all(parameter.grad is None for network in method.frozen.values() for parameter in network.parameters())


def test_adapters_are_merged_into_the_exported_student(folder: Path, tmp_path: Path) -> None:
    method = method_on(folder, tuning="lora")
    trained = {name for name, p in method.networks["student"].named_parameters() if p.requires_grad}
    assert "prompt" in trained
    assert all("lora" in name for name in trained - {"prompt"})
    for name, parameter in method.networks["student"].named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    exported = method.export(method.networks)
    path = tmp_path / "model.safetensors"
    save_model(path, architecture=exported.architecture, config=exported.config, state_dict=exported.state_dict)
    generator = load_generator(path)
    assert isinstance(generator, NoisedLatentGenerator)
    lr = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        shown = method.preview({**method.networks, **method.frozen}, {"lr": lr, "hr": lr})["SR"]
        torch.testing.assert_close(generator(lr).clamp(0, 1), shown, rtol=1e-3, atol=1e-3)

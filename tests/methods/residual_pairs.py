"""What tests of the residual-shifting methods share: a batch, and phases run as the loop runs them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from onestepsr.methods.base import Method, SampleRandom
from onestepsr.weights.files import save_model
from weights_by_name import fill_by_name

MICRO = "random:resshift-micro"


def pair(side: int = 16) -> dict[str, Tensor]:
    """Two HR images of four times ``side`` and their LR versions."""
    rng = torch.Generator().manual_seed(0)
    return {
        "hr": torch.rand(2, 3, 4 * side, 4 * side, generator=rng),
        "lr": torch.rand(2, 3, side, side, generator=rng),
    }


def networks_of(method: Method) -> dict[str, nn.Module]:
    return {**method.networks, **method.frozen}


def filled(method: Method) -> Method:
    """With weights of which none is zero: output convolutions start at zero, and then nothing else gets a gradient."""
    for network in networks_of(method).values():
        fill_by_name(network)
    return method


def run_phase(method: Method, batch: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Loss terms of the only phase, after their backward pass."""
    (phase,) = method.phases
    for network in method.networks.values():
        network.zero_grad()
    terms = phase.loss(networks_of(method), batch, SampleRandom("test", seed, samples=range(2)))
    sum(terms.values()).backward()
    return terms


def evaluations_of(network: nn.Module) -> list[int]:
    """A list that grows with every evaluation of a residual-shifting network, those in backward passes included."""
    count: list[int] = []
    network.get_submodule("input_blocks.1.0").register_forward_pre_hook(lambda module, inputs: count.append(1))
    return count


def with_gradient(network: nn.Module) -> set[str]:
    return {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def saved(method: Method, path: Path) -> Path:
    """The exported model as a file."""
    exported = method.export(method.networks)
    save_model(path, architecture=exported.architecture, config=exported.config, state_dict=exported.state_dict)
    return path

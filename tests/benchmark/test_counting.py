"""The counter: toy networks whose operations can be counted by hand, and the stages of generators."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_seesr import CONFIG as SEESR
from small_seesr import small_seesr
from torch import Tensor, nn

from onestepsr.benchmark.complexity import measure
from onestepsr.benchmark.counting import Call, Cost, count, count_stages, stages_of, without_contents
from onestepsr.inference.devices import compile_networks
from onestepsr.models.loading import load_generator


def cost_of(network: nn.Module, *shape: int, device: str = "meta") -> Cost:
    network = network.to(device)
    return count(network, lambda: network(torch.zeros(*shape, device=device)))[1]


class Attention(nn.Module):
    """Self-attention without layers: nothing but its two products."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, tokens: Tensor) -> Tensor:
        n, length, channels = tokens.shape
        split = tokens.reshape(n, length, self.heads, channels // self.heads).transpose(1, 2)
        return F.scaled_dot_product_attention(split, split, split)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_linear_layer(device: str) -> None:
    cost = cost_of(nn.Linear(5, 7), 2, 3, 5, device=device)
    assert cost.macs == cost.layer_macs == 2 * 3 * 5 * 7
    assert cost.parameters == cost.trainable == 5 * 7 + 7


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_convolution_with_groups_and_stride(device: str) -> None:
    cost = cost_of(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), 1, 4, 8, 10, device=device)
    assert cost.macs == cost.layer_macs == (6 * 4 * 5) * (4 // 2 * 3 * 3)
    assert cost.parameters == 6 * 2 * 3 * 3


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("heads", [1, 4])
def test_products_of_attention_are_counted_everywhere_but_in_layers(heads: int, device: str) -> None:
    length, channels = 16, 8
    cost = cost_of(Attention(heads), 3, length, channels, device=device)
    assert cost.macs == 3 * 2 * length**2 * channels
    assert cost.layer_macs == 0


def test_normalisation_is_free() -> None:
    network = nn.Sequential(nn.LayerNorm(4), nn.SiLU(), nn.GroupNorm(2, 6))
    cost = cost_of(network, 5, 6, 4)
    assert cost.macs == cost.layer_macs == 0
    assert cost.parameters == 2 * 4 + 2 * 6


def test_adapters_beside_a_layer_cost() -> None:
    from onestepsr.models.lora import LoraConfig, add_lora

    network = nn.Sequential(nn.Linear(8, 12), nn.Conv1d(3, 5, 3, padding=1))
    linear, convolution, rank = 3 * 8 * 12, 5 * 12 * 3 * 3, 2
    plain = cost_of(network, 1, 3, 8)
    assert plain.layer_macs == linear + convolution
    add_lora(network, LoraConfig(rank=rank, targets="0"))
    beside = cost_of(network, 1, 3, 8)
    assert beside.layer_macs == beside.macs == plain.layer_macs + 3 * rank * (8 + 12)
    assert beside.trainable == rank * (8 + 12)
    assert beside.parameters == plain.parameters + beside.trainable


class Prompted(nn.Module):
    """One of two layers is used, twice, on a free parameter; the other never."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(1, 3, 4))
        self.used, self.idle = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(self.used(self.prompt.expand(len(x), -1, -1)))


def test_only_parameters_in_use_are_counted_and_each_once() -> None:
    network = Prompted()
    network.prompt.requires_grad_(False)
    cost = cost_of(network, 2)
    assert cost.macs == 2 * (2 * 3 * 4 * 4)
    assert cost.parameters == 3 * 4 + 4 * 4
    assert cost.trainable == 4 * 4


def test_counting_leaves_the_network_as_it_was_even_when_it_fails() -> None:
    network = nn.Linear(4, 4, device="meta")
    with pytest.raises(RuntimeError):
        count(network, lambda: network(torch.zeros(1, 5, device="meta")))
    assert network.weight.requires_grad
    assert not torch.nn.modules.module._global_forward_hooks
    with torch.no_grad():  # whatever mode the caller is in
        assert cost_of(network, 1, 4).macs == 16


# ---- the stages of a generator ----


def evaluation(*shape: int) -> Call:
    return "forward", (shape,)


def test_operations_are_those_of_the_complexity_command() -> None:
    generator = load_generator("random:d3sr-tiny", dtype=torch.bfloat16)
    expected = {stage.name: stage.cost.macs for stage in measure("random:d3sr-tiny", 128).stages}
    assert count_stages(generator, [evaluation(1, 3, 32, 32)]) == expected
    mixed = count_stages(generator, [evaluation(n, 3, 32, 32) for n in (1, 1, 2)])
    assert mixed == {stage: 4 * macs for stage, macs in expected.items()}
    assert all(parameter.device.type == "cpu" for parameter in generator.parameters())
    assert not set(vars(generator)) & {"forward", *stages_of(generator)}


def test_every_step_of_a_sampler_counts() -> None:
    one, four = (
        count_stages(load_generator("random:resshift-micro", steps=steps), [evaluation(1, 3, 16, 16)])
        for steps in (1, 4)
    )
    assert list(one) == ["encode", "steps", "decode"]
    assert four == {**one, "steps": 4 * one["steps"]}


def test_the_steps_of_seesr_count() -> None:
    one, four = (count_stages(small_seesr(replace(SEESR, steps=steps)), [evaluation(1, 3, 8, 8)]) for steps in (1, 4))
    assert four == {**one, "steps": 4 * one["steps"]}
    assert one["steps"] > 0


def test_a_network_without_stages_counts_nothing() -> None:
    assert count_stages(load_generator("bicubic"), [evaluation(1, 3, 16, 16)]) == {}


def test_a_copy_without_contents_leaves_the_original() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    network[1].shared = network[0].weight
    empty = without_contents(network)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    assert empty[1].shared is empty[0].weight
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"cpu"}


def test_a_compiled_generator_is_counted_by_a_plain_copy() -> None:
    generator = load_generator("random:resshift-micro")
    compile_networks(generator)
    macs = count_stages(generator, [evaluation(1, 3, 16, 16)])
    assert min(macs.values()) > 0
    assert "encode" not in vars(without_contents(generator).autoencoder)
    assert "encode" in vars(generator.autoencoder)

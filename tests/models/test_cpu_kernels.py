"""Layers for bfloat16 on a CPU: packed weights give the same bits and can be had back; elsewhere float32 multiplies."""

import copy
import pickle

import pytest
import torch
from agreement import agree, decibels
from torch import nn

from onestepsr.benchmark.counting import without_contents
from onestepsr.core.machine import multiplies_bfloat16
from onestepsr.models import cpu_kernels
from onestepsr.models.cpu_kernels import PackedConvolution, PackedLinear, as_kind

pytestmark = pytest.mark.numeric

LAST = torch.channels_last
packs = pytest.mark.skipif(not multiplies_bfloat16(), reason="no instructions for bfloat16, so weights are not packed")


def layer_and_input(kind: type[nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    plain = nn.Linear(48, 33) if kind is PackedLinear else nn.Conv2d(64, 48, 3, 2, 1)
    x = torch.randn(2, 7, 48) if kind is PackedLinear else torch.randn(2, 64, 3, 5)
    return plain.bfloat16().requires_grad_(False), x.bfloat16()


@pytest.mark.parametrize("kind", [PackedConvolution, PackedLinear])
def test_without_instructions_for_bfloat16_float32_multiplies(kind, monkeypatch):
    """On every processor, as on those with AVX2 only, where neither oneDNN's packing nor bfloat16's products are."""
    monkeypatch.setattr(cpu_kernels, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(cpu_kernels, "LEAST_WEIGHT", 0)
    plain, x = layer_and_input(kind)
    layer = as_kind(kind, plain)
    with torch.inference_mode():
        found = layer(x)
        assert torch.equal(found, copy.deepcopy(plain).float()(x.float()).bfloat16())  # rounded once, at the end
    assert found.dtype == torch.bfloat16
    assert layer._packed is None
    assert layer.weight is plain.weight
    assert torch.equal(layer.requires_grad_(True)(x), plain(x))  # training computes as it says
    assert torch.equal(layer.float()(x.float()), plain.float()(x.float()))


@packs
@pytest.mark.parametrize(("stride", "kernel", "padding"), [(1, 3, 1), (2, 3, 0), (1, 1, 0)])
def test_packed_weights_give_the_same_bits(stride, kernel, padding, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "LEAST_WEIGHT", 0)
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 48, kernel, stride, padding).bfloat16().to(memory_format=LAST)
    packed = as_kind(PackedConvolution, plain)
    assert packed.weight is plain.weight
    for shape in ((1, 64, 4, 4), (2, 64, 3, 5)):  # packed for the first of them
        x = torch.randn(shape).bfloat16()
        with torch.inference_mode():
            for inputs in (x, x.contiguous(memory_format=LAST)):
                assert agree(packed(inputs), plain(inputs))
    assert packed._packed is not None
    assert packed.weight.is_meta  # there is no second copy
    assert (packed.weight.shape, packed.weight.dtype) == (plain.weight.shape, torch.bfloat16)
    assert not packed.weight.is_inference()


@packs
def test_packed_linear_layers_agree_and_can_be_had_back():
    torch.manual_seed(0)
    plain = nn.Linear(48, 33).bfloat16().requires_grad_(False)
    packed = as_kind(PackedLinear, plain)
    x = torch.randn(2, 7, 48).bfloat16()
    exact = copy.deepcopy(plain).float()(x.float())
    with torch.inference_mode():
        for inputs in (x, x[:1, 0], x.transpose(0, 1)):  # the same bits for most shapes
            assert decibels(plain(inputs), packed(inputs)) > 45.0
        assert decibels(exact, packed(x)) > 45.0
    assert packed.weight.is_meta
    assert torch.equal(copy.deepcopy(packed).weight, plain.weight)
    with torch.inference_mode():
        packed(x)
    assert torch.equal(packed.state_dict()["weight"], plain.weight)
    assert torch.allclose(packed.float()(x.float()), exact)
    packed.requires_grad_(True)(x.float()).sum().backward()
    assert packed.weight.grad is not None


@packs
def test_packed_weights_can_be_had_back():
    x = torch.randn(1, 64, 2, 2).bfloat16()
    plain = nn.Conv2d(64, 64, 3, padding=1).bfloat16().requires_grad_(False)
    packed = as_kind(PackedConvolution, plain)

    def fresh() -> PackedConvolution:
        with torch.inference_mode():
            assert agree(packed(x), plain(x))
        assert packed.weight.is_meta
        return packed

    assert torch.equal(fresh().state_dict()["weight"], plain.weight)
    assert torch.equal(pickle.loads(pickle.dumps(fresh())).weight, plain.weight)
    assert torch.equal(fresh().to(memory_format=LAST).weight, plain.weight)
    assert torch.equal(fresh()(x), plain(x))  # where gradients are computed
    fresh().requires_grad_(True)(x).sum().backward()
    assert packed.weight.grad is not None
    fresh()
    larger = torch.randn(1, 64, 60, 60).bfloat16()  # for which they would not have been packed
    exact = plain.float()(larger.float())
    with torch.inference_mode():
        assert decibels(exact, packed(larger)) > 50.0
    empty = without_contents(packed)
    assert empty.weight.is_meta
    assert packed._packed is not None


@packs
def test_changed_weights_are_packed_anew():
    x = torch.randn(1, 64, 2, 2).bfloat16().contiguous(memory_format=LAST)
    plain = nn.Conv2d(64, 64, 3, padding=1).bfloat16()
    other = nn.Conv2d(64, 64, 3, padding=1).bfloat16()
    packed = as_kind(PackedConvolution, plain)
    with torch.inference_mode():
        packed(x)
        assert agree(copy.deepcopy(packed)(x), plain(x))
    packed.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert agree(packed(x), other(x))
        assert torch.equal(packed.float()(x.float()), other.float()(x.float()))
        assert agree(packed.bfloat16()(x), other.bfloat16()(x))

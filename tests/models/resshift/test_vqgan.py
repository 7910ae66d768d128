"""The vector-quantised autoencoder: the published names and numbers at its published size, the rest on a small one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UserError
from onestepsr.models import cpu_kernels
from onestepsr.models.resshift import vqgan
from onestepsr.models.resshift.vqgan import VQ_F8_FACE, Codebook, VQAutoencoder, VQConfig
from weights_by_name import fill_by_name

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parents[2] / "golden" / "vq_f4.npz"
SMALL = VQConfig(width=8, multipliers=(1, 2, 2), blocks=(1, 1, 2), latent_channels=4, codes=32, norm_groups=4)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return VQAutoencoder(SMALL)


def image(*size, seed=0):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_names_and_shapes_are_the_published_ones(golden):
    with torch.device("meta"):
        network = VQAutoencoder()
    ours = [f"{name} {'x'.join(map(str, value.shape))}" for name, value in network.state_dict().items()]
    assert sorted(ours) == sorted(golden["keys"].tolist())
    assert sum(parameter.numel() for parameter in network.parameters()) == 55_322_782


@torch.no_grad()
def test_numbers_equal_published_code(golden):
    network = VQAutoencoder().to(memory_format=torch.channels_last).eval()
    fill_by_name(network)
    z = torch.from_numpy(golden["z"])
    assert np.abs(network.encode(torch.from_numpy(golden["x"])).numpy() - golden["z"]).max() < 2e-5
    differing = network.quantize.nearest(z)[0].numpy() != golden["idx"]
    assert not (differing.ravel() & (golden["quant_margin"] > 1e-5)).any()
    assert np.abs(network.decode(z).numpy() - golden["dec_quant"]).max() < 2e-5
    assert np.abs(network.decode(z, quantize=False).numpy() - golden["dec_noquant"]).max() < 2e-5


def test_face_variant_shrinks_by_eight():
    with torch.device("meta"):
        network = VQAutoencoder(VQ_F8_FACE)
        z = network.encode(torch.empty(1, 3, 64, 128))
        assert z.shape == (1, 8, 8, 16)
        assert network.decode(z, quantize=False).shape == (1, 3, 64, 128)
    assert (network.factor, network.latent_channels) == (8, 8)
    names = network.state_dict()
    assert {"encoder.down.3.block.3.conv1.weight", "decoder.up.3.block.4.conv1.weight"} <= names.keys()
    assert names["quantize.embedding.weight"].shape == (4096, 8)


@torch.no_grad()
def test_sizes_that_are_not_square(small):
    z = small.encode(image(24, 40))
    assert z.shape == (2, 4, 6, 10)
    assert small.decode(z).shape == (2, 3, 24, 40)
    assert torch.equal(small(image(24, 40)), small.decode(z))


@torch.no_grad()
def test_latents_are_rounded_to_codes_before_decoding(small):
    z = small.encode(image(16, 16))
    rounded = small.quantize(z)
    assert not torch.equal(rounded, z)
    assert torch.equal(small.quantize(rounded), rounded)
    assert torch.equal(small.decode(z), small.decode(rounded, quantize=False))


@pytest.mark.parametrize("at_once", [1, 100, 10_000])
def test_nearest_code_is_the_nearest(monkeypatch, at_once):
    monkeypatch.setattr(vqgan, "DISTANCES_AT_ONCE", at_once)
    rng = torch.Generator().manual_seed(0)
    codebook = Codebook(20, 3)
    codebook.embedding.weight.data = torch.randn(20, 3, generator=rng)
    z = torch.randn(2, 3, 4, 5, generator=rng)
    distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 3).double(), codebook.embedding.weight.double())
    assert torch.equal(codebook.nearest(z), distances.argmin(1).reshape(2, 4, 5))


def test_nearest_code_is_found_in_float32_whatever_the_latents_are():
    codebook = Codebook(2, 1)
    codebook.embedding.weight.data = torch.tensor([[100.0], [101.0]])
    z = torch.tensor([100.4, 100.6]).reshape(1, 1, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):  # 100^2 and 101^2 differ by less than its precision at 10,000
        assert codebook.nearest(z).tolist() == [[[0, 1]]]


def test_gradient_passes_the_rounding_as_if_it_were_not_there(small):
    z = small.encode(image(16, 16)).detach().requires_grad_()
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    rounded = small.quantize(z)
    assert torch.equal(rounded, small.quantize(z.detach()))
    (rounded * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_every_parameter_but_the_codes_gets_a_gradient(small):
    small.zero_grad()
    small(image(16, 16)).square().sum().backward()
    without = [name for name, p in small.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a constant added to every key changes no softmax
    assert set(without) - {"encoder.mid.attn_1.k.bias", "decoder.mid.attn_1.k.bias"} == {"quantize.embedding.weight"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "error", "keys"), [(torch.bfloat16, 0.03, 512), (torch.bfloat16, 0.03, 1), (torch.float16, 0.004, 512)]
)
def test_half_precision_stays_near_float32(small, dtype, error, keys, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "LEAST_KEYS", keys)  # from so many keys on, by blocks of queries
    half = VQAutoencoder(SMALL).to(dtype)
    half.load_state_dict(small.state_dict())
    x = image(16, 16)
    z = small.encode(x)
    assert (half.encode(x.to(dtype)).float() - z).std() < error * z.std()
    expected = small.decode(z, quantize=False)
    assert (half.decode(z.to(dtype), quantize=False).float() - expected).std() < error * expected.std()
    assert half.decode(z.to(dtype)).dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_never_falls_back_to_storing_all_pairs_of_positions(monkeypatch, layout):
    torch.manual_seed(0)
    network, attend, strides = VQAutoencoder(SMALL).to(memory_format=layout), F.scaled_dot_product_attention, []

    def record(*qkv):
        strides.extend(tensor.stride(-1) for tensor in qkv)
        return attend(*qkv)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    network(image(16, 24).contiguous(memory_format=layout))
    assert strides == [1] * 6


def test_memory_need_follows_sizes_and_number_format():
    with torch.device("meta"):
        network = VQAutoencoder()
    assert 3300 <= network.memory_per_pixel(torch.float32) <= 4000  # measured: 3297 for an image of 256 x 256
    assert network.memory_per_pixel(torch.bfloat16) == network.memory_per_pixel(torch.float32) / 2


def test_configuration_survives_a_mapping():
    assert from_mapping(VQConfig, to_mapping(VQ_F8_FACE)) == VQ_F8_FACE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 100}, "multiple of norm_groups 32, got 100"),
        ({"multipliers": [1, 2]}, r"one entry of 1 or more per level, got \(1, 2\)"),
        ({"blocks": [2, 0, 2]}, "one entry of 1 or more per level"),
        ({"multipliers": [], "blocks": []}, "one entry of 1 or more per level"),
        ({"codes": 0}, "codes must be 1 or more"),
    ],
)
def test_bad_sizes_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        from_mapping(VQConfig, change)
    assert replace(SMALL, codes=2).codes == 2

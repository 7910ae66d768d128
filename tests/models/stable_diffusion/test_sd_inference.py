"""What inference does differently from diffusers' own code: the same within stated tolerances, training untouched."""

import copy

import pytest
import torch
from agreement import decibels
from small_diffusion import GENERATOR

from onestepsr.benchmark.speed import load_plain
from onestepsr.core.machine import multiplies_bfloat16
from onestepsr.models import cpu_kernels, loading
from onestepsr.models.cpu_kernels import PackedConvolution
from onestepsr.models.stable_diffusion import inference
from onestepsr.models.stable_diffusion.networks import stable_diffusion_generator

pytestmark = pytest.mark.numeric

LAST = torch.channels_last


@pytest.fixture
def fast(monkeypatch):
    """A small generator as inference has it, which uses what only larger ones would."""
    monkeypatch.setattr(cpu_kernels, "LEAST_KEYS", 1)
    monkeypatch.setattr(cpu_kernels, "LEAST_WEIGHT", 0)
    plain = generator()
    made = copy.deepcopy(plain)
    made.speed_up()
    return plain, made


def generator():
    torch.manual_seed(0)
    return stable_diffusion_generator(GENERATOR).eval().requires_grad_(False)


def test_float32_is_what_diffusers_computes(fast):
    plain, made = fast
    lr = torch.rand(2, 3, 8, 12)
    assert torch.allclose(made(lr), plain(lr), atol=1e-5)  # sums are taken in another order


def test_bfloat16_agrees_as_well_as_diffusers_own(fast):
    plain, made = fast
    lr = torch.rand(1, 3, 16, 24)
    exact = plain(lr)
    with torch.inference_mode():
        usual = plain.bfloat16().to(memory_format=LAST)(lr.bfloat16())
        found = made.bfloat16().to(memory_format=LAST)(lr.bfloat16())
    packed = [layer._packed is not None for layer in made.modules() if isinstance(layer, PackedConvolution)]
    assert any(packed) == multiplies_bfloat16()  # without instructions for bfloat16, float32 multiplies
    assert decibels(exact, found) > min(decibels(exact, usual) - 1.0, 35.0)


def test_parameters_keep_their_names_and_gradients(fast):
    plain, made = fast
    assert {key: value.shape for key, value in made.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    made.requires_grad_(True)(torch.rand(1, 3, 4, 4)).square().mean().backward()
    gradients = [parameter.grad for parameter in made.unet.parameters()]
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize(("width", "embedded"), [(32, True), (64, False)])
def test_residual_blocks_in_place_give_the_same_bits(width, embedded):
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=32, out_channels=width, temb_channels=8 if embedded else None, groups=8)
    lean = inference.LeanResidualBlock(block.eval().requires_grad_(False))
    x, time = torch.randn(2, 32, 6, 10).contiguous(memory_format=LAST), torch.randn(2, 8) if embedded else None
    assert torch.equal(lean(x, time), block(x, time))
    block, x, time = block.bfloat16(), x.bfloat16(), None if time is None else time.bfloat16()
    before = x.clone()
    with torch.inference_mode():
        assert torch.equal(lean(x, time), block(x, time))
    assert torch.equal(x, before)


def test_transformers_keep_the_order_in_memory(fast):
    plain, made = fast
    x, prompt = torch.randn(2, 32, 6, 10).contiguous(memory_format=LAST), torch.randn(2, 3, 16)
    block, lean = plain.unet.unet.down_blocks[0].attentions[0], made.unet.unet.down_blocks[0].attentions[0]
    expected, found = block(x, encoder_hidden_states=prompt, return_dict=False)[0], lean(x, prompt)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.is_contiguous(memory_format=LAST)
    assert not expected.is_contiguous(memory_format=LAST)  # otherwise ours is no longer needed
    with pytest.raises(ValueError, match="prompt alone"):
        lean(x, prompt, attention_mask=torch.zeros(1))


def test_a_generator_loaded_for_inference_has_it_all(monkeypatch):
    monkeypatch.setattr(loading, "load_network", lambda name: generator())
    made = loading.load_generator("any", dtype=torch.bfloat16)
    for part in (made.unet, made.autoencoder):
        assert any(isinstance(layer, PackedConvolution) for layer in part.modules())
        assert any(isinstance(getattr(m, "processor", None), inference.BlockwiseAttention) for m in part.modules())
        assert not any(type(layer).__name__ == "ResnetBlock2D" for layer in part.modules())


def test_the_baseline_of_speed_is_what_diffusers_wrote(monkeypatch):
    monkeypatch.setattr(loading, "load_network", lambda name: generator())
    made = load_plain("any", torch.device("cpu"))
    ours = {module.__class__.__module__ for module in made.modules()} & {
        inference.__name__,
        PackedConvolution.__module__,
    }
    assert ours == set()
    assert any(type(layer).__name__ == "ResnetBlock2D" for layer in made.modules())


def test_training_starts_from_plain_layers():
    assert not any(isinstance(layer, PackedConvolution) for layer in generator().modules())


def test_diffusers_finds_nothing_to_warn_of(fast, monkeypatch):
    from diffusers.models import attention_processor

    said = []
    monkeypatch.setattr(attention_processor.logger, "warning", said.append)
    with torch.inference_mode():
        fast[1](torch.rand(1, 3, 8, 8))
    assert said == []


def test_last_layers_lose_no_digits(fast):
    x = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        wide = fast[1].autoencoder.bfloat16().encode(x.bfloat16())
        image = fast[1].autoencoder.decode(wide.bfloat16())
    for output in (wide, image):
        assert output.dtype == torch.float32
        assert not torch.equal(output, output.bfloat16().float())


def test_masks_are_refused():
    with pytest.raises(ValueError, match="no mask"):
        inference.BlockwiseAttention()(None, torch.zeros(1, 1, 1), attention_mask=torch.zeros(1, 1))

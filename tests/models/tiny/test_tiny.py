"""The tiny backbone: the DCT start, shapes, statistics, and gradients everywhere."""

import dataclasses
from typing import Any

import pytest
import torch

from onestepsr.models.loading import load_network
from onestepsr.models.tiny.networks import (
    ResidualBlock,
    TinyAutoencoder,
    TinyConfig,
    TinyUNet,
    block_dct,
    timestep_embedding,
)

pytestmark = pytest.mark.numeric

SMALL = TinyConfig(
    encoder_width=8,
    decoder_width=8,
    widths=(8, 16),
    down_blocks=(1, 1),
    up_blocks=(1, 1),
    time_width=16,
    prompt_width=8,
)


@pytest.fixture
def picture() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 3, 3, generator=rng)
    return (
        torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=True).clamp(0, 1) * 2 - 1
    )


def test_block_dct_is_orthonormal():
    basis = block_dct(16, 16)
    assert torch.allclose(basis @ basis.T, torch.eye(48), atol=1e-6)


def test_complete_dct_starts_lossless(picture):
    autoencoder = TinyAutoencoder(TinyConfig(luma_channels=16, chroma_channels=16)).eval()
    assert torch.allclose(autoencoder.decode(autoencoder.encode(picture)), picture, atol=1e-5)


def test_default_start_is_close_to_lossless(picture):
    autoencoder = TinyAutoencoder().eval()
    error = (autoencoder.decode(autoencoder.encode(picture)) - picture).square().mean()
    assert error < 1e-3 * picture.square().mean()


def test_statistics_normalise_the_latent(picture):
    autoencoder = TinyAutoencoder(SMALL).train()
    before = autoencoder(picture)[0].detach()
    autoencoder.eval()
    z = autoencoder.encode(picture)
    assert z.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert torch.allclose(z.var(dim=(0, 2, 3)), torch.ones(z.shape[1]), atol=1e-3)
    assert torch.allclose(autoencoder.decode(z), before, atol=1e-4)


def test_statistics_stay_where_the_encoder_is_frozen(picture):
    autoencoder = TinyAutoencoder(SMALL).train()
    autoencoder(picture)
    tracked = autoencoder.latent_mean.clone()
    autoencoder(0.5 * picture)
    assert not torch.equal(autoencoder.latent_mean, tracked), "they follow an encoder that is trained"
    tracked = autoencoder.latent_mean.clone()
    autoencoder.encoder_linear.requires_grad_(False)
    autoencoder(picture)
    assert torch.equal(autoencoder.latent_mean, tracked)


def test_noise_samples_the_posterior(picture):
    autoencoder = TinyAutoencoder(SMALL).eval()
    noise = torch.ones(2, SMALL.latent_channels, 8, 8)
    _, mean, log_variance = autoencoder(picture, noise)
    expected = autoencoder.decode(mean + (0.5 * log_variance).exp()[:, None, None])
    assert torch.allclose(autoencoder(picture, noise)[0], expected)


def test_unet_predicts_one_value_per_latent_value():
    unet = TinyUNet(SMALL)
    z = torch.randn(2, SMALL.latent_channels, 6, 10)
    eps = unet(z, torch.tensor([3, 900]), torch.randn(1, 8, 8))
    assert eps.shape == z.shape
    assert unet.size_multiple == 2


def test_prompt_and_time_matter():
    torch.manual_seed(0)
    unet = TinyUNet(SMALL)
    torch.nn.init.normal_(unet.conv_out.weight)
    z, t = torch.randn(1, SMALL.latent_channels, 8, 8), torch.tensor([10])
    prompt = torch.randn(1, 8, 8)
    base = unet(z, t, prompt)
    assert not torch.allclose(base, unet(z, t + 500, prompt))
    assert not torch.allclose(base, unet(z, t, -prompt))


def test_every_parameter_gets_a_gradient(picture):
    torch.manual_seed(0)
    autoencoder, unet = TinyAutoencoder(SMALL), TinyUNet(SMALL)
    for module in (unet.conv_out, autoencoder.decoder.conv_out, autoencoder.encoder[-1]):
        torch.nn.init.normal_(module.weight, std=0.1)
    prompt = torch.randn(1, 8, 8, requires_grad=True)
    reconstruction, mean, _ = autoencoder(picture, torch.randn(2, SMALL.latent_channels, 8, 8))
    eps = unet(mean, torch.tensor([1, 2]), prompt)
    (reconstruction.square().mean() + eps.square().mean()).backward()
    missing = [name for network in (autoencoder, unet) for name, p in network.named_parameters() if p.grad is None]
    assert missing == []
    assert prompt.grad is not None
    assert prompt.grad.abs().sum() > 0


def test_timestep_embedding_is_cosines_then_sines():
    embedding = timestep_embedding(torch.tensor([0, 7]), 8)
    assert torch.equal(embedding[0], torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    assert embedding[1, 4] == pytest.approx(torch.tensor(7.0).sin().item())


def test_levels_must_agree():
    with pytest.raises(ValueError, match="one entry per level"):
        TinyConfig(widths=(8, 16), down_blocks=(1,))


def test_refinement_starts_as_nothing_and_sees_across_cells():
    torch.manual_seed(0)
    plain, refined = (TinyAutoencoder(TinyConfig(refine_width=width)).eval() for width in (0, 4))
    refined.load_state_dict(plain.state_dict(), strict=False)
    z = torch.randn(1, plain.latent_channels, 5, 5)
    torch.testing.assert_close(refined.decode(z), plain.decode(z))
    torch.nn.init.normal_(refined.decoder.refine.conv2.weight)
    image, half = torch.zeros(1, 3, 16, 16), torch.zeros(1, refined.decoder.conv_half.out_channels, 8, 8)
    touched = image.clone()
    touched[..., 7, 7] = 1.0  # the last pixel of a cell
    change = (refined.decoder.refine(touched, half) - refined.decoder.refine(image, half)).abs().sum(1)[0] > 0
    assert change[5:10, 5:10].all()
    assert change.sum() == 25


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"encoder_width": 0}, "at least 1"),
        ({"down_blocks": (1, 1, -1)}, "at least 1"),
        ({"decoder_blocks": -1}, "negative"),
        ({"refine_blocks": 1}, "refine_width"),
        ({"luma_channels": 17}, "luma_channels"),
    ],
)
def test_sizes_that_no_network_has_are_refused(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TinyConfig(**sizes)


@pytest.mark.parametrize("name", ["d3sr-tiny", "d3sr-tiny-fidelity"])
@pytest.mark.parametrize("pattern", ["columns", "rows", "checks", "halves"])
def test_pure_colours_stay_images(name: str, pattern: str) -> None:
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    mask = {"columns": columns % 2, "rows": rows % 2, "checks": (rows + columns) % 2, "halves": columns // 16}[pattern]
    first, second = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), torch.eye(3)
    lr = torch.where(mask.bool(), first[:, :, None, None], second[:, :, None, None])
    shifted = torch.where(mask.bool(), second[:, :, None, None], first[:, :, None, None])
    with torch.no_grad():
        sr = load_network(name)(torch.cat([lr, shifted]))
    # Beyond 0 and 1 is clipped. Some columns and rows of one pixel come out far too bright, but within bounds.
    beyond = 2 if name == "d3sr-tiny" else 6
    assert sr.min() > -beyond
    assert sr.max() < 1 + beyond


def test_training_meets_no_denormal_numbers() -> None:
    """Far below zero silu's derivative times a gradient is near 1e-40; processors multiply such numbers very slowly."""
    torch.manual_seed(0)
    block = ResidualBlock(4)
    with torch.no_grad():
        block.conv1.bias.copy_(torch.tensor([-30.0, -80.0, -86.0, -150.0]))  # type: ignore[union-attr]
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    inner: list[torch.Tensor] = []
    block.conv2.register_forward_hook(lambda module, inputs, output: inner.append(inputs[0]))
    block.conv1.register_full_backward_hook(lambda module, into, out: inner.append(out[0]))
    trained = block(x)
    (1e-4 * trained).sum().backward()
    assert len(inner) == 2
    for values in inner:
        assert not ((values != 0) & (values.abs() < torch.finfo(torch.float32).tiny)).any()
    with torch.no_grad():
        assert torch.equal(block(x), trained), "the same image as without gradients"


def test_without_gradients_the_image_is_the_same_and_the_inputs_stay() -> None:
    """There, activations and sums overwrite what is not needed any more."""
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, decoder_blocks=1, refine_width=4, refine_blocks=1)
    autoencoder, unet = TinyAutoencoder(config).eval(), TinyUNet(config).eval()
    for network in (autoencoder, unet):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    z, step, prompt = torch.randn(1, 20, 8, 8), torch.tensor([399]), torch.randn(1, 8, 8)
    kept = z.clone()
    noise, image = unet(z, step, prompt), autoencoder.decode(z)
    with torch.no_grad():
        assert torch.equal(unet(z, step, prompt), noise)
        assert torch.equal(autoencoder.decode(z), image)
    assert torch.equal(z, kept)

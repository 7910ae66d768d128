"""The small denoising network of residual shifting: called like ResShift's UNet, local, free to start from."""

import pytest
import torch
from torch import Tensor

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UserError
from onestepsr.models.resshift.unet import SwinConfig, SwinUNet, SwinUNetConfig
from onestepsr.models.tiny.denoiser import TinyDenoiser, TinyDenoiserConfig

pytestmark = pytest.mark.numeric

SMALL = TinyDenoiserConfig(widths=(8, 12, 16), down_blocks=(1, 1, 2), up_blocks=(1, 2, 1), time_width=16)
SMALL_SWIN = SwinUNetConfig(
    image_size=16,
    latent_channels=20,
    lq_size=16,
    model_channels=16,
    channel_mult=(1, 2),
    res_blocks=2,
    norm_groups=8,
    swin=SwinConfig(width=16, head_width=8),
)


def network(config: TinyDenoiserConfig = SMALL) -> TinyDenoiser:
    """Random weights, also where a new network starts from zero."""
    torch.manual_seed(0)
    built = TinyDenoiser(config)
    for parameter in built.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return built


def inputs(n: int = 2, height: int = 16, width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, 20, height, width, generator=rng)
    return x, torch.arange(n) * 7, torch.randn(n, 3, height, width, generator=rng)


def test_output_follows_every_argument_and_starts_at_zero():
    x, t, lq = inputs()
    assert not TinyDenoiser(SMALL)(x, t, lq).any()
    built = network()
    out = built(x, t, lq)
    assert out.shape == x.shape
    for changed in ((x + 1, t, lq), (x, t + 1, lq), (x, t, lq + 1)):
        assert not torch.allclose(built(*changed), out, atol=1e-3)


def test_every_parameter_gets_a_gradient():
    built = network()
    built(*inputs()).square().sum().backward()
    assert [name for name, p in built.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("build", [network, lambda: SwinUNet(SMALL_SWIN)], ids=["tiny", "swin"])
def test_features_are_one_map_per_level_as_announced(build):
    built, (x, t, lq) = build(), inputs()
    middle, skips, emb = built.encode(x, t, lq)
    maps = built.features(x, t, lq)
    assert tuple(found.shape[1] for found in maps) == built.feature_channels
    assert [tuple(found.shape[2:]) for found in maps] == [(16 >> k, 32 >> k) for k in range(len(maps))]
    assert torch.equal(maps[-1], middle)
    for found in maps[:-1]:  # the last of its size
        same = [skip for skip in skips if skip.shape == found.shape]
        assert torch.equal(found, same[-1])
    assert torch.equal(built.embed_time(t), emb)
    assert emb.shape == (2, built.time_channels)


def test_far_positions_do_not_matter():
    built, (x, t, lq) = network(), inputs(1, 16, 128)
    changed = lq.clone()
    changed[..., 100:] += 1
    whole, part = built(x, t, lq), built(x, t, changed)
    assert torch.allclose(whole[..., :32], part[..., :32], atol=1e-6)
    assert not torch.allclose(whole[..., 100:], part[..., 100:], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_become_what_the_weights_are(dtype):
    x, t, lq = inputs()
    built = network()
    expected = built(x, t, lq)
    out = built.to(dtype)(x, t, lq)
    assert out.dtype == torch.float32
    assert (out - expected).std() < 0.03 * expected.std()


def test_sides_that_do_not_fit_are_refused():
    x, t, lq = inputs()
    with pytest.raises(ValueError, match=r"multiples of 4, got 16x30"):
        network()(x[..., :30], t, lq[..., :30])
    with pytest.raises(ValueError, match=r"condition of a 16x32 latent must be 16x32, got 8x32"):
        network()(x, t, lq[..., :8, :])


def test_default_fits_the_default_autoencoder_and_is_small():
    with torch.device("meta"):
        built = TinyDenoiser()
    assert built.latent_channels == 20
    assert 500_000 < sum(p.numel() for p in built.parameters()) < 1_500_000


def test_configuration_survives_a_mapping_and_is_checked():
    assert from_mapping(TinyDenoiserConfig, to_mapping(SMALL)) == SMALL
    for change in ({"widths": [8]}, {"time_width": 15}, {"down_blocks": [0, 1, 1]}):
        with pytest.raises(UserError):
            from_mapping(TinyDenoiserConfig, change)

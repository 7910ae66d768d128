"""Adapters: only they train, they start as no change, and merging keeps the output, on both backbones."""

import pytest
import torch
from small_diffusion import UNET, XL

from onestepsr.core.errors import UserError
from onestepsr.models.backbones import load_backbone
from onestepsr.models.lora import LoraConfig, add_lora, lora_layers, merged_state_dict
from onestepsr.models.stable_diffusion.config import StableDiffusionEncoderConfig
from onestepsr.models.stable_diffusion.networks import StableDiffusionUNet, StableDiffusionUNetEncoder
from onestepsr.models.tiny.networks import TinyConfig, TinyUNet

OSEDIFF = r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv\w*)"
SMALL = TinyConfig(widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16, prompt_width=16)


def run(unet) -> torch.Tensor:
    channels = SMALL.latent_channels if isinstance(unet, TinyUNet) else 4
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(1, channels, 8, 8, generator=rng)
    return unet(z, torch.tensor([7]), torch.ones(1, 8, 16))


@pytest.fixture(params=["tiny", "stable diffusion"])
def unet(request):
    torch.manual_seed(0)
    if request.param == "stable diffusion":
        return StableDiffusionUNet(UNET).eval()
    unet = TinyUNet(SMALL)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    return unet


def trainable(network) -> list[str]:
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def test_adapters_start_as_no_change_and_only_they_train(unet):
    before = run(unet)
    names = add_lora(unet, LoraConfig(rank=2, alpha=2.0))
    assert torch.allclose(run(unet), before, atol=1e-6)
    assert trainable(unet)
    assert all("lora_" in name for name in trainable(unet))
    assert len(trainable(unet)) == 2 * len(names)
    run(unet).square().mean().backward()
    with_gradient = [name for name, parameter in unet.named_parameters() if parameter.grad is not None]
    assert with_gradient == trainable(unet)


def test_merging_keeps_output_and_keys(unet):
    keys = list(unet.state_dict())
    before = run(unet)
    add_lora(unet, LoraConfig(rank=2, alpha=4.0))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapted = run(unet)
    assert not torch.allclose(adapted, before, atol=1e-3)
    merged = merged_state_dict(unet)
    assert list(merged) == keys
    plain = type(unet)(unet.config).eval()
    plain.load_state_dict(merged)
    assert torch.allclose(run(plain), adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(unet), adapted)


def test_each_network_has_its_own_layers():
    names = lora_layers(StableDiffusionUNet(UNET))
    for name in (
        "unet.down_blocks.0.resnets.0.conv1",
        "unet.down_blocks.0.resnets.0.time_emb_proj",
        "unet.down_blocks.0.downsamplers.0.conv",
        "unet.down_blocks.0.attentions.0.proj_in",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
        "unet.up_blocks.0.resnets.0.conv_shortcut",
        "unet.up_blocks.0.upsamplers.0.conv",
    ):
        assert name in names
    assert not {"unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1"}.intersection(names)
    assert "encoder.mid_attention.to_q" in lora_layers(TinyUNet(SMALL))


@pytest.mark.parametrize(
    ("targets", "layers", "parameters"),
    [
        (None, 278, 16_944_128),
        (OSEDIFF, 258, 16_222_848),
        (r".*(to_q|to_k|to_v|to_out\.0)", 128, 3_319_808),
        (r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out)", 160, 4_118_528),
        (r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)", 192, 6_914_048),
        (r".*", 282, 17_062_528),
    ],
)
def test_adapters_of_stable_diffusion_have_the_documented_size(targets, layers, parameters):
    with torch.device("meta"):
        backbone = load_backbone("random:sd21-base")
        assert len(add_lora(backbone.unet, LoraConfig(targets=targets))) == layers
    assert sum(p.numel() for p in backbone.unet.parameters() if p.requires_grad) == parameters
    if targets is None:  # the paper says 966.3 M
        assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(966.3e6, abs=0.5e6)


def test_at_rank_four_they_are_as_many_as_osediff_has():
    with torch.device("meta"):
        unet = load_backbone("random:sd21-base").unet
        add_lora(unet, LoraConfig(rank=4, targets=OSEDIFF))
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 4_055_712


def test_pooled_prompt_of_xl_stays_trainable_beside_adapters():
    encoder = StableDiffusionUNetEncoder(StableDiffusionEncoderConfig(unet=XL))
    add_lora(encoder, LoraConfig(rank=2))
    assert "pooled_prompt" in trainable(encoder)
    assert all("lora_" in name or name == "pooled_prompt" for name in trainable(encoder))


def test_targets_that_match_nothing_are_refused(unet):
    with pytest.raises(UserError, match="match no linear or convolution"):
        add_lora(unet, LoraConfig(targets="nothing"))
    assert trainable(unet)  # and nothing has been frozen
    with pytest.raises(UserError, match="a Linear has no default"):
        lora_layers(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no regular expression"):
        LoraConfig(targets="(")

"""Adapters: only they train, they start as no change, and merging keeps the output."""

import pytest
import torch

from onestepsr.errors import UserError
from onestepsr.models.lora import LoraConfig, add_lora, merge_lora
from onestepsr.models.tiny import TinyConfig, TinyUNet

SMALL = TinyConfig(widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16, prompt_width=8)


def run(unet: TinyUNet) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(1, SMALL.latent_channels, 8, 8, generator=rng)
    return unet(z, torch.tensor([7]), torch.ones(1, 8, 8))


@pytest.fixture
def unet() -> TinyUNet:
    torch.manual_seed(0)
    unet = TinyUNet(SMALL)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    return unet


def test_adapters_start_as_no_change_and_only_they_train(unet):
    before = run(unet)
    names = add_lora(unet, LoraConfig(rank=2, alpha=2.0))
    assert torch.allclose(run(unet), before, atol=1e-6)
    assert "encoder.levels.0.0.conv1" in names
    assert "encoder.mid_attention.to_q" in names
    trainable = [name for name, p in unet.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


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
    assert torch.allclose(run(merge_lora(unet)), adapted, rtol=1e-4, atol=1e-4)
    assert list(unet.state_dict()) == keys


def test_targets_that_match_nothing_are_refused(unet):
    with pytest.raises(UserError, match="match no linear or convolution"):
        add_lora(unet, LoraConfig(targets="nothing"))

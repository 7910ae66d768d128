"""Stable Diffusion's networks: exact sizes, diffusers' own output, half a UNet, conditions of SDXL."""

import dataclasses

import pytest
import torch
from small_diffusion import AUTOENCODER, GENERATOR, UNET, XL, diffusers_unet, diffusers_vae

from onestepsr.models.backbones import load_backbone, load_discriminator_backbone, unet_encoder_of
from onestepsr.models.stable_diffusion.config import (
    SD21_BASE,
    SDXL_BASE,
    PromptConfig,
    SDXLConditioning,
    StableDiffusionEncoderConfig,
    StableDiffusionGeneratorConfig,
    UNetConfig,
)
from onestepsr.models.stable_diffusion.networks import (
    StableDiffusionUNetEncoder,
    stable_diffusion_generator,
)

pytestmark = pytest.mark.numeric

DTYPES = (torch.float32, torch.bfloat16)


def half_unet(config, **conditioning) -> StableDiffusionUNetEncoder:
    return StableDiffusionUNetEncoder(StableDiffusionEncoderConfig(unet=config, sdxl=SDXLConditioning(**conditioning)))


def count(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return stable_diffusion_generator(GENERATOR).eval().requires_grad_(False)


def test_published_sizes_are_met_to_the_parameter():
    with torch.device("meta"):
        backbone = load_backbone("random:sd21-base")
        encoder, prompt = load_discriminator_backbone("random:sd21-base")
        xl, xl_prompt = load_discriminator_backbone("random:sdxl-base")
    assert count(backbone.unet) == 865_910_724
    assert count(backbone.autoencoder) == 83_653_863
    assert backbone.prompt.shape == prompt.shape == (1, 77, 1024)
    assert backbone.lr_multiple == 16
    assert count(encoder) == 351_662_080
    assert count(xl.unet) == 1_243_367_040
    assert xl.pooled_prompt.shape == (1, 1280)
    assert xl_prompt.shape == (1, 77, 2048)
    assert {p.device.type for n in (backbone, encoder, xl) for p in n.parameters()} == {"meta"}


def test_networks_run_on_the_meta_device():
    with torch.device("meta"):
        assert load_backbone("random:sd21-base")(torch.zeros(1, 3, 128, 128)).shape == (1, 3, 512, 512)
        xl, prompt = load_discriminator_backbone("random:sdxl-base")
        assert xl(torch.zeros(2, 4, 64, 64), torch.zeros(2).long(), prompt)[0].shape == (2, 1280, 16, 16)


@pytest.mark.parametrize("config", [SD21_BASE, SDXL_BASE])
def test_a_half_has_diffusers_names_and_shapes(config):
    with torch.device("meta"):
        half, whole = half_unet(config).unet.state_dict(), diffusers_unet(config).state_dict()
    other = ("up_blocks.", "conv_norm_out.", "conv_out.")
    assert {key: value.shape for key, value in half.items()} == {
        key: value.shape for key, value in whole.items() if not key.startswith(other)
    }


def test_generator_does_what_the_diffusers_classes_do(generator):
    unet, vae = diffusers_unet(), diffusers_vae()
    generator = stable_diffusion_generator(GENERATOR).eval().requires_grad_(False)
    generator.unet.unet.load_state_dict(unet.state_dict())
    generator.autoencoder.vae.load_state_dict(vae.state_dict())
    lr = torch.rand(2, 3, 8, 12)
    enlarged = torch.nn.functional.interpolate(lr, scale_factor=4.0, mode="bicubic", align_corners=False)
    z_l = vae.encode(enlarged * 2 - 1).latent_dist.mean * 0.18215
    eps = unet(z_l, torch.tensor(300), generator.prompt.expand(2, -1, -1)).sample
    alpha_bar = generator.schedule.alpha_bar[300]
    z_h = (z_l - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    expected = vae.decode(z_h / 0.18215).sample / 2 + 0.5
    assert torch.allclose(generator(lr), expected, atol=1e-5)


def test_half_of_a_generator_gives_the_middle_features_of_its_unet(generator):
    features, whole = [], generator.unet.unet
    hook = whole.mid_block.register_forward_hook(lambda module, inputs, output: features.append(output))
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    generator.unet(z, t, generator.prompt)
    hook.remove()
    half = unet_encoder_of(generator)
    assert torch.equal(half(z, t, generator.prompt)[0], features[0])
    assert half.feature_channels == features[0].shape[1] == 64
    assert half.latent_channels == 4
    assert half.latent_gain == 1.0
    half.unet.conv_in.weight.data.zero_()
    assert generator.unet.unet.conv_in.weight.abs().sum() > 0  # it was a copy


def xl_encoder(**conditioning):
    torch.manual_seed(0)
    return half_unet(XL, **conditioning).eval()


def test_xl_is_told_pooled_text_and_sizes():
    encoder, whole = xl_encoder(), diffusers_unet(XL)
    encoder.unet.load_state_dict(whole.state_dict(), strict=False)
    features = []
    whole.mid_block.register_forward_hook(lambda module, inputs, output: features.append(output))
    z, t, prompt = torch.randn(2, 4, 8, 16), torch.tensor([3, 700]), torch.randn(1, 5, 24)
    ids = torch.tensor([[64.0, 128.0, 0.0, 0.0, 64.0, 128.0]]).expand(2, -1)
    whole(z, t, prompt.expand(2, -1, -1), added_cond_kwargs={"text_embeds": torch.zeros(2, 16), "time_ids": ids})
    assert torch.allclose(encoder(z, t, prompt)[0], features[0], atol=1e-5)
    with torch.no_grad():
        encoder.pooled_prompt.add_(1.0)
    assert not torch.allclose(encoder(z, t, prompt)[0], features[0], atol=1e-3)


def test_xl_choices_change_what_they_say():
    z, t, prompt = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.zeros(1, 1, 24)
    actual, fixed, as_if = xl_encoder(), xl_encoder(size="fixed"), xl_encoder(size="fixed", fixed_side=64)
    assert not torch.allclose(actual(z, t, prompt)[0], fixed(z, t, prompt)[0], atol=1e-4)
    assert torch.equal(actual(z, t, prompt)[0], as_if(z, t, prompt)[0])
    assert xl_encoder().latent_gain == 1.0
    assert xl_encoder(latent_scale="rescaled").latent_gain == pytest.approx(0.13025 / 0.18215)
    assert half_unet(UNET, latent_scale="rescaled").latent_gain == 1.0


def test_a_frozen_prompt_changes_nothing_and_drops_layers(generator):
    frozen = stable_diffusion_generator(GENERATOR).eval().requires_grad_(False)
    frozen.load_state_dict(generator.state_dict())
    lr = torch.rand(2, 3, 8, 8)
    before = frozen(lr)
    frozen.freeze_prompt()
    assert torch.allclose(frozen(lr), before, atol=1e-6)
    gone = {key for key in generator.state_dict() if key not in frozen.state_dict()}
    assert gone
    assert all("attn2.to_k" in key or "attn2.to_v" in key for key in gone)
    assert torch.allclose(frozen.to(torch.bfloat16)(lr.bfloat16()).float(), before, atol=0.1)


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    generator, lr = stable_diffusion_generator(GENERATOR).train(), torch.rand(1, 3, 4, 4)

    def gradients():
        generator.zero_grad()
        generator(lr).square().mean().backward()
        return [parameter.grad.clone() for parameter in generator.parameters() if parameter.grad is not None]

    plain = gradients()
    generator.unet.enable_gradient_checkpointing()
    generator.autoencoder.enable_gradient_checkpointing()
    again = gradients()
    assert len(plain) == len(again) > 100
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


def test_prompt_start_is_configuration():
    prompts = [
        stable_diffusion_generator(dataclasses.replace(GENERATOR, prompt=PromptConfig(**values))).prompt
        for values in ({"tokens": 3, "std": 0.0}, {"seed": 1}, {"seed": 1}, {"seed": 2})
    ]
    assert prompts[0].shape == (1, 3, 16)
    assert not prompts[0].any()
    assert torch.equal(prompts[1], prompts[2])
    assert not torch.equal(prompts[1], prompts[3])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UNetConfig(in_channels=9), "takes 9 channels and predicts 4"),
        (lambda: UNetConfig(block_out_channels=(32,)), "one entry per level"),
        (lambda: StableDiffusionGeneratorConfig(unet=SDXL_BASE), "width of 2048 .* 1024"),
        (
            lambda: StableDiffusionGeneratorConfig(autoencoder=dataclasses.replace(AUTOENCODER, latent_channels=16)),
            "takes 4 latent channels, the autoencoder gives 16",
        ),
        (lambda: PromptConfig(tokens=0), "at least 1 token"),
        (lambda: SDXLConditioning(fixed_side=0), "fixed_side"),
    ],
)
def test_sizes_that_cannot_work_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()

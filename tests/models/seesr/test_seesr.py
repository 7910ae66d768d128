"""SeeSR: names and sizes, layers and steps against diffusers' own parts, and reading its published folders."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_seesr import CONFIG, small_seesr, write_published
from small_text_model import WIDTH, write_text_encoder
from torch import Tensor, nn
from typer.testing import CliRunner

from onestepsr.cli.main import app
from onestepsr.core.errors import UserError
from onestepsr.diffusion.residual_shift import NoisePlane
from onestepsr.models.architectures import random_backbone, random_generator
from onestepsr.models.convert import convert
from onestepsr.models.loading import load_generator, load_network
from onestepsr.models.seesr.generator import (
    ADDED_PROMPT,
    NEGATIVE_PROMPT,
    SeeSRConfig,
    looks_published,
    read_published,
)
from onestepsr.models.seesr.networks import SeeSRCondition, joined_prompt
from onestepsr.prompts.embedder import PromptEmbedder
from onestepsr.weights import download
from onestepsr.weights.catalog import get_model


def inputs(seed: int = 3) -> tuple[Tensor, Tensor, SeeSRCondition]:
    """Latent, steps and condition of two samples."""
    rng = torch.Generator().manual_seed(seed)
    z, control, text, image = (
        torch.randn(shape, generator=rng) for shape in ((2, 4, 8, 8), (2, 3, 16, 16), (2, 5, 16), (2, 6, 12))
    )
    return z, torch.tensor([3, 900]), SeeSRCondition(control.sigmoid(), text, image)


# ---- names and sizes ----


def test_names_and_sizes_are_those_of_the_published_code() -> None:
    """Beside every layer of diffusers' networks below ``attentions`` there is one below ``image_attentions``; only keys
    and values of the tokens have another width."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    with torch.device("meta"):
        generator: Any = random_generator("random:seesr")
        unet = UNet2DConditionModel.from_config(dict(generator.denoiser.unet.config))
        controlnet = ControlNetModel.from_config(dict(generator.denoiser.controlnet.config))
    for ours, plain, image_layers in (
        (generator.denoiser.unet, unet, 16),
        (generator.denoiser.controlnet, controlnet, 7),
    ):
        expected = {key: tuple(value.shape) for key, value in plain.state_dict().items()}
        for key, shape in list(expected.items()):
            if ".attentions." in key:
                width = (*shape[:-1], 512) if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) else shape
                expected[key.replace(".attentions.", ".image_attentions.")] = width
        assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == expected
        assert (
            sum(".image_attentions." in key and key.endswith("attn2.to_k.weight") for key in expected) == image_layers
        )
    counts = [sum(p.numel() for p in part.parameters()) for part in (unet, controlnet)]
    assert counts == [865_910_724, 364_228_240]
    total = sum(p.numel() for p in generator.denoiser.parameters())
    assert total == 1_126_760_324 + 489_031_440
    assert "down_blocks.2.image_attentions.1.transformer_blocks.0.attn2.to_v.weight" in unet_names(generator)
    generator.denoiser.train_only()
    trained = {name for name, parameter in generator.denoiser.named_parameters() if parameter.requires_grad}
    assert all("image_attentions" in name or "controlnet_cond_embedding" in name for name in trained)
    assert sum(p.numel() for p in generator.denoiser.parameters() if p.requires_grad) == 386_739_280
    with pytest.raises(UserError, match="no latent-diffusion backbone"):
        random_backbone("random:seesr")


def unet_names(generator: Any) -> set[str]:
    return set(generator.denoiser.unet.state_dict())


# ---- layers ----


def through(block: Any, h: Tensor, emb: Tensor, y: SeeSRCondition, skips: list[Tensor] | None = None) -> Any:
    """A block of diffusers, layer by layer: the residual block, then the text's transformer, then the image's."""
    outputs = []
    for index, resnet in enumerate(block.resnets):
        h = resnet(h if skips is None else torch.cat([h, skips.pop()], dim=1), emb)
        if hasattr(block, "attentions"):
            layer = block.attentions[index]
            h = type(layer).forward(layer, h, encoder_hidden_states=y.text, return_dict=False)[0]
            h = block.image_attentions[index](h, encoder_hidden_states=y.image, return_dict=False)[0]
        outputs.append(h)
    for sampler in getattr(block, "downsamplers" if skips is None else "upsamplers", None) or ():
        h = sampler(h)
        outputs.append(h)
    return h, outputs


def middle_of(block: Any, h: Tensor, emb: Tensor, y: SeeSRCondition) -> Tensor:
    h = block.resnets[0](h, emb)
    h = type(block.attentions[0]).forward(block.attentions[0], h, encoder_hidden_states=y.text, return_dict=False)[0]
    h = block.image_attentions[0](h, encoder_hidden_states=y.image, return_dict=False)[0]
    result: Tensor = block.resnets[1](h, emb)
    return result


def reference(network: Any, z: Tensor, t: Tensor, y: SeeSRCondition) -> Any:
    """Prediction and the judged features, from the layers of both networks in the published order."""
    guide, unet = network.controlnet, network.unet
    emb = guide.time_embedding(guide.time_proj(t))
    h = guide.conv_in(z) + guide.controlnet_cond_embedding(y.control)
    states = [h]
    for block in guide.down_blocks:
        h, outputs = through(block, h, emb, y)
        states += outputs
    residuals = [layer(state) for layer, state in zip(guide.controlnet_down_blocks, states, strict=True)]
    middle = guide.controlnet_mid_block(middle_of(guide.mid_block, h, emb, y))
    emb = unet.time_embedding(unet.time_proj(t))
    h = unet.conv_in(z)
    states = [h]
    for block in unet.down_blocks:
        h, outputs = through(block, h, emb, y)
        states += outputs
    states = [state + residual for state, residual in zip(states, residuals, strict=True)]
    judged = [states[1], states[3]]  # one residual block a level: behind it, and before the halving
    h = middle_of(unet.mid_block, h, emb, y) + middle
    for block in unet.up_blocks:
        h, _ = through(block, h, emb, y, states)
    assert not states
    return unet.conv_out(nn.functional.silu(unet.conv_norm_out(h))), judged


@torch.no_grad()
def test_the_denoiser_is_unet_and_controlnet_with_the_image_behind_the_text() -> None:
    network, (z, t, y) = small_seesr().denoiser, inputs()
    expected, judged = reference(network, z, t, y)
    torch.testing.assert_close(network(z, t, y), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(network.features(z, t, y), judged, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for changed in (y._replace(control=y.control * 0.5), y._replace(text=y.text + 1), y._replace(image=y.image + 1)):
        assert not torch.allclose(network(z, t, changed), expected, atol=1e-5)


@torch.no_grad()
def test_a_copy_attends_with_its_own_layers() -> None:
    network, given = small_seesr().denoiser, inputs()
    expected, twin = network(*given), copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.zero_()
    assert torch.equal(twin(*given), expected)


def test_gradients_with_and_without_keeping_activations() -> None:
    found = []
    for checkpointed in (False, True):
        network = small_seesr().denoiser.train()
        network.train_only()
        if checkpointed:
            network.enable_gradient_checkpointing()
        network(*inputs()).square().mean().backward()
        found.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
        assert all(p.grad is None for p in network.parameters() if not p.requires_grad)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient is not None
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, found[1][name], msg=name)


# ---- steps ----


@torch.no_grad()
def test_fifty_steps_are_those_of_the_published_scheduler() -> None:
    from diffusers import DDPMScheduler

    generator = small_seesr(replace(CONFIG, steps=50))
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler.set_timesteps(50)
    lr, z_y, noise = torch.rand(1, 3, 4, 4), torch.randn(1, 4, 8, 8), NoisePlane(5)
    prompt = joined_prompt(torch.randn(1, 5, 16), torch.randn(1, 6, 12))
    text, image = prompt[:, :5], prompt[:, 5:, :12]
    control = generator.enlarge(lr).clamp(0, 1)
    z = scheduler.add_noise(z_y, noise(0, z_y), torch.tensor([999]))
    draws = iter(noise(number, z_y) for number in range(1, 51))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(draws))
        for t in scheduler.timesteps:
            eps = [
                generator.denoiser(z, t[None], SeeSRCondition(control, side, image))
                for side in (generator.negative, text)
            ]
            z = scheduler.step(eps[0] + 5.5 * (eps[1] - eps[0]), t, z).prev_sample
    found = generator.sample(z_y, generator.condition(lr, prompt), noise)
    torch.testing.assert_close(found, z, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_one_step_is_the_estimate_at_the_last_step() -> None:
    generator = small_seesr(replace(CONFIG, steps=1, guidance=1.0))
    lr, z_y, noise = torch.rand(1, 3, 4, 4), torch.randn(1, 4, 8, 8), NoisePlane(5)
    condition = generator.condition(lr, None)
    assert not condition.image.any()
    z = generator.schedule.add_noise(z_y, noise(0, z_y), 999)
    eps = generator.denoiser(z, torch.tensor([999]), condition)
    expected = (z - (1 - generator.schedule.alpha_bar[999]).sqrt() * eps) / generator.schedule.alpha_bar[999].sqrt()
    torch.testing.assert_close(generator.sample(z_y, condition, noise), expected, rtol=1e-4, atol=1e-4)


def test_settings_that_make_no_sampler() -> None:
    for change, message in (
        ({"steps": 0}, "steps is 0"),
        ({"guidance": 0.5}, "guidance is 0.5"),
        ({"noised": False}, "noised"),
        ({"condition_channels": (8,)}, "one length"),
        ({"image_width": 99}, "image_width"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, **change)
    assert (SeeSRConfig().steps, SeeSRConfig().guidance, SeeSRConfig().timestep) == (50, 5.5, 999)
    assert (ADDED_PROMPT, NEGATIVE_PROMPT) == ("clean, high-resolution, 8k", "dotted, noise, blur, lowres, smooth")
    with pytest.raises(UserError, match="a prompt of 8 tokens, the negative prompt has 5"):
        small_seesr()(torch.rand(1, 3, 4, 4), prompt=torch.zeros(1, 8 + 6, 16))


# ---- published folders ----


def test_published_folders_become_a_file_that_upscales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(download.CACHE, str(tmp_path / "cache"))
    assert CONFIG.unet.cross_attention_dim == WIDTH
    published = small_seesr()
    own, base = write_published(tmp_path, published)
    write_text_encoder(base)
    assert looks_published(own)
    assert not looks_published(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onestepsr.models.seesr.generator.SeeSRConfig", small_defaults)
        generator = read_published(own, base)
        with pytest.raises(UserError, match=r"cswry/SeeSR offers what it is made of.*'onestepsr models convert"):
            load_network("seesr")
        assert get_model("seesr").state == "its file is yours to bring"
        target = get_model("seesr").path
        result = CliRunner().invoke(app, ["models", "convert", str(own), str(target), "--backbone", str(base)])
    assert result.exit_code == 0, result.output
    assert "seesr.safetensors: seesr," in result.output
    assert get_model("seesr").state == "cached"
    for part in ("unet", "controlnet"):
        states = [getattr(one.denoiser, part).state_dict() for one in (published, generator, load_network(target))]
        assert states[0].keys() == states[1].keys() == states[2].keys()
        assert all(torch.equal(states[0][key], other[key]) for other in states[1:] for key in other)
    loaded: Any = load_generator("seesr")
    empty, negative = PromptEmbedder(base).embed(["", NEGATIVE_PROMPT])
    assert torch.equal(loaded.prompt[0], empty)
    assert torch.equal(loaded.negative[0], negative)
    assert loaded(torch.rand(1, 3, 5, 6)).shape == (1, 3, 20, 24)


def small_defaults(**values: Any) -> SeeSRConfig:
    """SeeSR's configuration with the tokens of a small RAM and few steps."""
    return SeeSRConfig(**{"image_width": 12, "image_tokens": 6, "steps": 2, **values})


def test_other_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    own, base = write_published(tmp_path, small_seesr())
    target = tmp_path / "out.safetensors"
    for source, options, message in (
        (own, {}, "SeeSR needs --backbone, the diffusers folder"),
        (own, {"backbone": "sd21-base"}, "SeeSR needs --backbone"),
        (own, {"backbone": base, "part": "discriminator"}, "--backbone, --dtype and --overwrite alone"),
        (own, {"backbone": base}, r"unet: weight '.*' has shape \(.*12\), expected \(.*512\)|image_width must not"),
    ):
        with pytest.raises(UserError, match=message) as error:
            convert(source, target, **options)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
        assert not target.exists()
    with pytest.raises(UserError, match="no SeeSR, whose unet and controlnet"):
        read_published(base, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onestepsr.models.seesr.generator.SeeSRConfig", small_defaults)
        part = own / "controlnet" / "diffusion_pytorch_model.safetensors"
        part.write_bytes((own / "unet" / part.name).read_bytes())
        with pytest.raises(UserError, match=r"controlnet: no weight 'controlnet_.*unexpected weight 'conv_norm_out"):
            read_published(own, base)

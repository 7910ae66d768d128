"""Backbones from single-file checkpoints: every tensor in its place, unknown models are one line."""

import pytest
import torch
from safetensors.torch import save_file
from small_diffusion import AUTOENCODER, UNET, XL, diffusers_unet, diffusers_vae, ldm_unet_name, write_single_file

from onestepsr.core.config import from_mapping
from onestepsr.core.errors import UserError
from onestepsr.methods import d3sr, distillation, osediff, tadsr
from onestepsr.models.backbones import LEAST_CORRELATION, load_backbone, load_discriminator_backbone, noise_correlation
from onestepsr.models.convert import convert
from onestepsr.models.stable_diffusion import checkpoints
from onestepsr.models.stable_diffusion.config import SD21_BASE, SDXL_BASE


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setattr(checkpoints, "KNOWN", {"a small one": (UNET, AUTOENCODER), "its XL": (XL, AUTOENCODER)})


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_checkpoint_gives_the_networks_that_were_put_in(tmp_path, name):
    unet, vae = diffusers_unet(), diffusers_vae()
    write_single_file(tmp_path / name, unet, vae)
    generator = load_backbone(tmp_path / name)
    for network, foreign in ((generator.unet.unet, unet), (generator.autoencoder.vae, vae)):
        ours, theirs = network.state_dict(), foreign.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        expected = unet(z, torch.tensor(7), generator.prompt).sample
        assert torch.equal(generator.unet(z, torch.tensor([7]), generator.prompt), expected)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_discriminator_takes_its_half_and_needs_no_autoencoder(tmp_path, name):
    unet = diffusers_unet(XL)
    write_single_file(tmp_path / name, unet)
    encoder, prompt = load_discriminator_backbone(tmp_path / name)
    ours, theirs = encoder.unet.state_dict(), unet.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert any(key.startswith("add_embedding") for key in ours)
    assert not any(key.startswith("up_blocks") for key in ours)
    assert prompt.shape == (1, 77, 24)
    with pytest.raises(UserError, match="SDXL can be the discriminator's backbone"):
        load_backbone(tmp_path / name)


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (
            SD21_BASE,
            ("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", "output_blocks.2.1.conv.weight", "out.2.bias"),
        ),
        (
            SDXL_BASE,
            (
                "input_blocks.8.1.transformer_blocks.9.ff.net.2.bias",
                "output_blocks.2.2.conv.weight",
                "label_emb.0.2.bias",
            ),
        ),
    ],
)
def test_names_of_the_published_models_are_all_translated(config, known):
    with torch.device("meta"):
        unet = diffusers_unet(config)
    names = [f"model.diffusion_model.{ldm_unet_name(key, unet)}" for key in unet.state_dict()]
    assert all(f"model.diffusion_model.{name}" in names for name in known)
    translated = checkpoints.unet_weights({name: lambda: None for name in names}, config)
    assert translated.keys() == unet.state_dict().keys()


def test_a_half_is_read_without_the_other(tmp_path, monkeypatch):
    write_single_file(tmp_path / "model.safetensors", diffusers_unet(), diffusers_vae())
    read = []
    opened = checkpoints.open_weights

    def noting(path):
        return {key: lambda key=key, get=get: (read.append(key), get())[1] for key, get in opened(path).items()}

    monkeypatch.setattr(checkpoints, "open_weights", noting)
    load_discriminator_backbone(tmp_path / "model.safetensors")
    assert any("input_blocks" in key for key in read)
    assert not any(part in key for key in read for part in ("output_blocks", "first_stage", "cond_stage"))


def test_a_unet_that_predicts_something_else_is_reported(tmp_path, caplog, monkeypatch):
    write_single_file(tmp_path / "model.safetensors", diffusers_unet(), diffusers_vae())
    generator = load_backbone(tmp_path / "model.safetensors")  # random: it predicts nothing
    assert "does not seem to predict noise" in caplog.text
    sigma = (1 - generator.schedule.alpha_bar[-1]).sqrt()

    def perfect(z_t, t, prompt):  # of black images
        return z_t / sigma

    def velocity(z_t, t, prompt):
        return (1 - sigma**2).sqrt() * z_t / sigma - sigma * torch.randn(z_t.shape)

    monkeypatch.setattr(generator.unet, "forward", perfect)
    assert noise_correlation(generator) == pytest.approx(1.0)
    monkeypatch.setattr(generator.unet, "forward", velocity)
    assert abs(noise_correlation(generator)) < LEAST_CORRELATION


@pytest.mark.parametrize(
    ("build", "kind", "config"),
    [
        (osediff.build, osediff.OSEDiffConfig, {}),
        (d3sr.build, d3sr.D3SRConfig, {"perceptual": {"features": "oriented"}}),
        (distillation.build, distillation.DistillationConfig, {}),
        (tadsr.build, tadsr.TADSRConfig, {"family": "latent_diffusion"}),
    ],
)
def test_training_refuses_a_file_that_does_not_predict_noise(tmp_path, build, kind, config):
    path = tmp_path / "model.safetensors"
    write_single_file(path, diffusers_unet(), diffusers_vae())  # random, which is as far from noise as velocity
    key = "teacher" if kind is tadsr.TADSRConfig else "backbone"
    with pytest.raises(UserError, match=r"prediction type is not 'epsilon'") as error:
        build(from_mapping(kind, {key: str(path), **config}))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"prediction type is not 'epsilon'"):
        convert(path, tmp_path / "ours.safetensors")  # whose file could not say what it predicts either
    assert not (tmp_path / "ours.safetensors").exists()
    convert(path, tmp_path / "half.safetensors", part="discriminator")  # features need no prediction


def test_models_of_other_sizes_are_named(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_single_file(path, diffusers_unet(), diffusers_vae())
    monkeypatch.undo()  # the published models are known, this one is not
    with pytest.raises(UserError, match=r"cross-attention width 16, expected 1024 \(Stable Diffusion 2.1-base\)"):
        load_backbone(path)


def test_what_is_no_such_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="neither onestepsr weights nor a Stable Diffusion checkpoint"):
        load_backbone(path)
    write_single_file(path, diffusers_unet())
    with pytest.raises(UserError, match="holds no autoencoder"):
        load_backbone(path)
    unet = diffusers_unet()
    unet.conv_in = torch.nn.Conv2d(9, 32, 3)
    write_single_file(path, unet, diffusers_vae())
    with pytest.raises(UserError, match="9 latent channels, expected 4"):
        load_backbone(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="read safely"):
        load_backbone(path)


def test_a_checkpoint_that_lacks_a_tensor_names_it(tmp_path):
    path, unet = tmp_path / "model.safetensors", diffusers_unet()
    del unet.mid_block.resnets[0].conv1
    write_single_file(path, unet, diffusers_vae())
    with pytest.raises(UserError, match=r"no weight 'mid_block.resnets.0.conv1"):
        load_backbone(path)

"""Backbones from diffusers folders: diffusers' own output, only what is needed is read, bad ones are one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_diffusion import (
    GENERATOR,
    XL,
    change_settings,
    diffusers_unet,
    write_folder,
    write_scheduler,
)

from onestepsr.core.errors import UserError
from onestepsr.models.backbones import load_backbone, load_discriminator_backbone, read_prompt
from onestepsr.models.stable_diffusion.config import PromptConfig, SDXLConditioning

UNET_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path)
    return tmp_path


def is_loaded(generator, unet, vae) -> bool:
    pairs = [(generator.unet.unet, unet), (generator.autoencoder.vae, vae)]
    return all(
        torch.equal(ours, theirs)
        for network, foreign in pairs
        for ours, theirs in zip(network.state_dict().values(), foreign.state_dict().values(), strict=True)
    )


def test_folder_gives_its_networks_sizes_and_schedule(tmp_path):
    unet, vae = write_folder(tmp_path)
    write_scheduler(tmp_path, num_train_timesteps=500, beta_end=0.02)
    generator = load_backbone(tmp_path, prompt=PromptConfig(tokens=4))
    assert is_loaded(generator, unet, vae)
    assert generator.unet.config == GENERATOR.unet
    assert generator.schedule.steps == 500
    assert generator.schedule.config.beta_end == 0.02
    assert generator.prompt.shape == (1, 4, 16)
    z = torch.randn(1, 4, 6, 10)
    with torch.no_grad():
        expected = unet(z, torch.tensor(7), generator.prompt).sample
        assert torch.equal(generator.unet(z, torch.tensor([7]), generator.prompt), expected)
        image = torch.rand(1, 3, 12, 20) * 2 - 1
        assert torch.equal(generator.autoencoder.encode(image), vae.encode(image).latent_dist.mean * 0.18215)


def test_shards_are_read_through_their_index(tmp_path):
    unet, vae = write_folder(tmp_path, shards="200KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert is_loaded(load_backbone(tmp_path), unet, vae)


def test_pickles_and_half_precision_are_read(tmp_path):
    unet, vae = write_folder(tmp_path)
    state = {key: value.half() for key, value in unet.state_dict().items()}
    (tmp_path / "unet" / UNET_FILE).unlink()
    torch.save(state, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    generator = load_backbone(tmp_path)
    assert is_loaded(generator, unet.half().float(), vae)
    assert {parameter.dtype for parameter in generator.parameters()} == {torch.float32}


def test_old_names_of_the_autoencoders_attention_are_known(tmp_path):
    unet, vae = write_folder(tmp_path)
    path = tmp_path / "vae" / UNET_FILE
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, value in load_file(path).items():
        name = key
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        tensors[name] = value
    assert tensors.keys() != vae.state_dict().keys()
    save_file(tensors, path)
    assert is_loaded(load_backbone(tmp_path), unet, vae)


@pytest.mark.parametrize("only_unet", [False, True])
def test_a_discriminator_reads_only_its_half(folder, only_unet):
    path = folder / "unet" / UNET_FILE
    tensors = load_file(path)
    half = {key: value for key, value in tensors.items() if not key.startswith(("up_", "conv_out", "conv_norm_out"))}
    poisoned = {key: value if key in half else torch.full_like(value, float("nan")) for key, value in tensors.items()}
    for content in (poisoned, half):  # the other half may be damaged, or not be there at all
        save_file(content, path)
        encoder, prompt = load_discriminator_backbone(folder / "unet" if only_unet else folder)
        assert all(torch.equal(encoder.unet.state_dict()[key], value) for key, value in half.items())
        assert prompt.shape == (1, 77, 16)
        with pytest.raises(UserError, match=r"conv_norm_out|up_blocks|not finite"):
            load_backbone(folder)


def test_xl_is_a_discriminator_and_no_generator(tmp_path):
    unet, _ = write_folder(tmp_path, xl=True)
    encoder, prompt = load_discriminator_backbone(
        tmp_path, sdxl=SDXLConditioning(prompt_tokens=3, latent_scale="rescaled")
    )
    assert encoder.config.unet == XL
    assert encoder.latent_gain < 1
    assert torch.equal(encoder.unet.add_embedding.linear_1.weight, unet.add_embedding.linear_1.weight)
    assert prompt.shape == (1, 3, 24)
    assert not prompt.any()
    with pytest.raises(UserError, match=r"cross-attention width of 24 .* SDXL .* discriminator"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "'v_prediction', expected 'epsilon'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "'linear', expected 'scaled_linear'"),
        ("unet/config.json", {"cross_attention_dim": 24}, r"attn2.to_k.* has shape \(32, 16\), expected \(32, 24\)"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels and predicts 4"),
        ("unet/config.json", {"class_embed_type": "projection"}, "class_embed_type 'projection' is not supported"),
        ("unet/config.json", {"attention_head_dim": "five"}, "attention_head_dim: expected a list"),
        ("vae/config.json", {"latent_channels": 16}, "takes 4 latent channels, the autoencoder gives 16"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor 0.1 is not supported"),
    ],
)
def test_folders_that_do_not_fit_are_one_line(folder, file, changes, message):
    change_settings(folder / file, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_may_be_given_once_for_all_levels(folder):
    change_settings(folder / "unet" / "config.json", attention_head_dim=2, transformer_layers_per_block=1)
    assert load_backbone(folder).unet.config.attention_head_dim == (2, 2)


@pytest.mark.parametrize("missing", ["unet/config.json", "scheduler/scheduler_config.json", f"vae/{UNET_FILE}"])
def test_what_is_missing_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(UserError, match=missing.split("/")[1]):
        load_backbone(folder)


def test_damaged_weights_are_named(folder):
    path = folder / "unet" / UNET_FILE
    tensors = load_file(path)
    for key, value, message in (
        ("conv_in.bias", None, "no weight 'conv_in.bias'"),
        ("extra.bias", torch.zeros(1), "unexpected weight 'extra.bias'"),
        ("conv_in.bias", torch.full((32,), float("inf")), "'conv_in.bias' holds values that are not finite"),
        ("conv_in.bias", torch.zeros(3), r"'conv_in.bias' has shape \(3,\), expected \(32,\)"),
    ):
        changed = {name: tensor for name, tensor in tensors.items() if name != key or value is not None}
        save_file(changed if value is None else changed | {key: value}, path)
        with pytest.raises(UserError, match=message):
            load_backbone(folder)


@pytest.mark.parametrize("shard", ["../vae/diffusion_pytorch_model.safetensors", "absent.safetensors"])
def test_an_index_names_only_files_that_lie_beside_it(folder, shard):
    (folder / "unet" / UNET_FILE).unlink()
    index = folder / "unet" / f"{UNET_FILE}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"not a file of the same folder|absent"):
        load_backbone(folder)


def test_a_pickle_that_would_run_code_is_refused(folder, tmp_path):
    (folder / "unet" / UNET_FILE).unlink()
    torch.save({"weights": diffusers_unet()}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="no weights that can be read safely"):
        load_backbone(folder)


def test_a_prompt_can_come_from_a_file(folder, tmp_path):
    path = tmp_path / "prompt.safetensors"
    wanted = torch.randn(5, 16)
    save_file({"prompt": wanted}, path)
    assert torch.equal(load_backbone(folder, prompt_file=path).prompt[0], wanted)
    with pytest.raises(UserError, match=r"shape \(5, 16\), expected .*\(tokens, 1024\)"):
        read_prompt(path, 1024)
    save_file({"a": wanted, "b": wanted.clone()}, path)
    with pytest.raises(UserError, match="2 tensors"):
        read_prompt(path, 16)

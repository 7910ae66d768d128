"""``onestepsr models convert``: foreign backbones become files of ours, bad ones one line and exit code 2."""

import json

import pytest
import torch
from small_diffusion import GENERATOR, change_settings, write_folder, write_single_file
from typer.testing import CliRunner

from onestepsr.cli.main import app, main
from onestepsr.core.errors import UserError
from onestepsr.models.backbones import load_backbone, load_discriminator_backbone
from onestepsr.models.loading import load_generator
from onestepsr.models.stable_diffusion.config import SDXLConditioning
from onestepsr.weights.files import read_weights


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "backbone")
    return tmp_path / "backbone"


def convert(*arguments) -> str:
    result = CliRunner().invoke(app, ["models", "convert", *map(str, arguments)])
    if result.exception:
        raise result.exception
    return result.stdout


def test_a_folder_becomes_a_file_that_upscales_alike(folder, tmp_path):
    target = tmp_path / "new" / "backbone.safetensors"
    document = json.loads(convert(folder, target, "--json"))
    assert document["schema"] == 1
    assert document["architecture"] == "stable-diffusion"
    assert document["bytes"] == target.stat().st_size
    ours, theirs, lr = load_generator(target), load_backbone(folder), torch.rand(1, 3, 6, 5)
    assert document["parameters"] == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        assert torch.allclose(ours(lr), theirs(lr), atol=1e-5)
    assert torch.equal(load_backbone(target).prompt, theirs.prompt)


def test_number_format_and_part_can_be_chosen(folder, tmp_path):
    target = tmp_path / "half.safetensors"
    assert "stable-diffusion-encoder" in convert(folder, target, "--part", "discriminator", "--dtype", "bfloat16")
    tensors = read_weights(target)[2]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not any("up_blocks" in key for key in tensors)
    ours, theirs = load_discriminator_backbone(target), load_discriminator_backbone(folder)
    assert torch.equal(ours[1], theirs[1])
    for key, value in theirs[0].state_dict().items():
        assert torch.equal(ours[0].state_dict()[key], value.bfloat16().float())


def test_xl_keeps_its_conditions(tmp_path):
    write_folder(tmp_path / "xl", xl=True)
    target = tmp_path / "half.safetensors"
    convert(tmp_path / "xl", target, "--part", "discriminator")
    ours, prompt = load_discriminator_backbone(target, sdxl=SDXLConditioning(size="fixed"))
    theirs, _ = load_discriminator_backbone(tmp_path / "xl", sdxl=SDXLConditioning(size="fixed"))
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([9])
    assert torch.equal(ours(z, t, prompt)[0], theirs(z, t, prompt)[0])
    assert ours.pooled_prompt.shape == (1, 16)


def test_a_discriminator_takes_half_of_a_whole_file(folder, tmp_path):
    target = tmp_path / "whole.safetensors"
    convert(folder, target)
    encoder, prompt = load_discriminator_backbone(target)
    expected, _ = load_discriminator_backbone(folder)
    assert torch.equal(encoder.unet.conv_in.weight, expected.unet.conv_in.weight)
    assert torch.equal(prompt, load_backbone(target).prompt)


def test_what_is_there_is_kept(folder, tmp_path):
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(UserError, match="--overwrite"):
        convert(folder, target)
    assert target.read_bytes() == b"precious"
    convert(folder, target, "--overwrite")
    assert load_backbone(target).timestep == 399
    with pytest.raises(UserError, match=r"end in \.safetensors"):
        convert(folder, tmp_path / "model.ckpt")


def test_numbers_that_do_not_fit_leave_nothing_behind(folder, tmp_path):
    generator = load_backbone(folder)
    generator.unet.unet.conv_in.bias.data[0] = 1e6
    write_single_file(tmp_path / "big.safetensors", generator.unet.unet, generator.autoencoder.vae)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "onestepsr.models.stable_diffusion.checkpoints.KNOWN", {"small": (GENERATOR.unet, GENERATOR.autoencoder)}
        )
        patch.setattr("onestepsr.models.backbones.noise_correlation", lambda generator: 1.0)  # random, so it is near 0
        with pytest.raises(UserError, match=r"conv_in.bias' is too large for float16"):
            convert(tmp_path / "big.safetensors", tmp_path / "out.safetensors", "--dtype", "float16")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-here", "out.safetensors"], "nothing-here"),
        (["backbone", "out.safetensors", "--part", "half"], "accepted: generator, discriminator"),
        (["backbone", "out.safetensors", "--dtype", "int8"], "accepted: float32, bfloat16, float16"),
        (["random:sdxl-base", "out.safetensors"], "discriminator's backbone only"),
        (["random:sd15", "out.safetensors"], "sd21-base"),
        (["other", "out.safetensors"], "prediction type 'v_prediction', expected 'epsilon'"),
        (["empty", "out.safetensors"], "config.json"),
    ],
)
def test_bad_input_is_one_line_and_code_two(tmp_path, monkeypatch, capsys, arguments, message):
    write_folder(tmp_path / "backbone")
    write_folder(tmp_path / "other")
    change_settings(tmp_path / "other" / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["models", "convert", *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out.safetensors").exists()

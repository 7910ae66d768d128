"""Files that are no usable weights are named: cut downloads, other kinds of files, networks of other projects."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onestepsr.core.errors import UserError
from onestepsr.models.loading import load_network
from onestepsr.weights.catalog import get_model
from onestepsr.weights.files import open_weights, read_weights
from onestepsr.weights.recognise import network_name

BUNDLED = get_model("d3sr-tiny").path


def archived() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(__file__, "model.safetensors")
    return stream.getvalue()


CONTENTS = {
    "is empty": b"",
    "a web page": b"<!DOCTYPE html><html>404",
    "a server's message in XML": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "a GGUF file": b"GGUF\3\0\0\0",
    "an archive": archived(),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "not a safetensors file": bytes(range(100)),
}


@pytest.mark.parametrize("words", CONTENTS)
def test_other_files_are_named(words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENTS[words])
    with pytest.raises(UserError, match=rf"model\.safetensors: {words}") as error:
        load_network(path)
    assert "\n" not in str(error.value)


def test_an_incomplete_download_says_how_much_is_there(tmp_path: Path) -> None:
    whole, path = BUNDLED.read_bytes(), tmp_path / "half.safetensors"
    path.write_bytes(whole[:1_000_000])
    size = f"{len(whole) / 1e6:.1f} MB"
    for read in (load_network, read_weights, open_weights):
        with pytest.raises(UserError, match=rf"half\.safetensors: incomplete: 1\.0 MB of {size}: download it again"):
            read(path)
    path.write_bytes(whole[:100])
    with pytest.raises(UserError, match="incomplete: 100 bytes, its header alone has"):
        load_network(path)


def test_an_incomplete_pickle_is_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    for read in (load_network, open_weights):
        with pytest.raises(UserError, match=r"cut\.pth: incomplete \(2,000 bytes.*download it again"):
            read(path)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("conv_first.weight", "an ESRGAN checkpoint (RRDBNet)"),
        ("RRDB_trunk.0.RDB1.conv1.weight", "an ESRGAN checkpoint (RRDBNet)"),
        ("model.1.sub.0.RDB1.conv1.0.weight", "an ESRGAN checkpoint (RRDBNet)"),
        ("body.0.weight", "a compact Real-ESRGAN checkpoint (SRVGGNet)"),
        ("layers.0.residual_group.blocks.0.attn.relative_position_bias_table", "a SwinIR checkpoint"),
        ("layers.0.residual_group.blocks.0.conv_block.cab.0.weight", "a HAT checkpoint"),
        ("stylegan_decoder.style_mlp.1.weight", "a GFPGAN checkpoint (faces)"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("lora_unet_down_blocks_0.lora_up.weight", "a LoRA, which is added to another model"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "a FLUX checkpoint"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight", "a Stable Diffusion 3 checkpoint"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_networks_of_other_projects_are_named(key: str, name: str, suffix: str, tmp_path: Path) -> None:
    assert network_name([key]) == name
    path, state = tmp_path / f"other{suffix}", {key: torch.zeros(1)}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"params_ema": state} if key == "conv_first.weight" else state, path)
    with pytest.raises(UserError, match="which is not supported here") as error:
        load_network(path)
    assert str(error.value).startswith(f"{path}: {name}, which")
    assert network_name(["nothing.known"]) is None


# ---- Files that are made to take memory or time ----


def rezipped(path: Path, method: int) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(name, content + (bytes(50_000_000) if name.endswith(".pkl") else b""))


def test_a_pickle_that_unfolds_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    rezipped(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    with pytest.raises(UserError, match="its parts are compressed"):
        open_weights(path)


def test_tensors_that_repeat_a_few_values_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "views.pth"
    torch.save({"weight": torch.zeros(1).expand(10**6, 10**6)}, path)
    with pytest.raises(UserError, match="tensor 'weight' has fewer values in the file than its shape says"):
        open_weights(path)
    torch.save({"weight": torch.zeros(3, device="meta")}, path)
    with pytest.raises(UserError, match="tensor 'weight' has fewer values"):
        open_weights(path)


def test_a_bytearray_of_any_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "zeros.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    program = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."  # bytearray(2**31 - 1)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, program if name.endswith("data.pkl") else content)
    with pytest.raises(UserError, match="it makes a bytearray"):
        open_weights(path)

"""Weight files: what is written is what is read, and every kind of damage is one clear line."""

import hashlib
import json
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UnknownModel, UserError
from onestepsr.models import loading
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyAutoencoder
from onestepsr.weights import catalog, download, files
from small import SMALL

KINDS = get_args(catalog.Kind)
CONFIG = TinyGeneratorConfig(model=SMALL, timestep=120)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    generator = tiny_generator(CONFIG).eval()
    torch.nn.init.normal_(generator.unet.conv_out.weight)
    path = tmp_path / "model.safetensors"
    save(path, generator.state_dict())
    return path, generator


def save(path, state_dict, config=None):
    config = to_mapping(CONFIG) if config is None else config
    files.save_model(path, architecture="tiny-latent-diffusion", config=config, state_dict=state_dict)


def test_equal_weights_give_equal_files(saved):
    path, generator = saved
    extra = {str(i): "x" * i for i in range(12)}
    contents = set()
    for _ in range(4):
        files.save_model(
            path, architecture="any", config=to_mapping(CONFIG), state_dict=generator.state_dict(), extra=extra
        )
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert files.read_weights(path)[0] == "any"


def test_non_finite_weights_are_named(saved):
    path, generator = saved
    state = generator.state_dict()
    state["unet.conv_out.bias"] = torch.full_like(state["unet.conv_out.bias"], float("nan"))
    save(path, state)
    with pytest.raises(UserError, match=r"unet\.conv_out\.bias.*not finite"):
        loading.load_generator(path)


def test_configuration_that_does_not_fit_is_refused(saved):
    path, generator = saved
    config = to_mapping(CONFIG)
    config["model"]["widths"] = [8, 24]
    save(path, generator.state_dict(), config)
    with pytest.raises(UserError, match="do not match their configuration") as caught:
        loading.load_generator(path)
    assert "\n" not in str(caught.value)
    config["model"]["width"] = 3
    save(path, generator.state_dict(), config)
    with pytest.raises(UserError, match="did you mean 'widths'"):
        loading.load_generator(path)


def test_files_that_are_no_weights_of_ours_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (b"", b"garbage that is no safetensors header"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"not a safetensors file|is empty"):
            loading.load_generator(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not onestepsr weights"):
        loading.load_generator(path)
    save_file(
        {"x": torch.zeros(1)}, path, metadata={"format": "onestepsr", "architecture": "nope", "config": json.dumps({})}
    )
    with pytest.raises(UserError, match="unknown architecture 'nope'"):
        loading.load_generator(path)


def test_an_autoencoder_is_no_generator(tmp_path):
    path = tmp_path / "ae.safetensors"
    state = TinyAutoencoder(SMALL).state_dict()
    files.save_model(path, architecture="tiny-autoencoder", config=to_mapping(SMALL), state_dict=state)
    assert isinstance(loading.load_network(path), TinyAutoencoder)
    with pytest.raises(UserError, match="no generator"):
        loading.load_generator(path)


def test_unknown_names_suggest_a_known_one(tmp_path):
    with pytest.raises(UnknownModel, match="d3sr-tiny"):
        loading.load_generator("d3sr-tny")
    with pytest.raises(UnknownModel, match="no such weights file"):
        loading.load_generator(tmp_path / "missing.safetensors")


def test_bundled_models_are_whole():
    for spec in loading.list_models("upscaler"):
        if spec.downloads:
            continue
        assert catalog.verify(spec.id) == spec.sha256
        assert not spec.bundled or spec.path.stat().st_size < 40 * 2**20
        assert loading.load_generator(spec.id).scale == spec.scale


def test_bicubic_needs_no_weights():
    lr = torch.rand(1, 3, 4, 6)
    expected = torch.nn.functional.interpolate(lr, scale_factor=4.0, mode="bicubic")
    torch.testing.assert_close(loading.load_generator("bicubic")(lr), expected, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="no weights file"):
        loading.resolve("bicubic")


def test_every_alias_says_what_it_is_and_where_it_comes_from():
    specs = loading.list_models()
    assert [spec.kind for spec in specs] == sorted((spec.kind for spec in specs), key=KINDS.index)
    assert {spec.id for spec in specs if spec.kind != "upscaler"} == {
        "sd21-base",
        "sdxl-base",
        "vgg16",
        "dists",
        "lpips-vgg",
        "efficientnet-lite0",
        "efficientnet-lite1",
        "alexnet",
        "lpips-alex",
        "inception-fid",
        "niqe",
    }
    for spec in specs:
        assert not spec.downloads or (spec.licence_url and (spec.use or spec.kind == "upscaler"))
        assert spec.kind == "upscaler" or all(download.sha256 for download in spec.downloads)
    assert all("Attachment A" in spec.downloads[0].notice for spec in loading.list_models("backbone"))


@pytest.fixture
def small_alias(tmp_path, monkeypatch):
    """An alias of a few bytes, in an empty cache, without a network."""
    monkeypatch.setenv(download.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(download.OFFLINE, "1")
    monkeypatch.delenv(download.MIRROR, raising=False)
    sha = hashlib.sha256(b"weights").hexdigest()
    spec = catalog.ModelSpec(
        id="small",
        kind="backbone",
        summary="s",
        licence="MIT",
        use="train with it",
        files=(download.Download(file="small.bin", urls=("http://127.0.0.1:9/small.bin",), sha256=sha, bytes=7),),
    )
    monkeypatch.setitem(catalog._MODELS, "small", spec)
    return spec


def test_an_alias_resolves_to_its_file_in_the_cache(small_alias, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"single-file checkpoint instead of 'small'"):
        loading.resolve("small")
    with pytest.raises(UserError, match="'onestepsr models download small' fetches it"):
        catalog.verify("small")
    assert small_alias.state == "not downloaded (7 bytes)"
    (tmp_path / "small.bin").write_bytes(b"weights")
    monkeypatch.setenv(download.MIRROR, str(tmp_path))
    assert loading.resolve("small") == tmp_path / "cache" / "small" / "small.bin" == small_alias.path
    assert catalog.verify("small") == hashlib.sha256(b"weights").hexdigest()
    small_alias.path.write_bytes(b"changed")
    with pytest.raises(UserError, match="fetches it again"):
        catalog.verify("small")


def test_what_is_no_upscaler_is_refused_before_any_download(small_alias, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'small' is a backbone, no upscaler: train with it"):
        loading.load_generator("small")
    assert not (tmp_path / "cache").exists()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").write_bytes(b"a file of that name is what is meant")
    with pytest.raises(UserError, match="not a safetensors file"):
        loading.load_generator("small")


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.ckpt", "missing/sd21"])
def test_a_missing_file_is_called_a_missing_file(name):
    with pytest.raises(UnknownModel, match="no such weights file"):
        loading.resolve(name)


def test_a_folder_is_no_weights_file(tmp_path):
    with pytest.raises(UnknownModel, match="a folder, no weights file"):
        loading.resolve(tmp_path)

"""Weight files: what is written is what is read, and every kind of damage is one clear line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from onestepsr.config import to_mapping
from onestepsr.errors import UnknownModel, UserError
from onestepsr.models import registry
from onestepsr.models.backbones import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny import TinyAutoencoder, TinyConfig

SMALL = TinyConfig(
    encoder_width=8, decoder_width=8, widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16
)
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
    registry.save_model(path, architecture="tiny-latent-diffusion", config=config, state_dict=state_dict)


def test_save_and_load_give_the_same_network(saved):
    path, generator = saved
    loaded = registry.load_generator(path)
    lr = torch.rand(1, 3, 6, 6)
    with torch.no_grad():
        assert torch.allclose(loaded(lr), generator(lr), atol=1e-6)
    assert loaded.timestep == 120
    assert not any(p.requires_grad for p in loaded.parameters())
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_equal_weights_give_equal_files(saved):
    path, generator = saved
    extra = {str(i): "x" * i for i in range(12)}
    contents = set()
    for _ in range(4):
        registry.save_model(
            path, architecture="any", config=to_mapping(CONFIG), state_dict=generator.state_dict(), extra=extra
        )
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert registry.read_weights(path)[0] == "any"


def test_non_finite_weights_are_named(saved):
    path, generator = saved
    state = generator.state_dict()
    state["unet.conv_out.bias"] = torch.full_like(state["unet.conv_out.bias"], float("nan"))
    save(path, state)
    with pytest.raises(UserError, match=r"unet\.conv_out\.bias.*not finite"):
        registry.load_generator(path)


def test_configuration_that_does_not_fit_is_refused(saved):
    path, generator = saved
    config = to_mapping(CONFIG)
    config["model"]["widths"] = [8, 24]
    save(path, generator.state_dict(), config)
    with pytest.raises(UserError, match="do not match their configuration") as caught:
        registry.load_generator(path)
    assert "\n" not in str(caught.value)
    config["model"]["width"] = 3
    save(path, generator.state_dict(), config)
    with pytest.raises(UserError, match="did you mean 'widths'"):
        registry.load_generator(path)


def test_files_that_are_no_weights_of_ours_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (b"", b"garbage that is no safetensors header"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"not a safetensors file|cannot be read"):
            registry.load_generator(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not onestepsr weights"):
        registry.load_generator(path)
    save_file(
        {"x": torch.zeros(1)}, path, metadata={"format": "onestepsr", "architecture": "nope", "config": json.dumps({})}
    )
    with pytest.raises(UserError, match="unknown architecture 'nope'"):
        registry.load_generator(path)


def test_an_autoencoder_is_no_generator(tmp_path):
    path = tmp_path / "ae.safetensors"
    state = TinyAutoencoder(SMALL).state_dict()
    registry.save_model(path, architecture="tiny-autoencoder", config=to_mapping(SMALL), state_dict=state)
    assert isinstance(registry.load_network(path), TinyAutoencoder)
    with pytest.raises(UserError, match="no generator"):
        registry.load_generator(path)


def test_unknown_names_suggest_a_known_one(tmp_path):
    with pytest.raises(UnknownModel, match="d3sr-tiny"):
        registry.load_generator("d3sr-tny")
    with pytest.raises(UnknownModel, match="no such weights file"):
        registry.load_generator(tmp_path / "missing.safetensors")


def test_bundled_models_are_whole():
    for spec in registry.list_models():
        assert registry.verify(spec.id) == spec.sha256
        assert not spec.bundled or spec.path.stat().st_size < 40 * 2**20
        assert registry.load_generator(spec.id).scale == spec.scale


def test_bicubic_needs_no_weights():
    lr = torch.rand(1, 3, 4, 6)
    expected = torch.nn.functional.interpolate(lr, scale_factor=4.0, mode="bicubic")
    assert torch.equal(registry.load_generator("bicubic")(lr), expected)
    with pytest.raises(UserError, match="no weights file"):
        registry.resolve("bicubic")

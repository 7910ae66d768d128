"""OSEDiff's published weights: their layout, what they do to the backbone, and files that are something else."""

import gzip
import json
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_osediff import CONFIG, adapted, photo, plain

from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError
from onestepsr.models.backbones import load_backbone
from onestepsr.models.lora import LoraConfig, add_lora
from onestepsr.models.osediff.checkpoints import (
    Adapters,
    collect,
    copy_into_adapters,
    looks_published,
    merge,
    read_adapters,
    read_published,
    write_adapters,
    write_published,
)
from onestepsr.models.osediff.generator import ENCODER_LAYERS, UNET_LAYERS, OSEDiffGenerator
from onestepsr.weights.files import save_model
from weights_by_name import values_by_name

LAYOUT = Path(__file__).parents[2] / "golden" / "osediff_pkl_keys.json.gz"


@pytest.fixture(scope="module")
def layout():
    """Lists, keys and shapes of the published file."""
    return json.loads(gzip.decompress(LAYOUT.read_bytes()))


@pytest.fixture(scope="module")
def published(layout, tmp_path_factory):
    """A file of exactly the published keys, shapes and types, lists with repeated names included."""
    states = {
        name: OrderedDict((key, torch.from_numpy(values_by_name(key, tuple(shape)))) for key, shape in state.items())
        for name, state in layout.items()
        if name.startswith("state_dict")
    }
    repeated = [*layout["vae_lora_encoder_modules"], *layout["vae_lora_encoder_modules"]]
    lists = {name: layout[name] for name in layout["top_level"] if name.endswith("modules")}
    content = {**lists, "vae_lora_encoder_modules": repeated, "rank_unet": 4, "rank_vae": 4, **states}
    path = tmp_path_factory.mktemp("published") / "osediff.pkl"
    torch.save({name: content[name] for name in layout["top_level"]}, path)
    return path


def assert_equal_content(left: Adapters, right: Adapters) -> None:
    assert (left.rank_unet, left.rank_vae, left.modules) == (right.rank_unet, right.rank_vae, right.modules)
    for mine, other in ((left.unet, right.unet), (left.vae, right.vae)):
        assert list(mine) == list(other)
        assert all(torch.equal(value, other[key]) and value.dtype == other[key].dtype for key, value in mine.items())


def test_published_layout_goes_to_our_file_and_back(published, layout, tmp_path):
    assert looks_published(published)
    adapters = read_published(published)
    assert sum(value.numel() for value in adapters.unet.values()) == 4_055_712 + 11_840
    assert sum(value.numel() for value in adapters.vae.values()) == 369_356
    write_adapters(tmp_path / "osediff.adapters.safetensors", adapters)
    ours = read_adapters(tmp_path / "osediff.adapters.safetensors")
    assert_equal_content(ours, adapters)
    for name in ("once.pkl", "again.pkl"):
        write_published(tmp_path / name, ours)
    back = torch.load(tmp_path / "once.pkl", weights_only=True)
    original = torch.load(published, weights_only=True)
    assert list(back) == list(original) == layout["top_level"]
    for name, value in original.items():
        if name.startswith("state_dict"):
            assert list(back[name]) == list(value)
            assert all(torch.equal(back[name][key], tensor) for key, tensor in value.items())
        else:
            assert back[name] == value
    assert (tmp_path / "once.pkl").read_bytes() == (tmp_path / "again.pkl").read_bytes()


def test_our_training_adapts_the_layers_that_the_published_file_names(layout):
    with torch.device("meta"):
        generator = OSEDiffGenerator.of(load_backbone("random:sd21-base"))
        add_lora(generator.unet, LoraConfig(rank=4, alpha=8.0, targets=UNET_LAYERS))
        add_lora(generator.autoencoder, LoraConfig(rank=4, alpha=8.0, targets=ENCODER_LAYERS))
    for part, network in (("unet", generator.unet.unet), ("vae", generator.autoencoder.vae)):
        named = {
            key.replace(".default.", "."): tuple(value.shape)
            for key, value in network.state_dict().items()
            if ".lora_" in key or key.startswith("conv_in.base_layer.")
        }
        theirs = layout[f"state_dict_{part}"].items()
        expected = {re.sub(r"\.default_\w+\.", ".", key): tuple(shape) for key, shape in theirs}
        assert named == expected


def test_published_names_fit_the_backbone(published):
    """Without values: every key of the file has its layer, of the right shape, in Stable Diffusion 2.1."""
    with torch.device("meta"):
        generator = OSEDiffGenerator.of(load_backbone("random:sd21-base"))
    adapters = read_published(published)
    unet, vae = ({key: t.to("meta") for key, t in adapters.tensors(part).items()} for part in ("unet", "vae"))
    merge(generator, replace(adapters, unet=unet, vae=vae), "published")


def test_merged_and_unmerged_give_the_same_image():
    unmerged, merged = adapted(), plain()
    before = merged(photo())
    merge(merged, collect(unmerged), "test")
    expected = unmerged(photo())
    assert (expected - before).abs().max() > 1e-2, "the adapters do something"
    torch.testing.assert_close(merged(photo()), expected, rtol=0, atol=2e-4)


def test_the_update_enters_twice(published):
    """W + 2 B A, because the published code leaves alpha at 8 and has rank 4; 1 would be another model."""
    generator, adapters = plain(), collect(adapted())
    assert adapters.scaling("unet") == adapters.scaling("vae") == 2.0
    weight = generator.unet.unet.mid_block.resnets[0].conv1.weight
    name, before = "mid_block.resnets.0.conv1", weight.clone()
    a, b = (adapters.unet[f"{name}.lora_{side}.default_others.weight"] for side in "AB")
    merge(generator, adapters, "test")
    update = 2.0 * torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    torch.testing.assert_close(weight - before, update, rtol=1e-4, atol=1e-6)
    first = generator.unet.unet.conv_in.weight
    a, b = (adapters.unet[f"conv_in.lora_{side}.default_encoder.weight"] for side in "AB")
    whole = adapters.unet["conv_in.base_layer.weight"] + 2.0 * torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-6)
    assert read_published(published).scaling("unet") == 2.0


def test_another_alpha_is_kept_in_the_weights():
    odd, merged = adapted(rank=2, alpha=3.0), plain()
    adapters = collect(odd)
    assert adapters.rank_unet == 2
    merge(merged, adapters, "test")
    torch.testing.assert_close(merged(photo()), odd(photo()), rtol=0, atol=2e-4)


def test_adapters_go_into_a_run_unmerged():
    trained, fresh = adapted(), plain()
    for network, layers in ((fresh.unet, UNET_LAYERS), (fresh.autoencoder, ENCODER_LAYERS)):
        add_lora(network, LoraConfig(rank=4, alpha=8.0, targets=layers))
    copy_into_adapters(fresh, collect(trained), "test")
    torch.testing.assert_close(fresh(photo()), trained(photo()), rtol=0, atol=1e-6)
    adapters = collect(trained)
    less = {key: value for key, value in adapters.unet.items() if "bias" not in key}
    with pytest.raises(UserError, match=r"lacks 'conv_in\.base_layer\.bias'"):
        copy_into_adapters(fresh, replace(adapters, unet=less), "x")


def test_weights_for_another_backbone_are_refused_and_change_nothing(published):
    generator = plain()
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    with pytest.raises(UserError, match=r"x\.pkl: weights for another backbone: .*expected") as shape:
        merge(generator, read_published(published), "x.pkl")
    adapters = collect(adapted())
    elsewhere = {key.replace("mid_block", "middle"): value for key, value in adapters.unet.items()}
    with pytest.raises(UserError, match=r"another backbone: 'middle.* is no layer of this one's unet"):
        merge(generator, replace(adapters, unet=elsewhere), "x.pkl")
    lost = "mid_block.resnets.0.conv1.lora_B.default_others.weight"
    half = {key: value for key, value in adapters.unet.items() if key != lost}
    with pytest.raises(UserError, match=r"'mid_block\.resnets\.0\.conv1' has only one half"):
        merge(generator, replace(adapters, unet=half), "x.pkl")
    with pytest.raises(UserError, match="unknown weight 'surprise'"):
        merge(generator, replace(adapters, unet={"surprise": torch.ones(1)}), "x.pkl")
    assert "\n" not in str(shape.value)
    assert all(torch.equal(value, before[key]) for key, value in generator.state_dict().items())
    with torch.device("meta"):
        tiny = OSEDiffGenerator.of(load_backbone("random:d3sr-tiny"), timestep=399)
    with pytest.raises(UserError, match="belong to Stable Diffusion, not to a TinyUNet"):
        merge(tiny, adapters, "x.pkl")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def changed(published, **changes):
    content = torch.load(published, weights_only=True)
    content.update(changes)
    return {name: value for name, value in content.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_unet": Evil()}, r"no weights that can be read safely \(it would call 'print'\)"),
        ({"rank_unet": 4.0}, "rank_unet: expected a rank from 1 to 4096, got 4.0"),
        ({"rank_vae": True}, "rank_vae: expected a rank"),
        ({"rank_vae": None}, "no 'rank_vae'"),
        ({"extra": 1}, "unknown entry 'extra'"),
        ({"unet_lora_others_modules": [1]}, "expected a list of layer names"),
        ({"unet_lora_others_modules": "mid_block"}, "expected a list of layer names, got a str"),
        ({"state_dict_unet": [torch.ones(1)]}, "expected a dictionary of tensors, got a list"),
        ({"state_dict_vae": {"x": 1}}, "'x' is a int, expected a tensor"),
        ({"state_dict_vae": {"x": torch.ones(1, dtype=torch.int64)}}, "expected a tensor of real numbers"),
        ({"state_dict_vae": {"x": torch.tensor([float("nan")])}}, "not finite"),
    ],
)
def test_files_with_anything_else_are_refused_in_one_line(published, tmp_path, capsys, changes, message):
    path = tmp_path / "odd.pkl"
    torch.save(changed(published, **changes), path)
    with pytest.raises(UserError, match=message) as refusal:
        read_published(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert capsys.readouterr().out == ""


def test_what_is_no_such_file_is_said(published, tmp_path):
    for name, content in (("list.pkl", [1]), ("weights.pth", {"a": torch.ones(1)})):
        torch.save(content, tmp_path / name)
        assert not looks_published(tmp_path / name)
    with pytest.raises(UserError, match="a list, not OSEDiff's dictionary"):
        read_published(tmp_path / "list.pkl")
    (tmp_path / "cut.pkl").write_bytes(published.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"incomplete .* download it again"):
        read_published(tmp_path / "cut.pkl")
    with pytest.raises(UserError, match="cannot be read"):
        read_published(tmp_path / "none.pkl")


def test_a_merged_model_is_no_file_of_adapters(tmp_path):
    path = tmp_path / "merged.safetensors"
    save_model(path, architecture="osediff", config=to_mapping(CONFIG), state_dict=plain().state_dict())
    with pytest.raises(UserError, match="holds 'osediff', expected 'osediff-adapters'"):
        read_adapters(path)

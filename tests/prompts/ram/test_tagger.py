import re
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from onestepsr.core.errors import UserError
from onestepsr.prompts.ram import (
    RamConfig,
    RamNetwork,
    RamTagger,
    adapter_delta,
    format_tags,
    published_input,
    read_tag_names,
    read_thresholds,
    select_tags,
    tagger_input,
    usual_folder,
)
from onestepsr.prompts.sources import TaggedImages, load_extractor

MICRO = RamConfig(
    tags=5, side=32, width=8, depths=(2, 2), heads=(2, 4), window=4, text_width=12, head_width=16, head_heads=2
)
GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "osediff_input.npz")
NAMES = ["cat", "dog", "sea lion", "tree", "sky"]
SWIN_NAMES = (
    (r"patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"patch_embed\.norm", "embeddings.norm"),
    (r"^layers", "encoder.layers"),
    (r"attn\.relative_position_bias_table", "attention.relative_position_bias.relative_position_bias_table"),
    (r"attn\.proj", "attention.o_proj"),
    (r"attn\.qkv", "attention.qkv"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"^norm", "layernorm"),
)
"""Names of the published Swin transformer as regular expressions, and those that transformers gives them."""


def random_network(seed=0):
    torch.manual_seed(seed)
    network = RamNetwork(MICRO).eval()
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.3)
    return network


@pytest.fixture
def folder(tmp_path):
    """The published files, in small and without adapters."""
    path = tmp_path / "ram"
    path.mkdir()
    weights = {**random_network().state_dict(), "text_decoder.bias": torch.zeros(3)}
    weights["visual_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    torch.save({"model": weights, "epoch": 3}, path / "ram_swin_large_14m.pth")
    (path / "ram_tag_list.txt").write_text("\n".join(NAMES) + "\n")
    (path / "ram_tag_list_threshold.txt").write_text("0.5\n" * 5)
    return path


def photo(seed=1):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((90, 60))


def test_the_encoder_is_a_swin_transformer():
    from transformers import SwinConfig, SwinModel

    network = random_network()
    state = {}
    for published_name, value in network.visual_encoder.state_dict().items():
        name = reduce(lambda text, pair: re.sub(*pair, text), SWIN_NAMES, published_name)
        parts = zip("qkv", value.chunk(3), strict=True) if ".qkv." in name else [("", value)]
        state |= {name.replace(".qkv.", f".{part}_proj."): tensor for part, tensor in parts}
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4)
    reference = SwinModel(config).eval()
    reference.load_state_dict(state)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = network.visual_encoder(image), reference(image)
    torch.testing.assert_close(found[:, 1:], expected.last_hidden_state, rtol=0, atol=2e-5)
    torch.testing.assert_close(found[:, 0], expected.pooler_output, rtol=0, atol=2e-5)


def test_tags_ask_the_image_in_layers_of_cross_attention():
    network = random_network()
    seen, queries = torch.randn(2, 7, 12), torch.randn(2, 5, 16)
    layer = network.tagging_head["encoder"]["layer"][0]
    attention = layer.crossattention["self"]
    reference = nn.MultiheadAttention(16, 2, kdim=12, vdim=12, batch_first=True)
    reference.q_proj_weight, reference.k_proj_weight, reference.v_proj_weight = (
        attention[name].weight for name in ("query", "key", "value")
    )
    biases = [attention[name].bias.data for name in ("query", "key", "value")]
    reference.in_proj_bias.data.copy_(torch.cat(biases))
    joined = layer.crossattention["output"]
    reference.out_proj.weight, reference.out_proj.bias = joined["dense"].weight, joined["dense"].bias
    with torch.no_grad():
        middle = joined["LayerNorm"](queries + reference(queries, seen, seen)[0])
        hidden = nn.functional.gelu(layer.intermediate["dense"](middle))
        expected = layer.output["LayerNorm"](middle + layer.output["dense"](hidden))
        torch.testing.assert_close(layer(queries, seen), expected, rtol=0, atol=1e-5)


def test_the_published_sizes():
    with torch.device("meta"):
        network = RamNetwork(RamConfig())
        logits = network(torch.empty(1, 3, 384, 384))
    assert logits.shape == (1, 4585)
    swin_large = sum(parameter.numel() for parameter in network.visual_encoder.parameters())
    assert swin_large == 195_198_516  # with its thousand classes, 196.7 M
    names = network.state_dict().keys()
    assert "visual_encoder.layers.2.blocks.17.attn.relative_position_bias_table" in names
    assert "visual_encoder.layers.2.downsample.reduction.weight" in names
    assert "visual_encoder.layers.3.downsample.reduction.weight" not in names
    assert "tagging_head.encoder.layer.1.crossattention.self.query.weight" in names
    assert "tagging_head.encoder.layer.1.crossattention.output.LayerNorm.bias" in names
    assert "tagging_head.encoder.layer.0.intermediate.dense.weight" in names


def test_an_image_becomes_the_tags_above_their_thresholds(folder):
    with torch.no_grad():
        probabilities = random_network()(tagger_input(published_input(photo()), side=32))[0].sigmoid()
    middle = float(probabilities.median())
    (folder / "ram_tag_list_threshold.txt").write_text(f"{middle}\n" * 5)
    expected = [name for name, probability in zip(NAMES, probabilities, strict=True) if probability > middle]
    assert RamTagger(folder, config=MICRO).describe(photo()) == ", ".join(expected)
    assert len(expected) == 2
    (folder / "ram_tag_list_threshold.txt").write_text("".join(f"{float(p) - 1e-3}\n" for p in probabilities))
    tagger = RamTagger(folder, config=MICRO)
    assert tagger.describe(photo()) == ", ".join(NAMES)
    tagger.release()
    assert tagger._network is None
    assert tagger.describe(photo()) == ", ".join(NAMES)


def test_tokens_of_the_image_itself_beside_the_tags(folder):
    tagger = RamTagger(folder, config=MICRO)
    tagger.enlarges = False
    tags, tokens = tagger.see(photo())
    network, pixels = random_network(), tagger_input(photo(), side=32)
    with torch.no_grad():
        expected = network.image_proj(network.visual_encoder(pixels))
        probabilities = network(pixels)[0].sigmoid()
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    assert tokens.shape == (1, 1 + 4 * 4, 12)
    assert tags == ", ".join(select_tags(probabilities, torch.full((5,), 0.5), NAMES))
    source = TaggedImages(tagger, "a boat", "clean")
    assert source.text(Path("x.png"), photo()) == f"{tags}, a boat,clean"
    assert torch.equal(source.tokens, tokens)
    with pytest.raises(UserError, match="tokens of RAM's image encoder"):
        TaggedImages(object(), "", "")


def test_adapters_are_merged_with_the_scale_of_loralib(folder):
    plain = RamTagger(folder, config=MICRO)._load()
    rank, layer, dense = 2, "visual_encoder.layers.0.blocks.0.attn.qkv", "tagging_head.encoder.layer.0.crossattention"
    down, up = torch.randn(2 * rank, 8), torch.randn(16, rank)
    key_down, key_up = torch.randn(rank, 12), torch.randn(16, rank)
    adapters = {
        f"{layer}.lora_A": down,
        f"{layer}.lora_B": up,
        f"{dense}.self.key.lora_A": key_down,
        f"{dense}.self.key.lora_B": key_up,
        "text_decoder.query.lora_A": torch.zeros(1, 1),
    }
    save_file(adapters, folder / "DAPE.safetensors")
    adapted = RamTagger(folder, config=MICRO)._load()
    change = adapted.state_dict()[f"{layer}.weight"] - plain.state_dict()[f"{layer}.weight"]
    torch.testing.assert_close(change[:8], up[:8] @ down[:2] / 2, rtol=0, atol=1e-5)
    assert not change[8:16].any()  # the key is as it was
    torch.testing.assert_close(change[16:], up[8:] @ down[2:] / 2, rtol=0, atol=1e-5)
    change = adapted.state_dict()[f"{dense}.self.key.weight"] - plain.state_dict()[f"{dense}.self.key.weight"]
    torch.testing.assert_close(change, key_up @ key_down / 2, rtol=0, atol=1e-5)


def test_adapters_that_do_not_fit_are_named(folder):
    layer = "visual_encoder.layers.0.blocks.0.attn.qkv"
    for adapters, message in (
        ({"other.lora_A": torch.zeros(1)}, "no adapter of RAM's network"),
        ({f"{layer}.lora_A": torch.zeros(2, 8)}, "has no lora_B"),
        ({f"{layer}.lora_A": torch.zeros(2, 9), f"{layer}.lora_B": torch.zeros(24, 2)}, "do not fit a weight of"),
    ):
        save_file(adapters, folder / "DAPE.safetensors")
        with pytest.raises(UserError, match=message):
            RamTagger(folder, config=MICRO).describe(photo())
    with pytest.raises(UserError, match=r"adapter: \(3, 4\) and \(5, 3\) do not fit a weight of \(6, 4\)"):
        adapter_delta(torch.zeros(3, 4), torch.zeros(5, 3), torch.Size((6, 4)))


def test_missing_files_and_how_to_do_without(folder, tmp_path):
    with pytest.raises(UserError, match=r"DAPE: .*dape must hold ram_swin.*, DAPE.pth, .*give --prompt-file") as caught:
        load_extractor("dape")
    assert "\n" not in str(caught.value)
    (folder / "ram_tag_list_threshold.txt").unlink()
    with pytest.raises(UserError, match="must hold"):
        load_extractor(folder)
    (folder / "ram_tag_list_threshold.txt").write_text("0.5\n" * 5)
    with pytest.raises(UserError, match="5 tags, the network has 4585"):
        load_extractor(folder)
    folder.rename(tmp_path / "moved")
    usual_folder().parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "moved").rename(usual_folder())
    with pytest.raises(UserError, match="5 tags, the network has 4585"):
        load_extractor("dape")


def test_a_file_of_another_network_is_named(folder):
    torch.save({"model": {"label_embed": torch.zeros(5, 12)}}, folder / "ram_swin_large_14m.pth")
    with pytest.raises(UserError, match=r"ram_swin_large_14m.pth: no weight 'fc.bias'"):
        RamTagger(folder, config=MICRO).describe(photo())


# ---- tags and the tagger's input -----------------------------------------------------------------------------------


def test_prompts_have_the_published_form():
    assert format_tags(["cat", "tree"]) == "cat, tree, ,"
    assert format_tags(["cat", "tree"], "a photo") == "cat, tree, a photo,"
    assert format_tags([]) == ", ,"


def test_tags_above_their_own_threshold_in_the_order_of_the_list():
    names = ["cat", "dog", "tree", "sky"]
    probabilities = torch.tensor([0.7, 0.7, 0.9, 0.2])
    assert select_tags(probabilities, torch.tensor([0.6, 0.8, 0.9, 0.1]), names) == ["cat", "sky"]
    assert select_tags(probabilities, 0.5, names) == ["cat", "dog", "tree"]
    with pytest.raises(ValueError, match="expected \\(3,\\)"):
        select_tags(probabilities, 0.5, names[:3])


@pytest.mark.parametrize("name", ["small", "mid"])
def test_images_are_prepared_as_published(name):
    prepared = published_input(Image.fromarray(GOLDEN[f"{name}.in"]))
    assert prepared.size == tuple(GOLDEN[f"{name}.out_size_wh"])
    pixels = np.asarray(prepared).astype(int)
    assert (
        np.abs(pixels[:64, :64] - GOLDEN[f"{name}.out_corner"]).max() <= 1
    )  # other versions of Pillow round otherwise
    np.testing.assert_allclose(pixels.mean((0, 1)), GOLDEN[f"{name}.out_mean"], atol=0.05)


def test_faces_are_prepared_at_their_own_size():
    assert published_input(Image.new("RGB", (515, 530)), scale=1).size == (512, 528)


def test_the_tagger_sees_a_square_in_the_statistics_of_imagenet():
    flat = Image.new("RGB", (50, 20), (255, 0, 51))
    square = tagger_input(flat)
    assert square.shape == (1, 3, 384, 384)
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]).view(1, 3, 1, 1)
    torch.testing.assert_close(square, expected.expand_as(square))
    fine = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8))
    assert tagger_input(fine, antialias=True).std() < 0.6 * tagger_input(fine).std()


def test_lists_of_tags_and_thresholds(tmp_path):
    (tmp_path / "tags.txt").write_text("cat\nsea lion \n")
    (tmp_path / "numbers.txt").write_text("0.5\n0.75\n")
    assert read_tag_names(tmp_path / "tags.txt") == ["cat", "sea lion"]
    assert read_thresholds(tmp_path / "numbers.txt", 2).tolist() == [0.5, 0.75]
    with pytest.raises(UserError, match="2 thresholds for 3 tags"):
        read_thresholds(tmp_path / "numbers.txt", 3)
    with pytest.raises(UserError, match="expected one number per line"):
        read_thresholds(tmp_path / "tags.txt", 2)
    (tmp_path / "numbers.txt").write_text("0.5\n7\n")
    with pytest.raises(UserError, match="outside 0 to 1"):
        read_thresholds(tmp_path / "numbers.txt", 2)
    with pytest.raises(UserError, match="cannot be read"):
        read_tag_names(tmp_path / "none.txt")

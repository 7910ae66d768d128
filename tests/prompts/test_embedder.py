import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_text_model import WIDTH, write_text_encoder

from onestepsr.core.errors import UserError
from onestepsr.prompts.embedder import EmbeddingCache, PromptEmbedder, TextEncoder, TextEncoderFolder
from onestepsr.weights.download import OFFLINE

LONG = "cat " * 76


@pytest.fixture
def forbidden(monkeypatch):
    """Loading a text encoder is an error."""

    def refuse(self, device="cpu"):
        raise AssertionError("the text encoder was loaded")

    return lambda: monkeypatch.setattr(TextEncoderFolder, "load", refuse)


def test_embeddings_are_those_of_the_model_on_77_tokens(text_folder):
    from transformers import CLIPTextModel

    embedder = PromptEmbedder(text_folder)
    texts = ["a cat, dog", "", "a cat, dog"]
    found = embedder.embed(texts)
    assert found.shape == (3, 77, WIDTH)
    assert (found.dtype, embedder.width) == (torch.float32, WIDTH)
    assert torch.equal(found[0], found[2])
    vocabulary = json.loads((text_folder / "tokenizer" / "vocab.json").read_text())
    words = ["<|startoftext|>", "a</w>", "cat</w>", ",</w>", "dog</w>", "<|endoftext|>"]
    tokens = torch.tensor([[vocabulary[word] for word in words] + [vocabulary["!"]] * 71])
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(text_folder / "text_encoder").eval()(tokens).last_hidden_state
    torch.testing.assert_close(found[:1], expected, rtol=0, atol=1e-6)


def test_the_encoder_is_loaded_only_for_texts_that_no_cache_holds(text_folder, tmp_path, forbidden):
    cache = EmbeddingCache(tmp_path / "prompts")
    first = PromptEmbedder(text_folder, cache=cache).embed(["a cat", "a dog"])
    forbidden()
    again = PromptEmbedder(text_folder, cache=cache)
    assert torch.equal(again.embed(["a dog", "a cat"]), first.flip(0))
    assert again.embed([]).shape == (0, 77, WIDTH)
    with pytest.raises(AssertionError, match="was loaded"):
        again.embed(["a tree"])


def test_the_encoder_does_not_stay_in_memory(text_folder, monkeypatch):
    alive = []
    original = TextEncoder.__init__

    def counted(self, *parts):
        alive.append(self)
        original(self, *parts)

    monkeypatch.setattr(TextEncoder, "__init__", counted)
    monkeypatch.setattr(TextEncoder, "__del__", lambda self: alive.append("gone"), raising=False)
    PromptEmbedder(text_folder, cache=EmbeddingCache(limit=0)).embed(["a cat"])
    alive.pop(0)
    assert alive == ["gone"]


def test_a_text_that_is_too_long_is_refused_or_cut_off(text_folder, tmp_path):
    cache = EmbeddingCache(tmp_path / "prompts")
    with pytest.raises(UserError, match=r"prompt 'cat cat .*…': 76 tokens, at most 75 are read; shorten it"):
        PromptEmbedder(text_folder, cache=cache).embed(["fine", LONG])
    cut = PromptEmbedder(text_folder, cache=cache, truncate=True).embed([LONG, "cat " * 75])
    assert torch.equal(cut[0], cut[1])
    with pytest.raises(UserError, match="76 tokens"):  # although it has been embedded before
        PromptEmbedder(text_folder, cache=cache).embed([LONG])
    assert torch.equal(PromptEmbedder(text_folder, cache=cache).embed(["cat " * 75])[0], cut[1])


def test_weights_under_the_names_of_published_files_are_the_same(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "published")
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, path, {"format": "pt"})
    assert torch.equal(PromptEmbedder(folder).embed(["a cat"]), PromptEmbedder(text_folder).embed(["a cat"]))


def test_another_encoder_has_another_identity(text_folder, tmp_path):
    other = write_text_encoder(tmp_path / "other", seed=1)
    assert TextEncoderFolder(text_folder).identity() == TextEncoderFolder(text_folder).identity()
    assert TextEncoderFolder(other).identity() != TextEncoderFolder(text_folder).identity()
    same = shutil.copytree(text_folder, tmp_path / "same")
    assert TextEncoderFolder(same).identity() == TextEncoderFolder(text_folder).identity()
    settings = same / "tokenizer" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"pad_token": "!"', '"pad_token": "a"'))
    assert TextEncoderFolder(same).identity() != TextEncoderFolder(text_folder).identity()


def _without_weights(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()


def _damaged(folder):
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"nothing")


def _incomplete(folder):
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    del weights["final_layer_norm.weight"]
    save_file(weights, path, {"format": "pt"})


def _of_another_kind(folder):
    _change(folder, architectures=["CLIPTextModelWithProjection"])


def _shorter(folder):
    _change(folder, max_position_embeddings=32)


def _nameless(folder):
    _change(folder, hidden_size="wide")


def _change(folder, **values):
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_weights, "no text_encoder/model.safetensors; expected a diffusers folder"),
        (_damaged, "text_encoder: does not load"),
        (_incomplete, "1 weights are missing, the first is final_layer_norm.weight"),
        (_of_another_kind, "expected a CLIPTextModel"),
        (_shorter, "reads 32 tokens, expected 77"),
        (_nameless, "hidden_size is 'wide'"),
    ],
)
def test_folders_that_are_of_no_use_are_named(text_folder, tmp_path, spoil, message):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        PromptEmbedder(folder).embed(["a cat"])
    assert "\n" not in str(caught.value)


def test_what_is_neither_folder_nor_repository_is_named(tmp_path):
    with pytest.raises(UserError, match=r"'sd21': no such folder, and no owner/name .* did you mean 'sd21-base'"):
        PromptEmbedder("sd21")
    with pytest.raises(UserError, match=f"'nobody/nothing': no such folder here, .*{OFFLINE} is set.*give the path"):
        PromptEmbedder("nobody/nothing@main")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file, expected a folder"):
        PromptEmbedder(tmp_path / "file")

import os

import pytest
import torch
from safetensors.torch import save_file

from onestepsr.prompts.embedder import EmbeddingCache

WIDTH = 4
ENTRY = 77 * WIDTH * 4 + 200


def embedding(seed=0):
    return torch.randn(77, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_what_was_kept_comes_back_for_the_same_encoder_and_text(tmp_path):
    cache = EmbeddingCache(tmp_path / "new" / "folder")
    assert cache.get("encoder", "a cat", WIDTH) is None
    cache.put("encoder", "a cat", embedding())
    assert torch.equal(EmbeddingCache(cache.folder).get("encoder", "a cat", WIDTH), embedding())
    assert cache.get("encoder", "a dog", WIDTH) is None
    assert cache.get("other", "a cat", WIDTH) is None
    assert cache.get("encoder", "a cat", WIDTH + 1) is None


def test_the_least_recently_used_go_first(tmp_path):
    cache = EmbeddingCache(tmp_path, limit=3 * ENTRY)
    for number, text in enumerate("abc"):
        cache.put("e", text, embedding(number))
        os.utime(cache.path("e", text), (number, number))
    assert cache.get("e", "a", WIDTH) is not None  # is the most recently used from now on
    cache.put("e", "d", embedding(3))
    assert [cache.get("e", text, WIDTH) is not None for text in "abcd"] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= cache.limit
    unlimited = EmbeddingCache(tmp_path / "all", limit=None)
    for text in "abcde":
        unlimited.put("e", text, embedding())
    assert all(unlimited.get("e", text, WIDTH) is not None for text in "abcde")
    EmbeddingCache(tmp_path, limit=0).put("e", "z", embedding())
    assert cache.get("e", "z", WIDTH) is None


@pytest.mark.parametrize(
    "content",
    [b"no safetensors", {"other": embedding()}, {"embedding": embedding()[:5]}, {"embedding": embedding() / 0}],
)
def test_damaged_entries_count_as_absent_and_are_replaced(tmp_path, content):
    cache = EmbeddingCache(tmp_path)
    path = cache.path("e", "a")
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    assert cache.get("e", "a", WIDTH) is None
    cache.put("e", "a", embedding())
    assert torch.equal(cache.get("e", "a", WIDTH), embedding())


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache(tmp_path / "file" / "folder")
    cache.put("e", "a", embedding())
    assert cache.get("e", "a", WIDTH) is None


def test_a_folder_that_others_own_can_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    cache = EmbeddingCache(tmp_path)
    cache.put("e", "a", embedding())
    monkeypatch.setattr(os, "utime", refuse)
    assert torch.equal(cache.get("e", "a", WIDTH), embedding())

"""Texts of photos on their way to the networks: every crop of a photo comes with the embedding of its text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_text_model import write_text_encoder

from onestepsr.core.config import from_mapping
from onestepsr.core.errors import UserError
from onestepsr.data.datasets import DataConfig, build_dataset
from onestepsr.methods.base import Method
from onestepsr.prompts.embedder import EmbeddingCache
from onestepsr.train.batches import with_prompts
from onestepsr.train.recipes import load_run
from onestepsr.train.run import prepare

TOKENS, WIDTH = 77, 2
TEXTS = {"a": "cat", "b": "a dog", "c": "a blue tree"}


class Lengths:
    """An embedder without weights: the embedding of a text holds its length; it remembers what it was asked."""

    width = WIDTH

    def __init__(self, cache: EmbeddingCache) -> None:
        self.cache, self.asked = cache, []

    def path(self, text: str) -> Path:
        return self.cache.path("lengths", text)

    def find(self, text: str) -> torch.Tensor | None:
        return self.cache.get("lengths", text, self.width)

    def embed(self, texts: list[str]) -> torch.Tensor:
        self.asked.extend(texts)
        for text in texts:
            self.cache.put("lengths", text, torch.full((TOKENS, self.width), float(len(text))))
        return torch.empty(0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos of one gray level each, 10, 20 and 30, the second one in a folder of its own."""
    for level, name in enumerate(("a.png", "sub/b.png", "c.png"), start=1):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 44, 3), 10 * level, np.uint8)).save(path)
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    return tmp_path


def config_of(folder: Path, **changes: object) -> DataConfig:
    values = {"paths": [str(folder / "photos")], "crop": 32, "degradation": "bicubic"}
    values |= {"prompts": str(folder / "texts.json"), "cache_dir": str(folder / "cache")}
    return from_mapping(DataConfig, values | changes, "data")


def prompted(folder: Path, embedders: list[Lengths], *, dry: bool = False, **changes: object):
    config = config_of(folder, **changes)

    def embedder(cache: EmbeddingCache) -> Lengths:
        embedders.append(Lengths(cache))
        return embedders[-1]

    method = Method(networks={}, phases=(), embedder=embedder)
    return with_prompts(build_dataset(config, 0), config, method, "data", dry=dry)


def length_for(level: float) -> int:
    return len(list(TEXTS.values())[round(level * 255 / 10) - 1])


def test_every_crop_has_the_text_of_its_photo(photos: Path) -> None:
    source = prompted(photos, [])
    assert len(source) == 3
    seen = set()
    for index in range(9):
        sample = source[index]
        assert set(sample) == {"hr", "lr", "prompt"}
        assert sample["prompt"].shape == (TOKENS, WIDTH)
        assert sample["prompt"].unique().tolist() == [length_for(float(sample["hr"].mean()))]
        seen.add(int(sample["prompt"][0, 0]))
    assert seen == {len(text) for text in TEXTS.values()}


def test_a_photo_that_stands_in_for_a_broken_one_brings_its_own_text(photos: Path) -> None:
    source = prompted(photos, [])
    broken = photos / "photos" / "a.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for index in range(6):
        sample = source[index]
        assert sample["prompt"].unique().tolist() == [length_for(float(sample["hr"].mean()))]


def test_pairs_have_texts_too(photos: Path) -> None:
    for path in (photos / "photos").rglob("*.png"):
        target = photos / "lr" / path.relative_to(photos / "photos")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((11, 10)).save(target)
    for changes in ({}, {"crop": 0}):
        source = prompted(photos, [], kind="pairs", lr_paths=[str(photos / "lr")], **changes)
        for index in range(4):
            sample = source[index]
            assert sample["prompt"].unique().tolist() == [length_for(float(sample["hr"].mean()))]


def test_embeddings_are_made_once_and_stay_on_disk(photos: Path) -> None:
    embedders: list[Lengths] = []
    (photos / "texts.json").write_text(json.dumps(TEXTS | {"c": "cat"}))
    prompted(photos, embedders)
    again = prompted(photos, embedders)
    assert [sorted(one.asked) for one in embedders] == [["a dog", "cat"], []]
    for path in (photos / "cache" / "prompts").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="embedding of a photo's text is gone"):
        again[0]


def test_several_processes_make_embeddings_one_after_the_other(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While this process waits for the lock, the one that has it makes what this one would look for."""
    places: list[Path] = []

    @contextmanager
    def after_another(path: Path, *, wait: bool) -> Iterator[bool]:
        assert wait
        places.append(path)
        monkeypatch.setattr("onestepsr.train.batches.locked", lambda path, wait: nullcontext(True))
        prompted(photos, [])
        yield True

    monkeypatch.setattr("onestepsr.train.batches.locked", after_another)
    embedders: list[Lengths] = []
    prompted(photos, embedders)
    assert embedders[0].asked == []
    assert places == [photos / "cache" / "prompts" / ".lock"]


def test_a_dry_run_reads_texts_and_makes_no_embedding(photos: Path) -> None:
    embedders: list[Lengths] = []
    assert set(prompted(photos, embedders, dry=True)[0]) == {"hr", "lr"}
    assert not embedders
    (photos / "texts.json").write_text(json.dumps({"a": "cat"}))
    with pytest.raises(UserError, match=r"texts\.json: no prompt for c\.png"):
        prompted(photos, embedders, dry=True)


def test_what_has_no_texts_says_so(photos: Path) -> None:
    config = config_of(photos)
    with pytest.raises(UserError, match=r"data\.prompts: the networks of this run read no texts"):
        with_prompts(build_dataset(config, 0), config, Method(networks={}, phases=()), "data", dry=False)
    plain = config_of(photos, prompts=None)
    source = build_dataset(plain, 0)
    assert with_prompts(source, plain, Method(networks={}, phases=()), "data", dry=False) is source
    with pytest.raises(UserError, match="prompts with a pool_size of 2: expected pool_size 0"):
        config_of(photos, pool_size=2)


def test_recipes_read_texts_unless_they_learn_their_prompt(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a recipe to its samples, with the text encoder replaced."""

    class Wide(Lengths):
        width = 64

        def __init__(self, name: str, cache: EmbeddingCache, fetch: bool) -> None:
            assert fetch
            super().__init__(cache)

    monkeypatch.setattr("onestepsr.prompts.embedder.PromptEmbedder", Wide)
    values = {"data.paths": [str(photos / "photos")], "data.prompts": str(photos / "texts.json"), "data.crop": 32}
    values |= {"config.backbone": "random:d3sr-tiny", "data.cache_dir": str(photos / "cache"), "data.pool_size": 0}
    settings = [f"{name}={json.dumps(value)}" for name, value in (values | {"out": str(photos / "run")}).items()]
    plan = prepare(load_run("osediff", "osediff-tiny", settings), resume=False)
    assert plan.photos == 3
    assert plan.source[0]["prompt"].shape == (TOKENS, Wide.width)
    assert plan.validator is not None
    assert plan.validator.source is plan.source
    with pytest.raises(UserError, match="read no texts of photos"):
        prepare(load_run("osediff", "osediff-tiny", [*settings, "config.prompt.kind=learnable"]), resume=False)


@pytest.fixture
def dry_settings(photos: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.delenv("ONESTEPSR_OFFLINE", raising=False)
    monkeypatch.setenv("ONESTEPSR_CACHE", str(photos / "weights"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(photos / "hub"))
    values = {"data.paths": [str(photos / "photos")], "data.crop": 32, "data.pool_size": 0, "out": "run"}
    values |= {"config.backbone": "random:d3sr-tiny", "data.cache_dir": str(photos / "cache")}
    values |= {"config.prompt.kind": "text", "config.prompt.text_encoder": str(photos / "sd")}
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def dry_run(*settings: str) -> None:
    """Says of text encoder and texts what training would."""
    prepare(load_run("osediff", "osediff-tiny", list(settings)), resume=False, dry=True)


def test_a_dry_run_only_looks_at_a_text_encoder(
    photos: Path, dry_settings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_text_encoder(photos / "sd", width=64)
    dry_run(*dry_settings, f"data.prompts={photos / 'texts.json'}")
    assert not (photos / "cache").exists()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["config.prompt.text_encoder=nowhere"], "text encoder 'nowhere': no such folder"),
        (["config.prompt.text_encoder={folder}/photos"], r"photos: no text_encoder/config\.json; expected"),
        (["config.prompt.text_encoder={folder}/narrow"], "gives embeddings of width 16, the backbone takes 64"),
        (["config.prompt.text='{long}'"], "80 tokens, at most 75 are read"),
        (["data.prompts={folder}/long.json"], "80 tokens, at most 75 are read"),
    ],
)
def test_a_dry_run_refuses_what_training_would(
    photos: Path, dry_settings: list[str], changes: list[str], message: str
) -> None:
    long = "cat " * 80
    write_text_encoder(photos / "sd", width=64)
    write_text_encoder(photos / "narrow")
    (photos / "long.json").write_text(json.dumps(TEXTS | {"c": long}))
    with pytest.raises(UserError, match=message):
        dry_run(*dry_settings, *(change.format(folder=photos, long=long) for change in changes))


def test_a_dry_run_tells_what_training_would_fetch(
    dry_settings: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry_run(*dry_settings, "config.prompt.text_encoder=nobody/nothing")
    assert "text encoder 'nobody/nothing': not on this machine; training begins by fetching it" in caplog.text
    monkeypatch.setenv("ONESTEPSR_OFFLINE", "1")
    with pytest.raises(UserError, match=r"not to be fetched \(ONESTEPSR_OFFLINE is set\)"):
        dry_run(*dry_settings, "config.prompt.text_encoder=nobody/nothing")

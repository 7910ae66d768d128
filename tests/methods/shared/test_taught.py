"""Images of a teacher beside the samples: what it is asked, what it answers, and what cannot be taught."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.data.datasets import TAUGHT, DataConfig, build_dataset
from onestepsr.methods.shared.taught import TaughtPool, TaughtStream, Teacher, taught
from onestepsr.models.generators import Generator


class Steep(Generator):
    """Doubles the contrast of an image around a quarter, at the image's own size."""

    def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
        return 2 * lr - 0.5


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = torch.randint(0, 256, (40, 36, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for number in range(2):
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return DataConfig(paths=(folder,), crop=32, degradation="camera", cache_dir=tmp_path / "cache")


def test_answers_are_clamped_to_the_levels_of_eight_bits_by_a_model_that_is_loaded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[str] = []

    def load(name: str, **_: Any) -> Generator:
        loaded.append(name)
        return Steep()

    monkeypatch.setattr("onestepsr.models.loading.load_generator", load)
    teacher = Teacher("steep", "float32")
    lr = torch.tensor([0.0, 0.25, 0.5, 0.502, 1.0]).expand(1, 3, 4, 5)
    for _ in range(2):
        sr = teacher(lr)
        torch.testing.assert_close(sr[0, 2, 3], torch.tensor([0, 0, 128, 129, 255]) / 255, rtol=0, atol=1e-6)
    assert loaded == ["steep"]


def test_a_stream_adds_the_teachers_image_to_the_samples_of_its_source(data: DataConfig) -> None:
    source = build_dataset(data, 5)
    stream = taught(source, Teacher("bicubic", "float32"), data, 5)
    assert isinstance(stream, TaughtStream)
    assert (stream.config, stream.seed, stream.with_lr, stream.photos) == (data, 5, True, source.photos)  # type: ignore[union-attr]
    assert len(stream) == 2
    sample = stream[3]
    assert set(sample) == {"hr", "lr", TAUGHT}
    assert torch.equal(sample["lr"], source[3]["lr"])
    assert sample[TAUGHT].shape == sample["hr"].shape
    assert stream.content() == [*source.content(), ["teacher", "bicubic", "torch.float32"]]  # type: ignore[union-attr]


def test_a_pool_is_made_where_the_configuration_asks_for_one_whatever_the_source(data: DataConfig) -> None:
    pooled = replace(data, pool_size=3)
    pools = [taught(build_dataset(config, 5), Teacher("bicubic", "float32"), pooled, 5) for config in (data, pooled)]
    assert all(isinstance(pool, TaughtPool) and isinstance(pool.source, TaughtStream) for pool in pools)
    assert pools[0].folder == pools[1].folder  # type: ignore[union-attr]
    assert isinstance(taught(build_dataset(pooled, 5), Teacher("bicubic", "float32"), data, 5), TaughtStream)


def test_a_teacher_is_known_by_the_weights_of_its_file_or_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(b"weights")
    assert Teacher(str(path), "float32").identity() == [hashlib.sha256(b"weights").hexdigest(), "torch.float32"]
    assert Teacher("bicubic", "bfloat16").identity() == ["bicubic", "torch.bfloat16"]


def test_what_cannot_be_taught_is_said(data: DataConfig, tmp_path: Path) -> None:
    source, teacher = build_dataset(data, 5), Teacher("bicubic", "float32")
    folder = data.paths[0]
    pairs = replace(data, kind="pairs", lr_paths=(folder,), taught_paths=(folder,))
    for wrong, config, message in (
        (build_dataset(data, 5, with_lr=False), data, "a teacher needs LR images, and its pool keeps no texts"),
        (source, replace(data, prompts=tmp_path), "a teacher needs LR images, and its pool keeps no texts"),
        (source, pairs, r"data\.taught_paths: the targets of this method are made by its own teacher"),
    ):
        with pytest.raises(UserError, match=message):
            taught(wrong, teacher, config, 5)

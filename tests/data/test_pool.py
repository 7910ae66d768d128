import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from onestepsr.core.errors import UserError
from onestepsr.data.datasets import DataConfig, Pool, build_dataset


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        coarse = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60, 48)).save(folder / f"{number}.png")
    return folder


def pooled(photos, seed=0, with_lr=True, **settings):
    values = {"paths": (photos,), "crop": 32, "pool_size": 6, "cache_dir": photos.parent / "cache", **settings}
    return build_dataset(DataConfig(**values), seed, with_lr)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def orientations(image):
    mirrored = [image, image.flip(-1)]
    return {torch.rot90(each, turns, (-2, -1)).numpy().tobytes() for each in mirrored for turns in range(4)}


def made(pool):
    return int((np.fromfile(pool.folder / "made.bin", np.uint64) != 0).sum())


def test_entries_equal_the_direct_samples_before_and_after_storage(photos):
    pool, direct = pooled(photos), pooled(photos, pool_size=0)
    for _ in range(2):
        assert all(same(pool.entry(number), direct[number]) for number in range(6))
    assert made(pool) == 6
    assert all(same(pooled(photos).entry(number), direct[number]) for number in range(6))


def test_later_epochs_reuse_the_same_images_in_new_orientations(photos):
    pool = pooled(photos, rotations=True, degradation="bicubic")
    known = set().union(*(orientations(pool.entry(number)["hr"]) for number in range(6)))
    epochs = [[pool[epoch * 6 + place] for place in range(6)] for epoch in range(4)]
    for epoch in epochs:
        assert {sample["hr"].numpy().tobytes() for sample in epoch} <= known
        assert len({min(orientations(sample["hr"])) for sample in epoch}) == 6
    assert len({sample["hr"].numpy().tobytes() for epoch in epochs for sample in epoch}) > 6
    for sample in epochs[2]:  # LR is turned along with HR
        shrunk = torch.nn.functional.interpolate(sample["hr"][None], size=8, mode="bicubic", antialias=True)[0]
        assert (shrunk.clamp(0, 1) - sample["lr"]).abs().max() < 1 / 255


def test_only_what_is_asked_for_is_made(photos):
    pool = pooled(photos)
    pool[0]
    assert made(pool) == 1


def test_damaged_and_unfinished_entries_are_made_again(photos):
    pool = pooled(photos)
    expected = [pool.entry(number) for number in range(6)]
    pixels = np.memmap(pool.folder / "hr.bin", np.uint8, "r+", shape=(6, 3, 32, 32))
    pixels[2, 1] = 0  # as if the process had died while writing
    pixels.flush()
    checks = np.memmap(pool.folder / "made.bin", np.uint64, "r+", shape=(6,))
    checks[4] = 0  # written, but not marked
    checks.flush()
    again = pooled(photos)
    assert all(same(again.entry(number), expected[number]) for number in range(6))


def test_loader_workers_change_nothing_and_share_the_pool(photos):
    direct = list(DataLoader(pooled(photos, cache_dir=photos.parent / "a"), 4, sampler=range(12), num_workers=0))
    shared = pooled(photos, cache_dir=photos.parent / "b")
    workers = list(DataLoader(shared, 4, sampler=range(12), num_workers=2))
    assert all(same(left, right) for left, right in zip(direct, workers, strict=True))
    assert made(shared) == 6


def test_another_configuration_seed_or_photo_is_another_pool(photos):
    folders = {pooled(photos).folder, pooled(photos, seed=1).folder, pooled(photos, with_lr=False).folder}
    folders |= {pooled(photos, degradation="camera").folder, pooled(photos, hr_scale=(0.6, 1.0)).folder}
    assert pooled(photos).folder in folders
    assert pooled(photos, cache_bytes=5).folder in folders
    Image.new("RGB", (64, 64)).save(photos / "new.png")
    folders.add(pooled(photos).folder)
    assert len(folders) == 6


def test_hr_alone(photos):
    pool = pooled(photos, with_lr=False)
    assert pool[0].keys() == {"hr"}
    assert not (pool.folder / "lr.bin").exists()


def test_a_pool_can_be_sent_to_another_process(photos):
    pool = pooled(photos)
    first = pool[3]
    assert same(pickle.loads(pickle.dumps(pool))[3], first)


def test_a_pool_without_a_place_is_refused(photos):
    (photos.parent / "file").write_text("")
    with pytest.raises(UserError, match="cannot be opened"):
        pooled(photos, cache_dir=photos.parent / "file")[0]
    huge = pooled(photos, pool_size=10**12)
    assert isinstance(huge, Pool)
    with pytest.raises(UserError, match="pool_size"):
        huge.entry(0)

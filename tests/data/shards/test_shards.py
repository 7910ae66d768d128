import io
import logging
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from onestepsr.core.errors import UserError
from onestepsr.data.datasets import DataConfig, build_dataset
from onestepsr.data.order import BLOCKS_PER_WINDOW, BlockOrder
from onestepsr.data.shards import index, reader
from onestepsr.data.shards.index import HR, LR, OTHER, build_index, open_index
from onestepsr.data.shards.reader import expand_braces, find_tars

INDEX = "{}.index.npz"


def encoded(height, width, seed=0, kind="PNG", **options):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def photos(tmp_path):
    """Nine photos: as files below ``photos`` and, in the same order, in three tars below ``tars``."""
    for shard in range(3):
        members = {}
        for number in range(shard * 3, shard * 3 + 3):
            name = f"{number}.{'jpg' if number % 2 else 'png'}"
            data = encoded(40 + 4 * number, 60, number, "JPEG" if number % 2 else "PNG")
            members |= {name: data, f"{number}.json": b"{}"}
            (tmp_path / "photos").mkdir(exist_ok=True)
            (tmp_path / "photos" / name).write_bytes(data)
        write_tar(tmp_path / "tars" / f"train-{shard:02d}.tar", members)
    return tmp_path


def shards(folder, seed=0, with_lr=True, **settings):
    values = {"kind": "shards", "paths": (folder / "tars",), "crop": 32, "cache_dir": folder / "cache", **settings}
    return build_dataset(DataConfig(**values), seed, with_lr)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_shards_give_the_same_photos_as_files(photos):
    tars = shards(photos)
    files = build_dataset(DataConfig(paths=(photos / "photos",), crop=32), seed=0)
    assert len(tars) == len(files) == 9
    assert all(np.array_equal(tars.cache.get(number), files.cache.get(number)) for number in range(9))


def test_a_sample_depends_on_seed_and_number_alone(photos):
    first, second = shards(photos, seed=1), shards(photos, seed=1, cache_bytes=0)
    numbers = [0, 100, 5, 12]
    expected = {number: first[number] for number in numbers}
    assert all(same(second[number], expected[number]) for number in reversed(numbers))
    assert same(pickle.loads(pickle.dumps(second))[5], expected[5])
    assert not same(shards(photos, seed=2)[5], expected[5])


def test_loader_workers_change_nothing(photos):
    dataset = shards(photos, cache_bytes=0, degradation="bicubic")
    dataset[0]  # a file is open when the workers are forked
    batches = [list(DataLoader(dataset, batch_size=6, sampler=range(18), num_workers=count)) for count in (0, 2)]
    assert len(batches[0]) == 3
    assert all(same(left, right) for left, right in zip(*batches, strict=True))


def test_a_pool_over_shards_equals_them_and_depends_on_the_order(photos):
    pool, direct = shards(photos, pool_size=4), shards(photos)
    assert all(same(pool.entry(number), direct[number]) for number in range(4))
    assert shards(photos, pool_size=4, shuffle_block=1).folder != pool.folder


@pytest.mark.parametrize("block", [1, 2, 5, 1000])
def test_each_epoch_visits_every_photo_once_in_a_new_order(block):
    counts = [3, 0, 700, 41, 1, 250]
    order = BlockOrder(counts, block, seed=3)
    total = sum(counts)
    epochs = [[order.position(epoch * total + place) for place in range(total)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = BlockOrder(counts, block, seed=3)
    assert [again.position(index) for index in (2 * total + 5, 7)] == [epochs[2][5], epochs[0][7]]
    assert BlockOrder(counts, block, seed=4).position(0) != epochs[0][0]
    with pytest.raises(IndexError):
        order.position(-1)


def test_neighbours_in_the_order_come_from_few_places():
    counts, block = [500] * 400, 10
    order = BlockOrder(counts, block, seed=0)
    window = [order.position(place) for place in range(BLOCKS_PER_WINDOW * block)]
    assert len({number // block for number in window}) == BLOCKS_PER_WINDOW
    first = [number // block for number in window[:BLOCKS_PER_WINDOW]]
    assert len(set(first)) > BLOCKS_PER_WINDOW // 2  # mixed inside, not block after block


def test_open_files_are_few(photos, monkeypatch):
    monkeypatch.setattr(reader, "MAX_OPEN_FILES", 2)
    images = shards(photos).images
    for number in (0, 3, 6, 0, 8, 4):
        assert images.fetch(number)[1].endswith((f"{number}.png", f"{number}.jpg"))
        assert len(images._open) <= 2


def test_the_index_is_made_once_and_again_when_the_tar_changes(photos, monkeypatch):
    built = []
    monkeypatch.setattr(index, "build_index", lambda path: built.append(path.name) or build_index(path))
    tar = photos / "tars" / "train-00.tar"
    kept = tar.with_name(INDEX.format(tar.name))
    assert open_index(tar, photos / "cache").members.tolist() == open_index(tar, photos / "cache").members.tolist()
    assert built == ["train-00.tar"]
    assert sorted(path.name for path in (photos / "tars").glob("*index*")) == [kept.name]
    for damage in (b"", b"no archive", kept.read_bytes()[:-300]):
        kept.write_bytes(damage)
        assert len(open_index(tar, photos / "cache").members) == 3
    assert len(built) == 4
    write_tar(tar, {"new.png": encoded(50, 50)})
    assert open_index(tar, photos / "cache").members["width"].tolist() == [50]


def test_an_index_that_cannot_lie_beside_the_tar_goes_to_the_cache(photos, monkeypatch, caplog):
    tar = photos / "tars" / "train-01.tar"
    tar.with_name(INDEX.format(tar.name)).mkdir()  # nothing can be renamed to this
    made = open_index(tar, photos / "cache")
    assert len(list((photos / "cache").glob("tar-index-*.npz"))) == 1
    monkeypatch.setattr(index, "build_index", None)
    assert open_index(tar, photos / "cache").members.tolist() == made.members.tolist()
    monkeypatch.undo()
    (photos / "file").write_text("")
    assert len(open_index(tar, photos / "file").members) == 3
    assert "cannot be kept" in caplog.text
    assert not list(photos.rglob("*writing*"))


def test_processes_of_a_run_begin_at_different_tars(photos, monkeypatch):
    begun = []
    monkeypatch.setattr(index, "build_index", lambda path: begun.append(path.name) or build_index(path))
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert [index.path.name for index in index.open_indexes(find_tars([photos / "tars"]), photos / "cache")] == [
        f"train-{number:02d}.tar" for number in range(3)
    ]
    assert begun == ["train-02.tar", "train-00.tar", "train-01.tar"]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_counts_as_a_image(tmp_path, layout):
    turned = Image.Exif()
    turned[0x0112] = 6
    long_name = "/".join(["folder-with-a-name"] * 6) + "/é.png"
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w", format=layout) as archive:

        def add(name, data=b"", **fields):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))

        add("folder.png", type=tarfile.DIRTYPE)
        add("a/b.JPG", encoded(24, 40, 1, "JPEG", exif=turned))
        add("link.png", type=tarfile.SYMTYPE, linkname="a/b.JPG")
        add("hard.jpg", type=tarfile.LNKTYPE, linkname="a/b.JPG")
        add("a/._b.JPG", b"hidden")
        add("notes.txt", b"text")
        add(long_name, encoded(16, 48))
        add("broken.webp", b"no image")
        add("empty.png")
    members = open_index(tar, tmp_path).members
    assert list(zip(members["width"].tolist(), members["height"].tolist(), strict=True)) == [
        (24, 40),
        (48, 16),
        (0, 0),
        (0, 0),
    ]
    data = tar.read_bytes()
    begin, length = int(members["offset"][1]), int(members["bytes"][1])
    assert data[begin : begin + length] == encoded(16, 48)


def test_small_and_damaged_photos_are_left_out_with_a_line(photos, caplog):
    whole = encoded(48, 48)
    extra = {"cut.png": whole[: len(whole) // 2], "none.jpg": b"none", "small.png": encoded(20, 200), "ok.png": whole}
    write_tar(photos / "tars" / "x.tar", extra)
    with caplog.at_level(logging.WARNING):
        dataset = shards(photos)
    assert len(dataset) == 11  # the cut file's header is fine
    assert "1 unreadable" in caplog.text
    assert "x.tar: none.jpg" in caplog.text
    assert "smaller than crop = 32" in caplog.text
    caplog.clear()
    assert all(dataset[number]["hr"].shape == (3, 32, 32) for number in range(22))
    assert sum("x.tar: cut.png" in record.message for record in caplog.records) == 1
    place = next(index for index in range(11) if dataset.position(index) == 9)  # where cut.png would come
    assert same(dataset[place], shards(photos)[place])


def cut_off(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def scribbled(path):
    data = bytearray(path.read_bytes())
    data[1024:1536] = b"x" * 512  # the second member's header: the first one's data fill a block
    path.write_bytes(data)


def replaced(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "cut off at byte"),
        (scribbled, "damaged at byte 1,024"),
        (replaced(b""), "not a tar file"),
        (replaced(b"text" * 200), "not a tar file"),
        (replaced(b"\x1f\x8b\x08" + bytes(600)), "compressed with gzip"),
        (replaced(bytes(10240)), "no images inside"),
    ],
)
def test_bad_tars_are_refused_in_one_line(tmp_path, damage, message):
    tar = write_tar(tmp_path / "tars" / "a.tar", {"a.txt": b"a", "b.png": encoded(64, 64)})
    damage(tar)
    with pytest.raises(UserError, match=message) as caught:
        shards(tmp_path)
    assert str(caught.value).startswith(str(tar))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*writing*"))


def test_sets_without_usable_photos_are_refused(tmp_path, photos):
    for paths, message in (
        ((photos / "nowhere",), "nowhere: no such file"),
        ((photos / "tars" / "train-{00..04}.tar",), r"train-03.tar: no such file \(2 of 5"),
        ((photos / "photos",), "no .tar files in it"),
    ):
        with pytest.raises(UserError, match=message):
            shards(photos, paths=paths)
    with pytest.raises(UserError, match="short side of 60, expected at least crop = 512"):
        shards(photos, crop=512)
    (photos / "photos" / "set.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"set.tar.gz is compressed"):
        shards(photos, paths=(photos / "photos",))
    broken = write_tar(tmp_path / "broken" / "a.tar", {"a.png": b"none"})
    with pytest.raises(UserError, match=r"a.tar: a.png: none of the 1 images"):
        shards(photos, paths=(broken,))
    with pytest.raises(UserError, match=r"set data.kind to shards"):
        build_dataset(DataConfig(paths=(broken,), crop=32), seed=0)
    with pytest.raises(UserError, match=r"no images in it .*set data.kind to shards"):
        build_dataset(DataConfig(paths=(broken.parent,), crop=32), seed=0)
    whole = encoded(64, 64)
    write_tar(broken, {"a.png": whole[: len(whole) // 2]})
    with pytest.raises(UserError, match="can be decoded"):
        shards(photos, paths=(broken,))[0]


def test_a_tar_that_changes_or_goes_during_the_run_ends_it(photos):
    dataset = shards(photos, cache_bytes=0)
    tars = sorted((photos / "tars").glob("*.tar"))
    os.utime(tars[0], ns=(1, 1))
    tars[1].unlink()
    with pytest.raises(UserError, match=r"train-00.tar: changed"):
        dataset.images.fetch(0)
    with pytest.raises(UserError, match=r"train-01.tar: cannot be read \(No such file"):
        dataset.images.fetch(3)
    assert dataset.images.fetch(6)[1].endswith("6.png")


def test_patterns_expand_as_in_a_shell():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{8..10}") == ["8", "9", "10"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("plain") == ["plain"]
    for pattern in ("{5..1}", "{x}", "{0..9999999}", "{0..99999}{0..99}"):
        with pytest.raises(UserError, match=r"\{"):
            expand_braces(pattern)


@pytest.fixture
def pairs(tmp_path):
    for shard in range(2):
        members = {"readme.png": encoded(8, 8)}
        for number in range(3):
            hr = encoded(64, 96, 3 * shard + number)
            buffer = io.BytesIO()
            with Image.open(io.BytesIO(hr)) as image:
                image.resize((24, 16), Image.Resampling.BOX).save(buffer, "PNG")
            members |= {f"s/{number}.lr.png": buffer.getvalue(), f"s/{number}.hr.png": hr}
        write_tar(tmp_path / "tars" / f"{shard}.tar", members)
    return tmp_path


def test_pairs_in_a_tar_are_found_by_their_key_and_stay_aligned(pairs):
    dataset = shards(pairs, kind="shard_pairs", rotations=True)
    assert len(dataset) == 6
    for number in range(12):
        sample = dataset[number]
        boxed = torch.nn.functional.avg_pool2d(sample["hr"], 4)
        assert (boxed - sample["lr"]).abs().max() < 1.01 / 255
    members = open_index(pairs / "tars" / "0.tar", pairs).members
    assert members["role"].tolist() == [OTHER, LR, HR, LR, HR, LR, HR]
    assert members["partner"].tolist() == [-1, 2, 1, 4, 3, 6, 5]


def test_whole_pairs_come_in_the_order_of_the_tars(pairs):
    dataset = shards(pairs, kind="shard_pairs", crop=0)
    assert dataset[4]["hr"].shape == (3, 64, 96)
    expected = np.asarray(Image.open(io.BytesIO(encoded(64, 96, 4))))
    assert np.array_equal((dataset[4]["hr"] * 255).round().numpy().transpose(1, 2, 0), expected)
    assert same(dataset[4], dataset[10])


def test_the_lr_half_of_a_pair_is_no_photo(pairs):
    assert len(shards(pairs, crop=16)) == 6


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.hr.png", encoded(64, 96), r"0.tar: no partner for a.hr.png"),
        ("s/1.lr.png", encoded(17, 24), r"s/1.hr.png: 96x64 against 24x17, expected 4 times"),
        ("s/1.lr.png", None, "no partner for s/1.hr.png"),
    ],
)
def test_pairs_that_do_not_match_are_named(pairs, name, data, message):
    tar = pairs / "tars" / "0.tar"
    with tarfile.open(tar) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}
    members[name] = data
    write_tar(tar, {name: data for name, data in members.items() if data is not None})
    with pytest.raises(UserError, match=message):
        shards(pairs, kind="shard_pairs")
    with pytest.raises(UserError, match="no pairs inside"):
        shards(pairs, kind="shard_pairs", paths=(write_tar(pairs / "other.tar", {"a.png": encoded(64, 64)}),))


def test_a_damaged_pair_is_replaced_in_training_and_refused_as_a_whole_image(pairs):
    hr = encoded(64, 96)
    members = {"a.hr.png": hr, "a.lr.png": encoded(16, 24)[:-60], "b.hr.png": hr, "b.lr.png": encoded(16, 24)}
    path = write_tar(pairs / "other.tar", members)
    dataset = shards(pairs, kind="shard_pairs", paths=(path,))
    assert all(dataset[number]["lr"].shape == (3, 8, 8) for number in range(4))
    with pytest.raises(UserError, match=r"other.tar: a.lr.png: cannot be decoded"):
        shards(pairs, kind="shard_pairs", paths=(path,), crop=0)[0]

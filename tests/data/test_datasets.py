import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from onestepsr.core.config import from_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.rng import generator
from onestepsr.data.datasets import DataConfig, build_dataset, epoch_position, random_crop


def save(path, height, width, seed=0, scale=1):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height // scale, width // scale, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for number in range(5):
        save(folder / ("sub" if number % 2 else ".") / f"{number}.png", 48 + 8 * number, 72, seed=number, scale=6)
    return folder


def config(folder, **settings):
    return DataConfig(paths=(folder,), crop=32, **settings)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_samples_are_8bit_images_of_the_promised_shapes(photos):
    sample = build_dataset(config(photos), seed=0)[3]
    assert (sample["hr"].shape, sample["lr"].shape) == ((3, 32, 32), (3, 8, 8))
    for image in sample.values():
        assert image.dtype == torch.float32
        levels = image * 255
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert build_dataset(config(photos), seed=0, with_lr=False)[3].keys() == {"hr"}


def test_a_sample_depends_on_seed_and_number_alone(photos):
    first, second = build_dataset(config(photos), seed=1), build_dataset(config(photos, cache_bytes=0), seed=1)
    numbers = [0, 7, 1000, 3]
    expected = {number: first[number] for number in numbers}
    assert all(same(second[number], expected[number]) for number in reversed(numbers))
    assert not same(build_dataset(config(photos), seed=2)[7], expected[7])


def test_loader_workers_change_nothing(photos):
    dataset = build_dataset(config(photos), seed=0)
    batches = [list(DataLoader(dataset, batch_size=3, sampler=range(9), num_workers=workers)) for workers in (0, 2)]
    assert len(batches[0]) == 3
    assert all(same(left, right) for left, right in zip(*batches, strict=True))


def test_each_epoch_visits_every_photo_once_in_a_new_order():
    epochs = [[epoch_position(50, epoch * 50 + place, seed=3) for place in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    with pytest.raises(IndexError):
        epoch_position(50, -1, seed=3)


def test_crops_shrink_the_photo_within_the_range():
    pixels = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (120, 1, 3))  # one level per column
    settings = DataConfig(paths=("x",), crop=40, hr_scale=(0.5, 0.8))
    for number in range(20):
        window = random_crop(pixels, settings, generator(number))
        assert window.shape == (40, 40, 3)
        slope = float(np.diff(window[20, 4:-4, 0].astype(float)).mean())
        assert 1 / 0.8 - 0.05 <= slope <= 1 / 0.5 + 0.05
    whole = random_crop(pixels[:40], settings, generator(0))  # as small as the crop: taken as it is
    assert float(np.diff(whole[0, :, 0].astype(float)).mean()) == 1


def test_flips_and_rotations_reach_all_orientations(tmp_path):
    quarter = np.zeros((32, 32, 3), np.uint8)
    quarter[:16, :8] = 255
    (tmp_path / "photos").mkdir()
    Image.fromarray(quarter).save(tmp_path / "photos" / "a.png")
    for rotations, count in ((False, 2), (True, 8)):
        dataset = build_dataset(config(tmp_path / "photos", rotations=rotations), seed=0, with_lr=False)
        assert len({dataset[i]["hr"].numpy().tobytes() for i in range(64)}) == count
    dataset = build_dataset(config(tmp_path / "photos", flips=False), seed=0, with_lr=False)
    assert len({dataset[i]["hr"].numpy().tobytes() for i in range(16)}) == 1


def test_small_and_damaged_photos_are_left_out_with_a_line(photos, caplog):
    save(photos / "small.png", 20, 200)
    (photos / "empty.jpg").write_bytes(b"")
    whole = (photos / "0.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        dataset = build_dataset(config(photos), seed=0)
    assert len(dataset) == 6  # the cut file's header is fine
    assert any("1 unreadable" in record.message for record in caplog.records)
    assert any("smaller than crop = 32" in record.message for record in caplog.records)
    caplog.clear()
    assert all(dataset[number]["hr"].shape == (3, 32, 32) for number in range(12))
    assert sum("cut.png" in record.message for record in caplog.records) == 1


def test_folders_without_usable_photos_are_refused(tmp_path, photos):
    with pytest.raises(UserError, match="no such folder"):
        build_dataset(config(tmp_path / "nowhere"), seed=0)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no images in it"):
        build_dataset(config(tmp_path / "bare"), seed=0)
    (tmp_path / "bare" / "a.jpg").write_text("no image")
    with pytest.raises(UserError, match="none of the 1 images"):
        build_dataset(config(tmp_path / "bare"), seed=0)
    with pytest.raises(UserError, match="crop = 512"):
        build_dataset(DataConfig(paths=(photos,), crop=512), seed=0)
    whole = (photos / "0.png").read_bytes()
    (tmp_path / "bare" / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="can be decoded"):
        build_dataset(config(tmp_path / "bare"), seed=0)[0]


def test_orientation_and_gray_photos(tmp_path):
    pixels = np.zeros((40, 64), np.uint8)
    pixels[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed turned by a quarter
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png", exif=exif)
    dataset = build_dataset(config(tmp_path / "photos", flips=False), seed=0, with_lr=False)
    assert (dataset.photos[0].width, dataset.photos[0].height) == (40, 64)
    image = dataset[0]["hr"]
    assert image.shape == (3, 32, 32)
    assert torch.equal(image[:, 0], image[:, 31])  # bright half now at the right
    assert image[0, 0, 0] == 0
    assert image[0, 0, 31] == 1


def test_degradation_by_name_by_weights_and_in_full(photos):
    for degradation in ("camera", {"camera": 2, "real_esrgan": 1}, {"final_jpeg": [50, 60]}):
        values = {"paths": [str(photos)], "crop": 32, "degradation": degradation}
        assert build_dataset(from_mapping(DataConfig, values, "data"), seed=0)[0]["lr"].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop": 30}, "crop is 30"),
        ({"crop": 0}, "crop is 0"),
        ({"degradation": "camra"}, "did you mean 'camera'"),
        ({"degradation": {"camra": 1}}, "did you mean 'camera'"),
        ({"degradation": {"first": {"blurs": 1}}}, "degradation.first.blurs"),
        ({"hr_scale": [0.5, 1.5]}, "hr_scale"),
        ({"kind": "pairs"}, "lr_paths"),
        ({"lr_paths": ["x"]}, "lr_paths"),
        ({"paths": []}, "paths is empty"),
        ({"pool_size": -1}, "pool_size"),
        ({"kind": "pairs", "lr_paths": ["x"], "crop": 0, "pool_size": 4}, "pool_size"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(UserError, match=message):
        from_mapping(DataConfig, {"paths": ["photos"], **values}, "data")


@pytest.fixture
def pair_folders(tmp_path):
    for number in range(3):
        save(tmp_path / "hr" / "scenes" / f"{number}.png", 64, 96, seed=number)
        with Image.open(tmp_path / "hr" / "scenes" / f"{number}.png") as hr:
            (tmp_path / "lr" / "scenes").mkdir(parents=True, exist_ok=True)
            hr.resize((24, 16), Image.Resampling.BOX).save(tmp_path / "lr" / "scenes" / f"{number}.bmp")
    return {"kind": "pairs", "paths": (tmp_path / "hr",), "lr_paths": (tmp_path / "lr",)}


def test_pairs_stay_aligned_through_crops_and_flips(pair_folders):
    dataset = build_dataset(DataConfig(crop=32, rotations=True, **pair_folders), seed=0)
    assert len(dataset) == 3
    for number in range(12):
        sample = dataset[number]
        boxed = torch.nn.functional.avg_pool2d(sample["hr"], 4)
        assert (boxed - sample["lr"]).abs().max() < 1.01 / 255


def test_whole_pairs_come_in_name_order(pair_folders):
    dataset = build_dataset(DataConfig(crop=0, **pair_folders), seed=0)
    assert [dataset.pairs[number].hr.name for number in range(3)] == ["scenes/0.png", "scenes/1.png", "scenes/2.png"]
    assert dataset[0]["hr"].shape == (3, 64, 96)
    assert same(dataset[1], dataset[4])
    assert not same(dataset[0], dataset[1])


def test_pairs_that_do_not_match_are_listed(pair_folders):
    folder = pair_folders["paths"][0]
    save(folder / "extra.png", 64, 96)
    save(pair_folders["lr_paths"][0] / "other.png", 16, 24)
    with pytest.raises(UserError, match=r"no partner for extra; .*no partner for other"):
        build_dataset(DataConfig(crop=32, **pair_folders), seed=0)


def test_pairs_of_wrong_size_are_refused(pair_folders):
    save(pair_folders["lr_paths"][0] / "scenes" / "1.bmp", 17, 24)
    with pytest.raises(UserError, match="96x64 against 24x17, expected 4 times"):
        build_dataset(DataConfig(crop=32, **pair_folders), seed=0)
    with pytest.raises(UserError, match="expected 2 times"):
        build_dataset(DataConfig(crop=32, scale=2, **pair_folders), seed=0)


@pytest.mark.parametrize(
    ("lr", "hr"), [("0801x4", "0801"), ("a_x4", "a_x1"), ("b_LRBI_x4", "b_HR_x4"), ("c_LR4", "c_HR")]
)
@pytest.mark.parametrize("together", [False, True])
def test_pairs_by_the_names_of_datasets(tmp_path, lr, hr, together):
    low, high = (tmp_path / "one", tmp_path / "one") if together else (tmp_path / "lr", tmp_path / "hr")
    save(low / f"{lr}.png", 16, 16)
    save(high / f"{hr}.png", 64, 64)
    if together and hr == "0801":  # names that do not tell which is which
        with pytest.raises(UserError, match="expected 4 times as large"):
            match_and_check(high, low)
    else:
        (pair,) = match_and_check(high, low)
        assert (pair.lr.name, pair.hr.name) == (f"{lr}.png", f"{hr}.png")


def match_and_check(high, low):
    return build_dataset(DataConfig(kind="pairs", paths=(high,), lr_paths=(low,), crop=32), seed=0).pairs


def test_the_first_photos_of_a_folder_by_name(tmp_path):
    for number in range(5):
        save(tmp_path / "a" / f"{number:05}.png", 40, 40, number)
        save(tmp_path / "b" / f"{number:05}.png", 40, 40, number)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    data = from_mapping(DataConfig, {"paths": folders, "first": [0, 2], "crop": 32})
    assert build_dataset(data, 0).names() == [f"{number:05}.png" for number in (0, 1, 2, 3, 4, 0, 1)]
    with pytest.raises(UserError, match=r"b: 5 images, expected at least 6 \(data.first\)"):
        build_dataset(from_mapping(DataConfig, {"paths": folders, "first": [0, 6], "crop": 32}), 0)
    with pytest.raises(UserError, match="expected a number of at least 0 for each of the paths"):
        from_mapping(DataConfig, {"paths": folders, "first": [3], "crop": 32})
    pairs = {"kind": "pairs", "paths": folders[:1], "lr_paths": folders[1:], "scale": 1, "crop": 32, "first": [3]}
    assert build_dataset(from_mapping(DataConfig, pairs), 0).names() == ["00000.png", "00001.png", "00002.png"]

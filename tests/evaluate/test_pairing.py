"""Which images belong together, and how datasets are understood."""

from pathlib import Path

import pytest

from onestepsr.core.errors import UserError
from onestepsr.data.pair_names import matched
from onestepsr.evaluate.pairing import Case, find_cases, find_photos, pair_by_name


def touch(folder: Path, *names: str) -> Path:
    """Empty files: only names count here."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_pairs_follow_names_and_not_order(tmp_path: Path) -> None:
    hr = touch(tmp_path / "hr", "a.png", "b.png", "sub/c.png")
    sr = touch(tmp_path / "sr", "b_mine.bmp", "z_mine.png", "sub/c_mine.png")
    pairing = pair_by_name(sr, hr, suffix="_mine")
    assert [(pair.name, pair.image and pair.image.name, pair.hr and pair.hr.name) for pair in pairing.cases] == [
        ("b", "b_mine.bmp", "b.png"),
        ("sub/c", "c_mine.png", "c.png"),
    ]
    assert [path.name for path in pairing.unmatched] == ["z_mine.png"]
    assert [path.name for path in pairing.unmatched_hr] == ["a.png"]


MADE = ("a_x4.png", "a_LR_x4.png", "a_LR4.png", "a_SR.png", "a-LR_x2.5.png", "a.png", "a_HR.png", "a_HR_x4.png")


@pytest.mark.parametrize("made", MADE)
def test_usual_endings_need_no_suffix(tmp_path: Path, made: str) -> None:
    hr = touch(tmp_path / "hr", "a_HR.png", "a_LR4.png", "b_HR.png")
    pairing = pair_by_name(touch(tmp_path / "sr", made), hr)
    assert [(pair.name, pair.hr and pair.hr.name) for pair in pairing.cases] == [("a", "a_HR.png")]
    assert [path.name for path in pairing.unmatched_hr] == ["b_HR.png"]


def test_an_equal_name_wins_over_a_similar_one(tmp_path: Path) -> None:
    hr = touch(tmp_path / "hr", "a.png", "a_x4.png")
    pairing = pair_by_name(touch(tmp_path / "sr", "a.png", "a_x4.png"), hr)
    assert [(pair.image and pair.image.name, pair.hr and pair.hr.name) for pair in pairing.cases] == [
        ("a.png", "a.png"),
        ("a_x4.png", "a_x4.png"),
    ]
    with pytest.raises(UserError, match="both belong to 'b'"):
        pair_by_name(touch(tmp_path / "two", "b_x4.png", "b_SR.png"), touch(tmp_path / "one", "b.png"))


def test_two_files_are_a_pair_whatever_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "made.png", "truth.bmp")
    pairing = pair_by_name(tmp_path / "made.png", tmp_path / "truth.bmp")
    assert [(pair.image and pair.image.name, pair.hr and pair.hr.name) for pair in pairing.cases] == [
        ("made.png", "truth.bmp")
    ]


def test_a_file_finds_its_reference_in_a_folder(tmp_path: Path) -> None:
    pairing = pair_by_name(touch(tmp_path, "b.jpg") / "b.jpg", touch(tmp_path / "hr", "a.png", "b.png"))
    assert [pair.name for pair in pairing.cases] == ["b"]
    assert pairing.unmatched_hr == ()


def test_impossible_pairings_end_in_one_line(tmp_path: Path) -> None:
    sr, hr = touch(tmp_path / "sr", "a_mine.png"), touch(tmp_path / "hr", "a.png")
    with pytest.raises(UserError, match=r"'a_mine' and 'a'.*--suffix"):
        pair_by_name(sr, hr)
    with pytest.raises(UserError, match="two files or two folders"):
        pair_by_name(sr, hr / "a.png")
    with pytest.raises(UserError, match="no such folder"):
        pair_by_name(tmp_path / "absent", hr)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in it"):
        pair_by_name(sr, tmp_path / "empty")
    touch(sr, "a_mine.bmp")
    with pytest.raises(UserError, match="share the name 'a'"):
        pair_by_name(sr, hr, suffix="_mine")


def test_a_data_set_of_two_folders(tmp_path: Path) -> None:
    touch(tmp_path, "lr/a.png", "lr/b_LR4.png", "lr/c.png", "HR/a.jpg", "HR/b.png", "HR/d.png", "notes.txt")
    data = find_cases(tmp_path)
    assert (data.folder, data.hr) == (tmp_path / "lr", tmp_path / "HR")
    assert [(case.name, case.image and case.image.name, case.hr and case.hr.name) for case in data.cases] == [
        ("a", "a.png", "a.jpg"),
        ("b", "b_LR4.png", "b.png"),
    ]
    assert [path.name for path in (*data.unmatched, *data.unmatched_hr)] == ["c.png", "d.png"]
    assert find_cases(tmp_path / "lr", tmp_path / "HR").cases == data.cases


def test_a_data_set_in_one_folder(tmp_path: Path) -> None:
    touch(tmp_path, "x_HR.png", "x_LR.png", "y_LR4.png", "y_HR.png", "z_HR.png", "other.png")
    data = find_cases(tmp_path)
    assert data.cases == [
        Case(name="x", image=tmp_path / "x_LR.png", hr=tmp_path / "x_HR.png"),
        Case(name="y", image=tmp_path / "y_LR4.png", hr=tmp_path / "y_HR.png"),
    ]
    assert data.unmatched == [tmp_path / "other.png"]
    assert data.unmatched_hr == [tmp_path / "z_HR.png"]


def test_lr_images_alone(tmp_path: Path) -> None:
    data = find_cases(touch(tmp_path, "b_LR4.png", "sub/a.jpg"))
    assert [(case.name, case.hr) for case in data.cases] == [("b_LR4", None), ("sub/a", None)]
    assert data.hr is None
    touch(tmp_path / "half", "LR/a.png", "other/a.png")
    assert find_cases(tmp_path / "half").folder == tmp_path / "half" / "LR"


def test_photos_to_degrade(tmp_path: Path) -> None:
    assert [case.name for case in find_photos(touch(tmp_path / "plain", "b.png", "a.jpg")).cases] == ["a", "b"]
    assert [case.name for case in find_photos(touch(tmp_path / "set", "a_HR.png", "a_LR.png")).cases] == ["a"]
    assert find_photos(touch(tmp_path / "two", "LR/a.png", "HR/a.png")).hr == tmp_path / "two" / "HR"


def test_data_sets_without_a_pair_end_in_one_line(tmp_path: Path) -> None:
    touch(tmp_path, "LR/a.png", "HR/b.png")
    with pytest.raises(UserError, match=r"no image in .*'a' and 'b'"):
        find_cases(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_cases(tmp_path / "absent")


DATASETS = {
    "DIV2K": ("0801x4.png", "0801.png"),
    "KAIR": ("babyx4.png", "baby.png"),
    "DRealSR": ("DSC_1286_x4.png", "DSC_1286_x1.png"),
    "RealSR": ("Canon_001_LR4.png", "Canon_001_HR.png"),
    "RCAN": ("baby_LRBI_x4.png", "baby_HR_x4.png"),
    "results of RCAN": ("baby_RCAN_x4.png", "baby_HR_x4.png"),
    "EDSR": ("0801_x4_SR.png", "0801.png"),
    "EDSR, joined": ("0801x4_SR.png", "0801.png"),
    "SwinIR": ("baby_SRx4.png", "baby.png"),
    "SwinIR, by name": ("baby_SwinIR_x4.png", "baby.png"),
    "results of EDSR": ("0801_x4_EDSR.png", "0801.png"),
    "DIV2K mild": ("0801x4m.png", "0801.png"),
    "DIV2K wild": ("0801x4w1.png", "0801.png"),
    "SelfExSR": ("img_001_SRF_4_LR.png", "img_001_SRF_4_HR.png"),
    "Upscayl": ("baby_upscayl_4x_realesrgan.png", "baby.png"),
    "Real-ESRGAN": ("baby_out.png", "baby.png"),
    "factor behind": ("baby@4x.png", "baby.png"),
}


@pytest.mark.parametrize(("image", "reference"), DATASETS.values(), ids=DATASETS)
@pytest.mark.parametrize("suffix", ["", "x4"])
def test_names_of_datasets_need_no_suffix(tmp_path: Path, image: str, reference: str, suffix: str) -> None:
    """In evaluation of images and of models, and in training on pairs; a suffix that is given all the same is borne."""
    made, hr = touch(tmp_path / "made", image), touch(tmp_path / "hr", reference)
    touch(made, image.replace("1", "2").replace("baby", "bird"))
    touch(hr, reference.replace("DSC_1", "DSC_2").replace("001", "002").replace("0801", "0802").replace("baby", "bird"))
    for found in (pair_by_name(made, hr, suffix=suffix), find_cases(made, hr, suffix=suffix)):
        pairs = {(case.image and case.image.name, case.hr and case.hr.name) for case in found.cases}
        assert (image, reference) in pairs
    names = {path.stem: path for path in sorted(made.iterdir())}
    assert matched(names, [path.stem for path in hr.iterdir()])[Path(image).stem] == Path(reference).stem


@pytest.mark.parametrize("kind", ["DRealSR", "RealSR"])
def test_a_dataset_that_holds_both_in_one_folder(tmp_path: Path, kind: str) -> None:
    touch(tmp_path, *DATASETS[kind])
    for found in (find_cases(tmp_path), find_cases(tmp_path, tmp_path)):
        assert [(case.image and case.image.name, case.hr and case.hr.name) for case in found.cases] == [DATASETS[kind]]


def test_what_is_equally_like_two_references_is_of_neither(tmp_path: Path) -> None:
    names = {"a_x4": tmp_path / "a_x4.png", "b": tmp_path / "b.png"}
    assert matched(names, ["a_x2", "a_x3", "b"]) == {"b": "b"}
    assert matched(names, ["a_x2", "b_HR", "b_SR"]) == {"a_x4": "a_x2"}

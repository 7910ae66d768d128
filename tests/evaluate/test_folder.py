"""Pairing by name, scoring and summarising."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onestepsr.errors import UserError
from onestepsr.evaluate.catalog import METRICS, select_metrics
from onestepsr.evaluate.folder import Score, pair_by_name, report, score_pairs, summarize


def write_image(path: Path, size: tuple[int, int] = (24, 20), seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(samples).convert(mode).save(path)
    return path


def test_pairs_follow_names_and_not_order(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "sub/c.png"):
        write_image(tmp_path / "hr" / name)
    for name in ("b_x4.bmp", "z_x4.png", "sub/c_x4.png"):
        write_image(tmp_path / "sr" / name)
    pairing = pair_by_name(tmp_path / "sr", tmp_path / "hr", suffix="_x4")
    assert [(pair.name, pair.sr.name, pair.hr and pair.hr.name) for pair in pairing.pairs] == [
        ("b", "b_x4.bmp", "b.png"),
        ("sub/c", "c_x4.png", "c.png"),
    ]
    assert [path.name for path in pairing.lonely_sr] == ["z_x4.png"]
    assert [path.name for path in pairing.lonely_hr] == ["a.png"]


def test_two_files_are_a_pair_whatever_their_names(tmp_path: Path) -> None:
    pairing = pair_by_name(write_image(tmp_path / "made.png"), write_image(tmp_path / "truth.bmp"))
    assert [(pair.sr.name, pair.hr and pair.hr.name) for pair in pairing.pairs] == [("made.png", "truth.bmp")]


def test_a_file_finds_its_reference_in_a_folder(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "hr" / name)
    pairing = pair_by_name(write_image(tmp_path / "b.jpg"), tmp_path / "hr")
    assert [pair.name for pair in pairing.pairs] == ["b"]
    assert pairing.lonely_hr == []


def test_impossible_pairings_end_in_one_line(tmp_path: Path) -> None:
    write_image(tmp_path / "sr" / "a_x4.png")
    write_image(tmp_path / "hr" / "a.png")
    with pytest.raises(UserError, match=r"'a_x4' and 'a'.*--suffix"):
        pair_by_name(tmp_path / "sr", tmp_path / "hr")
    with pytest.raises(UserError, match="two files or two folders"):
        pair_by_name(tmp_path / "sr", tmp_path / "hr" / "a.png")
    with pytest.raises(UserError, match="no such folder"):
        pair_by_name(tmp_path / "absent", tmp_path / "hr")
    write_image(tmp_path / "sr" / "a_x4.bmp")
    with pytest.raises(UserError, match="share the name 'a'"):
        pair_by_name(tmp_path / "sr", tmp_path / "hr", suffix="_x4")


def test_scores_of_equal_grey_and_different_pictures(tmp_path: Path) -> None:
    for folder in ("sr", "hr"):
        write_image(tmp_path / folder / "equal.png", mode="L")
        write_image(tmp_path / folder / "other.png", seed=len(folder) + (folder == "sr"))
    chosen = select_metrics(["psnr", "ssim", "grid"], with_reference=True)
    pairs = pair_by_name(tmp_path / "sr", tmp_path / "hr").pairs
    equal, other = score_pairs(pairs, chosen)
    assert (equal.values["psnr"], equal.values["ssim"]) == pytest.approx((80.0, 1.0))
    assert other.values["psnr"] < 20
    summary = summarize([equal, other], chosen)["psnr"]
    assert (summary.mean, summary.count) == (pytest.approx((80.0 + other.values["psnr"]) / 2), 2)
    assert summary.std == pytest.approx((80.0 - other.values["psnr"]) / 2**0.5)


def test_one_bad_picture_leaves_the_others(tmp_path: Path) -> None:
    for folder in ("sr", "hr"):
        for name in ("broken", "good", "sizes"):
            write_image(tmp_path / folder / f"{name}.png")
    write_image(tmp_path / "sr" / "sizes.png", size=(23, 20))
    (tmp_path / "sr" / "broken.png").write_bytes(b"no picture")
    pairs = pair_by_name(tmp_path / "sr", tmp_path / "hr").pairs
    broken, good, sizes = score_pairs(pairs, select_metrics(["psnr"], with_reference=True))
    assert good.values == {"psnr": pytest.approx(80.0)}
    assert "broken.png" in broken.problems[0]
    assert "sizes.png is 23 x 20" in sizes.problems[0]
    assert "sizes.png is 24 x 20" in sizes.problems[0]


def test_a_picture_too_small_for_one_metric_keeps_the_other(tmp_path: Path) -> None:
    path = write_image(tmp_path / "small.png", size=(9, 9))
    pairs = pair_by_name(path, path).pairs
    (score,) = score_pairs(pairs, select_metrics(["ssim", "psnr"], with_reference=True))
    assert list(score.values) == ["psnr"]
    assert "at least 11 x 11" in score.problems[0]


def test_report_has_the_promised_shape() -> None:
    chosen = select_metrics(["psnr", "grid"], with_reference=True)
    scores = [
        Score(name="a", values={"psnr": 20.0, "grid": 0.5}, problems=[]),
        Score(name="b", values={"psnr": 30.0}, problems=["b.png: too small"]),
        Score(name="c", values={}, problems=["c.png: damaged"]),
    ]
    assert report(scores, summarize(scores, chosen)) == {
        "schema": 1,
        "mean": {"psnr": 25.0, "grid": 0.5},
        "images": {"a": {"psnr": 20.0, "grid": 0.5}, "b": {"psnr": 30.0}},
    }


def test_metrics_are_chosen_by_name() -> None:
    assert [spec.name for spec in select_metrics(["grid", "psnr", "grid"], with_reference=True)] == ["grid", "psnr"]
    with pytest.raises(UserError, match="did you mean 'psnr'"):
        select_metrics(["pnsr"], with_reference=True)
    with pytest.raises(UserError, match="give --hr, or choose from niqe, grid"):
        select_metrics(["psnr"], with_reference=False)
    with pytest.raises(UserError, match="no metric chosen"):
        select_metrics([], with_reference=True)


def test_every_metric_is_keyed_by_its_own_name_and_has_one_function() -> None:
    for name, spec in METRICS.items():
        assert spec.name == name
        assert (spec.against is None) != (spec.alone is None)

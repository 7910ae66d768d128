"""Folders and models: order, overlap, failures that stay with their image, LR images that are made."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_images import save, scene

from onestepsr.cli import degrade
from onestepsr.core.errors import OneStepSRError, UserError
from onestepsr.core.files import partial_path
from onestepsr.data.degradation.presets import get_preset
from onestepsr.evaluate.metrics.catalog import METRICS
from onestepsr.evaluate.pairing import Case, find_cases, find_photos, pair_by_name
from onestepsr.evaluate.protocols import Protocol
from onestepsr.evaluate.result import EvaluationResult, Files, ModelRecord
from onestepsr.evaluate.run import (
    Degrader,
    EvaluatedModel,
    Score,
    Scorer,
    evaluate_images,
    evaluate_model,
    load_case,
    without_images,
    worker_count,
)
from onestepsr.imaging.read import LoadedImage, read_image

PLAIN = Protocol(name="test", summary="", metrics=("psnr",))


def scorer(**changes: int) -> Scorer:
    return Scorer([METRICS["psnr"]], replace(PLAIN, **changes))


def repeated(image: LoadedImage, path: Path) -> LoadedImage:
    """A model: every pixel four by four times."""
    return replace(image, pixels=image.pixels.repeat(4, axis=0).repeat(4, axis=1), alpha=None)


MODEL = EvaluatedModel(enlarge=repeated, scale=4, record=ModelRecord(name="repeated"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for seed, name in enumerate("abcde"):
        hr = scene(32, 40, seed)
        save(tmp_path / "HR" / f"{name}.png", hr)
        save(tmp_path / "LR" / f"{name}.png", torch.nn.functional.avg_pool2d(hr, 4))
    return tmp_path


def evaluate_lr(
    data: Path, enlarge: Callable[[LoadedImage, Path], LoadedImage]
) -> tuple[EvaluationResult, list[Score]]:
    """The result of a model on ``data``, and the scores as they came."""
    scores: list[Score] = []

    def kept(found: Iterable[Score], total: int) -> Iterator[Score]:
        for score in found:
            scores.append(score)
            yield score

    model = replace(MODEL, enlarge=enlarge)
    return evaluate_model(model, find_cases(data), scorer(), label="m", track=kept), scores


def test_one_bad_image_leaves_the_others(data: Path) -> None:
    (data / "LR" / "b.png").write_bytes(b"no image")
    save(data / "LR" / "d.png", scene(5, 10))
    save(data / "LR" / "e.png", scene(32, 40))
    cases = pair_by_name(data / "LR", data / "HR")
    gone = Case(name="gone", image=data / "LR" / "gone.png")
    result = evaluate_images(replace(cases, cases=[*cases.cases, gone]), scorer(), label="x")
    assert list(result.failed) == ["a", "b", "c", "d", "gone"]
    assert list(result.images) == ["e"]
    assert "b.png: not an image" in result.failed["b"]
    assert "d.png: SR is 10 x 5 but HR is 40 x 32" in result.failed["d"]
    assert "No such file" in result.failed["gone"]


def test_threads_are_as_many_as_before(data: Path) -> None:
    before = torch.get_num_threads()
    evaluate_images(pair_by_name(data / "HR", data / "HR"), scorer(), label="x")
    assert torch.get_num_threads() == before
    assert 1 <= worker_count() <= 8


def test_the_network_stays_in_its_thread_while_others_read_and_measure(data: Path) -> None:
    threads: set[int] = set()

    def enlarge(image: LoadedImage, path: Path) -> LoadedImage:
        threads.add(threading.get_ident())
        return repeated(image, path)

    result, scores = evaluate_lr(data, enlarge)
    assert [score.name for score in scores] == list("abcde")
    assert threads == {threading.get_ident()}
    assert set(result.seconds) == {"reading", "model", "metrics", "total"}


@pytest.mark.parametrize(("error", "message"), [(OneStepSRError("overflows"), "overflows"), (MemoryError(), "--tile")])
def test_a_model_that_fails_on_one_image_goes_on(data: Path, error: Exception, message: str) -> None:
    calls: Iterator[int] = iter(range(5))

    def enlarge(image: LoadedImage, path: Path) -> LoadedImage:
        if next(calls) == 1:
            raise error
        return repeated(image, path)

    (data / "LR" / "d.png").write_bytes(b"no image")
    result, scores = evaluate_lr(data, enlarge)
    assert [bool(score.problems) for score in scores] == [False, True, False, True, False]
    assert (scores[1].problems[0].files, scores[3].problems[0].files) == (str(data / "LR" / "b.png"), "")
    assert message in scores[1].problems[0].reason
    assert "b.png" in result.failed["b"]


def test_a_defect_is_no_problem_of_an_image(data: Path) -> None:
    def enlarge(image: LoadedImage, path: Path) -> LoadedImage:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        evaluate_lr(data, enlarge)


def evaluate_saved(data: Path, **changes: int) -> EvaluationResult:
    return evaluate_model(MODEL, find_cases(data), scorer(**changes), label="m", keep=data / "kept")


def test_numbers_are_those_of_the_saved_images(data: Path) -> None:
    result = evaluate_saved(data)
    again = evaluate_images(pair_by_name(data / "kept" / "SR", data / "HR"), scorer(), label="again")
    assert result.images == again.images
    assert result.folders == Files(lr=str(data / "LR"), sr=str(data / "kept" / "SR"), hr=str(data / "HR"))
    assert result.files["b"] == Files(lr="b.png", sr="b.png", hr="b.png")
    assert (result.protocol.settings["scale"], result.model) == (4, MODEL.record)
    assert {"reading", "model", "metrics", "total"} == set(result.seconds)
    assert without_images(result).folders.sr is None
    assert without_images(result).files["b"] == Files(lr="b.png", hr="b.png")


@pytest.mark.parametrize(("crop", "folders"), [(0, ["SR"]), (16, ["HR", "LR", "SR"])])
def test_leftovers_are_looked_for_once_in_each_folder(
    data: Path, monkeypatch: pytest.MonkeyPatch, crop: int, folders: list[str]
) -> None:
    kept, looked, glob = data / "kept", list[Path](), Path.glob
    leftover = partial_path(kept / "SR" / "b.png")
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: looked.append(folder) or glob(folder, pattern))
    evaluate_saved(data, crop=crop)
    assert sorted(folder.name for folder in looked if kept in folder.parents) == folders
    assert not leftover.exists()


def test_crops_are_cut_before_the_model_runs(data: Path) -> None:
    result = evaluate_saved(data, crop=16)
    lr = read_image(data / "kept" / "LR" / "c.png").pixels
    np.testing.assert_array_equal(lr, read_image(data / "LR" / "c.png").pixels[2:6, 3:7])
    hr = read_image(data / "kept" / "HR" / "c.png").pixels
    np.testing.assert_array_equal(hr, read_image(data / "HR" / "c.png").pixels[8:24, 12:28])
    saved = evaluate_images(pair_by_name(data / "kept" / "SR", data / "kept" / "HR"), scorer(crop=16), label="saved")
    assert result.images == saved.images
    with pytest.raises(UserError, match="the LR image is 10 x 8, the protocol needs 9 x 9"):
        load_case(find_cases(data).cases[0], scale=4, crop=36)
    with pytest.raises(UserError, match="multiple of the model's factor"):
        evaluate_saved(data, crop=18)


@pytest.mark.parametrize("recipe", ["real_esrgan", "bicubic"])
def test_made_lr_images_are_those_of_degrade(tmp_path: Path, recipe: str) -> None:
    for seed, name in enumerate(("a.png", "sub/b.png")):
        save(tmp_path / "photos" / name, scene(70, 85, seed))
    jobs, _ = degrade.plan(tmp_path / "photos", tmp_path / "out", recursive=True)
    header = {"schema": 1, "recipe": recipe, "scale": 4, "seed": 7, "crop_multiple": 4}
    degrade.run(jobs, tmp_path / "out", header, skip_existing=False)
    data = find_photos(tmp_path / "photos")
    assert data.hr is not None
    degrader = Degrader(name=recipe, recipe=get_preset(recipe), seed=7, folder=data.hr)
    result = evaluate_model(
        MODEL,
        data,
        scorer(),
        label="m",
        degrader=degrader,
        keep=tmp_path / "kept",
    )
    for name in ("a", "sub/b"):
        for side in ("LR", "HR"):
            kept, made = (read_image(tmp_path / place / side / f"{name}.png").pixels for place in ("kept", "out"))
            np.testing.assert_array_equal(kept, made)
    assert result.protocol.settings["degradation"] == recipe
    assert result.protocol.settings["degradation_seed"] == 7
    assert result.folders == Files(**{k: str(tmp_path / "kept" / k.upper()) for k in ("lr", "sr", "hr")})


def test_photos_below_the_scale_are_told(tmp_path: Path) -> None:
    make = Degrader(name="bicubic", recipe=get_preset("bicubic"), seed=0, folder=tmp_path)
    with pytest.raises(UserError, match="3 x 9, expected sides of at least 4"):
        make(save(tmp_path / "thin.png", scene(9, 3)))


def test_an_image_that_cannot_be_kept_is_a_problem(data: Path) -> None:
    (data / "kept").write_text("a file where a folder should be")
    result = evaluate_saved(data)
    assert "cannot be written" in result.failed["a"]
    assert set(result.images) == set("abcde")


def test_without_references_only_the_rest_is_measured(data: Path) -> None:
    alone = find_cases(data / "LR")
    result = evaluate_model(MODEL, alone, Scorer([METRICS["grid"]], PLAIN), label="m")
    assert set(result.images["a"]) == {"grid"}
    assert result.folders == Files(lr=str(data / "LR"))


def test_labels_of_loaded_images_name_both_files(data: Path) -> None:
    loaded = load_case(find_cases(data).cases[0], scale=4)
    assert loaded.label.endswith(f"against {data / 'HR' / 'a.png'}")
    assert loaded.lr.pixels.shape == (8, 10, 3)

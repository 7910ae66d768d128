"""Folders and models: order, overlap, failures that stay with their image, LR images that are made."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_images import samples, save, scene

from onestepsr.cli import degrade
from onestepsr.core.errors import OneStepSRError, UserError
from onestepsr.core.files import partial_path
from onestepsr.data.degradation.presets import get_preset
from onestepsr.evaluate.inputs import Degrader, Loaded, Loader
from onestepsr.evaluate.metrics.catalog import METRICS
from onestepsr.evaluate.pairing import Case, Pair, find_cases, find_photos, pair_by_name
from onestepsr.evaluate.protocols import Protocol
from onestepsr.evaluate.result import EvaluationResult, Files, ModelRecord
from onestepsr.evaluate.run import (
    Degradation,
    EvaluatedModel,
    ModelRun,
    evaluate_images,
    evaluate_model,
    in_order,
    score_pairs,
    without_images,
    worker_count,
)
from onestepsr.evaluate.scoring import Scorer
from onestepsr.imaging.read import LoadedImage, from_array, read_image

PLAIN = Protocol(name="test", summary="", metrics=("psnr",))


def measurer(**changes: int) -> Scorer:
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


def test_results_keep_their_order_and_few_are_begun() -> None:
    begun: list[int] = []
    first_may_end = threading.Event()

    def task(number: int) -> int:
        begun.append(number)
        if number == 0:
            first_may_end.wait(5)
        return number

    with ThreadPoolExecutor(2) as pool:
        results = in_order(pool, ((lambda n=n: task(n)) for n in range(20)), 4)
        threading.Timer(0.05, first_may_end.set).start()
        assert next(results) == 0
        assert len(begun) <= 5
        assert list(results) == list(range(1, 20))


def test_one_bad_image_leaves_the_others(data: Path) -> None:
    (data / "LR" / "b.png").write_bytes(b"no image")
    save(data / "LR" / "d.png", scene(5, 10))
    pairs = [Pair(name=p.stem, sr=p, hr=data / "HR" / p.name) for p in sorted((data / "LR").iterdir())]
    scores = list(score_pairs([*pairs, Pair(name="gone", sr=data / "gone.png")], measurer(), workers=3))
    assert [score.name for score in scores] == ["a", "b", "c", "d", "e", "gone"]
    assert "b.png: not an image" in scores[1].problems[0]
    assert "d.png: SR is 10 x 5 but HR is 40 x 32" in scores[3].problems[0]
    assert "No such file" in scores[5].problems[0]
    assert torch.get_num_threads() >= 1


def test_threads_are_as_many_as_before() -> None:
    before = torch.get_num_threads()
    list(score_pairs([], measurer(), workers=2))
    assert torch.get_num_threads() == before
    assert 1 <= worker_count() <= 8


def model_run(data: Path, enlarge: object = repeated) -> tuple[ModelRun, list[Case]]:
    cases = find_cases(data).cases
    return ModelRun(load=Loader(scale=4), enlarge=enlarge, measurer=measurer()), cases  # type: ignore[arg-type]


def test_the_network_stays_in_its_thread_while_others_read_and_measure(data: Path) -> None:
    threads: set[int] = set()

    def enlarge(image: LoadedImage, path: Path) -> LoadedImage:
        threads.add(threading.get_ident())
        return repeated(image, path)

    run, cases = model_run(data, enlarge)
    scores = list(run.scores(cases, workers=2))
    assert [score.name for score in scores] == list("abcde")
    assert threads == {threading.get_ident()}
    assert set(run.clock.seconds) == {"reading", "model", "metrics"}


@pytest.mark.parametrize(("error", "message"), [(OneStepSRError("overflows"), "overflows"), (MemoryError(), "--tile")])
def test_a_model_that_fails_on_one_image_goes_on(data: Path, error: Exception, message: str) -> None:
    calls: Iterator[int] = iter(range(5))

    def enlarge(image: LoadedImage, path: Path) -> LoadedImage:
        if next(calls) == 1:
            raise error
        return repeated(image, path)

    run, cases = model_run(data, enlarge)
    (data / "LR" / "d.png").write_bytes(b"no image")
    scores = list(run.scores(cases, workers=2))
    assert [bool(score.problems) for score in scores] == [False, True, False, True, False]
    assert message in scores[1].problems[0]
    assert "b.png" in scores[1].problems[0]


def test_a_defect_is_no_problem_of_a_image(data: Path) -> None:
    def enlarge(image: LoadedImage, path: Path) -> LoadedImage:
        raise RuntimeError("a defect")

    run, cases = model_run(data, enlarge)
    with pytest.raises(RuntimeError, match="a defect"):
        list(run.scores(cases, workers=2))


def evaluate_saved(data: Path, **changes: int) -> EvaluationResult:
    return evaluate_model(MODEL, find_cases(data), measurer(**changes), label="m", keep=data / "kept")


def test_numbers_are_those_of_the_saved_images(data: Path) -> None:
    result = evaluate_saved(data)
    again = evaluate_images(pair_by_name(data / "kept" / "SR", data / "HR"), Files(), measurer(), label="again")
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
    saved = evaluate_images(
        pair_by_name(data / "kept" / "SR", data / "kept" / "HR"), Files(), measurer(crop=16), label="saved"
    )
    assert result.images == saved.images
    with pytest.raises(UserError, match="the LR image is 10 x 8, the protocol needs 9 x 9"):
        Loader(scale=4, crop=36)(find_cases(data).cases[0])
    with pytest.raises(UserError, match="multiple of the model's factor"):
        Loader(scale=4, crop=18)


@pytest.mark.parametrize("recipe", ["real_esrgan", "bicubic"])
def test_made_lr_images_are_those_of_degrade(tmp_path: Path, recipe: str) -> None:
    for seed, name in enumerate(("a.png", "sub/b.png")):
        save(tmp_path / "photos" / name, scene(70, 85, seed))
    jobs = degrade.plan(tmp_path / "photos", tmp_path / "out", recursive=True)
    header = {"schema": 1, "recipe": recipe, "scale": 4, "seed": 7, "crop_multiple": 4}
    degrade.run(jobs, tmp_path / "out", header, skip_existing=False)
    data = find_photos(tmp_path / "photos")
    assert data.hr is not None
    make = Degrader(recipe=get_preset(recipe), seed=7, folder=data.hr)
    result = evaluate_model(
        MODEL,
        data,
        measurer(),
        label="m",
        degradation=Degradation(name=recipe, make=make),
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
    make = Degrader(recipe=get_preset("bicubic"), seed=0, folder=tmp_path)
    with pytest.raises(UserError, match="3 x 9, expected sides of at least 4"):
        make(save(tmp_path / "thin.png", scene(9, 3)))


def test_a_image_that_cannot_be_kept_is_a_problem(data: Path) -> None:
    (data / "kept").write_text("a file where a folder should be")
    result = evaluate_saved(data)
    assert "cannot be made" in result.failed["a"]
    assert set(result.images) == set("abcde")


def test_without_references_only_the_rest_is_measured(data: Path) -> None:
    alone = find_cases(data / "LR")
    result = evaluate_model(MODEL, alone, Scorer([METRICS["grid"]], PLAIN), label="m")
    assert set(result.images["a"]) == {"grid"}
    assert result.folders == Files(lr=str(data / "LR"))


def test_labels_of_loaded_images_name_both_files(data: Path) -> None:
    loaded: Loaded = Loader(scale=4)(find_cases(data).cases[0])
    assert loaded.label.endswith(f"against {data / 'HR' / 'a.png'}")
    assert loaded.lr.pixels.shape == (8, 10, 3)
    assert from_array(samples(scene(4, 4))).width == 4

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from onestepsr.cli.degrade import register
from onestepsr.core.errors import UserError
from onestepsr.core.files import partial_path

app = typer.Typer()
register(app)
app.command("other")(lambda: None)  # a second command, so that the first one needs its name as in the real program


def degrade(*arguments):
    result = CliRunner().invoke(app, ["degrade", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (43, 50)), ("b.jpg", (40, 48)), ("sub/c.png", (32, 32))):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def test_pairs_and_record(photos, tmp_path):
    out = tmp_path / "out"
    assert "3 pairs" in degrade(photos, out, "--recursive", "--seed", 5)
    assert pixels(out / "HR" / "a.png").shape == (48, 40, 3)
    assert pixels(out / "LR" / "a.png").shape == (12, 10, 3)
    np.testing.assert_array_equal(pixels(out / "HR" / "a.png"), pixels(photos / "a.png")[:48, :40])
    assert pixels(out / "LR" / "sub" / "c.png").shape == (8, 8, 3)
    record = json.loads((out / "degradation.json").read_text())
    assert (record["schema"], record["recipe"], record["seed"]) == (1, "real_esrgan", 5)
    assert sorted(record["images"]) == ["a.png", "b.jpg", "sub/c.png"]
    assert 30 <= record["images"]["a.png"]["first_jpeg"] <= 95
    assert sorted(path.name for path in out.iterdir()) == ["HR", "LR", "degradation.json"]


def test_leftovers_are_looked_for_once_in_each_folder(photos, tmp_path, monkeypatch):
    """And not for each image: a large folder would take its square in time."""
    out, looked = tmp_path / "out", []
    leftovers = [partial_path(out / side / "a.png") for side in ("LR", "HR")]
    for path in leftovers:
        path.parent.mkdir(parents=True)
        path.touch()
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: looked.append(folder) or glob(folder, pattern))
    assert "2 pairs" in degrade(photos, out)
    assert sorted(folder.name for folder in looked if out in folder.parents) == ["HR", "LR"]
    assert not any(path.exists() for path in leftovers)


def test_a_pair_depends_on_seed_and_name_alone(photos, tmp_path):
    degrade(photos, tmp_path / "one", "--recursive", "--seed", 1)
    (photos / "a.png").unlink()
    degrade(photos, tmp_path / "two", "--seed", 1)
    degrade(photos, tmp_path / "three", "--seed", 2)
    first, second, third = (pixels(tmp_path / name / "LR" / "b.png") for name in ("one", "two", "three"))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, third)


def test_existing_pairs_are_kept_or_replaced_only_on_request(photos, tmp_path):
    out = tmp_path / "out"
    degrade(photos, out)
    original = (out / "LR" / "a.png").read_bytes()
    with pytest.raises(UserError, match="--skip-existing or --overwrite"):
        degrade(photos, out)
    (out / "LR" / "b.png").unlink()
    stamp = (out / "LR" / "a.png").stat().st_mtime_ns
    degrade(photos, out, "--skip-existing")
    assert (out / "LR" / "b.png").exists()
    assert (out / "LR" / "a.png").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="made with seed 0, now it is 9"):
        degrade(photos, out, "--skip-existing", "--seed", 9)
    degrade(photos, out, "--overwrite", "--seed", 9)
    assert (out / "LR" / "a.png").read_bytes() != original


def test_pairs_of_other_photos_stay_in_the_record(photos, tmp_path):
    out, more = tmp_path / "out", tmp_path / "more"
    more.mkdir()
    (photos / "a.png").rename(more / "z.png")
    degrade(photos, out)
    degrade(more, out)
    images = json.loads((out / "degradation.json").read_text())["images"]
    assert sorted(images) == ["b.jpg", "z.png"]
    (out / "LR" / "b.png").unlink()
    degrade(more, out, "--overwrite")
    assert list(json.loads((out / "degradation.json").read_text())["images"]) == ["z.png"], "a pair that is gone"
    (more / "z.png").rename(more / "y.png")
    with pytest.raises(UserError, match="made with seed 0, now it is 9"):
        degrade(more, out, "--seed", 9)
    degrade(more, out, "--overwrite", "--seed", 9)
    assert json.loads((out / "degradation.json").read_text())["seed"] == 9


def test_every_failure_is_named_and_the_others_are_done(photos, tmp_path):
    out = tmp_path / "out"
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "cut.jpg").write_bytes((photos / "b.jpg").read_bytes()[:200])
    Image.new("RGB", (32, 32)).save(photos / "b.png")
    result = CliRunner().invoke(app, ["degrade", str(photos), str(out)])
    assert result.exit_code == 1
    assert "2 pairs in" in result.stdout
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("failed: ")] == [
        f"failed: {photos / 'b.png'}: gives the same output as b.jpg; rename one of them",
        *(line for line in lines if f"failed: {photos / 'broken.png'}: not an image" in line),
        *(line for line in lines if f"failed: {photos / 'cut.jpg'}: truncated" in line),
    ]
    assert lines[-1] == "3 of 5 photos failed"
    assert "Degrading 1/4: a.png" in lines
    assert (out / "LR" / "b.png").exists()
    assert sorted(json.loads((out / "degradation.json").read_text())["images"]) == ["a.png", "b.jpg"]


def test_recipe_file_and_crop_multiple(photos, tmp_path):
    (tmp_path / "mild.yaml").write_text("first_jpeg: null\nfinal_jpeg: [90, 95]\n")
    out = tmp_path / "out"
    degrade(photos, out, "--recipe", tmp_path / "mild.yaml", "--scale", 2, "--crop-multiple", 16)
    assert pixels(out / "HR" / "a.png").shape == (48, 32, 3)
    assert pixels(out / "LR" / "a.png").shape == (24, 16, 3)
    assert json.loads((out / "degradation.json").read_text())["images"]["a.png"]["first_jpeg"] is None


@pytest.mark.parametrize("recipe", ["face_resshift", "faces.yaml"])
def test_faces_keep_their_size(photos, tmp_path, recipe):
    (tmp_path / "faces.yaml").write_text("shrink: [2, 4]\ngray_probability: 0\n")
    out = tmp_path / "out"
    degrade(photos, out, "--recipe", tmp_path / recipe if recipe.endswith("yaml") else recipe)
    assert json.loads((out / "degradation.json").read_text())["scale"] == 1
    original, hr, lr = (pixels(path / "a.png") for path in (photos, out / "HR", out / "LR"))
    np.testing.assert_array_equal(hr, original)
    assert lr.shape == original.shape
    assert not np.array_equal(lr, original)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "camra"], "did you mean 'camera'"),
        (["--crop-multiple", "6"], "multiple of the scale, 4"),
        (["--skip-existing", "--overwrite"], "choose one"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(photos, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        degrade(photos, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_clashing_places_and_names_are_refused(photos, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        degrade(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="lies in the folder of photos"):
        degrade(photos, photos / "out", "--recursive")

"""Tables of images through ``onestepsr.batch``: equal bytes, rows, resuming, other filesystems, and bad input."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from onestepsr.cli.main import main
from onestepsr.core.errors import UserError
from onestepsr.core.files import PARTIAL_PREFIX
from onestepsr.inference.options import UpscaleOptions
from onestepsr.inference.upscaler import Upscaler

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

from onestepsr.batch import UpscaleImages  # noqa: E402
from onestepsr.batch.files import located, split_query  # noqa: E402
from onestepsr.batch.inputs import list_inputs  # noqa: E402
from onestepsr.batch.job import BatchJob, Cluster  # noqa: E402
from onestepsr.batch.manifest import MANIFEST, PARTS  # noqa: E402

HERE = Cluster(address="none")
UPSCALE = UpscaleImages()  # loads its model once for all tests
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def put(folder: Path, count: int, side: int = 16) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("a" if number % 2 else "b") / f"{number:03d}.{'png' if number % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([*words])
    return int(stopped.value.code or 0)


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST and PARTS not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def manifest(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(folder / MANIFEST).to_pylist()
    return rows


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many as an actor has: in float32 the order of sums, and with it a level here and there, follows them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos in ``in`` and, by ``onestepsr upscale``, in ``out``."""
    folder = tmp_path_factory.mktemp("expected")
    put(folder / "in", 9)
    words = ["--recursive", "--engine", "torch"]  # whatever doctor has measured here
    assert run("upscale", str(folder / "in"), "-o", str(folder / "out"), *words) == 0
    return folder


def test_outputs_are_those_of_upscale_and_every_image_is_one_row(
    expected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (expected / "in" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    assert run("batch", str(expected / "in"), str(tmp_path), "--address", "none") == 1
    told = capsys.readouterr()
    assert re.search(r"failed: .*bad.jpg: [^\n]+\n9 of 10 images done, 1 failed", told.err)
    assert told.out == f"{tmp_path}/manifest.parquet\n"
    assert content(tmp_path) == content(expected / "out")
    rows = manifest(tmp_path)
    assert [row["input"] for row in rows] == sorted(str(p) for p in (expected / "in").rglob("*.*"))
    assert [row["status"] for row in rows].count("written") == 9
    failed = next(row for row in rows if row["status"] == "failed")
    assert "bad.jpg" in failed["error"]
    good = rows[0]
    assert (good["input_width"], good["input_height"], good["output_width"], good["output_height"]) == (16, 16, 64, 64)
    assert good["seconds"] > 0
    assert sorted(path.name for path in (tmp_path / PARTS).iterdir()) == ["job.json"]
    (expected / "in" / "bad.jpg").unlink()


def test_a_stopped_job_goes_on(expected: Path, tmp_path: Path) -> None:
    with closing(
        BatchJob(source=str(expected / "in"), output=str(tmp_path), cluster=HERE, upscale=UPSCALE).run()
    ) as rows:
        for number, _ in enumerate(rows):
            if number == 2:
                break
    assert not (tmp_path / MANIFEST).exists()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    job = BatchJob(source=str(expected / "in"), output=str(tmp_path), cluster=HERE, upscale=UPSCALE)
    again = list(job.run())
    assert job.done == 3
    assert len(again) == 6
    assert content(tmp_path) == content(expected / "out")
    assert {path: path.stat().st_mtime_ns for path in times} == times
    rows = manifest(tmp_path)
    assert len({row["input"] for row in rows}) == len(rows) == 9
    # Once more: nothing to do, and the manifest stays.
    assert list(BatchJob(source=str(expected / "in"), output=str(tmp_path), cluster=HERE, upscale=UPSCALE).run()) == []
    assert manifest(tmp_path) == rows


def test_outputs_without_a_row_are_found(expected: Path, tmp_path: Path) -> None:
    """As after a kill, which leaves images whose rows were not written yet."""
    list(BatchJob(source=str(expected / "in"), output=str(tmp_path), cluster=HERE, upscale=UPSCALE).run())
    (tmp_path / MANIFEST).write_bytes(b"PAR1 half of it")
    with pytest.raises(UserError, match=r"manifest.parquet: cannot be read as a manifest .* delete it"):
        BatchJob(source=str(expected / "in"), output=str(tmp_path), cluster=HERE, upscale=UPSCALE).plan()
    (tmp_path / MANIFEST).unlink()
    (tmp_path / "a" / "001.png").unlink()
    rows = {
        row["input"]: row
        for row in BatchJob(source=str(expected / "in"), output=str(tmp_path), cluster=HERE, upscale=UPSCALE).run()
    }
    states = [row["status"] for row in rows.values()]
    assert (states.count("found"), states.count("written")) == (8, 1)
    assert all(row["output_width"] == 64 for row in manifest(tmp_path))
    assert content(tmp_path) == content(expected / "out")


def test_failed_images_are_tried_again(tmp_path: Path) -> None:
    put(tmp_path / "in", 2)
    broken = tmp_path / "in" / "c.png"
    broken.write_bytes(b"nothing")
    job = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out"), "cluster": HERE, "upscale": UPSCALE}
    assert [row["status"] for row in BatchJob(**job).run()].count("failed") == 1
    Image.new("RGB", (4, 4)).save(broken)
    assert [row["input"] for row in BatchJob(**job).run()] == [str(broken)]
    assert [row["status"] for row in manifest(tmp_path / "out")] == ["written"] * 3


def test_the_class_takes_tables_of_ray_and_of_spark(expected: Path) -> None:
    paths = sorted(str(path) for path in (expected / "in" / "b").iterdir())
    upscale = UpscaleImages()
    contents = np.array([Path(path).read_bytes() for path in paths], dtype=object)
    wanted = [(expected / "out" / "b" / Path(path).name).read_bytes() for path in paths]
    of_ray = upscale({"path": np.array(paths), "bytes": contents})
    assert of_ray.column("image").to_pylist() == wanted
    pandas = pytest.importorskip("pandas")
    of_spark = upscale(pandas.DataFrame({"path": paths, "content": list(contents), "length": 1}))
    assert list(of_spark["image"]) == wanted
    assert upscale({"path": np.array(paths[:1])}).column("image").to_pylist() == wanted[:1]
    with pytest.raises(UserError, match="expected 'path'"):
        upscale({"name": paths})


def test_images_of_one_size_are_made_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 6)
    put(tmp_path / "wide", 4, side=20)
    paths = [*sorted(str(path) for path in tmp_path.rglob("*.*")), str(tmp_path / "absent.png")]
    groups: list[int] = []
    original = Upscaler.upscale_images

    def counted(self: Upscaler, images: list[Any], options: UpscaleOptions) -> list[Any]:
        groups.append(len({image.width for image in images}))
        groups.append(len(images))
        return original(self, images, options)

    monkeypatch.setattr(Upscaler, "upscale_images", counted)
    together = UpscaleImages(options=UpscaleOptions(tile_batch=4), file_format="png")
    table = {row["input"]: row for row in together({"path": paths}).to_pylist()}
    alone = {row["input"]: row for row in UpscaleImages(file_format="png")({"path": paths}).to_pylist()}
    assert set(groups[::2]) == {1}
    assert 1 < max(groups[1::2]) <= 4
    assert list(table.keys() - alone.keys()) == []
    for path in paths[:-1]:
        with (
            Image.open(io.BytesIO(table[path]["image"])) as ours,
            Image.open(io.BytesIO(alone[path]["image"])) as theirs,
        ):
            assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1
        assert table[path]["seconds"] > 0
    assert table[paths[-1]]["status"] == "failed"


def test_lists_and_patterns(tmp_path: Path) -> None:
    put(tmp_path / "in", 6)
    names = [f"{'a' if n % 2 else 'b'}/{n:03d}.{'png' if n % 3 else 'jpg'}" for n in range(6)]
    paths = [str(tmp_path / "in" / name) for name in names]
    (tmp_path / "list.txt").write_text("# photos\n" + "\n".join([*paths, paths[0]]) + "\n")
    parquet.write_table(pa.table({"id": range(6), "url": paths}), tmp_path / "list.parquet")
    (tmp_path / "list.csv").write_text("own,size\n" + "".join(f"{path},1\n" for path in paths))
    assert list_inputs(str(tmp_path / "list.txt"), {}).names == names
    assert list_inputs(str(tmp_path / "list.parquet"), {}).inputs == paths
    assert list_inputs(str(tmp_path / "list.csv"), {}, "own").names == names
    with pytest.raises(UserError, match="has the columns own, size; expected one of path"):
        list_inputs(str(tmp_path / "list.csv"), {})
    assert sorted(list_inputs(str(tmp_path / "in"), {}).names) == sorted(names)
    assert list_inputs(f"{tmp_path}/in/**/*.jpg", {}).names == ["a/003.jpg", "b/000.jpg"]
    assert list_inputs(f"{tmp_path}/in/a/00[13].*", {}).names == ["001.png", "003.jpg"]
    assert list_inputs(paths[0], {}).names == ["000.jpg"]


def test_addresses() -> None:
    assert split_query("s3://b/k?endpoint_override=http://127.0.0.1:1&region=x") == (
        "s3://b/k",
        {"s3://b": "endpoint_override=http://127.0.0.1:1&region=x"},
    )
    assert split_query("/tmp/a?b.jpg") == ("/tmp/a?b.jpg", {})
    assert located("/tmp/a b#c.jpg")[1] == "/tmp/a b#c.jpg"
    with pytest.raises(UserError, match="no filesystem"):
        located("nonsense://x/y")


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "in", 1)
    (tmp_path / "empty.txt").touch()

    def refused(*words: str) -> str:
        assert run("batch", *words, "--address", "none") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
        return err

    out = str(tmp_path / "out")
    assert "no such file, folder or bucket" in refused(str(tmp_path / "none"), out)
    assert "the list is empty" in refused(str(tmp_path / "empty.txt"), out)
    assert "no images there" in refused(f"{tmp_path}/in/*.gif", out)
    assert "accepted: more than none" in refused(str(tmp_path / "in"), out, "--num-cpus-per-actor", "0")
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(str(tmp_path / "in"), str(tmp_path / "file" / "below"))
    assert run("batch", str(tmp_path / "in"), out, "--address", "none") == 0
    capsys.readouterr()
    assert "other settings (options)" in refused(str(tmp_path / "in"), out, "--scale", "2")
    assert run("batch", str(tmp_path / "in"), out, "--address", "none", "--scale", "2", "--overwrite") == 0
    assert Image.open(tmp_path / "out" / "b" / "000.jpg").size == (32, 32)


def test_two_inputs_of_one_output(tmp_path: Path) -> None:
    for ending in ("jpg", "png"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"a.{ending}")
    job = BatchJob(
        source=f"{tmp_path}/a.*", output=str(tmp_path / "out"), cluster=HERE, upscale=UPSCALE, file_format="webp"
    )
    rows = list(job.run())
    assert sorted(row["status"] for row in rows) == ["failed", "written"]
    assert "is that of" in next(row["error"] for row in rows if row["status"] == "failed")


def test_outputs_are_no_inputs(tmp_path: Path) -> None:
    put(tmp_path, 2)
    for output in (tmp_path, tmp_path / "a" / ".." / ".", tmp_path.parent):
        with pytest.raises(UserError, match="holds the inputs"):
            BatchJob(source=str(tmp_path), output=str(output), cluster=HERE, upscale=UPSCALE, overwrite=True).plan()
    for made in (2, 0):
        job = BatchJob(source=str(tmp_path), output=str(tmp_path / "large"), cluster=HERE, upscale=UPSCALE)
        assert len(list(job.run())) == made
        assert job.total == 2


def test_names_of_a_list_stay_below_the_output(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("../../a/x.png\nb/../../c/y.png\n")
    assert list_inputs(str(tmp_path / "list.txt"), {}).names == ["a/x.png", "c/y.png"]


def test_one_source_per_output(tmp_path: Path) -> None:
    for name in ("one", "two"):
        put(tmp_path / name, 1)
    list(BatchJob(source=str(tmp_path / "one"), output=str(tmp_path / "out"), cluster=HERE, upscale=UPSCALE).run())
    with pytest.raises(UserError, match=r"holds images of .*one; choose another"):
        BatchJob(source=str(tmp_path / "two"), output=str(tmp_path / "out"), cluster=HERE, upscale=UPSCALE).plan()


def test_an_interrupted_overwrite_is_not_done_and_a_deleted_output_is_made_again(tmp_path: Path) -> None:
    put(tmp_path / "in", 3)
    job = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out"), "cluster": HERE, "upscale": UPSCALE}
    list(BatchJob(**job).run())
    (tmp_path / "out" / "a" / "001.png").unlink()
    assert [row["input"] for row in BatchJob(**job).run()] == [str(tmp_path / "in" / "a" / "001.png")]
    with closing(BatchJob(**job, overwrite=True).run()) as rows:
        next(rows)
    with pytest.raises(UserError, match="give --overwrite again"):
        BatchJob(**job).plan()
    assert len(list(BatchJob(**job, overwrite=True).run())) == 3
    assert list(BatchJob(**job).run()) == []


def test_names_that_are_not_utf8_are_one_line(tmp_path: Path) -> None:
    for name, line in (("list.txt", b"a\xff.png\n"), ("list.csv", b"path,n\na\xff.png,1\n")):
        (tmp_path / name).write_bytes(line)
        with pytest.raises(UserError, match="not UTF-8"):
            list_inputs(str(tmp_path / name), {})
    try:
        (tmp_path / os.fsdecode(b"a\xff.png")).touch()
    except OSError:
        pytest.skip("the filesystem takes UTF-8 only")
    with pytest.raises(UserError, match="not UTF-8"):
        list_inputs(str(tmp_path), {})


def test_a_wrong_model_does_not_bind_the_folder(tmp_path: Path) -> None:
    put(tmp_path / "in", 1)
    job = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out"), "cluster": HERE, "upscale": UPSCALE}
    with pytest.raises(UserError):
        list(BatchJob(**{**job, "upscale": UpscaleImages("d3sr-tyni")}).run())
    assert len(list(BatchJob(**job).run())) == 1


def test_folders_that_begin_with_a_line_are_no_hidden_ones(tmp_path: Path) -> None:
    for name in ("_raw", ".hidden", PARTS):
        put(tmp_path / name, 1)
    assert list_inputs(str(tmp_path), {}).names == ["_raw/b/000.jpg"]


def test_a_full_disk_is_a_row_and_the_rest_goes_on(expected: Path, tmp_path: Path) -> None:
    large = expected / "in" / "large.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(large)
    job = {"source": str(expected / "in"), "output": str(tmp_path), "cluster": HERE, "upscale": UPSCALE}
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # outputs of 16 x 16 pixels have 13 kB
        rows = {row["input"]: row for row in BatchJob(**job).run()}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        large.unlink()
    assert [row["error"] for row in rows.values() if row["status"] != "written"] == [
        f"{tmp_path}/large.png: cannot be written (File too large)"
    ]
    assert content(tmp_path) == content(expected / "out")
    assert len(manifest(tmp_path)) == 10


def test_a_disk_too_full_for_the_manifest_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestepsr.batch.job.FLUSH_S", 0.0)
    put(tmp_path / "in", 4)
    job = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out"), "cluster": HERE, "upscale": UPSCALE}
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    states: list[str] = []

    def run_until_full() -> None:
        for row in BatchJob(**job).run():
            states.append(row["status"])
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

    try:
        with pytest.raises(UserError, match="cannot be written") as error:
            run_until_full()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "\n" not in str(error.value)
    assert len(states) == 4
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(PARTIAL_PREFIX)]
    list(BatchJob(**job).run())
    assert [row["status"] in ("written", "found") for row in manifest(tmp_path / "out")] == [True] * 4


def test_missing_buckets_and_folders_are_rows_or_a_line(tmp_path: Path) -> None:
    put(tmp_path / "in", 1)
    good = tmp_path / "in" / "b" / "000.jpg"
    (tmp_path / "list.txt").write_text(f"{good}\n{tmp_path}/none/x.png\nnonsense://x/y.png\n")
    job = BatchJob(source=str(tmp_path / "list.txt"), output=str(tmp_path / "out"), cluster=HERE, upscale=UPSCALE)
    rows = {row["input"]: row for row in job.run()}
    assert [row["status"] for row in rows.values()].count("failed") == 2
    assert rows[str(good)]["status"] == "written"
    assert all(row["error"].startswith(path) for path, row in rows.items() if row["status"] == "failed")


def measured(sr: Path, hr: Path, target: Path, *words: str) -> tuple[dict[str, Any], bytes]:
    """What ``onestepsr evaluate`` writes but for times, as JSON and as rows."""
    files = ["--json", str(target / "a.json"), "--csv", str(target / "a.csv")]
    assert run("evaluate", str(sr), "--hr", str(hr), "--metrics", "psnr,ssim,grid", *files, *words) == 1
    content = json.loads((target / "a.json").read_text())
    return {key: content[key] for key in content.keys() - {"date", "seconds"}}, (target / "a.csv").read_bytes()


def broken_set(folder: Path) -> tuple[Path, Path]:
    """SR and HR images of which one cannot be read."""
    put(folder / "hr", 5, side=40)
    put(folder / "sr", 5, side=40)
    for path in (folder / "sr").rglob("*.*"):
        with Image.open(path) as image:
            image.point(lambda value: value // 2).save(path)
    (folder / "sr" / "a" / "003.jpg").write_bytes(b"no image")
    return folder / "sr", folder / "hr"


def test_evaluations_in_tasks_are_equal_to_the_last_digit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sr, hr = broken_set(tmp_path)
    whole = measured(sr, hr, tmp_path)
    words = ["--ray", "--address", "none", "--images-per-task", "2"]
    assert measured(sr, hr, tmp_path, *words) == whole
    assert (list(whole[0]["failed"]), whole[0]["count"]["ssim"]) == (["a/003"], 4)
    capsys.readouterr()
    assert run("evaluate", str(sr), "--hr", str(hr), "--address", "none") == 2
    assert run("evaluate", "--model", "d3sr-tiny", "--data", str(hr), "--ray") == 2
    errors = capsys.readouterr().err.splitlines()
    assert "--address: needs --ray" in errors[0]
    assert "make them with 'onestepsr batch'" in errors[1]
    assert len(errors) == 2


# ---- an object store, and a cluster ----


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


@pytest.fixture
def bucket() -> Any:
    """A query that leads to an empty S3 server on loopback with one bucket."""
    pytest.importorskip("moto")
    from pyarrow import fs

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        with socket.socket() as own:
            if own.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    query = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    own_fs, _ = fs.FileSystem.from_uri(f"s3://photos/x?{query}")
    own_fs.create_dir("photos")
    yield query, own_fs
    server.terminate()
    server.wait(20)


@pytest.mark.slow
def test_an_object_store_in_and_out(expected: Path, bucket: Any, capsys: pytest.CaptureFixture[str]) -> None:
    query, own_fs = bucket
    for path in (expected / "in").rglob("*.*"):
        name = path.relative_to(expected / "in").as_posix()
        with own_fs.open_output_stream(f"photos/in/{name}") as stream:
            stream.write(path.read_bytes())
    job = {"output": f"s3://photos/large?{query}", "cluster": HERE, "upscale": UPSCALE}
    assert len(list(BatchJob(source=f"s3://photos/in?{query}", **job).run())) == 9
    for name, wanted in content(expected / "out").items():
        assert own_fs.open_input_stream(f"photos/large/{name}").read() == wanted
    assert list(BatchJob(source=f"s3://photos/in?{query}", **job).run()) == []
    capsys.readouterr()
    assert run("batch", f"s3://absent/in?{query}", f"s3://photos/x?{query}", "--address", "none") == 2
    closed = query.replace("true", "false")
    assert run("batch", str(expected / "in"), f"s3://absent/x?{closed}", "--address", "none") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "s3://absent" in errors[0]
    assert "s3://absent" in errors[1]


@pytest.mark.slow
@pytest.mark.skipif("ONESTEPSR_TEST_RAY" not in os.environ, reason="starts a cluster: takes a minute and more")
def test_evaluations_by_a_cluster_are_equal_to_the_last_digit(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    sr, hr = broken_set(tmp_path)
    assert measured(sr, hr, tmp_path, "--ray", "--images-per-task", "2") == measured(sr, hr, tmp_path)


@pytest.mark.skipif("ONESTEPSR_TEST_RAY" not in os.environ, reason="starts a cluster: takes a minute and more")
def test_an_object_store_in_and_out_by_a_cluster(expected: Path, bucket: Any) -> None:
    pytest.importorskip("ray")
    query, own_fs = bucket
    for path in (expected / "in").rglob("*.*"):
        name = path.relative_to(expected / "in").as_posix()
        with own_fs.open_output_stream(f"photos/in/{name}") as stream:
            stream.write(path.read_bytes())
    with own_fs.open_output_stream("photos/in/broken.png") as stream:
        stream.write(b"no image")
    words = [f"s3://photos/in?{query}", f"s3://photos/large?{query}", "--images-per-task", "3"]
    first = subprocess.run(
        [sys.executable, "-m", "onestepsr", "batch", *words],
        env={**ENVIRONMENT, **os.environ},
        check=False,
        timeout=900,
    )
    assert first.returncode == 1
    for name, wanted in content(expected / "out").items():
        assert own_fs.open_input_stream(f"photos/large/{name}").read() == wanted
    rows = parquet.read_table(pa.BufferReader(own_fs.open_input_stream(f"photos/large/{MANIFEST}").read())).to_pylist()
    assert len({row["input"] for row in rows}) == len(rows) == 10
    assert [row["input"] for row in rows if row["status"] == "failed"] == ["s3://photos/in/broken.png"]


@pytest.mark.parametrize("running", [False, True])
def test_a_cluster_of_this_job_ends_with_it_and_no_other(
    running: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "in", 1)
    calls: list[str] = []

    def init(**settings: Any) -> None:
        calls.append("init")

    ray = ModuleType("ray")
    ray.is_initialized = lambda: running or "init" in calls  # type: ignore[attr-defined]
    ray.init = init  # type: ignore[attr-defined]
    ray.shutdown = lambda: calls.append("shutdown")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ModuleType("ray.data"))

    def turn(cluster: Cluster, items: list[dict[str, Any]], *_: Any) -> list[dict[str, Any]]:
        return [{"input": item["input"], "output": item["output"], "status": "written"} for item in items]

    monkeypatch.setattr(Cluster, "_turn", turn)
    job = BatchJob(source=str(tmp_path / "in"), output=str(tmp_path / "out"))
    assert [row["status"] for row in job.run()] == ["written"]
    assert calls == ([] if running else ["init", "shutdown"])


@pytest.mark.slow
@pytest.mark.skipif("ONESTEPSR_TEST_RAY" not in os.environ, reason="starts a cluster: takes a minute and more")
def test_a_local_cluster_whose_actor_and_driver_are_killed(expected: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    import psutil

    words = ["batch", str(expected / "in"), str(tmp_path / "out"), "--images-per-task", "2", "--actors", "1"]
    command = [sys.executable, "-m", "onestepsr", *words]

    def wait_for(count: int) -> None:
        for _ in range(6000):
            if len(content(tmp_path / "out")) >= count:
                return
            time.sleep(0.1)
        raise AssertionError("no progress")

    first = subprocess.Popen(command, env=ENVIRONMENT)
    wait_for(2)
    for child in psutil.Process(first.pid).children(recursive=True):
        if "MapWorker" in "".join(child.cmdline()):
            child.send_signal(signal.SIGKILL)
    wait_for(5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert subprocess.run(command, env=ENVIRONMENT, check=False, timeout=600).returncode == 0
    assert content(tmp_path / "out") == content(expected / "out")
    rows = manifest(tmp_path / "out")
    assert len({row["input"] for row in rows}) == len(rows) == 9

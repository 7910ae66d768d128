"""Short runs of scripts/serve_load.py, the examples of the documentation, and the steps of the container."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("fastapi")

from serving import EXAMPLES, server_process, serving, write_weights

from onestepsr.serve.service import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_load", ROOT / "scripts" / "serve_load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_many_clients_each_get_their_own_image(script: ModuleType, weights: Path) -> None:
    found = script.load(clients=12, seconds=1.0, side=24, model=str(weights), rounds=1, bare_seconds=0.2)
    assert found["broken"] == []
    assert found["answers"]["200"] >= 12


def test_malformed_uploads_leave_no_error_and_no_file(script: ModuleType, weights: Path) -> None:
    found = script.fuzz(uploads=60, model=str(weights))
    assert found["broken"] == []
    assert len(found["answers"]) >= 3


def test_requests_generated_from_the_document(script: ModuleType, weights: Path) -> None:
    pytest.importorskip("schemathesis")
    found = script.schema(examples=3, model=str(weights))
    assert found["broken"] == []


def test_the_examples_of_the_page_run(weights: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    shell, program = (
        re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[1],
        re.findall(r"```python\n(.*?)```", text, re.DOTALL),
    )
    (tmp_path / "examples").symlink_to(EXAMPLES)
    with serving(Settings(data_dir=tmp_path / "data", models=[str(weights)])) as (client, _):
        client.wait_ready()
        code = program[0].replace("http://127.0.0.1:7860", client.address)
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
        assert (tmp_path / "cat_x2.jpg").stat().st_size > 1000
        job = client.submit(EXAMPLES / "cat.jpg")["id"]
        client.wait(job)
        lines = shell.replace("http://127.0.0.1:7860", client.address).replace("jobs/ID", f"jobs/{job}")
        subprocess.run(["sh", "-e", "-c", lines], cwd=tmp_path, check=True, capture_output=True)
        assert (tmp_path / "large.png").read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / "cat_x4.jpg").read_bytes() == (tmp_path / "large.jpg").read_bytes()


def test_the_container_runs_the_steps_and_no_rights_of_root() -> None:
    dockerfile = (ROOT / "scripts" / "serve" / "Dockerfile").read_text(encoding="utf-8")
    assert "sh /src/scripts/serve/install.sh /src /opt/onestepsr" in dockerfile
    assert "USER onestepsr" in dockerfile


@pytest.mark.slow
def test_the_steps_of_the_container(tmp_path: Path) -> None:
    environment = {**os.environ, "PIP_NO_DEPS": "1", "PYTHON": sys.executable}
    environment["PYTHONPATH"] = sysconfig.get_path("purelib")  # the dependencies are here already
    command = ["sh", str(ROOT / "scripts" / "serve" / "install.sh"), str(ROOT), str(tmp_path / "env")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("no package index here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("onestepsr ")
    page = next((tmp_path / "env" / "lib").glob("python*/site-packages/onestepsr/serve/page/app.js"))
    assert page.read_bytes() == (ROOT / "src" / "onestepsr" / "serve" / "page" / "app.js").read_bytes()
    assert (page.parents[2] / "assets" / "compare.js").is_file()


def test_a_server_that_is_told_to_end_ends_well(weights: Path, tmp_path: Path) -> None:
    with server_process(tmp_path, "--model", str(weights)) as (client, process):
        client.wait_ready()
        process.terminate()
        assert process.wait(30) == 0

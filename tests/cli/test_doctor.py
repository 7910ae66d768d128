"""The doctor command reports what is there, and never fails because something is missing."""

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from onestepsr import __version__
from onestepsr.benchmark import probes
from onestepsr.cli import doctor
from onestepsr.core import machine
from onestepsr.inference.upscaler import resolve_dtype
from onestepsr.weights.catalog import list_models

app = typer.Typer()
app.callback()(lambda: None)
doctor.register(app)


DOCTOR = ["doctor", "--model", "random:resshift-micro"]  # which no other engine runs: nothing is measured


@pytest.fixture(autouse=True)
def short_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.001)
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path))


def test_json_holds_everything() -> None:
    result = CliRunner().invoke(app, [*DOCTOR, "--json"])
    assert result.exit_code == 0
    findings = json.loads(result.stdout)
    assert findings["schema"] == 1
    assert findings["versions"]["onestepsr"] == __version__
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["cpu"]["cores"] >= 1
    assert findings["cpu"]["free_memory_gb"] > 0
    assert set(findings["tflops"]) >= {"float32", "bfloat16"}
    assert all(speed > 0 for speed in findings["tflops"].values())
    assert findings["engines"]["chosen"] == "torch"
    assert "draws noise" in findings["engines"]["reason"]
    assert [model["id"] for model in findings["models"]] == [spec.id for spec in list_models()]


def test_text_has_one_line_for_each_finding() -> None:
    result = CliRunner().invoke(app, DOCTOR)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for title in ("python", "torch", "cpu", "free memory", "speed", "default", "engine", "extra prompts"):
        assert sum(line.startswith(f"{title} ") for line in lines) == 1


def test_missing_parts_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = [
        "torch>=2",
        "no-such-distribution>=1; extra == 'iqa'",
        "numpy; extra == 'metrics'",
        "x; extra == 'test'",
    ]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _name: requirements)
    extras = doctor.examine_extras()
    assert extras["iqa"] == {"missing": ["no-such-distribution"], "install": "pip install 'onestepsr[iqa]'"}
    assert extras["metrics"]["missing"] == []
    assert "test" not in extras


def test_engines_are_measured_and_the_choice_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    engines = doctor.examine_engines("bicubic")
    assert engines["measured"][0]["engine"] == "torch"
    assert len(engines["measured"]) > 1
    assert all(one["seconds"] > 0 for one in engines["measured"])
    kept = json.loads(next((tmp_path / "engines").iterdir()).read_text())
    assert (kept["model"], kept["engine"], kept["measured"]) == ("bicubic", engines["chosen"], engines["measured"])
    assert doctor.engines_as_text(engines).startswith(f"{engines['chosen']} for bicubic (128 x 128 pixels: torch ")


def test_unknown_processor_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "processor", dict)
    cpu = doctor.examine_cpu()
    assert cpu["features"] == []
    assert cpu["model"]


def test_instructions_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    described = {"model name": "Some CPU", "flags": "fpu avx2 amx_bf16"}
    monkeypatch.setattr(machine, "processor", lambda: described)
    assert doctor.examine_cpu()["features"] == ["avx2", "amx_bf16"]
    assert doctor.examine_cpu()["model"] == "Some CPU"


@pytest.mark.parametrize(
    ("vendor", "flags", "limit", "chosen"),
    [
        ("AuthenticAMD", "avx2 avx512_bf16", "", torch.bfloat16),
        ("AuthenticAMD", "avx2 avx512_bf16", "AVX2", torch.float32),
        ("AuthenticAMD", "avx2 avx512_bf16", "avx512_core", torch.float32),
        ("AuthenticAMD", "avx2 avx512f", "", torch.float32),
        ("GenuineIntel", "avx2 avx512_bf16 amx_bf16", "", torch.bfloat16),
        ("GenuineIntel", "avx2 avx512_bf16 amx_bf16", "avx512_core_bf16", torch.float32),
        ("GenuineIntel", "avx2 avx512_bf16", "", torch.float32),
        ("GenuineIntel", "avx2", "", torch.float32),
        ("", "asimd sve bf16", "", torch.float32),
    ],
)
def test_the_instructions_decide_the_dtype(
    vendor: str, flags: str, limit: str, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "processor", lambda: {"vendor_id": vendor, "flags": flags})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert resolve_dtype("auto", torch.device("cpu")) == chosen


def test_a_dtype_that_the_device_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(device: torch.device, dtype: torch.dtype, *_: object, **__: object) -> float:
        if dtype == torch.bfloat16:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return 1.0

    monkeypatch.setattr(probes, "convolution_speed", speed)
    assert doctor.measure_speeds(torch.device("cpu")) == {"float32": 1.0}
    monkeypatch.setattr(probes, "convolution_speed", lambda *_, **__: speed(torch.device("cpu"), torch.bfloat16))
    assert doctor.measure_speeds(torch.device("cpu")) == {}
    assert CliRunner().invoke(app, DOCTOR).exit_code == 0

"""``onestepsr models``: what it says of the bundled model and of a file, and how it fails."""

import hashlib
import json

import pytest
from typer.testing import CliRunner

from onestepsr.cli.doctor import examine_models
from onestepsr.cli.main import app
from onestepsr.core.errors import UnknownModel, UserError
from onestepsr.weights import catalog, download

run = CliRunner().invoke
WEIGHTS = b"seven b"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv(download.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(download.OFFLINE, "1")
    monkeypatch.delenv(download.MIRROR, raising=False)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An alias whose file lies in a mirror folder."""
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    file = download.Download(file="s.bin", urls=("https://localhost/x",), sha256=sha256, bytes=len(WEIGHTS))
    spec = catalog.ModelSpec(
        id="small", kind="loss network", summary="s", licence="MIT", licence_url="https://l", files=(file,)
    )
    monkeypatch.setitem(catalog._MODELS, "small", spec)
    monkeypatch.setenv(download.MIRROR, str(tmp_path))
    (tmp_path / "s.bin").write_bytes(WEIGHTS)
    return spec


def test_list_names_the_default_model_first():
    document = json.loads(run(app, ["models", "list", "--json"]).stdout)
    assert document["schema"] == 1
    assert document["models"][0]["id"] == "d3sr-tiny"
    states = {row["id"]: (row["kind"], row["scale"], row["state"]) for row in document["models"]}
    assert states["d3sr-tiny"] == ("upscaler", 4, "bundled")
    assert states["sd21-base"] == ("backbone", None, "not downloaded (5.2 GB)")
    lines = run(app, ["models", "list"]).stdout.splitlines()
    headings = [line for line in lines if line.endswith(":")]
    assert headings == ["upscalers:", "backbones:", "loss networks:", "metric networks:"]
    assert lines[1].startswith("  d3sr-tiny ")


def test_info_counts_parameters_and_shows_the_configuration():
    document = json.loads(run(app, ["models", "info", "d3sr-tiny", "--json"]).stdout)
    assert document["architecture"] == "tiny-latent-diffusion"
    assert 1_000_000 < document["parameters"] < 20_000_000
    assert document["bytes"] < 40 * 2**20
    assert 0 <= document["config"]["timestep"] < 1000
    by_path = json.loads(run(app, ["models", "info", document["file"], "--json"]).stdout)
    assert by_path["sha256"] == document["sha256"]


def test_verify_checks_every_model():
    result = run(app, ["models", "verify"])
    assert result.exit_code == 0
    assert [line.split(",")[0] for line in result.stdout.splitlines()] == [
        "d3sr-tiny: ok",
        "d3sr-tiny-fidelity: ok",
        "bicubic: ok",
    ]


def test_info_of_a_download_shows_terms_and_addresses_and_downloads_nothing(tmp_path):
    document = json.loads(run(app, ["models", "info", "sd21-base", "--json"]).stdout)
    assert document["kind"] == "backbone"
    assert "Attachment A" in document["notice"]
    assert document["bytes"] == 5_214_604_494
    assert document["file"] == str(tmp_path / "cache" / "sd21-base" / "v2-1_512-ema-pruned.safetensors")
    assert len(document["sources"]) == 4
    assert "needs no weights" in run(app, ["models", "info", "bicubic"]).stdout
    assert not (tmp_path / "cache").exists()


def test_download_and_verify(small):
    result = run(app, ["models", "download", "small", "d3sr-tiny", "small"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f"small: {small.path}", "d3sr-tiny: bundled, nothing to download"]
    assert "small: ok, sha256" in run(app, ["models", "verify"]).stdout
    small.path.write_bytes(b"altered")
    result = run(app, ["models", "verify"])
    assert result.exit_code == 1
    assert "d3sr-tiny: ok" in result.stdout
    assert "fetches it again" in result.stderr
    assert run(app, ["models", "download", "small"]).exit_code == 0
    assert small.path.read_bytes() == WEIGHTS


def test_one_failing_download_leaves_the_others(small):
    result = run(app, ["models", "download", "vgg16", "small"])
    assert result.exit_code == 1
    assert "1 of 2 models failed" in result.stderr
    assert small.path.read_bytes() == WEIGHTS
    assert isinstance(run(app, ["models", "download", "vgg16"]).exception, UserError)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["info", "nope"], UnknownModel),
        (["verify", "d3sr-tny"], UnknownModel),
        (["download", "sd21-bas"], UnknownModel),
        (["verify", "sd21-base"], UserError),
    ],
)
def test_unknown_models_are_user_errors(arguments, error):
    assert isinstance(run(app, ["models", *arguments]).exception, error)


def test_without_a_home_folder_everything_that_needs_none_is_listed(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ONESTEPSR_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    listed = run(app, ["models", "list"])
    assert listed.exit_code == 0
    assert "bundled]" in listed.output
    assert "BSD-3-Clause, no home folder for it: set ONESTEPSR_CACHE]" in listed.output
    assert run(app, ["models", "info", "vgg16"]).exit_code == 0
    assert "d3sr-tiny: ok" in run(app, ["models", "verify"]).output
    states = {model["id"]: model["state"] for model in examine_models()}
    assert states["d3sr-tiny"] == "verified"
    assert "ONESTEPSR_CACHE" in states["sd21-base"]

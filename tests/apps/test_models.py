"""``onestepsr models``: what it says of the bundled model and of a file, and how it fails."""

import json

import pytest
from typer.testing import CliRunner

from onestepsr.apps.cli import app
from onestepsr.errors import UnknownModel, UserError

run = CliRunner().invoke


def test_list_names_the_default_model_first():
    document = json.loads(run(app, ["models", "list", "--json"]).stdout)
    assert document["schema"] == 1
    assert document["models"][0]["id"] == "d3sr-tiny"
    assert "d3sr-tiny" in run(app, ["models", "list"]).stdout


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
    assert "d3sr-tiny: ok" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "error"), [(["info", "nope"], UnknownModel), (["verify", "d3sr-tny"], UserError)]
)
def test_unknown_models_are_user_errors(arguments, error):
    assert isinstance(run(app, ["models", *arguments]).exception, error)

"""Published OSEDiff weights as models: added to a backbone, converted both ways on the command line, by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_diffusion import AUTOENCODER, GENERATOR, UNET
from small_osediff import adapted, photo, plain

from onestepsr.cli.main import main
from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError
from onestepsr.models import loading
from onestepsr.models.loading import load_osediff
from onestepsr.models.osediff.checkpoints import collect, write_published
from onestepsr.models.osediff.generator import OSEDiffGenerator
from onestepsr.models.stable_diffusion.networks import stable_diffusion_generator
from onestepsr.weights import download, files
from onestepsr.weights.catalog import get_model


@pytest.fixture
def folder(tmp_path):
    """``osediff.pkl`` and the backbone it belongs to."""
    write_published(tmp_path / "osediff.pkl", collect(adapted()))
    state = {key: value for key, value in plain().state_dict().items() if key != "prompt"}
    state["prompt"] = torch.zeros(1, 77, 16)
    files.save_model(
        tmp_path / "backbone.safetensors",
        architecture="stable-diffusion",
        config=to_mapping(GENERATOR),
        state_dict=state,
    )
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    output = capsys.readouterr()
    return int(end.value.code or 0), output.out, output.err


def test_there_and_back_on_the_command_line(folder, capsys):
    pickle, backbone = str(folder / "osediff.pkl"), str(folder / "backbone.safetensors")
    target = folder / "out" / "osediff.safetensors"
    code, said, _ = run(capsys, "models", "convert", pickle, str(target), "--backbone", backbone, "--json")
    assert code == 0
    assert json.loads(said)["architecture"] == "osediff"
    assert sorted(file.name for file in target.parent.iterdir()) == [
        "osediff.adapters.safetensors",
        "osediff.safetensors",
    ]
    unmerged = adapted()
    unmerged.prompt = torch.nn.Parameter(torch.zeros(1, 77, 16))
    unmerged.enlarging = "pillow"  # as the published script runs them
    loaded = loading.load_generator(target)
    assert isinstance(loaded, OSEDiffGenerator)
    assert loaded.timestep == 999
    torch.testing.assert_close(loaded(photo()), unmerged(photo()), rtol=0, atol=2e-4)
    adapters = target.with_name("osediff.adapters.safetensors")
    back = folder / "back.pkl"
    code, said, _ = run(capsys, "models", "convert", str(adapters), str(back), "--to", "osediff-pkl")
    assert code == 0
    assert back.read_bytes() == Path(pickle).read_bytes()
    again = folder / "again.safetensors"
    assert run(capsys, "models", "convert", str(adapters), str(again), "--backbone", backbone)[0] == 0
    assert again.read_bytes() == target.read_bytes()


def test_the_face_model_and_a_prompt_of_ones_own(folder, capsys):
    pickle, backbone = str(folder / "osediff.pkl"), str(folder / "backbone.safetensors")
    embedding = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    save_file({"prompt": embedding}, folder / "prompt.safetensors")
    target = folder / "face.safetensors"
    options = ["--backbone", backbone, "--as", "osediff-face", "--prompt-embedding", str(folder / "prompt.safetensors")]
    options += ["--posterior", "sample"]
    assert run(capsys, "models", "convert", pickle, str(target), *options)[0] == 0
    loaded = loading.load_generator(target)
    assert (loaded.scale, loaded.posterior) == (1, "sample")
    assert torch.equal(loaded.prompt[0], embedding)
    assert loaded(photo(9)).shape == (1, 3, 9, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["osediff.pkl", "x.safetensors", "--backbone", "other"], "unknown model 'other'"),
        (["osediff.pkl", "x.safetensors", "--part", "discriminator"], "--part discriminator is for a whole backbone"),
        (["osediff.pkl", "x.safetensors", "--as", "osedif"], "no published model of OSEDiff: did you mean 'osediff'"),
        (["osediff.pkl", "x.pkl"], "must end in .safetensors"),
        (["osediff.pkl", "x.safetensors", "--posterior", "mode"], "--posterior 'mode': accepted: mean, sample"),
        (["odd.pkl", "x.safetensors", "--backbone", "backbone.safetensors"], "it would call 'print'"),
        (["osediff.pkl", "x.safetensors", "--to", "osediff-pkl"], "must end in .pkl"),
        (["osediff.pkl", "x.safetensors", "--to", "pth"], "--to 'pth': accepted: safetensors, osediff-pkl"),
        (["backbone.safetensors", "x.pkl", "--to", "osediff-pkl"], "holds no adapters of OSEDiff; they are in a file"),
        (
            ["backbone.safetensors", "x.safetensors", "--prompt-embedding", "y"],
            "which --backbone, --prompt-embedding and --posterior are for",
        ),
        (["none.pkl", "x.safetensors"], "none.pkl: no such weights file"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    torch.save({"state_dict_unet": {}, "state_dict_vae": {}, "rank_unet": print}, "odd.pkl")
    code, _, said = run(capsys, "models", "convert", *arguments)
    assert code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not list(folder.glob("x*"))


def test_weights_of_another_backbone_are_one_line(folder, capsys, tmp_path):
    other = replace(GENERATOR, unet=replace(UNET, block_out_channels=(32, 96)), autoencoder=AUTOENCODER)
    path = tmp_path / "other.safetensors"
    state = stable_diffusion_generator(other).state_dict()
    files.save_model(path, architecture="stable-diffusion", config=to_mapping(other), state_dict=state)
    code, _, said = run(
        capsys, "models", "convert", str(folder / "osediff.pkl"), str(folder / "x.safetensors"), "--backbone", str(path)
    )
    assert code == 2
    assert "osediff.pkl: weights for another backbone: '" in said
    assert len(said.strip().splitlines()) == 1


def test_a_name_stands_for_both_files(folder, monkeypatch):
    spec = get_model("osediff")
    assert (spec.scale, get_model("osediff-face").scale) == (4, 1)
    assert [download.file for download in spec.downloads] == ["osediff.pkl", get_model("sd21-base").files[0].file]
    assert spec.downloads[1].path == get_model("sd21-base").path, "the backbone is kept once"
    monkeypatch.setenv(download.OFFLINE, "1")
    with pytest.raises(UserError, match=r"osediff\.pkl") as refusal:
        loading.load_generator("osediff")
    assert "ONESTEPSR_OFFLINE" in str(refusal.value)
    place = spec.downloads[0].path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes((folder / "osediff.pkl").read_bytes())
    found = load_osediff("osediff", backbone=folder / "backbone.safetensors")
    assert (found.scale, found.timestep, found.posterior) == (4, 999, "mean")

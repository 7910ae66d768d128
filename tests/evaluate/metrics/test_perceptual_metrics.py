"""LPIPS, DISTS and EA-DISTS with weights from files, and what is said without them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_images import noisy, scene
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.evaluate.metrics import perceptual
from onestepsr.evaluate.metrics.catalog import METRICS
from onestepsr.losses.perceptual import DISTS, LPIPS, ea_dists
from onestepsr.models.perceptual_features import AlexNetFeatures, VGG16Features

pytestmark = pytest.mark.numeric

NETWORKS = {"vgg16": VGG16Features, "alexnet": AlexNetFeatures}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights files with the keys of the published ones, by alias."""
    folder = tmp_path_factory.mktemp("weights")
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for name, network in NETWORKS.items():
        save_file(network().state_dict(), folder / f"{name}.safetensors")
    for name, channels in (("lpips-vgg", VGG16Features.channels), ("lpips-alex", AlexNetFeatures.channels)):
        linear = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1, generator=rng) for k, c in enumerate(channels[1:])}
        torch.save(linear, folder / f"{name}.pth")
    torch.save({key: torch.rand(1, 1475, 1, 1, generator=rng) for key in ("alpha", "beta")}, folder / "dists.pth")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def published(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setattr(perceptual, "weights", lambda *aliases: [files[alias] for alias in aliases])
    return files


def pair() -> tuple[Tensor, Tensor]:
    hr = scene(40, 36)
    return noisy(hr, 0.1), hr


@pytest.mark.parametrize("name", ["lpips", "lpips_vgg", "dists", "ea_dists"])
def test_catalogue_values_are_those_of_the_losses(published: dict[str, Path], name: str) -> None:
    sr, hr = pair()
    alias = "alexnet" if name == "lpips" else "vgg16"
    network = VGG16Features(pooling="max") if name == "lpips_vgg" else NETWORKS[alias]()
    network.load_state_dict(load_file(published[alias]))
    small = torch.load(
        published[{"lpips": "lpips-alex", "lpips_vgg": "lpips-vgg"}.get(name, "dists")], weights_only=True
    )
    if name.startswith("lpips"):
        expected = LPIPS(network.channels[1:], list(small.values()))(network, sr, hr)
    else:
        distance = DISTS(network.channels, small["alpha"], small["beta"])
        expected = distance(network, sr, hr) if name == "dists" else ea_dists(distance, network, sr, hr)
    value = METRICS[name].load()(sr, hr)
    assert (value.dtype, value.requires_grad) == (torch.float64, False)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert value.item() > 1e-4
    assert METRICS[name].load()(hr, hr).item() == pytest.approx(0, abs=1e-6)


def test_missing_weights_say_which_command_brings_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path))
    for name, aliases in {
        "lpips": "alexnet lpips-alex",
        "lpips_vgg": "vgg16 lpips-vgg",
        "ea_dists": "vgg16 dists",
        "fid": "inception-fid",
    }.items():
        spec = METRICS[name]
        with pytest.raises(UserError, match=f"^needs weights that are not here: 'onestepsr models download {aliases}'"):
            (spec.of_sets or spec.load)()
    (tmp_path / "alexnet").mkdir()
    (tmp_path / "alexnet" / "alexnet-owt-7be5be79.pth").write_bytes(b"half a file")
    with pytest.raises(UserError, match="11 bytes instead of 244,408,911"):
        METRICS["lpips"].load()


def test_images_that_cannot_be_compared_are_told(published: dict[str, Path]) -> None:
    measure = METRICS["lpips"].load()
    sr, hr = pair()
    with pytest.raises(UserError, match="36 x 40 and 35 x 40 pixels: expected equal sizes"):
        measure(sr, hr[..., :35])
    with pytest.raises(UserError, match="at least 32 x 32"):
        measure(sr[..., :31, :31], hr[..., :31, :31])
    with pytest.raises(UserError, match="not finite"):
        measure(sr * float("inf"), hr)

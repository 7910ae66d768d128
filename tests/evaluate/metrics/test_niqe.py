"""NIQE against a published implementation, and what happens without its parameters or without structure."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_images import published_pair
from scipy import io
from torch import Tensor

from onestepsr.core.errors import MissingWeights, UserError
from onestepsr.core.files import file_sha256
from onestepsr.evaluate.metrics.niqe import ENVIRONMENT_VARIABLE, NiqeParameters, niqe, niqe_features, niqe_from_luma
from onestepsr.weights import catalog
from onestepsr.weights.catalog import get_model
from onestepsr.weights.download import download_file

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics_sr.npz"
SIMPLE = NiqeParameters(mean=torch.zeros(36, dtype=torch.float64), covariance=torch.eye(36, dtype=torch.float64))


def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def published_parameters() -> NiqeParameters:
    try:
        return NiqeParameters.find()
    except UserError as error:
        pytest.skip(str(error))


def write_parameters(path: Path, **changes: np.ndarray) -> Path:
    arrays = {"mu_pris_param": np.zeros((1, 36)), "cov_pris_param": np.eye(36)} | changes
    np.savez(path, **arrays)
    return path


def test_published_implementation_is_matched() -> None:
    parameters, expected = published_parameters(), golden()
    image = expected["sr"].permute(2, 0, 1)[None].float() / 255
    assert niqe_from_luma(expected["niqe_luma"], parameters) == pytest.approx(
        expected["niqe_from_given_y"].item(), abs=1e-4
    )
    assert niqe(image, parameters).item() == pytest.approx(expected["niqe_yiq"].item(), abs=0.03)
    assert niqe(image, parameters, luma="studio").item() == pytest.approx(expected["niqe_ycbcr"].item(), abs=0.03)


def test_the_second_pair_is_matched_too() -> None:
    parameters = published_parameters()
    sr, _ = published_pair("second")
    weights = torch.tensor([299.0, 587.0, 114.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    exact = ((sr.double() * 255).round() * weights).sum(dim=1)[0] / 1000
    with np.load(GOLDEN.with_name("metrics_second.npz")) as arrays:
        luma = exact.round() + torch.from_numpy(arrays["niqe_luma_correction"])
        expected = {name.removeprefix("second."): float(arrays[name]) for name in arrays if name.startswith("second.")}
    assert niqe_from_luma(luma, parameters) == pytest.approx(expected["niqe_from_given_y"], abs=1e-4)
    assert niqe(sr, parameters).item() == pytest.approx(expected["niqe_yiq"], abs=0.03)
    assert niqe(sr, parameters, luma="studio").item() == pytest.approx(expected["basicsr_niqe_crop0"], abs=0.03)


def test_bands_give_the_bits_of_one_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    luma = golden()["niqe_luma"].double()
    luma[:60] = 255  # saturated: here the last bit of a mean decides on which side of zero a pixel counts
    in_bands = niqe_features(luma)
    monkeypatch.setattr("onestepsr.evaluate.metrics.niqe.BAND_PIXELS", 10**9)
    torch.testing.assert_close(in_bands, niqe_features(luma), rtol=0, atol=0)


def test_value_with_simple_parameters_stays() -> None:
    # Recorded from this implementation while it matched the published one to 4e-6, for machines without parameters.
    assert niqe_from_luma(golden()["niqe_luma"], SIMPLE) == pytest.approx(5.078372424505795, abs=1e-6)


def test_features_do_not_see_what_lies_outside_whole_blocks() -> None:
    luma = golden()["niqe_luma"]
    changed = luma.clone()
    changed[192:], changed[:, 192:] = 0, 255
    features = niqe_features(luma)
    assert features.shape == (4, 36)
    torch.testing.assert_close(niqe_features(changed), features, rtol=0, atol=0)


def test_white_noise_is_symmetric_and_isotropic() -> None:
    noise = 128 + 20 * torch.randn(288, 288, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    average = niqe_features(noise).mean(dim=0)
    products = average[2:18].reshape(4, 4)  # (shift, [shape, mean, left, right])
    torch.testing.assert_close(products[0], products[1], rtol=0.05, atol=0.02)
    torch.testing.assert_close(products[2], products[3], rtol=0.05, atol=0.02)
    assert average[0] > products[0, 0]  # products of two Gaussians have heavier tails than a Gaussian


def test_flat_blocks_are_left_out() -> None:
    textured = golden()["niqe_luma"][:192, :192].double()
    flat = torch.full((192, 288), 100.0, dtype=torch.float64)
    features = niqe_features(torch.cat([textured, flat], dim=1)).reshape(2, 5, 36)
    assert features.isfinite().all(dim=2).tolist() == [[True, True, True, False, False]] * 2
    assert np.isfinite(niqe_from_luma(torch.cat([textured, flat], dim=1), SIMPLE))
    with pytest.raises(UserError, match="two structured blocks"):
        niqe_from_luma(flat, SIMPLE)


@pytest.mark.parametrize("shape", [(95, 400), (100, 100), (0, 0)])
def test_images_without_two_blocks_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="two structured blocks of 96 x 96"):
        niqe_from_luma(torch.rand(shape) * 255, SIMPLE)


def test_environment_variable_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(write_parameters(tmp_path / "parameters.npz")))
    assert NiqeParameters.find().covariance.equal(SIMPLE.covariance)


def test_the_authors_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "niqe_modelparameters.mat"
    io.savemat(path, {"mu_prisparam": np.zeros((1, 36)), "cov_prisparam": np.eye(36)})
    assert NiqeParameters.load(path).covariance.equal(SIMPLE.covariance)
    io.savemat(path, {"mu_prisparam": np.zeros((1, 36))})
    with pytest.raises(UserError, match=r"expected a .mat file with mu_prisparam and cov_prisparam"):
        NiqeParameters.load(path)
    for content in (b"", b"not Matlab's", bytes(200)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no NIQE statistics"):
            NiqeParameters.load(path)
    path.write_bytes(bytes(1_000_001))
    with pytest.raises(UserError, match="larger than"):
        NiqeParameters.load(path)


def test_without_the_variable_the_downloaded_file_is_read_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingWeights, match=f"onestepsr models download niqe.*{ENVIRONMENT_VARIABLE}"):
        NiqeParameters.find()
    own = write_parameters(tmp_path / "niqe_pris_params.npz")
    entry = replace(get_model("niqe").files[0], sha256=file_sha256(own), bytes=own.stat().st_size)
    monkeypatch.setitem(catalog._MODELS, "niqe", replace(get_model("niqe"), files=(entry,)))
    monkeypatch.setenv("ONESTEPSR_MIRROR", str(tmp_path))
    download_file(get_model("niqe").downloads[0])
    assert NiqeParameters.find().covariance.equal(SIMPLE.covariance)
    get_model("niqe").path.write_bytes(b"x")
    with pytest.raises(UserError, match="1 bytes instead of"):
        NiqeParameters.find()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu_pris_param": np.zeros((1, 35))}, r"must be \(36,\)"),
        ({"cov_pris_param": np.full((36, 36), np.nan)}, "finite"),
        ({"mu_pris_param": np.array([{"a": 1}])}, "no NIQE statistics"),
        ({"extra": np.zeros(200_000)}, "larger than"),
    ],
)
def test_damaged_parameters_end_in_one_line(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    path = write_parameters(tmp_path / "parameters.npz", **changes)
    with pytest.raises(UserError, match=message) as caught:
        NiqeParameters.load(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_archive_end_in_one_line(tmp_path: Path) -> None:
    other = tmp_path / "parameters.npz"
    other.write_bytes(b"not an archive")
    with pytest.raises(UserError, match="no NIQE statistics"):
        NiqeParameters.load(other)
    with pytest.raises(UserError, match="No such file"):
        NiqeParameters.load(tmp_path / "absent.npz")

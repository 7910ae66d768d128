"""The spatial loss: its rows of Table 5, and where its weights come from."""

import pytest
import torch
from safetensors.torch import save_file

from onestepsr.core.errors import UserError
from onestepsr.losses.perceptual import DISTS, LPIPS, lattice_loss, sobel_magnitude
from onestepsr.methods.shared.image_loss import PerceptualConfig, SpatialLoss, SpatialWeights, build_perceptual
from onestepsr.models.perceptual_features import VGG16Features
from weights_by_name import published_efficientnet


def images() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 32, 32, generator=rng).requires_grad_(), torch.rand(2, 3, 32, 32, generator=rng)


@pytest.mark.parametrize("distance", ["ea_dists", "dists", "lpips"])
def test_terms_are_named_weighted_and_differentiable(distance):
    sr, hr = images()
    config = PerceptualConfig(distance=distance)
    terms = SpatialLoss(SpatialWeights(mse=1.0, perceptual=1.0, lattice=1.0), config)(sr, hr)
    assert set(terms) == {"mse", distance, "lattice"}
    assert terms["mse"].item() == pytest.approx(((2 * sr - 2 * hr) ** 2).mean().item(), rel=1e-6)
    doubled = SpatialLoss(SpatialWeights(mse=0.0, perceptual=2.0), config)(sr, hr)
    assert set(doubled) == {distance}
    assert doubled[distance].item() == pytest.approx(2 * terms[distance].item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(doubled[distance], sr)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@torch.no_grad()
def test_edge_aware_term_is_that_of_images_and_edges():
    sr, hr = images()
    loss = SpatialLoss(SpatialWeights(mse=0.0, perceptual=1.0), PerceptualConfig())
    plain = SpatialLoss(SpatialWeights(mse=0.0, perceptual=1.0), PerceptualConfig(distance="dists"))
    of_images, of_edges = plain(sr, hr), plain(sobel_magnitude(sr), sobel_magnitude(hr))
    expected = of_images["dists"].item() + of_edges["dists"].item()
    assert loss(sr, hr)["ea_dists"].item() == pytest.approx(expected, rel=1e-5)
    per_channel = SpatialLoss(SpatialWeights(mse=0.0, perceptual=1.0), PerceptualConfig(per_channel_edges=True))
    edges = plain(sobel_magnitude(sr, per_channel=True), sobel_magnitude(hr, per_channel=True))
    expected = of_images["dists"].item() + edges["dists"].item()
    assert per_channel(sr, hr)["ea_dists"].item() == pytest.approx(expected, rel=1e-5)


def test_squared_error_and_lattice_penalty_are_counted_in_minus_one_to_one():
    sr, hr = images()
    terms = SpatialLoss(SpatialWeights(mse=3.0, perceptual=0.0, lattice=0.5), PerceptualConfig())(sr, hr)
    assert terms["mse"].item() == pytest.approx(3 * 4 * (sr - hr).square().mean().item(), rel=1e-5)
    assert terms["lattice"].item() == pytest.approx(0.5 * lattice_loss(2 * sr, 2 * hr).item(), rel=1e-5)
    for term in terms.values():
        (gradient,) = torch.autograd.grad(term, sr)
        assert gradient.any()


@pytest.mark.parametrize("distance", ["ea_dists", "dists", "ea_lpips", "lpips"])
def test_perceptual_term_is_its_weight_times_the_mean_distance_to_the_photo(distance):
    sr, hr = images()
    loss = SpatialLoss(SpatialWeights(mse=0.0, perceptual=3.0), PerceptualConfig(distance=distance))
    features, measured = loss.frozen["features"], loss.frozen["distance"]
    expected = measured(features, sr, hr)
    if distance.startswith("ea_"):
        expected = expected + measured(features, sobel_magnitude(sr), sobel_magnitude(hr))
    (term,) = loss(sr, hr).values()
    assert term.item() == pytest.approx(3 * expected.mean().item(), rel=1e-5)
    found, wanted = (torch.autograd.grad(value, sr)[0] for value in (term, 3 * expected.mean()))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("distance", ["lpips", "ea_lpips"])
def test_lpips_takes_faint_responses_of_oriented_filters_for_noise(distance):
    """Vectors of length 0.02, the smallest that count, become sqrt(1/2) long; far longer ones have unit length."""
    _, lpips = build_perceptual(PerceptualConfig(distance=distance))
    faint = torch.zeros(1, 12, 1, 1)
    faint[0, 3] = 0.02
    maps = [[torch.zeros(1, 3, 1, 1), one, *3 * [torch.zeros(1, 12, 1, 1)]] for one in (faint, 0 * faint)]
    assert lpips.compare(*maps).item() == pytest.approx(0.5, rel=1e-4)


def test_efficientnet_is_frozen_and_measures_by_as_many_maps_as_asked(tmp_path):
    torch.save(published_efficientnet(), tmp_path / "weights.pth")
    own = {"features": "efficientnet-lite0", "efficientnet_weights": str(tmp_path / "weights.pth")}
    features, dists = build_perceptual(PerceptualConfig(**own))
    assert dists.channels == (3, 16, 24, 40, 112, 320)
    assert not any(p.requires_grad for p in features.parameters())
    assert dists.alpha.sum().item() == pytest.approx(0.5)
    fewer, lpips = build_perceptual(PerceptualConfig(distance="lpips", efficientnet_stages=2, **own))
    assert lpips.channels == (16, 24)
    assert lpips.weights[0].item() == 0.5, "the mean over the layers"
    assert len(fewer(torch.rand(1, 3, 32, 32))) == 3


def test_without_a_perceptual_term_no_network_is_built():
    loss = SpatialLoss(SpatialWeights(mse=1.0, perceptual=0.0), PerceptualConfig(features="vgg16", vgg16_weights="?"))
    assert not loss.frozen


def test_published_weights_are_read_from_files(tmp_path):
    torch.manual_seed(0)
    vgg = VGG16Features()
    save_file(vgg.state_dict() | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg.safetensors")
    torch.save({"alpha": torch.rand(1, 1475, 1, 1), "beta": torch.rand(1, 1475, 1, 1)}, tmp_path / "dists.pt")
    lins = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate(vgg.channels[1:])}
    torch.save(lins, tmp_path / "lpips.pth")
    files = {
        "features": "vgg16",
        "vgg16_weights": str(tmp_path / "vgg.safetensors"),
        "dists_weights": str(tmp_path / "dists.pt"),
        "lpips_weights": str(tmp_path / "lpips.pth"),
    }
    hann, dists = build_perceptual(PerceptualConfig(**files))
    assert isinstance(dists, DISTS)
    assert float(dists.alpha.sum() + dists.beta.sum()) == pytest.approx(1, abs=1e-4)
    published = torch.load(tmp_path / "dists.pt")
    ratio = dists.alpha / published["alpha"].flatten()
    assert torch.allclose(ratio, ratio[0].expand_as(ratio))
    assert torch.allclose(dists.beta / published["beta"].flatten(), ratio)
    pooled, lpips = build_perceptual(PerceptualConfig(distance="lpips", **files))
    assert isinstance(lpips, LPIPS)
    assert torch.equal(lpips.weights[:64], lins["lin0.model.1.weight"].flatten())
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(hann(x)[1], pooled(x)[1])  # the same weights ...
    assert torch.equal(hann(x)[2], vgg(x)[2])
    assert not torch.equal(hann(x)[2], pooled(x)[2])  # ... under another pooling
    assert not any(p.requires_grad for p in hann.parameters())
    without = {**files, "dists_weights": None, "lpips_weights": None}
    _, dists = build_perceptual(PerceptualConfig(texture_share=0.25, **without))
    assert float(dists.alpha.sum()) == pytest.approx(0.25, abs=1e-4)
    assert len(dists.alpha[:3].unique()) == 1, "all channels of a map count alike"
    _, lpips = build_perceptual(PerceptualConfig(distance="ea_lpips", **without))
    assert torch.equal(lpips.weights, torch.ones(1472))


@pytest.mark.parametrize(
    ("content", "message"),
    [({"gamma": torch.rand(3)}, "expected tensors 'alpha' and 'beta'"), ("no tensors", "no weights that can be read")],
)
def test_wrong_weight_files_are_one_line(tmp_path, content, message):
    save_file(VGG16Features().state_dict(), tmp_path / "vgg.safetensors")
    torch.save(content, tmp_path / "dists.pt")
    settings = {"vgg16_weights": str(tmp_path / "vgg.safetensors"), "dists_weights": str(tmp_path / "dists.pt")}
    with pytest.raises(UserError, match=message) as caught:
        build_perceptual(PerceptualConfig(features="vgg16", **settings))
    assert "\n" not in str(caught.value)

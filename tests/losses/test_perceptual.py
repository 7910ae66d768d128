"""DISTS against the published code, EA-DISTS against its formula, and what any distance must satisfy."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from onestepsr.core.errors import UserError
from onestepsr.losses.perceptual import (
    DISTS,
    LPIPS,
    ea_dists,
    ea_lpips,
    read_dists_weights,
    read_lpips_weights,
    sobel_magnitude,
)
from onestepsr.models.perceptual_features import HannPool, OrientedFeatures, VGG16Features, oriented_filters
from weights_by_name import fill_by_name

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parents[1] / "golden" / "dists.npz"


@pytest.fixture(scope="module")
def golden():
    return {key: torch.tensor(value) for key, value in np.load(GOLDEN).items()}


@pytest.fixture(scope="module")
def oriented():
    features = OrientedFeatures()
    return features, DISTS(features.channels)


@torch.no_grad()
def test_dists_equals_published_code(golden):
    features = VGG16Features()
    fill_by_name(features)
    dists = DISTS(features.channels, golden["alpha"], golden["beta"])
    assert dists(features, golden["x"], golden["y"]).item() == pytest.approx(golden["score_xy"].item(), abs=5e-6)
    assert dists(features, golden["x"], golden["x"]).item() == pytest.approx(0.0, abs=1e-6)


def test_hann_window_is_the_published_one(golden):
    assert torch.allclose(HannPool().window[0, 0], golden["l2pool_kernel"], atol=1e-7)


def test_oriented_filters_ignore_constants_and_stay_bounded():
    bank = oriented_filters(3, 5)
    assert bank.sum(dim=(1, 2, 3)).abs().max() < 1e-6
    assert torch.allclose(bank.abs().sum(dim=(1, 2, 3)), torch.ones(6))


def test_distance_grows_with_blur_and_with_noise(oriented):
    features, dists = oriented
    rng = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(1, 3, 24, 24, generator=rng), size=(96, 96), mode="bicubic")
    noise = torch.randn(x.shape, generator=rng)
    noisy = [ea_dists(dists, features, x + level * noise, x).item() for level in (0.0, 0.02, 0.05, 0.1)]
    blurred = [ea_dists(dists, features, F.avg_pool2d(x, k, 1, k // 2), x).item() for k in (1, 3, 5, 9)]
    assert noisy[0] == pytest.approx(0, abs=1e-5)
    assert noisy == sorted(noisy)
    assert blurred == sorted(blurred)


def test_gradient_is_finite_even_at_the_target(oriented):
    features, dists = oriented
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for start in (x.clone(), torch.zeros_like(x)):
        start.requires_grad_()
        ea_dists(dists, features, start, x).sum().backward()
        assert start.grad.isfinite().all()


@pytest.mark.parametrize("kind", [DISTS, LPIPS])
def test_the_target_of_a_distance_gets_no_gradient(kind):
    x, y = (torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(k)).requires_grad_() for k in (0, 1))
    distance = DISTS((3, 3)) if kind is DISTS else LPIPS((3,))
    with_graph = []

    def features(image):
        with_graph.append(torch.is_grad_enabled())
        return [image, 2.0 * image]

    distance(features, x, y).sum().backward()
    assert with_graph == [False, True]  # the target's would cost as much memory as the image's
    assert x.grad.abs().sum() > 0
    assert y.grad is None


def test_sobel_magnitude_of_a_step_and_a_ramp():
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1.0
    edges = sobel_magnitude(step)
    assert edges.shape == step.shape
    assert torch.allclose(edges[0, 0, :, 3:5], torch.full((8, 2), 4.0), atol=1e-5)
    assert edges[..., :3].max() < 2e-3
    ramp = torch.arange(8.0).reshape(1, 1, 8, 1).expand(1, 3, 8, 8) / 8
    assert torch.allclose(sobel_magnitude(ramp)[..., 1:-1, :], torch.tensor(1.0), atol=1e-5)


def test_edge_aware_distance_adds_that_of_the_edges():
    """A ramp of 1/8 per row against an even 0.5, with the image itself as the only feature (Eq. 5 by hand).

    Image: means 0.4375 and 0.5, variance 0.08203 against none. Edges: 1, and 0.5 in the first and last row, whose mean
    is 0.875 and variance 0.046875, against 0.001 everywhere.
    """
    x = torch.arange(8.0).reshape(1, 1, 8, 1).expand(1, 3, 8, 8) / 8
    y = torch.full((1, 3, 8, 8), 0.5)
    dists = DISTS((3,))
    image = 1 - 0.5 * (2 * 0.4375 * 0.5) / (0.4375**2 + 0.5**2) - 0.5 * 1e-6 / 0.08203125
    edges = 1 - 0.5 * (2 * 0.875 * 0.001 + 1e-6) / (0.875**2 + 2e-6) - 0.5 * 1e-6 / 0.046875
    assert dists(lambda z: [z], x, y).item() == pytest.approx(image, abs=1e-5)
    assert ea_dists(dists, lambda z: [z], x, y).item() == pytest.approx(image + edges, abs=1e-5)


def test_edges_per_channel_see_colour_edges_that_the_mean_hides():
    x = torch.zeros(1, 3, 8, 8)
    x[:, 0, :, :4], x[:, 1, :, 4:] = 1.0, 1.0
    assert sobel_magnitude(x).max() < 2e-3
    assert sobel_magnitude(x, per_channel=True)[:, :2].max() > 3.9


@pytest.mark.parametrize("kind", ["dists", "ea_dists", "lpips", "ea_lpips"])
def test_gradients_are_those_of_finite_differences(kind):
    """DISTS has a backward pass of its own."""
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 3, 4, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    dists, lpips = DISTS((3, 3), texture_share=0.3).double(), LPIPS((3,), [torch.tensor([1.0, 2.0, 3.0])]).double()

    def features(image):
        return [1.0 * image, image.square() + image.flip(1)]

    distances = {
        "dists": lambda image: dists(features, image, y),
        "ea_dists": lambda image: ea_dists(dists, features, image, y),
        "lpips": lambda image: lpips(features, image, y),
        "ea_lpips": lambda image: ea_lpips(lpips, features, image, y, per_channel=True),
    }
    assert torch.autograd.gradcheck(distances[kind], x.requires_grad_(), eps=1e-7, atol=1e-5)


def test_weights_add_up_to_one():
    """Texture alone differs between two even images: alpha 3 and beta 1 give it three quarters, a share of 0.1 a tenth.

    Similarity of means 0.5 and 0.2: 0.2 / 0.29.
    """
    x, y = (torch.full((1, 1, 4, 4), value, dtype=torch.float64) for value in (0.5, 0.2))
    given, shared = DISTS((1,), alpha=torch.tensor([3.0]), beta=torch.tensor([1.0])), DISTS((1,), texture_share=0.1)
    for dists, texture in ((given, 0.75), (shared, 0.1)):
        assert dists.double().compare([x], [y]).item() == pytest.approx(texture * (1 - 0.2 / 0.29), abs=1e-5)
    assert DISTS((2, 4)).alpha.tolist() == pytest.approx([0.125] * 2 + [0.0625] * 4)


def test_maps_need_not_be_square():
    """Rows of 0 and 1 beside themselves: variances and covariance of 1/4."""
    rows = torch.tensor([[0.0] * 4, [1.0] * 4]).reshape(1, 1, 2, 4)
    assert DISTS((1,)).compare([rows], [rows]).item() == pytest.approx(0, abs=1e-6)
    assert DISTS((1,)).compare([rows], [1 - rows]).item() == pytest.approx(0.5 + 0.5, abs=1e-5), "structure of -1"


def test_weights_are_no_part_of_what_is_saved():
    assert not DISTS((3,)).state_dict()
    assert not LPIPS((3,)).state_dict()


def test_averaged_lpips_is_the_mean_over_the_layers():
    """Unit vectors at right angles differ by 2 in sum: over two layers of 2 and 4 channels 2/2 and 2/4, halved."""
    first, second = torch.eye(4).reshape(4, 1, 4, 1, 1)[:2]
    x, y = ([None, one[:, :2], one] for one in (first, second))
    x[0] = y[0] = first
    assert LPIPS.averaged((2, 4)).compare(x, y).item() == pytest.approx((2 + 2) / 2)


def test_short_vectors_of_lpips_stay_short_and_its_targets_are_constants():
    """1 over the root of 1 + 0.5 squared, against 0."""
    x, y = (torch.full((1, 1, 1, 1), value, requires_grad=True) for value in (1.0, 0.0))
    distance = LPIPS((1,), epsilon=0.5).compare([x, x], [y, y])
    assert distance.item() == pytest.approx(1 / 1.25)
    distance.sum().backward()
    assert x.grad.item() != 0
    assert y.grad is None
    x, y = (torch.full((1, 1, 1, 1), value) for value in (1e-10, 0.0))
    assert LPIPS((1,)).compare([x, x], [y, y]).item() == pytest.approx(1 / 2), "as long as the published epsilon"


def test_published_weights_are_read_by_their_names():
    tensors = {f"lin{k}.model.1.weight": torch.full((1, k + 1, 1, 1), k + 0.5, dtype=torch.float64) for k in range(5)}
    assert [weight.tolist() for weight in read_lpips_weights(tensors)] == [[k + 0.5] * (k + 1) for k in range(5)]
    del tensors["lin3.model.1.weight"]
    with pytest.raises(UserError, match=r"tensor 'lin3\.model\.1\.weight' is missing"):
        read_lpips_weights(tensors)
    alpha, beta = read_dists_weights({"alpha": torch.ones(1, 2, 1, 1), "beta": torch.zeros(1, 2, 1, 1)})
    assert (alpha.tolist(), beta.tolist()) == ([1, 1], [0, 0])
    with pytest.raises(UserError, match="expected tensors 'alpha' and 'beta'"):
        read_dists_weights({"alpha": alpha})


def test_weights_must_fit_the_features():
    with pytest.raises(ValueError, match="7 channels"):
        DISTS((3, 4), alpha=torch.ones(6), beta=torch.ones(7))


@torch.no_grad()
def test_edge_aware_lpips_adds_the_distance_of_edges():
    features = OrientedFeatures()
    lpips = LPIPS(features.channels[1:], epsilon=0.02)
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for per_channel in (False, True):
        edges = [sobel_magnitude(image, per_channel=per_channel) for image in (x, y)]
        expected = lpips(features, x, y) + lpips(features, *edges)
        torch.testing.assert_close(ea_lpips(lpips, features, x, y, per_channel=per_channel), expected)
        assert (expected > lpips(features, x, y)).all()
    assert ea_lpips(lpips, features, x, x).abs().max() < 1e-6


@torch.no_grad()
def test_lpips_is_its_formula():
    """Equation 1 of the paper, written position by position."""
    features = VGG16Features(pooling="max")
    fill_by_name(features)
    rng = torch.Generator().manual_seed(3)
    weights = [torch.rand(c, generator=rng) for c in features.channels[1:]]
    x, y = (torch.rand(1, 3, 32, 48, generator=rng) for _ in range(2))
    expected = 0.0
    for fx, fy, w in zip(features(x)[1:], features(y)[1:], weights, strict=True):
        unit = [f[0].double() / f[0].double().norm(dim=0) for f in (fx, fy)]
        squared = ((unit[0] - unit[1]) ** 2 * w.double()[:, None, None]).sum(dim=0)
        expected += float(squared.mean())
    distance = LPIPS(features.channels[1:], weights)
    assert float(distance(features, x, y)) == pytest.approx(expected, rel=1e-5)
    assert float(distance(features, x, x)) == 0.0


def test_lpips_has_a_finite_gradient_where_features_vanish():
    features = OrientedFeatures()
    distance = LPIPS(features.channels[1:], epsilon=0.02)
    flat = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    distance(features, flat, torch.rand(1, 3, 32, 32)).sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_vgg_with_max_pooling_sees_the_largest():
    features = VGG16Features(pooling="max")
    x = torch.rand(1, 3, 17, 33)
    maps = features(x)
    assert [tuple(m.shape[1:]) for m in maps[1:4]] == [(64, 17, 33), (128, 8, 16), (256, 4, 8)]


def test_edges_are_those_of_the_channel_mean_unless_asked_for():
    features = OrientedFeatures()
    rng = torch.Generator().manual_seed(3)
    x, y = (torch.rand(1, 3, 48, 48, generator=rng) for _ in range(2))
    distances = ((ea_dists, DISTS(features.channels)), (ea_lpips, LPIPS(features.channels[1:])))
    for edge_aware, distance in distances:
        found = edge_aware(distance, features, x, y)
        assert torch.equal(found, edge_aware(distance, features, x, y, per_channel=False))
        assert not torch.allclose(found, edge_aware(distance, features, x, y, per_channel=True), rtol=1e-3)

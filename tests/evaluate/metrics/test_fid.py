"""FID against closed forms and against the root of a matrix, and the resize before it."""

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import samples, scene
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.evaluate.metrics.fid import FID, frechet_distance, resize_for_inception

pytestmark = pytest.mark.numeric


def gaussian(count: int, dimensions: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.randn(dimensions, dimensions, generator=rng, dtype=torch.float64)
    return torch.randn(count, dimensions, generator=rng, dtype=torch.float64) @ mixed


def by_root(first: Tensor, second: Tensor) -> float:
    """The textbook form, through eigenvalues of the symmetric root."""
    covariances = [torch.cov(features.T) for features in (first, second)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    means = (first.mean(0) - second.mean(0)).square().sum()
    return float(means + covariances[0].trace() + covariances[1].trace() - 2 * shared)


@pytest.mark.parametrize("counts", [(200, 150), (200, 7), (5, 4), (2, 2)])
def test_many_and_few_images_give_the_textbook_value(counts: tuple[int, int]) -> None:
    first, second = gaussian(counts[0], 12, 0), gaussian(counts[1], 12, 1) + 0.3
    # The root of a singular covariance keeps half of the digits.
    assert frechet_distance(first, second) == pytest.approx(by_root(first, second), rel=1e-5)


def test_closed_forms() -> None:
    features = gaussian(50, 6, 0)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features + 2, features) == pytest.approx(6 * 4)
    spread = float(torch.cov(features.T).trace())
    centred = features - features.mean(0)
    assert frechet_distance(3 * centred, centred) == pytest.approx((3 - 1) ** 2 * spread)


def test_one_image_is_no_set() -> None:
    fid = FID(torch.nn.Flatten())
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        fid.distance(gaussian(1, 3, 0), gaussian(5, 3, 0))


def test_images_are_resized_as_clean_fid_does() -> None:
    photo = scene(123, 200)
    resized = resize_for_inception(photo[0])
    assert resized.shape == (3, 299, 299)
    levels = samples(photo)[..., 1].astype(np.float32)
    expected = np.asarray(Image.fromarray(levels).resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
    np.testing.assert_allclose(resized[1].numpy(), (expected - 128) / 128, atol=1e-5)


def test_features_are_taken_image_by_image() -> None:
    class Means(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3))

    fid = FID(Means())
    photos = torch.cat([scene(30, 40, seed) for seed in range(2)])
    together = fid.features(photos)
    assert (together.shape, together.dtype) == ((2, 3), torch.float64)
    torch.testing.assert_close(together[1:], fid.features(photos[1:]))

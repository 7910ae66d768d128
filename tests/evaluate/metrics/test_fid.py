"""FID against closed forms and against the root of a matrix, and the resize before it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import samples, scene
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.evaluate.metrics.catalog import METRICS, UNPAIRED_FID
from onestepsr.evaluate.metrics.fid import FID, frechet_distance, resize_for_inception
from onestepsr.evaluate.protocols import PROTOCOLS
from onestepsr.evaluate.run import Scorer

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


def test_unpaired_fid_compares_with_the_photos_of_another_folder(tmp_path) -> None:
    fid = FID(torch.nn.Sequential(torch.nn.AvgPool2d(100), torch.nn.Flatten()))
    photos = torch.stack([scene(48, 60, seed=number)[0] for number in range(3)])
    for number, photo in enumerate(photos):
        Image.fromarray(samples(photo[None])).save(tmp_path / f"photo-{number}.png")
    spec = replace(METRICS[UNPAIRED_FID], of_sets=lambda: fid)
    scorer = Scorer([METRICS["grid"], spec], PROTOCOLS["basic"], unpaired=tmp_path)
    shown = [scene(40, 44, seed=number) for number in range(7, 10)]
    scores = [scorer.score(f"{number}", samples(sr)) for number, sr in enumerate(shown)]  # another size
    values, unavailable = scorer.whole(scores)
    expected = frechet_distance(*(torch.cat([fid.features(one) for one in side]) for side in (shown, photos[:, None])))
    assert values[UNPAIRED_FID].value == pytest.approx(expected, rel=1e-6)
    assert (values[UNPAIRED_FID].count, unavailable) == (3, {})
    without = Scorer([METRICS["grid"], spec], PROTOCOLS["basic"])
    assert "name their folder by --unpaired" in without.unavailable[UNPAIRED_FID]


@pytest.mark.parametrize(("name", "network"), [("ids", "ArcFace"), ("lmd", "a landmark detector")])
def test_metrics_of_faces_say_what_they_would_take(name: str, network: str) -> None:
    scorer = Scorer([METRICS["psnr"], METRICS[name]], PROTOCOLS["basic"])
    assert f"{name.upper()} takes the weights of {network}" in scorer.unavailable[name]

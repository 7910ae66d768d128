"""What holds for every metric: value at identity, symmetry, monotony, precision, gradients of those that are losses."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from sample_images import blurred, noisy, scene
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.evaluate.metrics import fidelity
from onestepsr.evaluate.metrics.catalog import METRICS
from onestepsr.evaluate.metrics.fid import FID
from onestepsr.evaluate.metrics.niqe import NiqeParameters, niqe
from onestepsr.evaluate.metrics.perceptual import LearnedDistance
from onestepsr.imaging.read import read_image, samples_to_tensor
from onestepsr.losses.perceptual import DISTS, LPIPS, ea_dists
from onestepsr.models.efficientnet_lite import EfficientNetFeatures, EfficientNetLite
from onestepsr.models.perceptual_features import AlexNetFeatures, OrientedFeatures, VGG16Features
from weights_by_name import fill_by_name

pytestmark = pytest.mark.numeric

PHOTO = Path(__file__).parents[3] / "examples" / "cameraman_gray.jpg"
BLURS = (0.0, 0.6, 1.2, 2.4, 4.8)
NOISES = (0.0, 0.02, 0.05, 0.1, 0.2)

Measure = Callable[[Tensor, Tensor], Tensor]


@cache
def alexnet() -> AlexNetFeatures:
    torch.manual_seed(0)
    return AlexNetFeatures()


@cache
def efficientnet(name: str = "EfficientNet-Lite0") -> EfficientNetFeatures:
    torch.manual_seed(0)
    network = EfficientNetLite(name)
    fill_by_name(network)  # at their usual start, features would vanish
    return EfficientNetFeatures(network)


def dists_of(features: OrientedFeatures, *, edges: bool) -> LearnedDistance:
    distance = DISTS(features.channels)
    return LearnedDistance(features, distance, (lambda x, y: ea_dists(distance, features, x, y)) if edges else None)


MEASURES: dict[str, Measure] = {
    "psnr": fidelity.psnr_y,
    "psnr_rgb": fidelity.psnr_rgb,
    "ssim": fidelity.ssim_y,
    "ssim_rgb": fidelity.ssim_rgb,
    "ssim_basicsr": fidelity.ssim_basicsr,
    "ms_ssim": fidelity.ms_ssim,
    "overshoot": fidelity.overshoot,
    # Arithmetic of the published networks; their weights are not there, so features are random or our own.
    "lpips": LearnedDistance(alexnet(), LPIPS(alexnet().channels[1:])),
    "dists": dists_of(OrientedFeatures(), edges=False),
    "ea_dists": dists_of(OrientedFeatures(), edges=True),
    "lpips-efficientnet": LearnedDistance(efficientnet(), LPIPS.averaged(efficientnet().channels[1:])),
    "dists-efficientnet": LearnedDistance(efficientnet(), DISTS(efficientnet().channels)),
    "lpips-efficientnet1": LearnedDistance(
        efficientnet("EfficientNet-Lite1"), LPIPS.averaged(efficientnet().channels[1:])
    ),
    "dists-efficientnet1": LearnedDistance(efficientnet("EfficientNet-Lite1"), DISTS(efficientnet().channels)),
}
LEARNED = ("lpips", "dists", "ea_dists", "lpips-efficientnet", "dists-efficientnet")
LEARNED += ("lpips-efficientnet1", "dists-efficientnet1")
IDENTITY = {"psnr": 80.0, "psnr_rgb": 80.0, "overshoot": 0.0, **dict.fromkeys(LEARNED, 0.0)}
ASYMMETRIC = ("overshoot",)
BLIND_TO_BLUR = ("overshoot",)


def picture(name: str) -> Tensor:
    side = fidelity.MS_SSIM_SIDE if name == "ms_ssim" else 64
    return scene(side, side + 5)


def worsening(name: str, values: list[float]) -> list[float]:
    """``values`` so that larger is worse."""
    return [-value for value in values] if METRICS[name].higher_is_better else values


def test_no_metric_is_left_out() -> None:
    elsewhere = {"niqe", "niqe_studio", "fid", "unpaired_fid", "ids", "lmd", "grid", "lpips_vgg"}
    elsewhere |= {name for name, spec in METRICS.items() if spec.network and spec.alone is not None}  # pyiqa's
    assert METRICS.keys() == MEASURES.keys() | elsewhere


@pytest.mark.parametrize("name", MEASURES)
def test_identity(name: str) -> None:
    image = picture(name)
    assert MEASURES[name](image, image).item() == pytest.approx(IDENTITY.get(name, 1.0), abs=2e-6)


@pytest.mark.parametrize("name", MEASURES)
def test_symmetry(name: str) -> None:
    hr = picture(name)
    sr = noisy(blurred(hr, 1.0), 0.05)
    there, back = MEASURES[name](sr, hr).item(), MEASURES[name](hr, sr).item()
    assert (there == pytest.approx(back, rel=1e-5)) != (name in ASYMMETRIC)


@pytest.mark.parametrize("name", MEASURES)
def test_worse_with_every_step_of_noise(name: str) -> None:
    hr = picture(name)
    values = worsening(name, [MEASURES[name](noisy(hr, level), hr).item() for level in NOISES])
    assert values == sorted(values)
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("name", sorted(MEASURES.keys() - set(BLIND_TO_BLUR)))
def test_worse_with_every_step_of_blur(name: str) -> None:
    hr = picture(name)
    values = worsening(name, [MEASURES[name](blurred(hr, sigma), hr).item() for sigma in BLURS])
    assert values == sorted(values)
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("name", MEASURES)
def test_single_precision_is_enough(name: str) -> None:
    hr = picture(name)
    sr = (noisy(blurred(hr, 1.0), 0.05) * 255).round() / 255
    single = MEASURES[name](sr, hr).item()
    if name not in LEARNED:
        exact = [(image.double() * 255).round() / 255 for image in (sr, hr)]
        # Values of 8 bits are not exact in float32: by 1e-8, and where rounding ties by half a level of one pixel.
        assert MEASURES[name](*exact).item() == pytest.approx(single, rel=2e-6)
        return
    try:
        torch.set_default_dtype(torch.float64)
        measure: Measure = LearnedDistance(alexnet().double(), LPIPS(alexnet().channels[1:]))
        network = "EfficientNet-Lite1" if name.endswith("1") else "EfficientNet-Lite0"
        if "efficientnet" in name:
            features = efficientnet(network).double()
            channels = features.channels
            distance = LPIPS.averaged(channels[1:]) if name.startswith("lpips") else DISTS(channels)
            measure = LearnedDistance(features, distance)
        elif name != "lpips":
            measure = dists_of(OrientedFeatures().double(), edges=name == "ea_dists")
        double = measure(sr.double(), hr.double()).item()
    finally:
        torch.set_default_dtype(torch.float32)
        alexnet().float()
        efficientnet(network).float()
    assert double == pytest.approx(single, rel=1e-4)


def test_single_precision_is_enough_without_references() -> None:
    photo = samples_to_tensor(read_image(PHOTO).pixels).expand(-1, 3, -1, -1)
    exact = (photo.double() * 255).round() / 255
    assert fidelity.grid_artifact(exact).item() == pytest.approx(fidelity.grid_artifact(photo).item(), rel=1e-6)
    flat = NiqeParameters(mean=torch.zeros(36, dtype=torch.float64), covariance=torch.eye(36, dtype=torch.float64))
    assert niqe(exact, flat).item() == pytest.approx(niqe(photo, flat).item(), rel=1e-9)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("kind", ["different", "equal", "flat"])
def test_gradients_of_losses_are_finite(name: str, kind: str) -> None:
    hr = torch.full((1, 3, 64, 64), 0.5) if kind == "flat" else picture(name)
    sr = (noisy(hr, 0.1) if kind == "different" else hr).clone().requires_grad_()
    MEASURES[name](sr, hr).sum().backward()
    assert sr.grad is not None
    assert sr.grad.isfinite().all()
    if kind == "different":
        assert sr.grad.abs().max() > 0


@pytest.mark.parametrize("pooling", ["hann", "max"])
def test_gradients_through_vgg_are_finite(pooling: str) -> None:
    torch.manual_seed(0)
    features = VGG16Features(pooling=pooling)  # type: ignore[arg-type]
    distance = DISTS(features.channels) if pooling == "hann" else LPIPS(features.channels[1:])
    hr = scene(32, 32)
    sr = noisy(hr, 0.1).requires_grad_()
    value = LearnedDistance(features, distance)(sr, hr)
    value.sum().backward()
    assert value.item() > 0
    assert sr.grad is not None
    assert sr.grad.isfinite().all()
    assert sr.grad.abs().max() > 0


def test_a_batch_of_learned_distances_is_one_value_each() -> None:
    hr = torch.cat([scene(48, 48, seed) for seed in range(3)])
    sr = noisy(hr, 0.1)
    for name in LEARNED:
        together = MEASURES[name](sr, hr)
        assert together.shape == (3,)
        assert together[1].item() == pytest.approx(MEASURES[name](sr[1:2], hr[1:2]).item(), abs=1e-5)


def test_niqe_rises_with_noise_and_blur() -> None:
    try:
        parameters = NiqeParameters.find()
    except UserError as error:
        pytest.skip(str(error))
    photo = samples_to_tensor(read_image(PHOTO).pixels).expand(-1, 3, -1, -1)
    for damage, levels in ((noisy, NOISES), (blurred, BLURS)):
        values = [niqe(damage(photo, level), parameters).item() for level in levels]
        assert values == sorted(values)


class Averages(torch.nn.Module):
    """A small feature network for FID: colour means and contrasts of 13 x 13 cells."""

    def forward(self, x: Tensor) -> Tensor:
        cells = torch.nn.functional.avg_pool2d(x, 23)
        return torch.cat([cells.mean(dim=(2, 3)), cells.std(dim=(2, 3)), (x - x.mean()).abs().mean(dim=(2, 3))], dim=1)


def test_fid_is_zero_at_identity_symmetric_and_grows_with_noise_and_blur() -> None:
    fid = FID(Averages())
    photos = [scene(40, 48, seed) for seed in range(6)]

    def features(damage: Callable[[Tensor, float], Tensor], level: float) -> Tensor:
        return torch.cat([fid.features(damage(photo, level)) for photo in photos])

    reference = features(noisy, 0.0)
    assert fid.distance(reference, reference) == pytest.approx(0, abs=1e-9)
    for damage, levels in ((noisy, NOISES[1:]), (blurred, (1.0, 2.0, 4.0))):
        made = [features(damage, level) for level in levels]
        values = [fid.distance(one, reference) for one in made]
        assert values == sorted(values)
        assert fid.distance(reference, made[-1]) == pytest.approx(values[-1], rel=1e-9)

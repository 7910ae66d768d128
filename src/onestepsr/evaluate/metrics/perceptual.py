"""LPIPS, DISTS and EA-DISTS as metrics, by the code of the losses with the published weights, and metrics of pyiqa.

Weights have to be on this machine: nothing is downloaded while measuring.
"""

from __future__ import annotations

import importlib
import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from onestepsr.core.errors import MissingExtra, UserError, first_line
from onestepsr.evaluate.metrics.fidelity import Metric, check_image
from onestepsr.losses.perceptual import DISTS, LPIPS, ea_dists, read_dists_weights, read_lpips_weights
from onestepsr.models.efficientnet_lite import EfficientNetFeatures, EfficientNetLite
from onestepsr.models.perceptual_features import AlexNetFeatures, VGG16Features
from onestepsr.weights.catalog import get_model, resolve
from onestepsr.weights.download import without_downloads
from onestepsr.weights.files import SMALL_WEIGHTS, read_tensors

SMALLEST_SIDE = 32
"""Smaller images leave nothing, or nothing but border, of the deepest maps."""


class LearnedDistance(nn.Module):
    """(SR, HR) -> (N,) by a feature network and a distance of its maps, for RGB (N, 3, H, W) in [0, 1].

    Both move to the device of the images. Images of less than 32 x 32 pixels raise UserError.
    """

    def __init__(
        self, features: nn.Module, distance: nn.Module, measure: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        """``measure`` is (SR, HR) -> (N,); by default ``distance(features, SR, HR)``."""
        super().__init__()
        self.features, self.distance = features, distance
        self._measure = measure or (lambda sr, hr: distance(features, sr, hr))
        self.eval().requires_grad_(False)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """One distance per image; differentiable in ``sr``."""
        for image in (sr, hr):
            check_image(image)
        if sr.shape != hr.shape or min(sr.shape[-2:]) < SMALLEST_SIDE:
            sizes = " and ".join(f"{image.shape[-1]} x {image.shape[-2]}" for image in (sr, hr))
            raise UserError(f"{sizes} pixels: expected equal sizes of at least {SMALLEST_SIDE} x {SMALLEST_SIDE}")
        self.to(sr.device)
        return self._measure(sr, hr)


def load_lpips(network: Literal["alexnet", "vgg16"]) -> Metric:
    """LPIPS 0.1 on AlexNet, as tables print it, or on VGG-16, as trainings use it."""
    features: AlexNetFeatures | VGG16Features
    if network == "alexnet":
        backbone, linear = weights("alexnet", "lpips-alex")
        features = AlexNetFeatures.from_file(backbone)
    else:
        backbone, linear = weights("vgg16", "lpips-vgg")
        features = VGG16Features.from_file(backbone, pooling="max")
    layers = read_lpips_weights(read_tensors(linear, limit=SMALL_WEIGHTS))
    return LearnedDistance(features, LPIPS(features.channels[1:], layers))


def load_dists() -> Metric:
    """DISTS of whole images, without the resize to 256 pixels of its authors' demo."""
    return LearnedDistance(*_dists())


def load_ea_dists() -> Metric:
    """DISTS of the images plus DISTS of their Sobel edges (D3SR, Eq. 5), edges of the channel mean."""
    features, distance = _dists()
    return LearnedDistance(features, distance, lambda sr, hr: ea_dists(distance, features, sr, hr))


def load_efficientnet_lpips(name: str) -> Metric:
    """LPIPS over the five maps of EfficientNet-Lite0 or -Lite1, channels and maps alike: the mean over the maps, in
    [0, 4]."""
    features = _efficientnet(name)
    return LearnedDistance(features, LPIPS.averaged(features.channels[1:]))


def load_efficientnet_dists(name: str) -> Metric:
    """DISTS over the image and the same maps, every channel of a map and every map alike."""
    features = _efficientnet(name)
    return LearnedDistance(features, DISTS(features.channels))


def _efficientnet(name: str) -> EfficientNetFeatures:
    (path,) = weights(name.lower())
    return EfficientNetFeatures(EfficientNetLite.from_file(path, name))


def weights(*aliases: str) -> list[Path]:
    """Files of models' weights on this machine; UserError with the command that fetches the missing ones."""
    found, missing = [], []
    with without_downloads("measuring downloads nothing"):
        for alias in aliases:
            try:
                found.append(resolve(alias))
            except UserError:
                if get_model(alias).path.is_file():  # there, and damaged
                    raise
                missing.append(alias)
    if missing:
        raise UserError(
            f"needs weights that are not here: 'onestepsr models download {' '.join(missing)}' fetches them"
        )
    return found


def _dists() -> tuple[VGG16Features, DISTS]:
    backbone, channels = weights("vgg16", "dists")
    features = VGG16Features.from_file(backbone)
    return features, DISTS(features.channels, *read_dists_weights(read_tensors(channels, limit=SMALL_WEIGHTS)))


def without_gradients(measure: Metric) -> Metric:
    """``measure`` for numbers alone: float64 values on the CPU, and no graph kept."""

    def measured(sr: Tensor, hr: Tensor) -> Tensor:
        with torch.no_grad():
            return measure(sr, hr).to("cpu", torch.float64)

    return measured


# ---- Metrics of pyiqa ------------------------------------------------------------------------------------------------
# pyiqa is under the PolyForm Noncommercial licence, hence an optional extra and a notice when it is used. Some of its
# metrics draw random crops from global generators, and creating one sets their seeds: here every image starts from the
# same seed, so that a value does not depend on the images before it, and the generators are restored afterwards.

logger = logging.getLogger(__name__)

SEED = 123
"""Seed that pyiqa sets when it creates a metric."""
NOTICE = (
    "pyiqa is under the PolyForm Noncommercial License 1.0.0 (https://polyformproject.org/licenses/noncommercial/1.0.0):"
    " commercial use needs its author's permission; its metrics bring weights under licences of their own"
)
_lock = threading.Lock()


def load_iqa(name: str) -> Callable[[Tensor], Tensor]:
    """The function RGB (N, 3, H, W) in [0, 1] -> (N,) float64 of pyiqa's metric ``name``.

    Raises MissingExtra without pyiqa, and UserError in one line when it cannot be imported or fetch its weights.
    """
    package = _package()
    made: dict[torch.device, Any] = {}

    def on(device: torch.device) -> Any:
        if device not in made:
            with _lock, _seeded():
                made[device] = package.create_metric(name, device=device)
        return made[device]

    try:
        on(torch.device("cpu"))
    except Exception as error:  # an error of one metric must not stop the others
        version = getattr(package, "__version__", "of unknown version")
        raise UserError(f"pyiqa {version} cannot create '{name}': {first_line(error)}") from error

    def measure(image: Tensor) -> Tensor:
        check_image(image)
        try:
            metric = on(image.device)
            with _lock, torch.no_grad():
                values = []
                for single in image:
                    with _seeded():
                        values.append(float(metric(single[None].float())))
        except Exception as error:
            raise UserError(f"pyiqa's {name}: {first_line(error)}") from error
        return torch.tensor(values, dtype=torch.float64)

    return measure


@cache
def _package() -> Any:
    """pyiqa; its licence is shown the first time."""
    try:
        package = importlib.import_module("pyiqa")
    except ModuleNotFoundError as error:
        if error.name == "pyiqa":
            raise MissingExtra("this metric of pyiqa", "iqa") from error
        raise UserError(f"pyiqa is installed but cannot be imported: {first_line(error)}") from error
    except Exception as error:  # torchvision beside another build of PyTorch raises RuntimeError
        raise UserError(f"pyiqa is installed but cannot be imported: {first_line(error)}") from error
    logger.warning("%s", NOTICE)
    return package


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed the global generators that pyiqa draws from, and put them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(SEED)
    np.random.seed(SEED)
    torch.default_generator.manual_seed(SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])

"""NIQE, the natural image quality evaluator: distance of local image statistics from those of pristine photos.

Mittal, Soundararajan and Bovik, "Making a completely blind image quality analyzer", IEEE Signal Processing Letters,
2013. No reference image is needed; lower is better. The statistics of pristine photos are other people's data and are
not shipped with this package: 'onestepsr models download niqe' fetches them.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from onestepsr.core.errors import MissingWeights, UserError
from onestepsr.evaluate.metrics.fidelity import check_image, studio_luma
from onestepsr.imaging.color import gray
from onestepsr.weights.catalog import resolve
from onestepsr.weights.download import without_downloads

ENVIRONMENT_VARIABLE = "ONESTEPSR_NIQE_PARAMETERS"
MAX_PARAMETER_BYTES = 1_000_000
ARRAYS = {".npz": ("mu_pris_param", "cov_pris_param"), ".mat": ("mu_prisparam", "cov_prisparam")}
"""Names of mean and covariance in BasicSR's file, and in the authors' that IQA-PyTorch fetches; the same numbers."""
FEATURES = 36
BLOCK = 96
"""Side of a block at full size; at half size it is half of this."""
WINDOW, WINDOW_SIGMA = 7, 7 / 6
BAND_PIXELS = 4096
NO_STRUCTURE = 1e-6
"""Blocks whose normalised coefficients all stay below this are flat."""
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Row and column offsets of the neighbours whose products are modelled."""

Luma = Literal["yiq", "studio"]
"""``yiq``: full-range Y, IQA-PyTorch's default, used by OSEDiff and the papers after it. ``studio``: BasicSR's. The two
differ by up to 0.7 and must not be mixed in one table."""


@dataclass(frozen=True, kw_only=True)
class NiqeParameters:
    """Mean and covariance of the 36 features over pristine photos."""

    mean: Tensor
    """(36,) float64."""
    covariance: Tensor
    """(36, 36) float64."""

    def __post_init__(self) -> None:
        if self.mean.shape != (FEATURES,) or self.covariance.shape != (FEATURES, FEATURES):
            raise ValueError(
                f"NIQE statistics must be (36,) and (36, 36), got {self.mean.shape}, {self.covariance.shape}"
            )

    @classmethod
    def load(cls, path: Path) -> NiqeParameters:
        """Read mean (1, 36) and covariance (36, 36) from an .npz file as BasicSR's or a .mat file as the authors'.

        UserError for anything else.
        """
        mean, covariance = (torch.as_tensor(array, dtype=torch.float64) for array in _read_arrays(path))
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise UserError(f"{path}: NIQE statistics must be finite")
        try:
            return cls(mean=mean.flatten(), covariance=covariance)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def find(cls) -> NiqeParameters:
        """Load the file that ONESTEPSR_NIQE_PARAMETERS names, else the downloaded one; UserError if there is none."""
        named = os.environ.get(ENVIRONMENT_VARIABLE)
        if named:
            return cls.load(Path(named))
        try:
            with without_downloads("measuring downloads nothing"):
                return cls.load(resolve("niqe"))
        except MissingWeights as error:
            raise MissingWeights(
                "NIQE needs the statistics of pristine photos, which are not here: 'onestepsr models download niqe' "
                f"fetches them, or {ENVIRONMENT_VARIABLE} names their file (niqe_pris_params.npz of BasicSR, or the "
                "authors' niqe_modelparameters.mat)"
            ) from error


def niqe(image: Tensor, parameters: NiqeParameters, luma: Luma = "yiq") -> Tensor:
    """NIQE of RGB images (N, 3, H, W) in [0, 1] -> (N,) float64; lower is better. See :func:`niqe_from_luma`."""
    check_image(image)
    # float32 as in IQA-PyTorch, so that most ties of the rounding that follows fall the same way.
    y = studio_luma(image) if luma == "studio" else gray(image.detach().float())
    return torch.tensor([niqe_from_luma(plane, parameters) for plane in (y[:, 0] * 255).round()], dtype=torch.float64)


def niqe_from_luma(luma: Tensor, parameters: NiqeParameters) -> float:
    """NIQE of one luma plane (H, W) in [0, 255]: distance between two Gaussians of the features, covariances pooled.

    The plane is cropped to whole blocks of 96. Raises UserError when fewer than two blocks have any structure, because
    a covariance needs two.
    """
    features = niqe_features(luma)
    features = features[features.isfinite().all(dim=1)]
    if len(features) < 2:
        height, width = luma.shape
        raise UserError(
            f"NIQE needs at least two structured blocks of {BLOCK} x {BLOCK} pixels, got {width} x {height}"
        )
    mean, covariance = parameters.mean, parameters.covariance
    difference = mean - features.mean(dim=0)
    pooled = (covariance + torch.cov(features.T)) / 2
    return float((difference @ torch.linalg.pinv(pooled) @ difference).sqrt())


def niqe_features(luma: Tensor) -> Tensor:
    """Features of every 96 x 96 block of a luma plane (H, W) in [0, 255] -> (blocks, 36) float64.

    18 features at full size, then 18 at half size; a block without structure has values that are not finite.
    """
    rows, columns = luma.shape[0] // BLOCK, luma.shape[1] // BLOCK
    plane = luma[: rows * BLOCK, : columns * BLOCK].to("cpu", torch.float64)[None, None]
    if plane.numel() == 0:
        return torch.empty(0, FEATURES, dtype=torch.float64)
    full = _block_features(_normalised(plane), BLOCK)
    half = _block_features(_normalised(_halved(plane)), BLOCK // 2)
    return torch.cat([full, half], dim=1)


def _normalised(plane: Tensor) -> Tensor:
    """Mean-subtracted, contrast-normalised coefficients of (1, 1, H, W)."""
    mean = _window_mean(plane)
    deviation = (_window_mean(plane**2) - mean**2).abs().sqrt()
    return (plane - mean) / (deviation + 1)


def _window_mean(plane: Tensor) -> Tensor:
    # Not separated: in saturated areas the last bit of this mean decides on which side of zero a pixel counts, and
    # published implementations sum over the square.
    offset = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * WINDOW_SIGMA**2))
    window = torch.outer(window, window)
    kernel = (window / window.sum())[None, None]
    padded = F.pad(plane, (WINDOW // 2,) * 4, mode="replicate")
    height, width = plane.shape[-2:]
    # Bands of rows whose unfolded windows fit into a cache: the same bits as in one call, in a tenth of the time.
    rows = max(1, BAND_PIXELS // width)
    bands = [padded[..., top : min(top + rows, height) + WINDOW - 1, :] for top in range(0, height, rows)]
    return torch.cat([F.conv2d(band, kernel) for band in bands], dim=-2)


def _halved(plane: Tensor) -> Tensor:
    """Half size of (1, 1, H, W) with even sides: the antialiased bicubic filter of Matlab's imresize, a = -1/2.

    At this factor every output pixel sees the same eight taps, at distances 1/4, 3/4, 5/4 and 7/4 of the stretched
    kernel; edges are mirrored with the edge pixel repeated.
    """
    distance = torch.tensor((1.75, 1.25, 0.75, 0.25), dtype=torch.float64)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    side = torch.where(distance <= 1, near, far)
    taps = torch.cat([side, side.flip(0)])
    taps = taps / taps.sum()
    rows, columns = (_mirrored(size) for size in plane.shape[-2:])
    padded = plane[..., rows, :][..., columns]
    across = F.conv2d(padded, taps.view(1, 1, 1, -1), stride=(1, 2))
    return F.conv2d(across, taps.view(1, 1, -1, 1), stride=(2, 1))


def _mirrored(size: int, margin: int = 3) -> Tensor:
    index = torch.arange(size)
    return torch.cat([index[:margin].flip(0), index, index[-margin:].flip(0)])


def _block_features(coefficients: Tensor, block: int) -> Tensor:
    """18 features of every block of (1, 1, H, W) -> (blocks, 18)."""
    blocks = F.unfold(coefficients, block, stride=block)[0].T.reshape(-1, block, block)
    # Rounding errors of a flat block must not count as structure.
    blocks = blocks * (blocks.abs().amax(dim=(1, 2), keepdim=True) > NO_STRUCTURE)
    alpha, left, right, _ = _asymmetric_gaussian(blocks.flatten(1))
    features = [alpha, (left + right) / 2]
    for shift in SHIFTS:
        products = blocks * blocks.roll(shift, dims=(1, 2))
        alpha, left, right, mean = _asymmetric_gaussian(products.flatten(1))
        features += [alpha, mean, left, right]
    return torch.stack(features, dim=1)


def _shape_table() -> tuple[Tensor, Tensor]:
    """Candidate shapes alpha and the moment ratio (E|x|)^2 / E[x^2] of each, which grows with alpha."""
    alpha = torch.arange(200, 10001, dtype=torch.float64) / 1000
    ratio = torch.exp(2 * torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha))
    return alpha, ratio


def _asymmetric_gaussian(samples: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit an asymmetric generalised Gaussian to each row of (B, n) by moments: shape, left and right scale, mean, (B,).

    The estimator is that of Lasmar, Stitou and Berthoumieu 2009. Rows without values on both sides give NaN.
    """
    left = _root_mean_square(samples, samples < 0)
    right = _root_mean_square(samples, samples > 0)
    asymmetry = left / right
    ratio = samples.abs().mean(1) ** 2 / (samples**2).mean(1)
    ratio = ratio * (asymmetry**3 + 1) * (asymmetry + 1) / (asymmetry**2 + 1) ** 2
    shapes, ratios = _shape_table()
    above = torch.searchsorted(ratios, ratio.nan_to_num(0.0)).clamp(1, len(ratios) - 1)
    alpha = shapes[torch.where(ratio - ratios[above - 1] <= ratios[above] - ratio, above - 1, above)]
    scale = torch.exp((torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)) / 2)
    mean = (right - left) * scale * torch.exp(torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha))
    return alpha, left * scale, right * scale, mean


def _root_mean_square(samples: Tensor, chosen: Tensor) -> Tensor:
    return ((samples**2 * chosen).sum(1) / chosen.sum(1)).sqrt()


def _read_arrays(path: Path) -> list[NDArray[np.float64]]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    suffix = ".mat" if path.suffix == ".mat" else ".npz"
    names = ARRAYS[suffix]
    try:
        if suffix == ".mat":
            size = path.stat().st_size
        else:
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_PARAMETER_BYTES:
            raise UserError(f"{path}: larger than {MAX_PARAMETER_BYTES} bytes, which NIQE statistics are not")
        content = loadmat(path, variable_names=names) if suffix == ".mat" else np.load(path, allow_pickle=False)
        return [np.asarray(content[name], dtype=np.float64) for name in names]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, MatReadError, NotImplementedError, ValueError, KeyError, TypeError) as error:
        wanted = f"expected a {suffix} file with {' and '.join(names)}"
        raise UserError(f"{path}: no NIQE statistics; {wanted}") from error

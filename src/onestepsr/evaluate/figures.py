"""The papers' figures of analysis: metrics as a radar chart (OSEDiff, Fig. 1), features of a diffusion UNet on real and
super-resolved images (D3SR, Fig. 3), feature maps of images and of their edges (D3SR, Fig. 4), and the teacher's
estimates of noised results (TAD-SR, Fig. 2). Drawn by matplotlib, the extra ``plots``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from onestepsr.core.errors import MissingExtra, UserError
from onestepsr.core.files import replacing, writing
from onestepsr.evaluate.result import EvaluationResult, MetricRecord
from onestepsr.evaluate.tables import counterpart, find_published
from onestepsr.losses.perceptual import sobel_magnitude
from onestepsr.methods.shared.image_loss import PerceptualConfig, build_perceptual
from onestepsr.methods.shared.teachers import ResidualShiftTeacher
from onestepsr.models.backbones import load_backbone, load_discriminator_backbone
from onestepsr.models.discriminators import DiffusionEncoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHANNELS = 100
"""Channels of the middle block that D3SR's Fig. 3 shows: the first ones."""
WORST = 0.1
"""Radius of the worst shown method; 0 would leave no area. The best has 1."""
FORMATS = (".png", ".svg", ".pdf")


def check_figure(path: Path, option: str) -> None:
    """UserError before any work for a figure that could not be drawn or written."""
    if find_spec("matplotlib") is None:
        raise MissingExtra("drawing figures", "plots")
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{option} {path}: accepted endings: {', '.join(FORMATS)}")
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"{option} {path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in one step, in the format of the path's ending."""
    with writing(path.parent), replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


# ---- OSEDiff, Fig. 1: a radar chart of metrics -----------------------------------------------------------------------

Rows = dict[str, dict[str, float]]
"""By method, its means by metric."""


def radar_rows(results: Sequence[EvaluationResult], beside: str | None) -> tuple[Rows, dict[str, MetricRecord]]:
    """Means of results, and of the published rows of ``beside`` (a table and a dataset, as ``osediff/realsr``).

    Only metrics that every method has are kept: an axis without a value would look like the worst one.
    """
    rows: Rows = {r.label: {name: s.mean for name, s in r.summaries().items()} for r in results}
    records = dict(results[0].metrics)
    if beside is not None:
        found = find_published(beside)
        if len(found) > 1:
            raise UserError(f"--beside {beside}: in several tables; a chart takes one, such as osediff/{beside}")
        ((table, data),) = found
        records = {name: table.metrics[name] for name in data.columns}
        for result in results:
            keys = {name: counterpart(result, name, record.variant) for name, record in records.items()}
            means = result.summaries()
            rows[result.label] = {name: means[key].mean for name, key in keys.items() if key is not None}
        for label, values in data.rows.items():
            rows[label] = {n: v for n, v in zip(data.columns, values, strict=True) if v is not None}
    common = [name for name in records if all(name in values for values in rows.values())]
    if len(common) < 3 or len(rows) < 2:
        raise UserError(
            f"a radar chart takes two methods and three metrics that both have; there are {len(rows)} and "
            f"{', '.join(common) or 'none'}"
        )
    return rows, {name: records[name] for name in common}


def radar(rows: Mapping[str, Mapping[str, float]], records: Mapping[str, MetricRecord], path: Path) -> None:
    """One axis per metric, outwards is better; each axis goes from the worst to the best of the shown methods."""
    figure = _figure(7, 6)
    axes: Any = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * number / len(records) for number in range(len(records))]
    for label, values in rows.items():
        radii = []
        for name, record in records.items():
            column = [row[name] for row in rows.values()]
            low, high = min(column), max(column)
            share = 1.0 if high == low else (values[name] - low) / (high - low)
            radii.append(WORST + (1 - WORST) * (share if record.higher_is_better else 1 - share))
        (line,) = axes.plot([*angles, angles[0]], [*radii, radii[0]], label=label)
        axes.fill(angles, radii, alpha=0.08, color=line.get_color())
    ends = {}
    for name, record in records.items():
        column = sorted((row[name] for row in rows.values()), reverse=record.higher_is_better)
        ends[name] = f"{record.title}\n{column[-1]:.4g} to {column[0]:.4g}"
    axes.set_xticks(angles, list(ends.values()))
    axes.tick_params(axis="x", pad=16)
    axes.set_yticks([WORST, 1.0], ["", ""])
    axes.set_ylim(0, 1.05)
    figure.legend(loc="outside right upper")
    save_figure(figure, path)


# ---- D3SR, Fig. 3: features of a diffusion UNet on real and on super-resolved images ---------------------------------


@torch.no_grad()
def middle_features(images: Sequence[Tensor], backbone: str, timestep: int, side: int, seed: int) -> Tensor:
    """Middle-block features (N, channels, h', w'), the first 100 channels, of the central ``side`` x ``side`` pixels of
    images (1, 3, H, W) in [0, 1], whose latents are noised to ``timestep`` with one noise for all."""
    generator = load_backbone(backbone)
    encoder, prompt = load_discriminator_backbone(backbone)
    encoder.eval()
    found, noise = [], None
    for image in images:
        height, width = image.shape[-2:]
        if min(height, width) < side:
            raise UserError(f"an image of {width} x {height} pixels: --side {side} takes larger ones")
        top, left = (height - side) // 2, (width - side) // 2
        z = generator.encode(image[..., top : top + side, left : left + side])
        if noise is None:
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
        z_t = generator.schedule.add_noise(z, noise, timestep) if timestep else z
        features = cast(DiffusionEncoder, encoder)(z_t, torch.full((1,), timestep), prompt)[0]
        found.append(features[:, :CHANNELS])
    return torch.cat(found)


def principal_plane(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, D) on their two first principal axes, (N, 2), and the share of the variance that each axis has, (2,)."""
    centred = (rows - rows.mean(dim=0)).double()
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    u, s = u[:, :2], s.square()
    return u * s[:2].sqrt(), s[:2] / s.sum().clamp(min=torch.finfo(s.dtype).tiny)


def features_figure(real: Tensor, made: Tensor, path: Path, *, title: str) -> None:
    """Each channel of each image as one point: its map over the positions, on the two first principal axes (PCA) of
    all points. The paper shows UMAP and LLE too."""
    points = torch.cat([real, made]).flatten(0, 1).flatten(1)
    plane, shares = principal_plane(points)
    first = real.shape[0] * real.shape[1]
    figure = _figure(6, 5)
    axes = figure.add_subplot()
    for label, own in (("real images", plane[:first]), ("super-resolved images", plane[first:])):
        axes.scatter(own[:, 0].tolist(), own[:, 1].tolist(), s=8, alpha=0.5, label=label)
    axes.set_xlabel(f"first axis, {shares[0]:.0%} of the variance")
    axes.set_ylabel(f"second axis, {shares[1]:.0%}")
    axes.set_title(title, fontsize=9)
    axes.legend()
    save_figure(figure, path)


# ---- D3SR, Fig. 4: feature maps of an image and of its edges ---------------------------------------------------------


@torch.no_grad()
def edge_maps(image: Tensor, features: str) -> dict[str, list[Tensor]]:
    """For an image (1, 3, H, W) in [0, 1] and for its Sobel magnitude (D3SR, Eq. 6-7): the input, then of each map of
    the feature network the mean over channels, (h, w)."""
    network, _ = build_perceptual(PerceptualConfig(distance="dists", features=cast(Any, features)))
    edges = sobel_magnitude(image)
    rows = {}
    for label, shown in (("DISTS", image), ("edges: EA-DISTS", edges)):
        maps = network(shown)[1:]
        rows[label] = [shown[0].clamp(0, 1).permute(1, 2, 0), *(one[0].abs().mean(dim=0) for one in maps)]
    return rows


# ---- TAD-SR, Fig. 2: the teacher's estimates of noised results -------------------------------------------------------


@torch.no_grad()
def score_images(
    lr: Tensor, images: Mapping[str, Tensor], teacher: str, steps: Sequence[int], seed: int
) -> dict[str, list[Tensor]]:
    """Each image (1, 3, H, W) in [0, 1], then the teacher's estimate of z_0, decoded, from its latent noised to each of
    ``steps`` with one noise for all: what the teacher thinks the image should be. (H, W, 3) each."""
    judge = ResidualShiftTeacher(teacher, None)
    judge.network.eval()
    for step in steps:
        if not 0 <= step < judge.steps:
            raise UserError(f"step {step}: '{teacher}' has the steps 0 to {judge.steps - 1}")
    generator = judge.generator
    z_y = generator.encode(generator.enlarge(lr))
    noise = torch.randn(z_y.shape, generator=torch.Generator().manual_seed(seed))
    rows: dict[str, list[Tensor]] = {}
    for label, image in images.items():
        z_0 = generator.encode(image)
        if z_0.shape != z_y.shape:
            size = f"{image.shape[-1]} x {image.shape[-2]}"
            raise UserError(f"{label}: {size} pixels do not belong to an LR image of {lr.shape[-1]} x {lr.shape[-2]}")
        shown = [image]
        for step in steps:
            t = torch.full((1,), step)
            z_t = judge.noised(z_0, z_y, noise, t)
            shown.append(generator.decode(judge.estimate(judge.network, z_t, t, lr)))
        rows[label] = [one[0].float().clamp(0, 1).permute(1, 2, 0) for one in shown]
    return rows


def grid_figure(rows: Mapping[str, Sequence[Tensor]], columns: Sequence[str], path: Path) -> None:
    """Images (h, w, 3) and maps (h, w) in a grid with titles; each map from its own smallest to its largest value."""
    height, width = next(iter(rows.values()))[0].shape[:2]
    figure = _figure(2.4 * len(columns), (2.4 * height / width + 0.4) * len(rows))
    axes: Any = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for place, image, title in zip(line, images, columns, strict=True):
            place.imshow(image.numpy(), cmap="viridis")
            place.set_xticks([])
            place.set_yticks([])
            place.set_title(title, fontsize=9)
        line[0].set_ylabel(label, fontsize=9)
    save_figure(figure, path)

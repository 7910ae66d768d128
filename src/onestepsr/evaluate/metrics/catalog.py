"""Table of the named metrics: how each is computed and described."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.evaluate.metrics import fid, fidelity, perceptual
from onestepsr.evaluate.metrics.niqe import Luma, NiqeParameters, niqe
from onestepsr.evaluate.result import MetricRecord

Reference = Callable[[Tensor, Tensor], Tensor]
NoReference = Callable[[Tensor], Tensor]
STUDIO = "Y of BT.601 studio range"
UNPAIRED_FID = "unpaired_fid"


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """One named metric; exactly one of ``against``, ``alone`` and ``of_sets`` is given."""

    name: str
    """Name given to ``--metrics`` and key in JSON files."""
    title: str
    """Column title."""
    higher_is_better: bool
    variant: str = ""
    """Setting that tells it from others of the same title."""
    unit: str = ""
    """Unit of the values; empty for none."""
    network: bool = False
    """True if a network measures, which a GPU makes faster."""
    against: Callable[[], Reference] | None = None
    """Loads the metric and returns the function (SR, HR) -> (N,)."""
    alone: Callable[[], NoReference] | None = None
    """Loads the metric and returns the function SR -> (N,)."""
    of_sets: Callable[[], fid.SetDistance] | None = None
    """Loads a metric that has one value for all images together."""
    unpaired: bool = False
    """True for one of sets that compares with other photos than the HR images."""

    @property
    def needs_reference(self) -> bool:
        """True if HR images are needed."""
        return self.alone is None and not self.unpaired

    @property
    def record(self) -> MetricRecord:
        """Description that is saved with its values."""
        return MetricRecord(
            title=self.title, higher_is_better=self.higher_is_better, variant=self.variant, unit=self.unit
        )

    def load(self) -> Reference:
        """The function (SR, HR) -> (N,), which ignores HR if no reference is needed. Not for metrics of sets."""
        if self.against is not None:
            return self.against()
        assert self.alone is not None
        measure = self.alone()
        return lambda sr, _hr: measure(sr)


def _load_niqe(luma: Luma) -> NoReference:
    parameters = NiqeParameters.find()
    return lambda sr: niqe(sr, parameters, luma)


def _plain(name: str, title: str, measure: fidelity.Metric, *, variant: str, unit: str = "") -> MetricSpec:
    return MetricSpec(
        name=name, title=title, higher_is_better=True, variant=variant, unit=unit, against=lambda: measure
    )


def _distance(name: str, title: str, variant: str, load: Callable[[], Reference]) -> MetricSpec:
    return MetricSpec(
        name=name,
        title=title,
        variant=variant,
        higher_is_better=False,
        network=True,
        against=lambda: perceptual.without_gradients(load()),
    )


def _iqa(name: str, title: str, variant: str, *, higher_is_better: bool = True) -> MetricSpec:
    """A metric of pyiqa without references, under the name that pyiqa gives it."""
    return MetricSpec(
        name=name,
        title=title,
        variant=variant,
        higher_is_better=higher_is_better,
        network=True,
        alone=partial(perceptual.load_iqa, name),
    )


def _of_faces(name: str, title: str, variant: str, network: str) -> MetricSpec:
    """A metric of TAD-SR's Table III that is known by name and refused: its network is none that can be had here."""

    def load() -> Reference:
        raise UserError(
            f"{title} takes the weights of {network}, for which this package has no loader: no weights were found "
            "whose terms allow every use and that give the published numbers"
        )

    return MetricSpec(name=name, title=title, variant=variant, higher_is_better=False, network=True, against=load)


METRICS = {
    spec.name: spec
    for spec in (
        _plain("psnr", "PSNR-Y", fidelity.psnr_y, variant=f"{STUDIO}, not rounded", unit="dB"),
        _plain("psnr_rgb", "PSNR-RGB", fidelity.psnr_rgb, variant="RGB", unit="dB"),
        _plain("ssim", "SSIM-Y", fidelity.ssim_y, variant=f"{STUDIO}, rounded"),
        _plain("ssim_rgb", "SSIM-RGB", fidelity.ssim_rgb, variant="mean of the channels"),
        _plain("ssim_basicsr", "SSIM-Y (BasicSR)", fidelity.ssim_basicsr, variant=f"{STUDIO}, not rounded or clamped"),
        _plain("ms_ssim", "MS-SSIM-Y", fidelity.ms_ssim, variant=f"{STUDIO}, rounded, five scales"),
        _distance("lpips", "LPIPS", "AlexNet, v0.1", partial(perceptual.load_lpips, "alexnet")),
        _distance("lpips_vgg", "LPIPS (VGG)", "VGG-16, v0.1", partial(perceptual.load_lpips, "vgg16")),
        _distance("dists", "DISTS", "VGG-16, no resize", perceptual.load_dists),
        _distance(
            "lpips-efficientnet",
            "LPIPS (EfficientNet)",
            "EfficientNet-Lite0, five maps, no channel weights, mean",
            partial(perceptual.load_efficientnet_lpips, "EfficientNet-Lite0"),
        ),
        _distance(
            "dists-efficientnet",
            "DISTS (EfficientNet)",
            "EfficientNet-Lite0, image and five maps, no channel weights, no resize",
            partial(perceptual.load_efficientnet_dists, "EfficientNet-Lite0"),
        ),
        _distance(
            "lpips-efficientnet1",
            "LPIPS (EfficientNet-Lite1)",
            "EfficientNet-Lite1, five maps, no channel weights, mean",
            partial(perceptual.load_efficientnet_lpips, "EfficientNet-Lite1"),
        ),
        _distance(
            "dists-efficientnet1",
            "DISTS (EfficientNet-Lite1)",
            "EfficientNet-Lite1, image and five maps, no channel weights, no resize",
            partial(perceptual.load_efficientnet_dists, "EfficientNet-Lite1"),
        ),
        _distance("ea_dists", "EA-DISTS", "VGG-16, no resize, edges of the channel mean", perceptual.load_ea_dists),
        MetricSpec(
            name="fid", title="FID", variant="clean-fid", higher_is_better=False, network=True, of_sets=fid.load_fid
        ),
        MetricSpec(
            name=UNPAIRED_FID,
            title="FID (unpaired)",
            variant="clean-fid, against the photos of --unpaired",
            higher_is_better=False,
            network=True,
            of_sets=fid.load_fid,
            unpaired=True,
        ),
        _of_faces("ids", "IDS", "angle between ArcFace's embeddings of SR and HR, in degrees", "ArcFace"),
        _of_faces("lmd", "LMD", "distance of facial landmarks in SR and HR, in pixels", "a landmark detector"),
        MetricSpec(
            name="niqe",
            title="NIQE",
            variant="Y of YIQ, rounded",
            higher_is_better=False,
            alone=partial(_load_niqe, "yiq"),
        ),
        MetricSpec(
            name="niqe_studio",
            title="NIQE (BasicSR)",
            variant=f"{STUDIO}, rounded",
            higher_is_better=False,
            alone=partial(_load_niqe, "studio"),
        ),
        _iqa("musiq", "MUSIQ", "koniq10k"),
        _iqa("maniqa-pipal", "MANIQA", "maniqa-pipal"),
        _iqa("maniqa", "MANIQA (KonIQ)", "koniq"),
        _iqa("clipiqa", "CLIPIQA", "RN50"),
        _iqa("clipiqa+", "CLIPIQA+", "RN50, learned prompts"),
        _iqa("topiq_nr", "TOPIQ", "koniq10k, without reference"),
        _iqa("liqe", "LIQE", "koniq10k"),
        _iqa("ilniqe", "IL-NIQE", "pyiqa", higher_is_better=False),
        _iqa("pi", "PI", "pyiqa", higher_is_better=False),
        MetricSpec(
            name="overshoot",
            title="overshoot",
            variant="gray levels beyond the range of 7 x 7 pixels, beside edges",
            higher_is_better=False,
            against=lambda: fidelity.overshoot,
        ),
        MetricSpec(
            name="grid",
            title="grid",
            variant="4 x 4 cells",
            higher_is_better=False,
            alone=lambda: fidelity.grid_artifact,
        ),
    )
}


def select_metrics(names: Sequence[str], *, with_reference: bool) -> list[MetricSpec]:
    """The metrics called ``names``, each once and in that order; UserError for unknown ones and for a missing HR."""
    chosen: dict[str, MetricSpec] = {}
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}': {did_you_mean(name, METRICS)}")
        if METRICS[name].needs_reference and not with_reference:
            free = ", ".join(spec.name for spec in METRICS.values() if not (spec.needs_reference or spec.unpaired))
            raise UserError(f"metric '{name}' compares with HR images: give --hr, or choose from {free}")
        chosen[name] = METRICS[name]
    if not chosen:
        raise UserError(f"no metric chosen; known: {', '.join(METRICS)}")
    return list(chosen.values())

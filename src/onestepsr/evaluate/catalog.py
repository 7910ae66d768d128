"""The metrics that have a name, and what a table needs to know of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from onestepsr.errors import UserError, did_you_mean
from onestepsr.evaluate import metrics
from onestepsr.evaluate.niqe import NiqeParameters, niqe

Reference = Callable[[Tensor, Tensor], Tensor]
NoReference = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """One named metric; exactly one of ``against`` and ``alone`` is given."""

    name: str
    """Name given to ``--metrics`` and key in JSON files."""
    title: str
    """Column title."""
    higher_is_better: bool
    against: Callable[[], Reference] | None = None
    """Returns the function (SR, HR) -> (N,); whatever has to be loaded is loaded here, once."""
    alone: Callable[[], NoReference] | None = None
    """Returns the function SR -> (N,)."""

    @property
    def needs_reference(self) -> bool:
        """Whether HR images are needed."""
        return self.against is not None

    def load(self) -> Reference:
        """The function (SR, HR) -> (N,); without need of a reference, HR is ignored."""
        if self.against is not None:
            return self.against()
        assert self.alone is not None
        measure = self.alone()
        return lambda sr, _hr: measure(sr)


def _load_niqe() -> NoReference:
    parameters = NiqeParameters.find()
    return lambda sr: niqe(sr, parameters)


METRICS = {
    spec.name: spec
    for spec in (
        MetricSpec(name="psnr", title="PSNR-Y dB", higher_is_better=True, against=lambda: metrics.psnr_y),
        MetricSpec(name="psnr_rgb", title="PSNR-RGB dB", higher_is_better=True, against=lambda: metrics.psnr_rgb),
        MetricSpec(name="ssim", title="SSIM-Y", higher_is_better=True, against=lambda: metrics.ssim_y),
        MetricSpec(name="overshoot", title="overshoot", higher_is_better=False, against=lambda: metrics.overshoot),
        MetricSpec(name="niqe", title="NIQE", higher_is_better=False, alone=_load_niqe),
        MetricSpec(name="grid", title="grid", higher_is_better=False, alone=lambda: metrics.grid_artifact),
    )
}


def select_metrics(names: Sequence[str], *, with_reference: bool) -> list[MetricSpec]:
    """The metrics called ``names``, each once and in that order; UserError for unknown ones and for a missing HR."""
    chosen: dict[str, MetricSpec] = {}
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}': {did_you_mean(name, METRICS)}")
        if METRICS[name].needs_reference and not with_reference:
            free = ", ".join(spec.name for spec in METRICS.values() if not spec.needs_reference)
            raise UserError(f"metric '{name}' compares with HR images: give --hr, or choose from {free}")
        chosen[name] = METRICS[name]
    if not chosen:
        raise UserError(f"no metric chosen; known: {', '.join(METRICS)}")
    return list(chosen.values())

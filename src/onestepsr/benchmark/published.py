"""Published figures to compare with, as printed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedComplexity:
    """One column of a complexity table."""

    method: str
    """Name of the method."""
    steps: int
    """Network evaluations of the diffusion model for one picture."""
    seconds: float
    """Time for one picture."""
    parameters_millions: float
    """Parameters in total; the source prints 1.4e3 and the like for some, which are two digits only."""
    macs_billions: float
    """Multiply-accumulate operations for one picture; the source does not say how they were counted."""


COMPLEXITY_SOURCE = "D3SR (arXiv 2410.04224), Table 3: one picture of 512 x 512 on one A100 with 40 GB"
COMPLEXITY_SIDE = 512
"""Output side of the table's pictures."""
COMPLEXITY = (
    PublishedComplexity(method="StableSR", steps=200, seconds=11.50, parameters_millions=1400, macs_billions=75_812),
    PublishedComplexity(method="DiffBIR", steps=50, seconds=7.79, parameters_millions=1600, macs_billions=24_528),
    PublishedComplexity(method="SeeSR", steps=50, seconds=5.93, parameters_millions=2000, macs_billions=32_336),
    PublishedComplexity(method="ResShift", steps=15, seconds=0.71, parameters_millions=173.8, macs_billions=4_903),
    PublishedComplexity(method="SinSR", steps=1, seconds=0.16, parameters_millions=173.8, macs_billions=2_059),
    PublishedComplexity(method="OSEDiff", steps=1, seconds=0.35, parameters_millions=1400, macs_billions=2_269),
    PublishedComplexity(method="D3SR", steps=1, seconds=0.11, parameters_millions=966.3, macs_billions=2_132),
)
D3SR_COMPLEXITY = next(row for row in COMPLEXITY if row.method == "D3SR")
D3SR_FIGURE_1_MACS_BILLIONS = 2_120.0
"""What Figure 1 of the same paper gives for D3SR, where Table 3 has 2,132."""

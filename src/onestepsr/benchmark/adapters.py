"""Which adapters reproduce the paper's figures for D3SR: sets of layers, each with its parameters and operations.

The paper says rank 16 and gives totals, not the layers; the totals depend on the layers and on the way of counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from onestepsr.benchmark.complexity import Complexity, measure_generator
from onestepsr.benchmark.networks import D3SR_SD21, D3SR_SD21_MERGED, measure, sd21_generator

ATTENTION = r"to_q|to_k|to_v|to_out\.0"
TRANSFORMER = rf"{ATTENTION}|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2"
NAMED = {"none, or merged": D3SR_SD21_MERGED, "every layer inside the blocks (default)": D3SR_SD21}
"""Sets of layers that are networks with a name."""
SETS = (
    ("none, or merged", ""),
    ("attention", rf".*\.({ATTENTION})"),
    ("attention, projections, feed-forward", rf".*\.({TRANSFORMER})"),
    ("these and every convolution", rf".*({TRANSFORMER}|conv\w*)"),
    ("every layer inside the blocks (default)", ""),
    ("every layer", r".*"),
)
"""Sets of layers, each with the regular expression of their names where it has no name of its own."""


@dataclass(frozen=True, kw_only=True)
class AdapterSet:
    """D3SR on Stable Diffusion 2.1-base with adapters on one set of layers."""

    layers: str
    """Which layers have adapters."""
    complexity: Complexity
    """The whole generator."""

    @property
    def thop_macs(self) -> int:
        """MACs of the whole generator as the profiler thop reports them."""
        return sum(stage.cost.thop_macs for stage in self.complexity.stages)

    @property
    def thop_parameters(self) -> int:
        """Parameters of the whole generator as the profiler thop reports them."""
        return sum(stage.cost.thop_parameters for stage in self.complexity.stages)


def compare_adapters(side: int, counted: Sequence[Complexity] = ()) -> list[AdapterSet]:
    """D3SR with every set of adapters of :data:`SETS`, for one picture of ``side`` x ``side``; networks that have been
    ``counted`` for that size already are not counted again."""
    known = {network.name: network for network in counted}
    return [AdapterSet(layers=layers, complexity=_measure(layers, targets, side, known)) for layers, targets in SETS]


def _measure(layers: str, targets: str, side: int, known: dict[str, Complexity]) -> Complexity:
    if layers in NAMED:
        name = NAMED[layers]
        return known[name] if name in known else measure(name, side)
    with torch.device("meta"):
        generator = sd21_generator(targets).eval()
    return measure_generator(generator, side, name=layers, summary="")

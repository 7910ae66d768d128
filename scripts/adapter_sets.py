"""D3SR's parameters and operations by the layers that have adapters, beside the figures that the paper prints.

    python scripts/adapter_sets.py > table.md

The paper prints 966.3 M and 2,132 G in its Table 3 and 2,120 G in its Figure 1, and says neither which layers have
adapters nor how it counted. The profiler thop counts convolution and linear layers only, adds four operations for every
element of a layer normalisation's output, and takes for parameters only those of the layers that it knows: group
normalisation and the prompt embedding are left out. The last column names the paper's figures that thop's count gives
in every printed digit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from onestepsr.benchmark.complexity import billions, millions
from onestepsr.benchmark.counting import LAYERS, Cost, count, size_of
from onestepsr.core.tables import Grid
from onestepsr.models.architectures import random_backbone
from onestepsr.models.generators import OneStepLatentGenerator
from onestepsr.models.lora import LoraConfig, add_lora

ATTENTION = r"to_q|to_k|to_v|to_out\.0"
TRANSFORMER = rf"{ATTENTION}|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2"
DEFAULT = "every layer inside the blocks (default)"
SETS: dict[str, str | None] = {
    "none, or merged": "",
    "attention": rf".*\.({ATTENTION})",
    "attention, projections, feed-forward": rf".*\.({TRANSFORMER})",
    "these and every convolution": rf".*({TRANSFORMER}|conv\w*)",
    DEFAULT: None,
    "every layer": r".*",
}
"""Sets of layers and the regular expression of their names; None is the backbone's own choice."""
SIDE = 512
"""Side of the output image of the paper's table."""
PUBLISHED = {"966.3 M": 966.3, "2,132 G": 2132.0, "2,120 G": 2120.0}
"""Figures as printed; the last is of Figure 1."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """One network, counted both ways."""

    parameters: int
    """All parameters."""
    cost: Cost
    """The package's own counts."""
    thop_parameters: int
    thop_macs: int

    @property
    def reproduced(self) -> str:
        """The paper's figures that thop's counts round to, in every printed digit."""
        rounded = {round(self.thop_parameters / 1e6, 1), float(round(self.thop_macs / 1e9))}
        return ", ".join(text for text, value in PUBLISHED.items() if value in rounded)


def as_thop_counts(network: nn.Module, evaluate: Callable[[], object]) -> Count:
    """Counts of one evaluation of ``network``, on the meta device, in which every parameter of a layer is used."""
    normalised = 0

    def add(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal normalised
        normalised += output.numel() if isinstance(layer, nn.LayerNorm) else 0

    with register_module_forward_hook(add):
        _, cost = count(network, evaluate)
    known = [layer for layer in network.modules() if isinstance(layer, (*LAYERS, nn.LayerNorm))]
    own = {id(parameter): parameter for layer in known for parameter in layer.parameters(recurse=False)}
    return Count(
        parameters=size_of(network.parameters()),
        cost=cost,
        thop_parameters=size_of(own.values()),
        thop_macs=cost.layer_macs + 4 * normalised,
    )


def of_set(targets: str | None) -> Count:
    """D3SR's generator on Stable Diffusion 2.1-base with adapters on the layers that ``targets`` matches."""
    with torch.device("meta"):
        generator = random_backbone("random:sd21-base").requires_grad_(False).eval()
        assert isinstance(generator, OneStepLatentGenerator)
        if targets != "":
            add_lora(generator.unet, LoraConfig(targets=targets))
        lr = torch.empty(1, 3, *[SIDE // generator.scale] * 2)
        return as_thop_counts(generator, lambda: generator(lr))


def main() -> None:
    """Count every set and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows = []
    for layers, targets in SETS.items():
        found = of_set(targets)
        figures = millions(found.parameters), billions(found.cost.layer_macs), millions(found.thop_parameters)
        rows.append((layers, *figures, billions(found.thop_macs), found.reproduced))
    columns = ("adapters on", "parameters, M", "MACs, G (layers only)", "thop: M", "thop: G", "gives the paper's")
    sys.stdout.write(Grid(title="", columns=columns, rows=tuple(rows)).markdown() + "\n")


if __name__ == "__main__":
    main()

"""The complexity of networks as tables, as one JSON document and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from onestepsr.benchmark.complexity import Complexity
from onestepsr.benchmark.networks import AdapterSet
from onestepsr.benchmark.tables import Table, billions, millions

# Published figures to compare with, as printed ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PublishedComplexity:
    """One column of a complexity table."""

    method: str
    """Name of the method."""
    steps: int
    """Network evaluations of the diffusion model for one image."""
    seconds: float
    """Time for one image."""
    parameters_millions: float
    """Parameters in total; the source prints 1.4e3 and the like for some, which are two digits only."""
    macs_billions: float
    """Multiply-accumulate operations for one image; the source does not say how they were counted."""


COMPLEXITY_SOURCE = "D3SR (arXiv 2410.04224), Table 3: one image of 512 x 512 on one A100 with 40 GB"
COMPLEXITY_SIDE = 512
"""Output side of the table's images."""
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


SCHEMA = 1
COUNTING = """\
One multiply-accumulate operation (MAC) is one multiplication and one addition. Two ways of counting stand side by side.
*All products* is PyTorch's own counter: every convolution and every product of matrices, also the two inside each
attention, queries with keys and weights with values. *Layers only* looks at convolution and linear layers, as most
profilers do, and so leaves the two products of attention out. Normalisation, activations, additions, Eq. 1 of the paper
and bicubic enlargement are in neither."""
STAGES = """\
Inference runs `encode`, `unet` as often as its line says (once if it says nothing) and `decode`. A discriminator is
there in training only: it is evaluated three times for every photo, once for the generator's update and twice for its
own. OSEDiff's two further UNets are there in training only too: each is evaluated twice for every photo, the teacher
under two prompts, the regulariser for the generator's update and for its own. A stage's parameters are those that it
uses; the prompt embedding belongs to `unet`. With adapters beside their layers the UNet costs more than with adapters
merged into them, which is how it runs in the end. Where the prompt is constant, its keys and values could be kept as
well; that is not counted."""
PUBLISHED = """\
The paper's rows are as printed (its 1.4e3 and the like are two digits). Ours name both ways of counting. Time needs a
real machine and is no matter of this page."""
ADAPTERS = """\
The paper prints 966.3 M and 2,132 G in its Table 3 and 2,120 G in its Figure 1, and says neither which layers have
adapters nor how it counted. The profiler thop counts layers only, adds four operations for every element that a layer
normalisation puts out, and takes for parameters only those of the layers that it knows: group normalisation and the
prompt embedding are left out. The last column names the paper's figures that thop's count gives in every printed
digit."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was counted."""

    side: int
    """Side of the square image put out, in pixels."""
    networks: Sequence[Complexity]
    """The networks, in the order asked for."""
    adapters: Sequence[AdapterSet] = ()
    """D3SR with several sets of adapters; empty where that was not asked for."""


def as_document(report: Report) -> dict[str, Any]:
    """Everything counted, and the published figures, as plain data for JSON."""
    return {
        "schema": SCHEMA,
        "size": report.side,
        "networks": [_network(network) for network in report.networks],
        "adapters": [_adapter_set(found) for found in report.adapters],
        "published": {
            "source": COMPLEXITY_SOURCE,
            "size": COMPLEXITY_SIDE,
            "methods": [asdict(row) for row in COMPLEXITY],
            "d3sr_figure_1_macs_billions": D3SR_FIGURE_1_MACS_BILLIONS,
        },
    }


def _network(network: Complexity) -> dict[str, Any]:
    return {
        "name": network.name,
        "summary": network.summary,
        "parameters": network.parameters,
        "trainable": network.trainable,
        "parts": dict(network.parts),
        "macs": network.macs,
        "layer_macs": network.layer_macs,
        "stages": [{"name": stage.name, "times": stage.times, **asdict(stage.cost)} for stage in network.stages],
    }


def _adapter_set(found: AdapterSet) -> dict[str, Any]:
    whole = found.complexity
    return {
        "layers": found.layers,
        "parameters": whole.parameters,
        "trainable": whole.trainable,
        "macs": whole.macs,
        "layer_macs": whole.layer_macs,
        "thop_parameters": found.thop_parameters,
        "thop_macs": found.thop_macs,
    }


def tables(report: Report) -> list[Table]:
    """Stages, parts, the published comparison where the size is the published one, and the sets of adapters."""
    found = [stage_table(report), part_table(report)]
    if report.side == COMPLEXITY_SIDE:
        found.append(published_table(report))
    return [*found, adapter_table(report)] if report.adapters else found


def stage_table(report: Report) -> Table:
    """Parameters and MACs of every stage of every network, with totals where there is more than one stage."""
    rows: list[tuple[str, ...]] = []
    for network in report.networks:
        for stage in network.stages:
            cost, times = stage.cost, stage.times
            counts = (millions(cost.parameters), millions(cost.trainable))
            macs = (billions(times * cost.macs), billions(times * cost.layer_macs))
            rows.append((network.name, stage.name if times == 1 else f"{times} x {stage.name}", *counts, *macs))
        if len(network.stages) > 1:
            counts = (millions(network.parameters), millions(network.trainable))
            rows.append((network.name, "total", *counts, billions(network.macs), billions(network.layer_macs)))
    counted = ("parameters, M", "trainable, M", "MACs, G (all products)", "MACs, G (layers only)")
    title = f"Stages, for one image of {report.side} x {report.side} pixels"
    return Table(title=title, note=STAGES, columns=("network", "stage", *counted), rows=tuple(rows), words=2)


def part_table(report: Report) -> Table:
    """Parameters by part of the network."""
    rows = [(network.name, part, millions(n)) for network in report.networks for part, n in network.parts.items()]
    return Table(title="Parts", columns=("network", "part", "parameters, M"), rows=tuple(rows), words=2)


def published_table(report: Report) -> Table:
    """The paper's table, and under it the generators counted here."""
    rows: list[tuple[str, ...]] = []
    for row in COMPLEXITY:
        digits = 1 if row.parameters_millions < 1000 else 0
        parameters, macs = f"{row.parameters_millions:,.{digits}f}", f"{row.macs_billions:,.0f}"
        rows.append((row.method, str(row.steps), f"{row.seconds:.2f}", parameters, macs))
    for network in report.networks:
        if len(network.stages) > 1:
            macs = f"{billions(network.layer_macs)} layers only, {billions(network.macs)} all products"
            rows.append(
                (f"{network.name}, counted here", str(network.steps), "", f"{network.parameters / 1e6:,.1f}", macs)
            )
    columns = ("method", "steps", "time, s", "parameters, M", "MACs, G")
    return Table(title=f"Beside {COMPLEXITY_SOURCE}", note=PUBLISHED, columns=columns, rows=tuple(rows))


def adapter_table(report: Report) -> Table:
    """D3SR by layers that have adapters: true parameters, layers only, and what the profiler thop prints."""
    rows = tuple(
        (
            found.layers,
            millions(found.complexity.parameters),
            billions(found.complexity.layer_macs),
            millions(found.thop_parameters),
            billions(found.thop_macs),
            reproduced(found),
        )
        for found in report.adapters
    )
    return Table(
        title="D3SR on Stable Diffusion 2.1-base by layers that have adapters",
        note=ADAPTERS,
        columns=("adapters on", "parameters, M", "MACs, G (layers only)", "thop: M", "thop: G", "gives the paper's"),
        rows=rows,
    )


def reproduced(found: AdapterSet) -> str:
    """Which of the paper's figures for D3SR thop's counts round to, in every printed digit."""
    parameters, macs = round(found.thop_parameters / 1e6, 1), round(found.thop_macs / 1e9)
    figures = {
        f"{D3SR_COMPLEXITY.parameters_millions:.1f} M": parameters == D3SR_COMPLEXITY.parameters_millions,
        f"{D3SR_COMPLEXITY.macs_billions:,.0f} G": macs == D3SR_COMPLEXITY.macs_billions,
        f"{D3SR_FIGURE_1_MACS_BILLIONS:,.0f} G": macs == D3SR_FIGURE_1_MACS_BILLIONS,
    }
    return ", ".join(figure for figure, same in figures.items() if same)


def as_markdown(report: Report, *, command: str, machine: str) -> str:
    """A page: how it was made, what is counted, and every table with what to know before reading it."""
    made = (
        f"Made by `{command}` on {machine}.\n\nNothing was computed: the networks are built on PyTorch's meta device, "
        "where tensors have shapes but no contents, so that the counts are the same on every machine."
    )
    summaries = "\n".join(f"- `{network.name}`: {network.summary}" for network in report.networks)
    sections = ["# Complexity: parameters and operations", made, COUNTING, summaries]
    return "\n\n".join([*sections, *(table.markdown() for table in tables(report))]) + "\n"

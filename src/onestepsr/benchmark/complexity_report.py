"""Report on the complexity of networks beside published figures: tables, one JSON document and a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from onestepsr.benchmark.complexity import Complexity
from onestepsr.benchmark.counting import Cost
from onestepsr.core.tables import Grid

# ---- published figures, as printed ----


class PublishedComplexity(NamedTuple):
    """One column of a published table of complexity."""

    method: str
    steps: int
    """Evaluations of the diffusion network for one image."""
    seconds: float
    parameters_millions: float
    """Parameters in total; the source prints 1.4e3 and the like for some, which are two digits only."""
    macs_billions: float
    """MACs for one image; the source does not say how they were counted."""


COMPLEXITY_SOURCE = "D3SR (arXiv 2410.04224), Table 3: one image of 512 x 512 on one A100 with 40 GB"
COMPLEXITY_SIDE = 512
"""Output side of the table's images."""
D3SR_COMPLEXITY = PublishedComplexity("D3SR", 1, 0.11, 966.3, 2_132)
D3SR_FIGURE_1_MACS_BILLIONS = 2_120.0
"""Figure 1 of the same paper on D3SR, where Table 3 has 2,132."""
COMPLEXITY = (
    PublishedComplexity("StableSR", 200, 11.50, 1400, 75_812),
    PublishedComplexity("DiffBIR", 50, 7.79, 1600, 24_528),
    PublishedComplexity("SeeSR", 50, 5.93, 2000, 32_336),
    PublishedComplexity("ResShift", 15, 0.71, 173.8, 4_903),
    PublishedComplexity("SinSR", 1, 0.16, 173.8, 2_059),
    PublishedComplexity("OSEDiff", 1, 0.35, 1400, 2_269),
    D3SR_COMPLEXITY,
)

# ---- report ----

COUNTING = """\
One multiply-accumulate operation (MAC) is one multiplication and one addition. Two ways of counting stand side by side.
*All products* is PyTorch's own counter: every convolution and every matrix product, also the two inside each
attention, queries with keys and weights with values. *Layers only* looks at convolution and linear layers, as most
profilers do, and so leaves the two products of attention out. Normalisation, activations, additions, Eq. 1 of the paper
and bicubic enlargement are in neither."""
STAGES = """\
Inference runs `encode`, `unet` as often as its line says (once if it says nothing) and `decode`. A discriminator is
used in training only: it is evaluated three times for every photo, once for the generator's update and twice for its
own. OSEDiff's two further UNets are used in training only too: each is evaluated twice for every photo, the teacher
under two prompts, the regulariser for the generator's update and for its own. A stage's parameters are those that it
uses; the prompt embedding belongs to `unet`. With adapters beside their layers the UNet costs more than with adapters
merged into them, which is how it runs in the end. Where the prompt is constant, its keys and values could be kept as
well; that is not counted."""
PUBLISHED_NOTE = """\
The paper's rows are as printed (its 1.4e3 and the like are two digits). Ours name both ways of counting. Time depends
on the machine and is not measured here."""
ADAPTERS = """\
The paper prints 966.3 M and 2,132 G in its Table 3 and 2,120 G in its Figure 1, and says neither which layers have
adapters nor how it counted. The profiler thop counts layers only, adds four operations for every element of a layer
normalisation's output, and takes for parameters only those of the layers that it knows: group normalisation and the
prompt embedding are left out. The last column names the paper's figures that thop's count gives in every printed
digit."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Complexity of several networks for one image size."""

    side: int
    """Side of the square output image, in pixels."""
    networks: Sequence[Complexity]
    """The networks, in the order asked for."""
    adapters: Sequence[Complexity] = ()
    """D3SR with several sets of adapters; empty where that was not asked for."""


def as_document(report: Report) -> dict[str, Any]:
    """All counts, and the published figures, as plain data for JSON."""
    totals = ("parameters", "trainable", "macs", "layer_macs")
    return {
        "schema": 1,
        "size": report.side,
        "networks": [
            {
                **{name: getattr(network, name) for name in ("name", "summary", *totals)},
                "parts": dict(network.parts),
                "stages": [
                    {"name": stage.name, "times": stage.times, **asdict(stage.cost)} for stage in network.stages
                ],
            }
            for network in report.networks
        ],
        "adapters": [
            {"layers": found.name} | {name: getattr(found, name) for name in (*totals, "thop_parameters", "thop_macs")}
            for found in report.adapters
        ],
        "published": {
            "source": COMPLEXITY_SOURCE,
            "size": COMPLEXITY_SIDE,
            "methods": [row._asdict() for row in COMPLEXITY],
            "d3sr_figure_1_macs_billions": D3SR_FIGURE_1_MACS_BILLIONS,
        },
    }


def tables(report: Report) -> list[Grid]:
    """Stages, parts, the published comparison where the size is the published one, and the sets of adapters."""
    parts = [(network.name, part, millions(n)) for network in report.networks for part, n in network.parts.items()]
    found = [stage_table(report)]
    found.append(Grid(title="Parts", columns=("network", "part", "parameters, M"), rows=tuple(parts), words=2))
    if report.side == COMPLEXITY_SIDE:
        found.append(published_table(report))
    return [*found, adapter_table(report)] if report.adapters else found


def stage_table(report: Report) -> Grid:
    """Parameters and MACs of every stage of every network, with totals where there is more than one stage."""
    rows: list[tuple[str, ...]] = []

    def add(network: str, name: str, counted: Cost | Complexity, times: int = 1) -> None:
        sizes = millions(counted.parameters), millions(counted.trainable)
        macs = billions(times * counted.macs), billions(times * counted.layer_macs)
        rows.append((network, name if times == 1 else f"{times} x {name}", *sizes, *macs))

    for network in report.networks:
        for stage in network.stages:
            add(network.name, stage.name, stage.cost, stage.times)
        if len(network.stages) > 1:
            add(network.name, "total", network)
    counted = ("parameters, M", "trainable, M", "MACs, G (all products)", "MACs, G (layers only)")
    title = f"Stages, for one image of {report.side} x {report.side} pixels"
    return Grid(title=title, lead=STAGES, columns=("network", "stage", *counted), rows=tuple(rows), words=2)


def published_table(report: Report) -> Grid:
    """The paper's table, and under it the generators counted here."""
    rows: list[tuple[str, ...]] = []
    for row in COMPLEXITY:
        parameters = f"{row.parameters_millions:,.{1 if row.parameters_millions < 1000 else 0}f}"
        rows.append((row.method, str(row.steps), f"{row.seconds:.2f}", parameters, f"{row.macs_billions:,.0f}"))
    for network in (network for network in report.networks if len(network.stages) > 1):
        macs = f"{billions(network.layer_macs)} layers only, {billions(network.macs)} all products"
        name, parameters = f"{network.name}, counted here", f"{network.parameters / 1e6:,.1f}"
        rows.append((name, str(network.steps), "", parameters, macs))
    columns = ("method", "steps", "time, s", "parameters, M", "MACs, G")
    return Grid(title=f"Beside {COMPLEXITY_SOURCE}", lead=PUBLISHED_NOTE, columns=columns, rows=tuple(rows))


def adapter_table(report: Report) -> Grid:
    """D3SR by layers that have adapters: true parameters, layers only, and the figures of the profiler thop."""
    rows = tuple(
        (
            *(found.name, millions(found.parameters), billions(found.layer_macs)),
            *(millions(found.thop_parameters), billions(found.thop_macs), reproduced(found)),
        )
        for found in report.adapters
    )
    return Grid(
        title="D3SR on Stable Diffusion 2.1-base by layers that have adapters",
        lead=ADAPTERS,
        columns=("adapters on", "parameters, M", "MACs, G (layers only)", "thop: M", "thop: G", "gives the paper's"),
        rows=rows,
    )


def reproduced(found: Complexity) -> str:
    """The paper's figures for D3SR that thop's counts round to, in every printed digit."""
    parameters, macs = round(found.thop_parameters / 1e6, 1), round(found.thop_macs / 1e9)
    figures = {
        f"{D3SR_COMPLEXITY.parameters_millions:.1f} M": parameters == D3SR_COMPLEXITY.parameters_millions,
        f"{D3SR_COMPLEXITY.macs_billions:,.0f} G": macs == D3SR_COMPLEXITY.macs_billions,
        f"{D3SR_FIGURE_1_MACS_BILLIONS:,.0f} G": macs == D3SR_FIGURE_1_MACS_BILLIONS,
    }
    return ", ".join(figure for figure, same in figures.items() if same)


def as_markdown(report: Report, *, command: str, machine: str) -> str:
    """A page: command and machine, way of counting, and every table with its note."""
    made = (
        f"Made by `{command}` on {machine}.\n\nNothing was computed: the networks are built on PyTorch's meta device, "
        "where tensors have shapes but no contents, so that the counts are the same on every machine."
    )
    summaries = "\n".join(f"- `{network.name}`: {network.summary}" for network in report.networks)
    sections = ["# Complexity: parameters and operations", made, COUNTING, summaries]
    return "\n\n".join([*sections, *(table.section() for table in tables(report))]) + "\n"


def millions(count: float) -> str:
    """A count of parameters in millions, three decimals."""
    return f"{count / 1e6:,.3f}"


def billions(count: float) -> str:
    """A count of operations in billions: one decimal, three below ten."""
    value = count / 1e9
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"

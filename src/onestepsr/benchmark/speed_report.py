"""Measured speed as tables, as one JSON document and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from onestepsr.benchmark.speed import SpeedConfig
from onestepsr.benchmark.speed_result import ModelSpeed, PathSpeed, StepRatio, step_ratios
from onestepsr.benchmark.tables import Table

SCHEMA = 1
DISTURBED = 0.1
"""Share of the cores that other work may take before the figures are said to be disturbed."""
MEASURING = """\
`product` is the upscaler as the `upscale` command uses it. `baseline` is the same network as published scripts run it:
eager float32, contiguous tensors, whole images; what depends on the prompt alone is computed beforehand in both. They
run in turn, so that a disturbance meets both. `enlarge` is what the generator does besides its stages: padding and
bicubic enlargement. `colour` is everything around the generator: dtypes, joining of tiles, colour fix and
rounding. Times are medians with quartiles."""
THROUGHPUT = """\
TFLOP/s are the operations of encode, UNet and decode (two per multiply-accumulate, all products of matrices) over the
sum of these stages' medians. The ceiling is the best that the same run found for a 3 x 3 convolution and for a product
of matrices, in the same dtype and memory format; the fraction is of the convolution's. Speed-up is the
baseline's median over the product's for the network alone, agreement the PSNR between the images of both. Memory is
the peak of a process of its own over what it took before it loaded the model: resident, and on the accelerator if there
is one. Images and megapixels put out per second count everything from file to file."""
STEPS = """\
`network` compares whole images without files and colour fix, `steps alone` the evaluations of the diffusion network
only, `file to file` everything."""


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """What was measured, where and how."""

    models: Sequence[ModelSpeed]
    """The models, in the order asked for."""
    config: SpeedConfig
    """Settings."""
    command: str
    """The command that measured."""
    machine: str
    """Processor, accelerator and versions."""
    device: str
    """Where the networks ran."""
    threads: int
    """Threads of the processor that PyTorch used."""
    other_work: float | None
    """Cores that were busy with something else meanwhile, on average; None where the system does not tell."""
    cores: int
    """Cores that could be used."""
    date: str
    """Day, ISO 8601."""

    @property
    def disturbed(self) -> bool:
        """Whether the machine had too much else to do."""
        return self.other_work is not None and self.other_work > DISTURBED * self.cores


def as_document(report: SpeedReport) -> dict[str, Any]:
    """Everything measured as plain data for JSON; times in seconds."""
    return {
        "schema": SCHEMA,
        "command": report.command,
        "machine": report.machine,
        "device": report.device,
        "threads": report.threads,
        "cores": report.cores,
        "cores_busy_with_other_work": report.other_work,
        "disturbed": report.disturbed,
        "date": report.date,
        "settings": asdict(report.config),
        "models": [_model(model) for model in report.models],
        "speedup_over_steps": [_ratio(ratio) for ratio in step_ratios(report.models)],
    }


def _model(found: ModelSpeed) -> dict[str, Any]:
    return {
        "model": found.model,
        "steps": found.steps,
        "output": list(found.output),
        "batch": found.batch,
        "images_per_second": found.images_per_second,
        "megapixels_per_second": found.megapixels_per_second,
        "tflops": found.product.tflops,
        "ceiling_tflops": asdict(found.ceiling),
        "fraction_of_ceiling": found.fraction_of_ceiling,
        "fraction_of_matrix_ceiling": found.fraction_of_matrix_ceiling,
        "speedup_over_baseline": found.speedup_over_baseline,
        "agreement_db": found.agreement_db,
        "memory_bytes": None if found.memory is None else {**asdict(found.memory), "own": found.memory.own},
        "product": _path(found.product),
        "baseline": None if found.baseline is None else _path(found.baseline),
    }


def _path(path: PathSpeed) -> dict[str, Any]:
    return {
        "dtype": path.dtype,
        "memory_format": path.memory_format,
        "tile": path.tile,
        "network": asdict(path.network),
        "whole": asdict(path.whole),
        "macs": path.macs,
        "tflops": path.tflops,
        "stages": [
            {
                "name": stage.name,
                **asdict(stage.seconds),
                "macs": stage.macs,
                "tflops": stage.tflops,
                **({} if stage.tile is None else {"tile": stage.tile}),
            }
            for stage in path.stages
        ],
    }


def _ratio(ratio: StepRatio) -> dict[str, Any]:
    return {
        "model": ratio.one.model,
        "over_model": ratio.many.model,
        "over_steps": ratio.many.steps,
        "network": ratio.network,
        "steps_alone": ratio.steps,
        "file_to_file": ratio.whole,
    }


def tables(report: SpeedReport) -> list[Table]:
    """Figures of the models, their stages, and one step beside several where both were measured."""
    ratios = step_ratios(report.models)
    return [model_table(report), stage_table(report), *([ratio_table(ratios)] if ratios else [])]


def model_table(report: SpeedReport) -> Table:
    """One row for each model."""
    side, batch = f"{report.config.width} x {report.config.height}", report.config.batch
    columns = ("model", "steps", "dtype", "network, s", "whole, s", "images/s", "Mpixel/s", "TFLOP/s")
    more = ("ceiling: conv.", "matrix", "fraction", "speed-up", "agreement, dB", "memory, MB", "device, MB")
    return Table(
        title=f"Speed for images of {side} pixels"
        + (f", {batch} at once" if batch > 1 else "")
        + (", compiled" if report.config.compiled else ""),
        note=THROUGHPUT,
        columns=(*columns, *more),
        rows=tuple(_model_row(found) for found in report.models),
    )


def _model_row(found: ModelSpeed) -> tuple[str, ...]:
    memory = found.memory
    return (
        found.model,
        str(found.steps),
        found.product.dtype,
        f"{found.product.network.median:.4g}",
        f"{found.product.whole.median:.4g}",
        f"{found.images_per_second:.3g}",
        f"{found.megapixels_per_second:.3g}",
        _digits(found.product.tflops, ".3g"),
        f"{found.ceiling.convolution:.3g}",
        f"{found.ceiling.matrix:.3g}",
        _digits(found.fraction_of_ceiling, ".0%"),
        _digits(found.speedup_over_baseline, ".2f"),
        _digits(found.agreement_db, ".1f"),
        _digits(None if memory is None else memory.own / 1e6, ",.0f"),
        _digits(None if memory is None or memory.device_peak is None else memory.device_peak / 1e6, ",.0f"),
    )


def stage_table(report: SpeedReport) -> Table:
    """One row for each stage of each path."""
    rows: list[tuple[str, ...]] = []
    for found in report.models:
        for name, path in (("product", found.product), ("baseline", found.baseline)):
            if path is not None:
                rows += [(f"{found.model}, {_steps(found)}", name, *cells) for cells in _stage_rows(path)]
    columns = ("model", "path", "stage", "median, ms", "quartiles, ms", "MACs, G", "TFLOP/s")
    return Table(title="Stages", note=MEASURING, columns=columns, rows=tuple(rows), words=3)


def _stage_rows(path: PathSpeed) -> list[tuple[str, ...]]:
    parts = [(stage.name, stage.seconds, stage.macs, stage.tflops) for stage in path.stages]
    parts += [("network", path.network, path.macs, path.tflops), ("whole", path.whole, None, None)]
    return [
        (
            name,
            f"{seconds.median * 1e3:,.1f}",
            f"{seconds.lower * 1e3:,.1f} to {seconds.upper * 1e3:,.1f}",
            "" if not macs else f"{macs / 1e9:,.1f}",
            _digits(tflops, ".3g"),
        )
        for name, seconds, macs, tflops in parts
    ]


def ratio_table(ratios: Sequence[StepRatio]) -> Table:
    """How much faster one step is."""
    rows = tuple(
        (
            ratio.one.model,
            f"{ratio.many.model}, {_steps(ratio.many)}",
            f"{ratio.network:.2f}",
            _digits(ratio.steps, ".2f"),
            f"{ratio.whole:.2f}",
        )
        for ratio in ratios
    )
    columns = ("one step", "beside", "network", "steps alone", "file to file")
    return Table(title="One step against several: times faster", note=STEPS, columns=columns, rows=rows, words=2)


def circumstances(report: SpeedReport) -> str:
    """How the figures came about, in one paragraph; says so when the machine was not idle."""
    other = "" if report.other_work is None else f"; other work kept {report.other_work:.2f} cores busy meanwhile"
    text = (
        f"Measured by `{report.command}` on {report.date} on {report.machine}; networks on {report.device}, "
        f"{report.threads} threads{other}."
    )
    return f"{text} **The machine was not idle: these times say little.**" if report.disturbed else text


def as_markdown(report: SpeedReport) -> str:
    """A page: how it was made, and every table with what to know before reading it."""
    sections = ["# Speed", circumstances(report), *(table.markdown() for table in tables(report))]
    return "\n\n".join(sections) + "\n"


def _steps(found: ModelSpeed) -> str:
    return "1 step" if found.steps == 1 else f"{found.steps} steps"


def _digits(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

"""Report on measured speed: one JSON document, and tables and a page of Markdown made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from onestepsr.core.machine import cores
from onestepsr.core.tables import Grid

if TYPE_CHECKING:
    from onestepsr.benchmark.speed import SpeedConfig

Figures = Mapping[str, Any]
"""Part of the JSON document, as docs/benchmark.md describes it."""
DISTURBED = 0.1
"""Share of the cores that other work may take before the figures are said to be disturbed."""
MEASURING = """\
`product` is the upscaler as the `upscale` command uses it. `baseline` is the same network as published scripts run it:
eager float32, contiguous tensors, whole images; what depends on the prompt alone is computed beforehand in both. They
run in turn, so that a disturbance meets both. `enlarge` is the generator's work besides its stages: padding and
bicubic enlargement. `colour` is everything around the generator: dtypes, joining of tiles, colour fix and
rounding. Times are medians with quartiles."""
THROUGHPUT = """\
TFLOP/s are the operations of encode, UNet and decode (two per multiply-accumulate, all matrix products) over the
sum of these stages' medians. The ceiling is the best that the same run found for a 3 x 3 convolution and for a
matrix product, in the same dtype and memory format; the fraction is of the convolution's. Speed-up is the
baseline's median over the product's for the network alone, agreement the PSNR between the images of both. Memory is
the peak of a fresh process over its size before it loaded the model: resident, and on the accelerator if there
is one. Images and megapixels of output per second count everything from file to file."""
COMPARING = """\
Seconds are the median for one image from file to file, in the same run on the same machine; the ratio is of these, to
the first model of the command line."""
STEPS = """\
`network` compares whole images without files and colour fix, `steps alone` the evaluations of the diffusion network
only, `file to file` everything."""


def document(
    models: Sequence[Figures], config: SpeedConfig, *, busy: float | None, **circumstances: Any
) -> dict[str, Any]:
    """All figures of ``models`` as plain data for JSON; times in seconds.

    ``busy``: cores that were busy with something else meanwhile, on average; None where the system does not tell.
    ``circumstances``: command, machine, device, threads and date.
    """
    return {
        "schema": 1,
        **circumstances,
        "cores": cores(),
        "cores_busy_with_other_work": busy,
        "disturbed": busy is not None and busy > DISTURBED * cores(),
        "settings": asdict(config),
        "models": list(models),
        "speedup_over_steps": step_ratios(models),
    }


def step_ratios(models: Sequence[Figures]) -> list[dict[str, Any]]:
    """Ratios of median times of every one-step model and every model of several steps."""
    ones, others = ([model for model in models if (model["steps"] == 1) == single] for single in (True, False))
    ratios = []
    for one, many in ((one, many) for one in ones for many in others):
        alone, all_steps = _diffusion(one["product"]), _diffusion(many["product"])
        ratios.append(
            {
                "model": one["model"],
                "over_model": many["model"],
                "over_steps": many["steps"],
                "network": many["product"]["network"]["median"] / one["product"]["network"]["median"],
                "steps_alone": all_steps / alone if all_steps and alone else None,
                "file_to_file": many["product"]["whole"]["median"] / one["product"]["whole"]["median"],
            }
        )
    return ratios


def _diffusion(path: Figures) -> float | None:
    """Median seconds of the diffusion network alone: all its evaluations, nothing else."""
    return next((stage["median"] for stage in path["stages"] if stage["name"] in ("steps", "unet")), None)


def tables(report: Figures) -> list[Grid]:
    """Several models side by side, their figures, their stages, and one step beside several where both were
    measured."""
    beside = [comparison_table(report)] if len(report["models"]) > 1 else []
    ratios = [ratio_table(report)] if report["speedup_over_steps"] else []
    return [*beside, model_table(report), stage_table(report), *ratios]


def comparison_table(report: Figures) -> Grid:
    """One row for each model, in the order of the command line: time from file to file, as a ratio to the first."""
    first = report["models"][0]["product"]["whole"]["median"]
    rows = tuple(
        (
            found["model"] + ("" if found["steps"] == 1 else f", {_steps(found['steps'])}"),
            _digits(found["product"]["whole"]["median"], ".4g"),
            _digits(found["megapixels_per_second"], ".3g"),
            _digits(found["memory_bytes"]["own"] / 1e6 if found["memory_bytes"] else None, ",.0f"),
            _digits(found["product"]["whole"]["median"] / first, ".2f"),
        )
        for found in report["models"]
    )
    columns = ("model", "seconds", "Mpixel/s", "memory, MB", f"ratio to {report['models'][0]['model']}")
    return Grid(title="Models side by side", lead=COMPARING, columns=columns, rows=rows)


def model_table(report: Figures) -> Grid:
    """One row for each model."""
    settings = report["settings"]
    columns = ("model", "steps", "dtype", "network, s", "whole, s", "images/s", "Mpixel/s", "TFLOP/s")
    more = ("ceiling: conv.", "matrix", "fraction", "speed-up", "agreement, dB", "memory, MB", "device, MB")
    return Grid(
        title=f"Speed for images of {settings['width']} x {settings['height']} pixels"
        + (f", {settings['batch']} at once" if settings["batch"] > 1 else "")
        + (", compiled" if settings["compiled"] else ""),
        lead=THROUGHPUT,
        columns=(*columns, *more),
        rows=tuple(_model_row(found) for found in report["models"]),
    )


def _model_row(found: Figures) -> tuple[str, ...]:
    product, memory = found["product"], found["memory_bytes"] or {}
    device = memory.get("device_peak")
    return (
        *(found["model"], str(found["steps"]), product["dtype"]),
        *(_digits(product[name]["median"], ".4g") for name in ("network", "whole")),
        *(_digits(found[name], ".3g") for name in ("images_per_second", "megapixels_per_second", "tflops")),
        *(_digits(found["ceiling_tflops"][name], ".3g") for name in ("convolution", "matrix")),
        _digits(found["fraction_of_ceiling"], ".0%"),
        _digits(found["speedup_over_baseline"], ".2f"),
        _digits(found["agreement_db"], ".1f"),
        _digits(memory["own"] / 1e6 if memory else None, ",.0f"),
        _digits(None if device is None else device / 1e6, ",.0f"),
    )


def stage_table(report: Figures) -> Grid:
    """One row for each stage of each path."""
    rows = [
        (f"{found['model']}, {_steps(found['steps'])}", path, *cells)
        for found in report["models"]
        for path in ("product", "baseline")
        if found[path]
        for cells in _stage_rows(found[path])
    ]
    columns = ("model", "path", "stage", "median, ms", "quartiles, ms", "MACs, G", "TFLOP/s")
    return Grid(title="Stages", lead=MEASURING, columns=columns, rows=tuple(rows), words=3)


def _stage_rows(path: Figures) -> list[tuple[str, ...]]:
    network = {"name": "network", **path["network"], "macs": path["macs"], "tflops": path["tflops"]}
    whole = {"name": "whole", **path["whole"], "macs": None, "tflops": None}
    return [
        (
            row["name"],
            f"{row['median'] * 1e3:,.1f}",
            f"{row['lower'] * 1e3:,.1f} to {row['upper'] * 1e3:,.1f}",
            f"{row['macs'] / 1e9:,.1f}" if row["macs"] else "",
            _digits(row["tflops"], ".3g"),
        )
        for row in (*path["stages"], network, whole)
    ]


def ratio_table(report: Figures) -> Grid:
    """One row for every one-step model and model of several steps."""
    rows = tuple(
        (
            ratio["model"],
            f"{ratio['over_model']}, {_steps(ratio['over_steps'])}",
            *(_digits(ratio[name], ".2f") for name in ("network", "steps_alone", "file_to_file")),
        )
        for ratio in report["speedup_over_steps"]
    )
    columns = ("one step", "beside", "network", "steps alone", "file to file")
    return Grid(title="One step against several: times faster", lead=STEPS, columns=columns, rows=rows, words=2)


def circumstances(report: Figures) -> str:
    """Command, day and machine in one paragraph, which says so when the machine was not idle."""
    busy = report["cores_busy_with_other_work"]
    other = "" if busy is None else f"; other work kept {busy:.2f} cores busy meanwhile"
    text = (
        f"Measured by `{report['command']}` on {report['date']} on {report['machine']}; networks on "
        f"{report['device']}, {report['threads']} threads{other}."
    )
    return f"{text} **The machine was not idle: these times say little.**" if report["disturbed"] else text


def as_markdown(report: Figures) -> str:
    """A page: the circumstances, and every table with its note."""
    sections = ["# Speed", circumstances(report), *(table.section() for table in tables(report))]
    return "\n\n".join(sections) + "\n"


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"


def _digits(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

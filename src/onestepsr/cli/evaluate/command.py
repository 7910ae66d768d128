"""``onestepsr evaluate``: metrics of super-resolved images, or of a model that is run first; ``compare``; ``plot``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from onestepsr.cli.batch import ClusterOptions
from onestepsr.cli.evaluate import plot
from onestepsr.cli.evaluate.measure import (
    LIST_METRICS,
    MeasureOptions,
    ModelOptions,
    Outcome,
    measure_images,
    measure_model,
    show_unavailable,
)
from onestepsr.cli.options import grouped, refuse
from onestepsr.cli.upscale.prompts import PromptOptions
from onestepsr.core.errors import UserError
from onestepsr.core.progress import progress

if TYPE_CHECKING:
    from onestepsr.core.tables import Grid
    from onestepsr.evaluate.comparison import Comparison


# ---- outputs besides the terminal ----


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Files to write, and published numbers to print."""

    csv: Annotated[Path | None, typer.Option(help="Write every value to this file: method, image, metrics.")] = None
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file as Markdown.")] = None
    latex: Annotated[Path | None, typer.Option(help="Write the tables to this file as LaTeX (booktabs).")] = None
    report: Annotated[
        Path | None, typer.Option(help="Write a page with images to this folder; it opens offline in any browser.")
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the results, with the rows of --beside, as a radar chart: .png, .svg or .pdf."),
    ] = None
    beside: Annotated[
        str | None,
        typer.Option(
            help="Print published numbers on this dataset beside the results, such as realsr, or of one table: "
            "osediff/realsr. Differences in how they were measured are listed."
        ),
    ] = None

    def check(self, json_file: Path | None) -> None:
        """Raise UserError now for outputs that could not be written after measuring."""
        from onestepsr.evaluate.report import PAGE, refuse_foreign
        from onestepsr.evaluate.tables import find_published

        files = {"--json": json_file, "--csv": self.csv, "--markdown": self.markdown, "--latex": self.latex}
        for option, path in files.items():
            if path is None:
                continue
            if not path.parent.is_dir():
                raise UserError(f"{option} {path}: the folder {path.parent} does not exist")
            if not os.access(path.parent, os.W_OK):
                raise UserError(f"{option} {path}: the folder {path.parent} cannot be written to")
            if path.is_dir():
                raise UserError(f"{option} {path}: is a folder, expected a file")
        if self.report is not None:
            if self.report.exists() and not self.report.is_dir():
                raise UserError(f"--report {self.report}: is a file, expected a folder")
            refuse_foreign(self.report / PAGE)
        if self.beside is not None:
            find_published(self.beside)
        if self.plot is not None:
            from onestepsr.evaluate.figures import check_figure

            check_figure(self.plot, "--plot")

    def write(self, comparison: Comparison, grids: Sequence[Grid]) -> None:
        """Print the published numbers and write the files; ``grids`` are the tables that were printed.

        UserError, once everything else is written, if no published table has a metric of the results.
        """
        from onestepsr.core.files import write_text
        from onestepsr.evaluate.report import PAGE, write_report
        from onestepsr.evaluate.tables import beside, values_csv

        published: list[Grid] = []
        problem: UserError | None = None
        try:
            published = beside(comparison.results, self.beside) if self.beside else []
        except UserError as error:  # measuring may have taken hours: the files come first
            problem = error
        for grid in published:
            grid.show()
        tables = [*grids, *published]
        if self.csv is not None:
            write_text(self.csv, values_csv(comparison.results))
        if self.markdown is not None:
            titles = [f"**{grid.title}**\n\n" if grid.title else "" for grid in tables]
            parts = [title + grid.markdown() for title, grid in zip(titles, tables, strict=True)]
            write_text(self.markdown, "\n\n".join(parts) + "\n")
        if self.latex is not None:
            write_text(self.latex, "\n\n".join(grid.latex() for grid in tables) + "\n")
        if self.report is not None:
            problems = write_report(
                self.report, comparison, published=published, track=lambda names: progress(names, "Writing images")
            )
            for line in problems:
                typer.echo(f"not in the report: {line}", err=True)
            typer.echo(f"report: {self.report / PAGE}", err=True)
        if self.plot is not None and problem is None:
            from onestepsr.evaluate.figures import radar, radar_rows

            radar(*radar_rows(comparison.results, self.beside), self.plot)
        if problem is not None:
            raise problem


# ---- evaluate ----


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate", no_args_is_help=True, cls=WithCompare)(grouped(evaluate))


def evaluate(
    context: typer.Context,
    sr: Annotated[
        Path | None, typer.Argument(help="Super-resolved image, or a folder of them.", show_default=False)
    ] = None,
    *,
    hr: Annotated[Path | None, typer.Option(help="Reference image or folder; matched by file name.")] = None,
    suffix: Annotated[
        str, typer.Option(help="Ending that SR (or, with --model, LR) names have beyond HR names, such as -mine.")
    ] = "",
    measuring: MeasureOptions,
    model: ModelOptions,
    prompts: PromptOptions,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    outputs: OutputOptions,
    ray: Annotated[
        bool, typer.Option("--ray", help="Measure SR on a Ray cluster that can read its folders; extra 'batch'.")
    ] = False,
    cluster: ClusterOptions,
) -> None:
    """Measure super-resolved images, against references where there are any; or run a model and measure it.

    'onestepsr evaluate compare A.json B.json' puts results side by side, 'onestepsr evaluate plot' draws the papers'
    figures of analysis. Ends with exit code 1 if an image could not
    be read, paired or measured, or a metric of --metrics could not; the others are measured all the same.
    """
    if measuring.metrics == LIST_METRICS:
        return _list_metrics()
    outputs.check(json_file)
    if not ray:
        refuse(context, [field.name for field in fields(cluster)], "needs --ray")
    elif model.model is not None:
        raise UserError("--ray measures images in files: make them with 'onestepsr batch' instead of --model")
    if model.model is None:
        refuse(context, [field.name for group in (model, prompts) for field in fields(group)], "needs --model")
        if sr is None:
            raise UserError("nothing to measure: give SR images, or --model with --data")
        if hr is None:
            refuse(context, ["suffix"], "needs --hr, to whose names those of SR images belong")
        outcome = measure_images(sr, hr, suffix, measuring, cluster.checked() if ray else None)
        _show(outcome, outputs, json_file)
    else:
        if sr is not None:
            raise UserError(f"'{sr}' and --model exclude each other: --data or --lr names the model's input")
        model.check(hr)
        prompts.refuse_unused(context)
        if model.degradation is not None:
            refuse(context, ["suffix"], "with --degradation, LR images are made of the HR photos and need no names")
        with _kept(model.out, outputs.report) as keep:
            outcome = measure_model(
                model,
                hr,
                prompts,
                measuring,
                keep=keep,
                suffix=suffix,
                refuse_seed=lambda why: refuse(context, ["seed"], why),
            )
            _show(outcome, outputs, json_file, images_stay=keep == model.out)
    asked_for_by_name = measuring.metrics is not None
    if outcome.result.failed or outcome.unmatched or (asked_for_by_name and outcome.result.unavailable):
        raise typer.Exit(1)
    return None


@contextmanager
def _kept(out: Path | None, report: Path | None) -> Iterator[Path | None]:
    """The folder for SR images: the one asked for, a temporary one if only a report needs them, or none."""
    if out is None and report is not None:
        with tempfile.TemporaryDirectory(prefix="onestepsr-") as folder:
            yield Path(folder)
    else:
        yield out


def _show(outcome: Outcome, outputs: OutputOptions, json_file: Path | None, *, images_stay: bool = True) -> None:
    """Print failures and the table, and write the files."""
    from onestepsr.core.tables import safe_text
    from onestepsr.evaluate.comparison import compare
    from onestepsr.evaluate.result import write_result
    from onestepsr.evaluate.run import without_images
    from onestepsr.evaluate.tables import result_grid

    result = outcome.result
    for reason in result.failed.values():
        typer.echo(f"failed: {safe_text(reason)}", err=True)
    known = outcome.reported_unavailable
    show_unavailable({name: reason for name, reason in result.unavailable.items() if name not in known})
    grid = result_grid(result)
    replace(grid, notes=()).show()
    if json_file is not None:
        write_result(json_file, result if images_stay else without_images(result))
    if result.images or result.whole:
        outputs.write(compare([result]), [grid])


def _list_metrics() -> None:
    from onestepsr.core.tables import Grid
    from onestepsr.evaluate.metrics.catalog import METRICS

    rows = []
    for spec in METRICS.values():
        better, reference = "higher" if spec.higher_is_better else "lower", "yes" if spec.needs_reference else "no"
        rows.append((spec.name, spec.title, better, reference, spec.variant))
    Grid(title="", columns=("name", "title", "better", "needs HR", "variant"), rows=tuple(rows), words=5).show()


# ---- evaluate compare ----

COMPARE, PLOT = "compare", "plot"


class WithCompare(TyperCommand):
    """The command ``evaluate``, of which ``evaluate compare`` and ``evaluate plot`` are commands of their own.

    A group would not do: its first argument is the name of a command, and that of ``evaluate`` is a folder.
    """

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of this command, or of the other if its name is the first argument."""
        if args[:1] == [PLOT]:
            return typer.main.get_command(plot.app).make_context(f"{info_name} {PLOT}", args[1:], parent, **extra)
        if args[:1] != [COMPARE]:
            return super().make_context(info_name, args, parent, **extra)
        app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
        app.command(COMPARE, no_args_is_help=True)(grouped(compare_results))
        return typer.main.get_command(app).make_context(f"{info_name} {COMPARE}", args[1:], parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the context is of."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


def compare_results(
    files: Annotated[
        list[Path], typer.Argument(help="Files of 'onestepsr evaluate --json'; all are compared with the first.")
    ],
    *,
    outputs: OutputOptions,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write means, differences and warnings to this file.")
    ] = None,
) -> None:
    """Compare results on the images that all have: means, paired differences from the first, significance.

    Reasons for which results are not comparable, such as another protocol, are listed before the tables.
    """
    from onestepsr.core.files import write_text
    from onestepsr.evaluate.comparison import compare
    from onestepsr.evaluate.result import read_result
    from onestepsr.evaluate.tables import difference_grid, method_grid

    outputs.check(json_file)
    for number, path in enumerate(files):
        if path.resolve() in [earlier.resolve() for earlier in files[:number]]:
            raise UserError(f"{path}: given twice")
    comparison = compare([read_result(path) for path in files])
    for line in comparison.warnings:
        typer.echo(f"warning: {line}", err=True)
    grids = [method_grid(comparison)] + ([difference_grid(comparison)] if comparison.differences else [])
    for grid in grids:
        grid.show()
    if json_file is not None:
        write_text(json_file, json.dumps(comparison.to_mapping(), indent=1, allow_nan=False) + "\n")
    outputs.write(comparison, grids)

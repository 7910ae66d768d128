"""``onestepsr evaluate``: metrics of super-resolved pictures, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onestepsr.apps.evaluate_compare import WithCompare
from onestepsr.errors import UserError
from onestepsr.files import replacing

if TYPE_CHECKING:
    from onestepsr.evaluate.catalog import MetricSpec
    from onestepsr.evaluate.folder import Pairing, Score, Summary

DEFAULT_WITH_REFERENCE = "psnr,ssim,grid"
DEFAULT_ALONE = "grid"
LISTED_NAMES = 10
"""How many names of pictures without counterpart are shown."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate", no_args_is_help=True, cls=WithCompare)(evaluate_command)


def evaluate_command(
    sr: Annotated[Path, typer.Argument(help="Super-resolved picture, or a folder of them.", show_default=False)],
    *,
    hr: Annotated[Path | None, typer.Option(help="Reference picture or folder; matched by file name.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: psnr, psnr_rgb, ssim, overshoot (these need --hr), niqe, grid. "
            f"Default: {DEFAULT_WITH_REFERENCE}; without --hr: {DEFAULT_ALONE}.",
            show_default=False,
        ),
    ] = None,
    suffix: Annotated[str, typer.Option(help="Ending that SR names have beyond HR names, such as _x4.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all values to this file.")] = None,
) -> None:
    """Measure super-resolved pictures, against references where there are any.

    Ends with exit code 1 if a picture could not be read, paired or measured; the others are measured all the same.
    """
    from rich.console import Console
    from rich.progress import track

    from onestepsr.evaluate.catalog import select_metrics
    from onestepsr.evaluate.folder import pair_by_name, report, score_pairs, summarize

    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"--json {json_file}: the folder {json_file.parent} does not exist")
    names = metrics if metrics is not None else (DEFAULT_ALONE if hr is None else DEFAULT_WITH_REFERENCE)
    chosen = select_metrics([name.strip() for name in names.split(",") if name.strip()], with_reference=hr is not None)
    pairing = pair_by_name(sr, hr, suffix=suffix)
    found = score_pairs(pairing.pairs, chosen)
    console = Console(stderr=True)
    total, hidden = len(pairing.pairs), not console.is_terminal
    scores = list(track(found, "Measuring", total=total, console=console, transient=True, disable=hidden))
    summaries = summarize(scores, chosen)
    failed = show_problems(pairing, scores)
    show_table(chosen, summaries)
    if json_file is not None:
        write_json(json_file, report(scores, summaries))
    if failed:
        raise typer.Exit(1)


def show_problems(pairing: Pairing, scores: Sequence[Score]) -> bool:
    """Tell on stderr what could not be measured; returns whether an SR picture is among it."""
    for title, paths in (("SR without HR", pairing.lonely_sr), ("HR without SR", pairing.lonely_hr)):
        if paths:
            names = ", ".join(path.name for path in paths[:LISTED_NAMES])
            more = f" and {len(paths) - LISTED_NAMES} more" if len(paths) > LISTED_NAMES else ""
            typer.echo(f"{title} ({len(paths)}): {names}{more}", err=True)
    problems = [problem for score in scores for problem in score.problems]
    for problem in problems:
        typer.echo(f"failed: {problem}", err=True)
    return bool(problems or pairing.lonely_sr)


def show_table(metrics: Sequence[MetricSpec], summaries: Mapping[str, Summary]) -> None:
    """Print mean, standard deviation and count of each metric."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "better", "mean", "std", "images")
    for column in table.columns[2:]:
        column.justify = "right"
    for metric in metrics:
        summary = summaries.get(metric.name)
        better = "higher" if metric.higher_is_better else "lower"
        values = (f"{summary.mean:.4f}", f"{summary.std:.4f}", str(summary.count)) if summary else ("-", "-", "0")
        table.add_row(metric.title, better, *values)
    Console().print(table)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` under ``path`` in one step."""
    try:
        with replacing(path) as partial:
            partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from error

"""Metrics over files and folders: pair by name, score one image after the other, summarise.

Pictures are compared as stored: 8 or 16 bits scaled to [0, 1], grey repeated into three channels, orientation applied,
transparency and colour profiles left aside.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from onestepsr.data.photos import find_images
from onestepsr.errors import UserError
from onestepsr.evaluate.catalog import MetricSpec
from onestepsr.image import read_picture, samples_to_tensor

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One super-resolved picture and, where there is one, its reference."""

    name: str
    """Path in its folder without the ending, with forward slashes."""
    sr: Path
    hr: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """What is to be compared and what found no counterpart."""

    pairs: list[Pair]
    lonely_sr: list[Path]
    lonely_hr: list[Path]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The values of one picture, and one line for each thing that could not be measured."""

    name: str
    values: dict[str, float]
    problems: list[str]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One metric over all pictures that have it."""

    mean: float
    std: float
    """Sample standard deviation; 0 for a single picture."""
    count: int


def pair_by_name(sr: Path, hr: Path | None = None, *, suffix: str = "") -> Pairing:
    """Match pictures of two folders by file name without ending, never by order.

    ``suffix`` is what SR names have beyond HR names (``_x4``: ``bird_x4.png`` belongs to ``bird.jpg``). Two files are a
    pair whatever their names. Folders are searched with their sub-folders. UserError if nothing matches, and if two
    files claim the same name.
    """
    if sr.is_file() and hr is not None and hr.is_file():
        return Pairing(pairs=[Pair(name=sr.stem, sr=sr, hr=hr)], lonely_sr=[], lonely_hr=[])
    if hr is not None and hr.is_file():
        raise UserError(f"--hr {hr}: is a file but {sr} is a folder; compare two files or two folders")
    made = _by_name(sr, suffix)
    if hr is None:
        return Pairing(pairs=[Pair(name=name, sr=path) for name, path in made.items()], lonely_sr=[], lonely_hr=[])
    references = _by_name(hr, "")
    pairs = [Pair(name=name, sr=made[name], hr=references[name]) for name in made if name in references]
    if not pairs:
        raise UserError(
            f"no picture in {sr} has the name of one in {hr} ('{next(iter(made))}' and '{next(iter(references))}' "
            "are the first of each); --suffix tells what SR names have at their end"
        )
    return Pairing(
        pairs=pairs,
        lonely_sr=[path for name, path in made.items() if name not in references],
        lonely_hr=[] if sr.is_file() else [path for name, path in references.items() if name not in made],
    )


def score_pairs(pairs: Sequence[Pair], metrics: Sequence[MetricSpec]) -> Iterator[Score]:
    """Score the pairs in order; metrics are loaded before the first one is read."""
    measures = {metric.name: metric.load() for metric in metrics}
    for pair in pairs:
        values: dict[str, float] = {}
        problems: list[str] = []
        try:
            sr, hr = _read_pair(pair)
        except UserError as error:
            yield Score(name=pair.name, values=values, problems=[str(error)])
            continue
        for name, measure in measures.items():
            try:
                values[name] = float(measure(sr, hr))
            except UserError as error:
                problems.append(f"{pair.sr}: {error}")
        yield Score(name=pair.name, values=values, problems=problems)


def summarize(scores: Sequence[Score], metrics: Sequence[MetricSpec]) -> dict[str, Summary]:
    """Mean, spread and count of every metric that at least one picture has."""
    result: dict[str, Summary] = {}
    for metric in metrics:
        values = [score.values[metric.name] for score in scores if metric.name in score.values]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            result[metric.name] = Summary(mean=statistics.fmean(values), std=spread, count=len(values))
    return result


def report(scores: Sequence[Score], summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """What ``evaluate --json`` writes: schema, mean by metric, values by image and metric."""
    return {
        "schema": SCHEMA,
        "mean": {name: summary.mean for name, summary in summaries.items()},
        "images": {score.name: score.values for score in scores if score.values},
    }


def _by_name(place: Path, suffix: str) -> dict[str, Path]:
    if place.is_file():
        return {place.stem.removesuffix(suffix): place}
    named: dict[str, Path] = {}
    for path in find_images(place):
        name = path.relative_to(place).with_suffix("").as_posix().removesuffix(suffix)
        if name in named:
            raise UserError(f"{path} and {named[name].name} share the name '{name}': remove one of them")
        named[name] = path
    return named


def _read_pair(pair: Pair) -> tuple[Tensor, Tensor]:
    """SR and HR as (1, 3, H, W) in [0, 1]; without a reference, SR stands for both."""
    sr = _read(pair.sr)
    hr = sr if pair.hr is None else _read(pair.hr)
    if sr.shape != hr.shape:
        sizes = [f"{image.shape[-1]} x {image.shape[-2]}" for image in (sr, hr)]
        raise UserError(f"{pair.sr} is {sizes[0]} but {pair.hr} is {sizes[1]}: sizes have to be equal")
    return sr, hr


def _read(path: Path) -> Tensor:
    return samples_to_tensor(read_picture(path).pixels).expand(-1, 3, -1, -1)

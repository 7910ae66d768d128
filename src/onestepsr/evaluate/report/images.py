"""The images of a report: found where the evaluation had them, written as PNG that any browser shows alike.

Pixels are those that were measured (orientation applied, colour profiles and transparency left aside); nothing else of
a file goes into the report, neither its name nor its metadata. A large image is represented by its centre, because a
reduced one would hide what is to be seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onestepsr.core.errors import UserError
from onestepsr.core.files import replacing
from onestepsr.evaluate.comparison import Comparison
from onestepsr.evaluate.result import EvaluationResult, Files

if TYPE_CHECKING:
    from onestepsr.imaging.read import Samples

FOLDER = "pictures"
_OURS = re.compile(r"\d{5}-(lr|hr|sr\d+)\.png")
_COMPRESSION = 4


@dataclass(frozen=True, kw_only=True)
class View:
    """One image of the report."""

    name: str
    """Its name in the results."""
    width: int
    """Width of what is shown, in pixels of the output."""
    height: int
    whole: tuple[int, int]
    """Width and height of the whole image; more than is shown if only the centre is."""
    files: dict[str, str]
    """By role (``lr``, ``hr``, ``sr0``, ``sr1``, ...) the path in the report."""


def roles(comparison: Comparison) -> dict[str, str]:
    """By role, the label shown: LR, the methods, HR."""
    return {"lr": "LR", **{f"sr{i}": label for i, label in enumerate(comparison.labels)}, "hr": "HR"}


def locate(comparison: Comparison) -> dict[str, dict[str, Path]]:
    """By image and role, the files that exist; images without any super-resolved file are left out."""
    found: dict[str, dict[str, Path]] = {}
    for number, result in enumerate(comparison.results):
        for role, key in (("lr", "lr"), (f"sr{number}", "sr"), ("hr", "hr")):
            for name, path in _files(result, key).items():
                found.setdefault(name, {}).setdefault(role, path)
    return {name: files for name, files in found.items() if any(role.startswith("sr") for role in files)}


def write_views(
    folder: Path, names: Iterable[str], located: Mapping[str, Mapping[str, Path]], side: int
) -> tuple[list[View], list[str]]:
    """Write the images called ``names``, at most ``side`` pixels wide and high; also one line for each that fails.

    Files of an earlier report in the same folder that are no longer used are removed.
    """
    target = folder / FOLDER
    views, problems = [], []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names):
            try:
                views.append(_write_view(target, number, name, located[name], side))
            except UserError as error:
                problems.append(str(error))
        used = {Path(path).name for view in views for path in view.files.values()}
        for path in target.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in used:
                path.unlink()
    except OSError as error:
        raise UserError(f"{target}: images of the report cannot be written ({error.strerror})") from error
    return views, problems


def centre(width: int, height: int, side: int, multiple: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part shown; its corner lies on a multiple of ``multiple``."""
    left, top = (max(0, length - side) // 2 // multiple * multiple for length in (width, height))
    return left, top, min(width, left + side), min(height, top + side)


def _files(result: EvaluationResult, key: str) -> dict[str, Path]:
    place = getattr(result.folders, key)
    if place is None:
        return {}
    root = Path(place)
    if root.is_file():
        return dict.fromkeys(list(result.images)[:1], root)
    recorded = {name: getattr(result.files.get(name, Files()), key) for name in result.images}
    if any(recorded.values()):
        # A file of results may come from somebody else: nothing outside the folder it names is shown.
        inside = {name: own for name, own in recorded.items() if own and ".." not in Path(own).parts}
        paths = {name: root / own for name, own in inside.items() if not Path(own).is_absolute()}
        return {name: path for name, path in paths.items() if path.is_file()}
    return _by_name(root, result)


def _by_name(root: Path, result: EvaluationResult) -> dict[str, Path]:
    from onestepsr.data.photos import find_images

    if not root.is_dir():
        return {}
    named = {path.relative_to(root).with_suffix("").as_posix(): path for path in find_images(root)}
    return {name: named[name] for name in result.images if name in named}


def _write_view(target: Path, number: int, name: str, files: Mapping[str, Path], side: int) -> View:
    from onestepsr.data.photos import read_pixels

    pixels = {role: read_pixels(path) for role, path in files.items()}
    shown = next(pixels[role] for role in sorted(pixels, reverse=True) if role != "lr")
    height, width = shown.shape[:2]
    box = centre(width, height, side, _factor(width, pixels.get("lr")))
    written = {}
    for role, samples in pixels.items():
        scale_x, scale_y = samples.shape[1] / width, samples.shape[0] / height
        left, right = round(box[0] * scale_x), max(1, round(box[2] * scale_x))
        top, bottom = round(box[1] * scale_y), max(1, round(box[3] * scale_y))
        path = target / f"{number:05d}-{role}.png"
        _write(path, samples[top:bottom, left:right])
        written[role] = f"{FOLDER}/{path.name}"
    return View(name=name, width=box[2] - box[0], height=box[3] - box[1], whole=(width, height), files=written)


def _factor(width: int, lr: Samples | None) -> int:
    """How many output pixels one input pixel covers, so that the part shown begins at the border of one."""
    return 1 if lr is None else max(1, round(width / lr.shape[1]))


def _write(path: Path, samples: Samples) -> None:
    from PIL import Image

    with replacing(path) as partial:
        Image.fromarray(samples).save(partial, format="PNG", compress_level=_COMPRESSION)


def choose(comparison: Comparison, names: Sequence[str], extremes: int, limit: int) -> list[str]:
    """At most ``limit`` of ``names``: worst and best of every metric and method first, then in their own order."""
    wanted: dict[str, None] = {}
    ranked = [ranking(comparison, metric, method) for metric in comparison.metrics for method in _methods(comparison)]
    for rank in range(extremes):
        for order in ranked:
            wanted.update(dict.fromkeys(name for name in (*order[rank : rank + 1], *order[-1 - rank :][:1])))
    available = set(names)
    first = [name for name in wanted if name in available][:limit]
    kept = set([*first, *(name for name in names if name not in wanted)][:limit])
    return [name for name in names if name in kept]


def ranking(comparison: Comparison, metric: str, method: int) -> list[str]:
    """Images of one method from the worst to the best value of ``metric``."""
    values = comparison.results[method].values(metric)
    return sorted(values, key=lambda name: values[name], reverse=not comparison.metrics[metric].higher_is_better)


def _methods(comparison: Comparison) -> range:
    return range(len(comparison.results))

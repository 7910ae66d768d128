"""Which images belong together: always by name, never by the order in which a folder lists them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onestepsr.core.errors import UserError
from onestepsr.data.photos import find_images

LR_ENDING = re.compile(r"[_-]LR(?:x?\d+)?$", re.IGNORECASE)
HR_ENDING = re.compile(r"[_-]HR$", re.IGNORECASE)
MADE_ENDING = re.compile(r"(?:[_-](?:LR(?:x?\d+)?|SR|HR))?(?:_x\d+(?:\.\d+)?)?$", re.IGNORECASE)
"""What SR images have at their end beyond the name of the scene: the ending of their LR image or, where all folders
use the same names, of their reference; a factor."""
LR_FOLDERS = ("LR", "test_LR")
HR_FOLDERS = ("HR", "test_HR")
"""Names, in any case, of the folders inside a dataset that has its images in two."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One super-resolved image and, where there is one, its reference."""

    name: str
    """Path in its folder without the ending, with forward slashes."""
    sr: Path
    hr: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """What is to be compared and what found no counterpart."""

    pairs: list[Pair]
    unmatched_sr: list[Path]
    unmatched_hr: list[Path]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image for a model to enlarge: at least one of the two files is there."""

    name: str
    """As the name of a :class:`Pair`."""
    lr: Path | None = None
    """The input; without one it is made from ``hr``."""
    hr: Path | None = None
    """The reference."""

    @property
    def path(self) -> Path:
        """The input's file, or that of the photo it is made from."""
        path = self.lr or self.hr
        assert path is not None, "a case has at least one file"
        return path


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Images for a model to enlarge."""

    cases: list[Case]
    layout: str
    """How the folder was understood, in words."""
    lr: Path | None
    """Folder of the inputs."""
    hr: Path | None
    """Folder of the references."""
    unmatched_lr: list[Path]
    unmatched_hr: list[Path]


def pair_by_name(sr: Path, hr: Path | None = None, *, suffix: str = "") -> Pairing:
    """Match images of two folders by file name without ending, never by order.

    ``suffix`` is what SR names have beyond HR names (``-mine``: ``bird-mine.png`` belongs to ``bird.jpg``). What finds
    no counterpart so is tried without the endings that datasets and upscalers add: ``bird_LR_x4.png`` belongs to
    ``bird_HR.png``. In a folder of references where names end in ``_HR``, only those are references. Two files are a
    pair whatever their names. Folders are searched with their sub-folders. UserError if nothing matches, and if two
    files claim the same name.
    """
    if sr.is_file() and hr is not None and hr.is_file():
        return Pairing(pairs=[Pair(name=sr.stem, sr=sr, hr=hr)], unmatched_sr=[], unmatched_hr=[])
    if hr is not None and hr.is_file():
        raise UserError(f"--hr {hr}: is a file but {sr} is a folder; compare two files or two folders")
    made = _named(_listed(sr), sr, suffix=suffix)
    if hr is None:
        return Pairing(
            pairs=[Pair(name=name, sr=path) for name, path in made.items()], unmatched_sr=[], unmatched_hr=[]
        )
    references = _references(hr)
    partners = _partners(made, references)
    if not partners:
        raise UserError(
            f"no image in {sr} has the name of one in {hr} ('{next(iter(made))}' and '{next(iter(references))}' "
            "are the first of each); --suffix tells what SR names have at their end"
        )
    pairs = [Pair(name=partner, sr=made[name], hr=references[partner]) for name, partner in partners.items()]
    return Pairing(
        pairs=sorted(pairs, key=lambda pair: pair.name),
        unmatched_sr=[path for name, path in made.items() if name not in partners],
        unmatched_hr=_left(references, partners) if sr.is_dir() else [],
    )


def find_cases(data: Path, hr: Path | None = None) -> EvaluationData:
    """The LR images of ``data`` with their references, where there are any.

    References are those of the folder ``hr`` if it is given; else of ``data/HR`` beside ``data/LR``; else the images
    whose name ends in ``_HR`` beside ``_LR`` (or ``_LR4``). A folder without any of these holds LR images alone.
    UserError for empty folders and where no LR image has a reference.
    """
    inside = _subfolder(data, LR_FOLDERS)
    if hr is None and inside is not None:
        hr, data = _subfolder(data, HR_FOLDERS), inside
    if hr is not None:
        return _data_set(_named(_listed(data), data), _references(hr), "folders of LR and HR images", lr=data, hr=hr)
    files = _listed(data)
    inputs, references = ([f for f in files if ending.search(f.stem)] for ending in (LR_ENDING, HR_ENDING))
    if inputs and references:
        named = _named(inputs, data, ending=LR_ENDING), _named(references, data, ending=HR_ENDING)
        other = sorted({*files} - {*inputs, *references})
        return _data_set(*named, "images ending in _LR and _HR", lr=data, hr=data, other=other)
    cases = [Case(name=name, lr=path) for name, path in _named(files, data).items()]
    return EvaluationData(
        cases=cases, layout="LR images without references", lr=data, hr=None, unmatched_lr=[], unmatched_hr=[]
    )


def find_photos(data: Path) -> EvaluationData:
    """The HR photos of ``data``, to be degraded: those of its folder ``HR`` or whose name ends in ``_HR``, else all."""
    folder = _subfolder(data, HR_FOLDERS) or data
    cases = [Case(name=name, hr=path) for name, path in _references(folder).items()]
    return EvaluationData(
        cases=cases, layout="HR photos, degraded", lr=None, hr=folder, unmatched_lr=[], unmatched_hr=[]
    )


def _data_set(
    inputs: Mapping[str, Path],
    references: Mapping[str, Path],
    layout: str,
    *,
    lr: Path,
    hr: Path,
    other: Sequence[Path] = (),
) -> EvaluationData:
    partners = _partners(inputs, references)
    if not partners:
        first = f"'{next(iter(inputs))}' and '{next(iter(references))}' are the first of each"
        raise UserError(f"no LR image in {lr} has the name of a reference in {hr} ({first})")
    cases = [Case(name=partner, lr=inputs[name], hr=references[partner]) for name, partner in partners.items()]
    return EvaluationData(
        cases=sorted(cases, key=lambda case: case.name),
        layout=layout,
        lr=lr,
        hr=hr,
        unmatched_lr=[*(path for name, path in inputs.items() if name not in partners), *other],
        unmatched_hr=_left(references, partners) if lr.is_dir() else [],
    )


def _partners(made: Mapping[str, Path], references: Mapping[str, Path]) -> dict[str, str]:
    """By name of a made image, the name of its reference: the same, or else the same without known endings."""
    found = {name: name for name in made if name in references}
    takers = {name: name for name in found}
    for name in [name for name in made if name not in found]:
        scene = MADE_ENDING.sub("", name)
        if scene not in references or takers.get(scene) == scene:
            continue
        if scene in takers:
            other = made[takers[scene]].name
            raise UserError(f"{made[name]} and {other} both belong to '{scene}': remove one of them")
        found[name], takers[scene] = scene, name
    return found


def _references(hr: Path) -> dict[str, Path]:
    files = _listed(hr)
    marked = [path for path in files if HR_ENDING.search(path.stem)]
    return _named(marked, hr, ending=HR_ENDING) if marked else _named(files, hr)


def _listed(place: Path) -> list[Path]:
    return [place] if place.is_file() else find_images(place)


def _named(
    files: list[Path], place: Path, *, suffix: str = "", ending: re.Pattern[str] | None = None
) -> dict[str, Path]:
    """Files by path in ``place`` without suffix and ending; two of one name are an error."""
    named: dict[str, Path] = {}
    for path in files:
        relative = path.relative_to(place) if path != place else Path(path.name)
        name = relative.with_suffix("").as_posix().removesuffix(suffix)
        name = ending.sub("", name) if ending is not None else name
        if name in named:
            raise UserError(f"{path} and {named[name].name} share the name '{name}': remove one of them")
        named[name] = path
    return named


def _subfolder(data: Path, names: tuple[str, ...]) -> Path | None:
    """The folder in ``data`` that has one of ``names`` in any case."""
    wanted = [name.lower() for name in names]
    inside = sorted(data.iterdir()) if data.is_dir() else []
    found = [path for path in inside if path.name.lower() in wanted and path.is_dir()]
    return min(found, key=lambda path: wanted.index(path.name.lower())) if found else None


def _left(references: Mapping[str, Path], partners: Mapping[str, str]) -> list[Path]:
    taken = set(partners.values())
    return [path for name, path in references.items() if name not in taken]

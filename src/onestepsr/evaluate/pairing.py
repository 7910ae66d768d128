"""Pairing of images with their references by name, never by the order in which a folder lists them."""

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
"""Ending that SR names have after the name of the scene: that of their LR image or, if all folders use the same names,
of their reference; then a factor."""
LR_FOLDERS = ("LR", "test_LR")
HR_FOLDERS = ("HR", "test_HR")
"""Names, in any case, of the two folders in which a dataset may have its images."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image and its reference; at least one of the two files is there."""

    name: str
    """Path in its folder without the ending, with forward slashes."""
    image: Path | None = None
    """The SR image to measure or the LR image to enlarge; without one, the LR image is made from ``hr``."""
    hr: Path | None = None
    """The reference."""

    @property
    def path(self) -> Path:
        """File of the image, or of the photo that it is made from."""
        path = self.image or self.hr
        assert path is not None, "a case has at least one file"
        return path


@dataclass(frozen=True, kw_only=True)
class CaseSet:
    """Images of one evaluation, and the files without a counterpart."""

    cases: list[Case]
    layout: str
    """Description of how the folder was understood."""
    folder: Path | None
    """Folder of the images."""
    hr: Path | None = None
    """Folder of the references."""
    unmatched: Sequence[Path] = ()
    unmatched_hr: Sequence[Path] = ()


def pair_by_name(sr: Path, hr: Path | None = None, *, suffix: str = "") -> CaseSet:
    """Match SR images with references by file name without ending, never by order.

    ``suffix`` is the ending that SR names have and HR names do not (``-mine``: ``bird-mine.png`` belongs to
    ``bird.jpg``). Images without a match are tried again without the endings that datasets and upscalers add:
    ``bird_LR_x4.png`` belongs to ``bird_HR.png``. In a folder of references where names end in ``_HR``, only those are
    references. Two files are a pair whatever their names. Folders are searched recursively. UserError if nothing
    matches, and if two files have the same name.
    """
    if hr is not None and hr.is_file():
        if not sr.is_file():
            raise UserError(f"--hr {hr}: is a file but {sr} is a folder; compare two files or two folders")
        return CaseSet(cases=[Case(name=sr.stem, image=sr, hr=hr)], layout="two files", folder=sr, hr=hr)
    images = _named(_listed(sr), sr, suffix=suffix)
    if hr is None:
        return _unpaired(images, "SR images without references", sr)
    hint = "; --suffix tells what SR names have at their end"
    return _matched(images, _references(hr), "SR and HR images", folder=sr, hr=hr, hint=hint)


def find_cases(data: Path, hr: Path | None = None) -> CaseSet:
    """Find the LR images of ``data`` and their references, if there are any.

    References are those of the folder ``hr`` if it is given; else of ``data/HR`` beside ``data/LR``; else the images
    whose name ends in ``_HR`` beside ``_LR`` (or ``_LR4``). A folder without any of these holds LR images alone.
    UserError for empty folders and where no LR image has a reference.
    """
    inside = _subfolder(data, LR_FOLDERS)
    if hr is None and inside is not None:
        hr, data = _subfolder(data, HR_FOLDERS), inside
    files = _listed(data)
    if hr is not None:
        return _matched(_named(files, data), _references(hr), "folders of LR and HR images", folder=data, hr=hr)
    inputs, references = ([f for f in files if ending.search(f.stem)] for ending in (LR_ENDING, HR_ENDING))
    if inputs and references:
        named = _named(inputs, data, ending=LR_ENDING), _named(references, data, ending=HR_ENDING)
        other = sorted({*files} - {*inputs, *references})
        return _matched(*named, "images ending in _LR and _HR", folder=data, hr=data, other=other)
    return _unpaired(_named(files, data), "LR images without references", data)


def find_photos(data: Path) -> CaseSet:
    """Find the HR photos of ``data`` to degrade: those in its folder ``HR``, else named ``_HR``, else all."""
    folder = _subfolder(data, HR_FOLDERS) or data
    cases = [Case(name=name, hr=path) for name, path in _references(folder).items()]
    return CaseSet(cases=cases, layout="HR photos, degraded", folder=None, hr=folder)


def _unpaired(images: Mapping[str, Path], layout: str, folder: Path) -> CaseSet:
    return CaseSet(cases=[Case(name=name, image=path) for name, path in images.items()], layout=layout, folder=folder)


def _matched(
    images: Mapping[str, Path],
    references: Mapping[str, Path],
    layout: str,
    *,
    folder: Path,
    hr: Path,
    other: Sequence[Path] = (),
    hint: str = "",
) -> CaseSet:
    partners = _partners(images, references)
    if not partners:
        first = f"'{next(iter(images))}' and '{next(iter(references))}' are the first of each"
        raise UserError(f"no image in {folder} has the name of a reference in {hr} ({first}){hint}")
    cases = [Case(name=partner, image=images[name], hr=references[partner]) for name, partner in partners.items()]
    taken = set(partners.values())
    left = [path for name, path in references.items() if name not in taken]
    return CaseSet(
        cases=sorted(cases, key=lambda case: case.name),
        layout=layout,
        folder=folder,
        hr=hr,
        unmatched=[*(path for name, path in images.items() if name not in partners), *other],
        unmatched_hr=left if folder.is_dir() else (),
    )


def _partners(images: Mapping[str, Path], references: Mapping[str, Path]) -> dict[str, str]:
    """Name of the reference of each image: the same name, or else the same without known endings."""
    found = {name: name for name in images if name in references}
    takers = {name: name for name in found}
    for name in [name for name in images if name not in found]:
        scene = MADE_ENDING.sub("", name)
        if scene not in references or takers.get(scene) == scene:
            continue
        if scene in takers:
            other = images[takers[scene]].name
            raise UserError(f"{images[name]} and {other} both belong to '{scene}': remove one of them")
        found[name], takers[scene] = scene, name
    return found


def _references(hr: Path) -> dict[str, Path]:
    files = _listed(hr)
    marked = [path for path in files if HR_ENDING.search(path.stem)]
    return _named(marked, hr, ending=HR_ENDING) if marked else _named(files, hr)


def _listed(source: Path) -> list[Path]:
    return [source] if source.is_file() else find_images(source)


def _named(
    files: Sequence[Path], source: Path, *, suffix: str = "", ending: re.Pattern[str] | None = None
) -> dict[str, Path]:
    """Files by path in ``source`` without suffix and ending; UserError if two have the same name."""
    named: dict[str, Path] = {}
    for path in files:
        relative = path.relative_to(source) if path != source else Path(path.name)
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

"""Pairing of images with their references by name, never by the order in which a folder lists them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onestepsr.core.errors import UserError
from onestepsr.data.pair_names import divided, matched, references
from onestepsr.data.photos import find_images

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
    ``bird.jpg``). Names that are not equal are compared without the endings of datasets and upscalers, see
    :mod:`onestepsr.data.pair_names`. In a folder of references where names end in ``_HR`` (or ``_x1``), only those
    are references. Two files are a pair whatever their names. Folders are searched recursively. UserError if nothing
    matches, and if two files have the same name.
    """
    if hr is not None and is_file(hr):
        if not is_file(sr):
            raise UserError(f"--hr {hr}: is a file but {sr} is a folder; compare two files or two folders")
        return CaseSet(cases=[Case(name=sr.stem, image=sr, hr=hr)], layout="two files", folder=sr, hr=hr)
    images = _named(_listed(sr), sr, suffix=suffix)
    if hr is None:
        return _unpaired(images, "SR images without references", sr)
    hint = "; --suffix tells what SR names have at their end"
    return _matched(images, _references(_listed(hr), hr), "SR and HR images", folder=sr, hr=hr, hint=hint)


def find_cases(data: Path, hr: Path | None = None, *, suffix: str = "") -> CaseSet:
    """Find the LR images of ``data`` and their references, if there are any.

    References are those of the folder ``hr`` if it is given; else of ``data/HR`` beside ``data/LR``; else the images
    whose name ends in ``_HR`` beside ``_LR`` (or ``_LR4``), or in ``_x1`` beside ``_x4``. A folder without any of these
    holds LR images alone. ``suffix`` is that of :func:`pair_by_name`, of LR names. UserError for empty folders and
    where no LR image has a reference.
    """
    inside = _subfolder(data, LR_FOLDERS)
    if hr is None and inside is not None:
        hr, data = _subfolder(data, HR_FOLDERS), inside
    files = _listed(data)
    both = divided(files) if hr is None or hr == data else None
    if both is not None:
        scheme, low, high = both
        named = _named(low, data, suffix=suffix), _references(high, data)
        other = sorted({*files} - {*low, *high})
        return _matched(*named, f"images ending in {scheme}", folder=data, hr=data, other=other)
    named_lr = _named(files, data, suffix=suffix)
    if hr is not None:
        return _matched(named_lr, _references(_listed(hr), hr), "folders of LR and HR images", folder=data, hr=hr)
    return _unpaired(named_lr, "LR images without references", data)


def find_photos(data: Path) -> CaseSet:
    """Find the HR photos of ``data`` to degrade: those in its folder ``HR``, else named ``_HR``, else all."""
    folder = _subfolder(data, HR_FOLDERS) or data
    cases = [Case(name=name, hr=path) for name, path in _references(_listed(folder), folder).items()]
    return CaseSet(cases=cases, layout="HR photos, degraded", folder=None, hr=folder)


def _unpaired(images: Mapping[str, Path], layout: str, folder: Path) -> CaseSet:
    return CaseSet(cases=[Case(name=name, image=path) for name, path in images.items()], layout=layout, folder=folder)


def _matched(
    images: Mapping[str, Path],
    truth: Mapping[str, Path],
    layout: str,
    *,
    folder: Path,
    hr: Path,
    other: Sequence[Path] = (),
    hint: str = "",
) -> CaseSet:
    partners = matched(images, truth)
    if not partners:
        first = f"'{next(iter(images))}' and '{next(iter(truth))}' are the first of each"
        raise UserError(f"no image in {folder} has the name of a reference in {hr} ({first}){hint}")
    cases = [Case(name=partner, image=images[name], hr=truth[partner]) for name, partner in partners.items()]
    taken = set(partners.values())
    left = [path for name, path in truth.items() if name not in taken]
    return CaseSet(
        cases=sorted(cases, key=lambda case: case.name),
        layout=layout,
        folder=folder,
        hr=hr,
        unmatched=[*(path for name, path in images.items() if name not in partners), *other],
        unmatched_hr=left if folder.is_dir() else (),
    )


def _references(files: Sequence[Path], hr: Path) -> dict[str, Path]:
    marked, ending = references(files)
    return _named(marked, hr, ending=ending)


def _listed(source: Path) -> list[Path]:
    return [source] if is_file(source) else find_images(source)


def is_file(path: Path) -> bool:
    """True for a file, also a pipe, which is one image."""
    return path.exists() and not path.is_dir()


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

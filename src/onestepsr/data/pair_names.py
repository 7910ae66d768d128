"""Names of images that belong together: one rule for evaluation and for training on pairs.

Equal names are a pair. Datasets and upscalers add endings for the role of an image and for its factor: ``0801x4`` is
the small version of ``0801`` (DIV2K), ``DSC_1_x4`` that of ``DSC_1_x1`` (DRealSR), ``baby_LRBI_x4`` that of
``baby_HR_x4`` (RCAN), ``a_LR4`` that of ``a_HR`` (RealSR). They are taken off one after the other, on both sides, until
names are equal.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from onestepsr.core.errors import UserError

_FACTOR = r"x\d+(?:\.\d+)?(?:m|d|w[1-4])?"
"""With the tracks of DIV2K: mild, difficult and wild (four versions)."""
_ROLE = r"[_-](?:LR|LQ|SR|HR|HQ|GT)(?:BI|BD|DN)?"
_TOOL = r"[_-](?:out|upscaled|upscayl|bicubic|real-?esrgan)"
"""Endings of upscalers' outputs, beside the factor."""
_ENDING = re.compile(rf"(?:{_ROLE}(?:[_-]?x?\d+(?:\.\d+)?)?|[_-]?{_FACTOR}|[@_-]\d+x|{_TOOL}|[_-]+)$", re.IGNORECASE)
_METHOD = re.compile(r"[_-](?:[A-Z]{2}|[A-Z][a-z0-9]+[A-Z])[A-Za-z0-9+]*$")
"""Name of a method before the factor or after it, as in ``baby_RCAN_x4`` and ``baby_x4_SwinIR``."""
_LOW = re.compile(r"[_-](?:LR|LQ)(?:BI|BD|DN)?(?:[_-]?x?\d+(?:\.\d+)?)?$", re.IGNORECASE)
_HIGH = re.compile(rf"[_-](?:HR|GT)(?:[_-]?{_FACTOR})?$", re.IGNORECASE)
_SMALLER = re.compile(r"[_-]x(?!1$)\d+(?:\.\d+)?$", re.IGNORECASE)
_ORIGINAL = re.compile(r"[_-]x1$", re.IGNORECASE)
SCHEMES = {"_LR and _HR": (_LOW, _HIGH), "_x4 and _x1": (_SMALLER, _ORIGINAL)}
"""Endings of LR and HR images that may lie in one folder."""


def divided(files: Sequence[Path]) -> tuple[str, list[Path], list[Path]] | None:
    """Scheme, LR and HR images of a folder that holds both, by the endings of their names; None if it does not."""
    for scheme, endings in SCHEMES.items():
        low, high = ([file for file in files if ending.search(file.stem)] for ending in endings)
        if low and high:
            return scheme, low, high
    return None


def references(files: Sequence[Path]) -> tuple[list[Path], re.Pattern[str] | None]:
    """The HR images among ``files``, and their ending: those that have one, or all if none has."""
    for _, ending in SCHEMES.values():
        marked = [file for file in files if ending.search(file.stem)]
        if marked:
            return marked, ending
    return list(files), None


def matched(images: Mapping[str, Path], others: Collection[str]) -> dict[str, str]:
    """The name of the reference, among ``others``, of each image that has one; UserError if two have the same."""
    by_scene: dict[str, list[tuple[int, str]]] = {}
    for other in others:
        for depth, scene in enumerate(_scenes(other)):
            by_scene.setdefault(scene, []).append((depth, other))
    found: dict[str, str] = {}
    takers: dict[str, str] = {}
    # Equal names first: beside 'a' and its reference 'a', 'a_x4' belongs to no one.
    for name in sorted(images, key=lambda name: name not in others):
        likes = next((by_scene[scene] for scene in _scenes(name) if scene in by_scene), None)
        if likes is None:
            continue
        best, *further = sorted(likes)
        depth, reference = best
        if further and further[0][0] == depth:  # two that are equally like it: neither is its reference
            continue
        if reference not in takers:
            found[name], takers[reference] = reference, name
        elif takers[reference] != reference:
            other = images[takers[reference]].name
            raise UserError(f"{images[name]} and {other} both belong to '{reference}': remove one of them")
    return {name: found[name] for name in images if name in found}


def _scenes(name: str) -> list[str]:
    """``name``, and what is left of it without one ending, without two, and so on."""
    folder, slash, rest = name.rpartition("/")
    scenes = [rest]
    while (shorter := _ENDING.sub("", scenes[-1])) not in ("", scenes[-1]):
        scenes.append(shorter)
    if len(scenes) > 1:
        shorter = _METHOD.sub("", scenes[-1])
        scenes += [shorter] if shorter not in ("", scenes[-1]) else []
    elif re.search(rf"{_FACTOR}$", without := _METHOD.sub("", rest)):
        scenes += [without, *(shorter for shorter in [_ENDING.sub("", without)] if shorter)]
    return [f"{folder}{slash}{scene}" for scene in scenes]

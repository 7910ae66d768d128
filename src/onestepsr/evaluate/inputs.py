"""The images that a model is measured on: read as they are, cut to a protocol's crops, or made from HR photos."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from onestepsr.core.errors import UserError
from onestepsr.core.files import remove_leftovers
from onestepsr.data.degradation.photo_files import draw_for, make_pair
from onestepsr.data.degradation.pipeline import Recipe
from onestepsr.evaluate.pairing import Case
from onestepsr.evaluate.result import Files
from onestepsr.imaging.read import LoadedImage, Samples, from_array, read_image
from onestepsr.imaging.write import write_image


@dataclass(frozen=True, kw_only=True)
class Degrader:
    """Makes LR images from HR photos: with the same recipe, seed and names, those that ``onestepsr degrade`` writes.

    The degradation of a photo depends on the seed and on its path in ``folder`` alone.
    """

    recipe: Recipe
    seed: int
    folder: Path
    scale: int = 4

    def __call__(self, path: Path) -> tuple[Samples, Samples]:
        """LR samples (h, w, 3) and HR samples (h * scale, w * scale, 3), which are cut at the bottom and right."""
        name = path.relative_to(self.folder).as_posix() if path != self.folder else path.name
        drawn = draw_for(self.recipe, self.seed, name)
        return make_pair(path, drawn, seed=self.seed, name=name, scale=self.scale, multiple=self.scale)


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Reads cases for a model of factor ``scale``."""

    scale: int
    crop: int = 0
    """Side of the central square of HR that is measured; 0 for whole images."""
    degrade: Degrader | None = None
    """Makes the LR images; None where they are there."""

    def __post_init__(self) -> None:
        if self.crop % self.scale:
            raise UserError(f"crop {self.crop}: expected a multiple of the model's factor, {self.scale}")

    def __call__(self, case: Case) -> Loaded:
        """Read one case; UserError in one line for what cannot be read or is too small."""
        if self.degrade is not None and case.hr is not None:
            lr, hr = self.degrade(case.hr)
            return self._cut(from_array(lr), hr, str(case.hr))
        assert case.lr is not None
        image = read_image(case.lr)
        if case.hr is None:
            return self._cut(image, None, str(case.lr))
        return self._cut(image, read_image(case.hr).pixels, f"{case.lr} enlarged, against {case.hr}")

    def _cut(self, lr: LoadedImage, hr: Samples | None, label: str) -> Loaded:
        if not self.crop:
            return Loaded(lr=lr, hr=hr, label=label)
        side = self.crop // self.scale
        if min(lr.height, lr.width) < side:
            raise UserError(f"{label}: the LR image is {lr.width} x {lr.height}, the protocol needs {side} x {side}")
        top, left = (lr.height - side) // 2, (lr.width - side) // 2
        if hr is not None:
            hr = _window(hr, top * self.scale, left * self.scale, self.crop)
        alpha = None if lr.alpha is None else _window(lr.alpha, top, left, side)
        return Loaded(lr=replace(lr, pixels=_window(lr.pixels, top, left, side), alpha=alpha), hr=hr, label=label)


@dataclass(frozen=True, kw_only=True)
class OutputWriter:
    """Saves the images of an evaluation as PNG in ``SR`` of a folder, and in ``LR`` and ``HR`` what is in no file."""

    folder: Path
    made: bool
    """Whether LR and HR as measured are in no file of their own: made, or cut."""

    def sweep(self, cases: Iterable[Case]) -> None:
        """Delete what a killed run left unfinished of these cases: once, for it looks through whole folders."""
        names = ("SR", "LR", "HR") if self.made else ("SR",)
        remove_leftovers(*(self._path(name, case) for case in cases for name in names))

    def __call__(self, case: Case, loaded: Loaded, sr: LoadedImage) -> None:
        """Write the images of one case; UserError if that fails."""
        images = {"SR": sr}
        if self.made:
            images["LR"] = loaded.lr
            if loaded.hr is not None:
                images["HR"] = from_array(loaded.hr)
        for name, image in images.items():
            path = self._path(name, case)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{path.parent}: cannot be made ({error.strerror})") from error
            write_image(image, path, sweep=False)

    def _path(self, name: str, case: Case) -> Path:
        return self.folder / name / f"{case.name}.png"

    def folders(self, originals: Files) -> Files:
        """The folders of an evaluation's images, with the saved ones in place of none."""
        if self.made:
            hr = str(self.folder / "HR") if originals.hr is not None else None
            return Files(lr=str(self.folder / "LR"), sr=str(self.folder / "SR"), hr=hr)
        return replace(originals, sr=str(self.folder / "SR"))

    def files(self, case: Case, original: Files) -> Files:
        """The files of one case relative to :meth:`folders`."""
        own = f"{case.name}.png"
        if self.made:
            return Files(lr=own, sr=own, hr=own if original.hr is not None else None)
        return replace(original, sr=own)


def relative(path: Path | None, folder: Path | None) -> str | None:
    """``path`` as a result file names it: relative to its folder, with forward slashes."""
    if path is None or folder is None:
        return None
    return path.name if path == folder else path.relative_to(folder).as_posix()


def _window(samples: Samples, top: int, left: int, side: int) -> Samples:
    return samples[top : top + side, left : left + side].copy()


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One case with its images read."""

    lr: LoadedImage
    hr: Samples | None
    label: str
    """The files, for messages."""

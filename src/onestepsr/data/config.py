"""Configuration of a training or validation set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onestepsr.data.degradation.pipeline import DegradationConfig, FaceDegradationConfig, Recipe
from onestepsr.data.degradation.presets import get_preset, mix

MAX_CROP = 4096


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Photos, their crops and their LR versions."""

    kind: Literal["hr_folder", "pairs"] = "hr_folder"
    """``hr_folder``: photos are degraded on the fly. ``pairs``: LR and HR images are matched by name,
    without the endings of datasets (``a_LR4`` and ``a_HR``, ``0801x4`` and ``0801``)."""
    paths: tuple[Path, ...] = ()
    """Folders of HR photos, searched recursively. At least one is needed."""
    lr_paths: tuple[Path, ...] = ()
    """Only for pairs: the folders of LR images, in the order of ``paths``."""
    crop: int = 256
    """Side of the square HR crop in pixels, a multiple of ``scale``. For pairs, 0 keeps whole images, to
    measure on: training needs one size."""
    scale: int = 4
    """HR size divided by LR size; 1 where images are restored at their own size, as faces are."""
    degradation: str | dict[str, float] | FaceDegradationConfig | DegradationConfig = "mixed"
    """A preset's name, relative weights of several presets by name, or all settings (second-order or of faces)."""
    hr_scale: tuple[float, float] = (0.5, 1.0)
    """Photos are shrunk by a factor from this range first, which also removes traces of their own JPEG compression.

    A photo is never shrunk below the crop: where the low end would do that, the range ends at what fits.
    """
    flips: bool = True
    """Mirror half of the crops."""
    rotations: bool = False
    """Turn crops by multiples of 90 degrees. Off by default: gravity is information for a generative model."""
    pool_size: int = 0
    """Number of distinct samples kept on disk and reused with new flips (and rotations); 0 makes every sample afresh.

    Worth it where degradation would take processor time from training. Takes crop^2 * 3.2 bytes per sample at scale 4.
    """
    prompts: Path | None = None
    """Texts about the photos, for methods whose networks read text: a folder with ``NAME.txt`` for ``NAME.jpg``, one
    text file for all, or a JSON or YAML table of names and texts. All crops of a photo have its text. Not with a
    pool."""
    cache_dir: Path = Path("cache")
    """Folder of the pools, each named by a hash of everything its content depends on, and of the embeddings of
    ``prompts``."""
    cache_bytes: int = 2_000_000_000
    """Limit on decoded photos kept in memory, shared out among the loader's workers."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty: expected one or more folders of photos")
        if not 1 <= self.scale <= 16:
            raise ValueError(f"scale is {self.scale}: expected 1 to 16")
        self._check_crop()
        if not 0 < self.hr_scale[0] <= self.hr_scale[1] <= 1:
            raise ValueError(f"hr_scale is {self.hr_scale}: expected 0 < low <= high <= 1")
        if self.pool_size < 0 or self.cache_bytes < 0:
            raise ValueError(f"pool_size {self.pool_size}, cache_bytes {self.cache_bytes}: expected 0 or more")
        if self.kind == "pairs" and len(self.lr_paths) != len(self.paths):
            raise ValueError(
                f"lr_paths has {len(self.lr_paths)} folders: expected one for each of {len(self.paths)} paths"
            )
        if self.kind != "pairs" and self.lr_paths:
            raise ValueError("lr_paths is set: expected only with kind 'pairs'")
        if self.prompts is not None and self.pool_size:
            raise ValueError(f"prompts with a pool_size of {self.pool_size}: expected pool_size 0")
        self.recipe()

    def _check_crop(self) -> None:
        whole = self.crop == 0 and self.kind == "pairs"
        if not whole and (self.crop % self.scale or not self.scale <= self.crop <= MAX_CROP):
            raise ValueError(f"crop is {self.crop}: expected a multiple of {self.scale} up to {MAX_CROP}")
        if whole and self.pool_size:
            raise ValueError("pool_size needs images of one size: set crop")

    def recipe(self) -> Recipe:
        """The degradation that ``degradation`` stands for."""
        if isinstance(self.degradation, str):
            return get_preset(self.degradation)
        if isinstance(self.degradation, (DegradationConfig, FaceDegradationConfig)):
            return self.degradation
        return mix(self.degradation)

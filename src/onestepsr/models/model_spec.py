"""What is known of a model that has a name: what it is, what it may be used for and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from onestepsr.errors import UserError
from onestepsr.models.sources import Download, Source, human_bytes

Kind = Literal["upscaler", "backbone", "loss network", "metric network"]
"""What a model is for: upscaling pictures, starting a training from it, measuring within a loss or only a result."""

HUB = "https://huggingface.co"
HUB_MIRROR = "https://hf-mirror.com"
MODELSCOPE = "https://www.modelscope.cn/models"


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A further file of a model that has several."""

    file: str
    """Its name."""
    sources: tuple[Source, ...]
    """Its addresses, mirrors in order."""
    folder: str = ""
    """Folder in the cache, where several models share the file; empty is the model's own."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """An alias: what the model is, what it may be used for and where its weights are."""

    id: str
    """Name given to ``--model`` or in a configuration."""
    summary: str
    """One line: method, backbone, data."""
    licence: str
    """Licence of the weights: SPDX identifier where there is one."""
    licence_url: str = ""
    """Where its text is; empty for the package's own."""
    notice: str = ""
    """What an unusual licence asks of the user, in one sentence; empty for permissive ones."""
    kind: Kind = "upscaler"
    """What the model is for."""
    use: str = ""
    """For what is not an upscaler: what to do with it."""
    bundled: str = ""
    """File name of the weights inside the package; empty for a model without weights of that kind."""
    sha256: str = ""
    """Checksum of the bundled file."""
    file: str = ""
    """File name of downloaded weights."""
    sources: tuple[Source, ...] = ()
    """Addresses of that file, mirrors in order."""
    more: tuple[WeightsFile, ...] = ()
    """The files that belong to it, where weights are published in several."""
    scale: int = 4
    """Factor of an upscaler's network itself."""
    faithful: str = ""
    """The upscaler at the other end of the fidelity control: of the same shape, trained for faithful pictures."""

    @property
    def downloads(self) -> tuple[Download, ...]:
        """The files to fetch; none for what is bundled or needs no weights."""
        if not self.sources:
            return ()
        return tuple(self._download(file) for file in (WeightsFile(file=self.file, sources=self.sources), *self.more))

    def _download(self, wanted: WeightsFile) -> Download:
        terms = f"licence {self.licence} ({self.licence_url})" + (f": {self.notice}" if self.notice else "")
        what = "a diffusers folder or a single-file checkpoint" if self.kind == "backbone" else "the file"
        if self.more:
            what = "a file that 'onestepsr models convert' has made of the published ones"
        return Download(
            model=self.id,
            file=wanted.file,
            sources=wanted.sources,
            notice=terms,
            alternative=f"give the path of {what} instead of '{self.id}'",
            folder=wanted.folder,
        )

    @property
    def path(self) -> Path:
        """Where the weights lie on this machine, or would lie once downloaded; of several files the first."""
        if self.bundled:
            return Path(str(resources.files("onestepsr") / "weights" / self.bundled))
        if self.downloads:
            return self.downloads[0].path
        raise UserError(f"model '{self.id}' has no weights file")

    @property
    def is_here(self) -> bool:
        """Whether all of its weights are on this machine, as far as a glance at the names tells."""
        return all(download.path.exists() for download in self.downloads)

    @property
    def state(self) -> str:
        """Where the weights stand, at a glance: nothing is hashed."""
        if not self.downloads:
            return "bundled" if self.bundled else "needs no weights"
        # what is wrong comes before what is missing, and that before what is there
        order = {"not downloaded": 1, "cached": 2}
        state = min((download.state for download in self.downloads), key=lambda state: order.get(state, 0))
        sizes = [download.bytes for download in self.downloads]
        known = sum(size for size in sizes if size is not None)
        return state if None in sizes else f"{state} ({human_bytes(known)})"


def mirrors(sha256: str, size: int | None, *urls: str) -> tuple[Source, ...]:
    """Addresses of one file, whose checksum (empty if unknown) and size (None if unknown) all of them share."""
    return tuple(Source(url=url, sha256=sha256, bytes=size) for url in urls)

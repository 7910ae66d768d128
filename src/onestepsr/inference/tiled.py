"""The way of one image through a network: in tiles that each go all of it, or stage by stage with latents between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onestepsr.imaging.icc import ColorProfile
from onestepsr.inference.allocator import no_malloc_trim
from onestepsr.inference.memory_plan import Plan, StagePlan
from onestepsr.inference.options import UpscaleOptions
from onestepsr.inference.shared_norms import SHARE_OF_PICTURE, SharedNorms, reduced
from onestepsr.inference.tile_runner import STAGES, WHOLE, Network, StageCall, Tile, TileRunner, enlarge, to_float
from onestepsr.inference.tiling import TileJoin, join_of
from onestepsr.models.memory_cost import Stage


class TiledRun:
    """One image, its plan, and the network it goes through."""

    def __init__(
        self,
        network: Network,
        pixels: NDArray[Any],
        plan: Plan,
        options: UpscaleOptions,
        *,
        profile: ColorProfile | None,
        norms: SharedNorms | None,
        progress: Callable[[int, int], None] | None,
        fill: bool,
        keep_memory: bool,
    ) -> None:
        """``pixels`` (H, W, C) are stored samples. ``norms`` are to treat all tiles alike, where there are tiles.

        ``progress(done, total)`` is called after every tile. ``fill`` and ``profile`` as in :class:`TileRunner`;
        ``keep_memory``: as :func:`onestepsr.inference.allocator.no_malloc_trim`.
        """
        self.network, self.plan, self.options, self.profile = network, plan, options, profile
        self.fill, self.keep_memory, self._norms = fill, keep_memory, norms
        self._join = self._join_of(plan)
        self._padding = self._join_of(plan.stages["unet"] if plan.stages else plan).multiple
        self._source = _padded(pixels, self._padding)
        self._size = (self._source.shape[2], self._source.shape[3])
        self._progress, self._done = progress, 0

    def rows(self) -> Iterator[Tensor]:
        """The enlarged image, padding and all, as consecutive bands (1, C, rows, W * scale) of float32."""
        with self._alike():
            if self.plan.stages is None:
                yield from self._images(WHOLE, self.plan, None)
                return
            encoding, restoring, decoding = (self.plan.stages[stage] for stage in STAGES)
            z_l = self._latent("encode", encoding, None)
            z_h = self._latent("unet", restoring, z_l)
            yield from self._images(STAGES["decode"], decoding, z_h)

    def enlarged_rows(self) -> Iterator[Tensor]:
        """The input, enlarged bicubically, as :meth:`rows`."""
        pieces = (enlarge(to_float(tile), self.network.scale) for tile in self._join.cut(self._source))
        return self._join.rows(pieces, self._size, self.network.scale)

    def _alike(self) -> AbstractContextManager[None]:
        """Inside, norms have statistics of the whole image, if some of them only meet tiles."""
        # A copy is no smaller than a cell of the network, which may be more than the memory is planned for.
        if self._norms and self.plan.cuts_autoencoder and self._padding**2 <= self.plan.pixels:
            return self._norms.calibrated_by(self._calibration_pass)
        return nullcontext()

    def _calibration_pass(self) -> None:
        """Send a reduced copy of the image through the network, whole."""
        # Not where freed memory is kept: its blocks have other sizes, and would only break up the heap.
        most = min(self.plan.pixels, self._size[0] * self._size[1] * SHARE_OF_PICTURE)
        copied = reduced(self._source, most, self._padding)
        TileRunner(self.network, self.profile, self.options).rehearse(Tile(place=(0, 0), lr=copied))

    def _exact(self, stage_plan: StagePlan) -> AbstractContextManager[None]:
        """Inside, norms have statistics of their own if they meet the whole image."""
        return self._norms.disabled() if self._norms and stage_plan.tiles == 1 else nullcontext()

    def _latent(self, stage: Stage, stage_plan: StagePlan, latent: Tensor | None) -> Tensor:
        """What encoder or UNet make of the image, joined: (1, D, h, w) in float32."""
        join = self._join_of(stage_plan)
        cells = join.in_cells(self.plan.cell)
        size = (self._size[0] // self.plan.cell, self._size[1] // self.plan.cell)
        with no_malloc_trim(self.keep_memory), self._exact(stage_plan):
            pieces = self._step(STAGES[stage], stage_plan)(self._tiles(join, latent))
            return torch.cat(list(cells.rows(pieces, size, 1)), dim=2)

    def _images(self, part: StageCall, stage_plan: StagePlan, latent: Tensor | None) -> Iterator[Tensor]:
        """Bands of the enlarged image from tiles of the input, or of ``latent``."""
        join = self._join_of(stage_plan)
        with no_malloc_trim(self.keep_memory), self._exact(stage_plan):
            pieces = self._step(part, stage_plan)(self._tiles(join, latent))
            yield from join.rows(pieces, self._size, self.network.scale)

    def _join_of(self, stage_plan: StagePlan) -> TileJoin:
        options = self.options
        return join_of(stage_plan.tile, options.overlap, stage_plan.multiple, options.tile_blend)

    def _tiles(self, join: TileJoin, latent: Tensor | None) -> Iterator[Tile]:
        """The parts of the input, and of ``latent``."""
        places = join.starts(*self._size)
        parts = [None] * len(places) if latent is None else join.in_cells(self.plan.cell).cut(latent)
        for place, lr, part in zip(places, join.cut(self._source), parts, strict=True):
            yield Tile(place=place, lr=lr, latent=part)

    def _step(self, part: StageCall, stage_plan: StagePlan) -> TileRunner:
        return TileRunner(
            self.network,
            self.profile,
            self.options,
            part=part,
            batch=stage_plan.batch,
            progress=self._advance,
            fill=self.fill,
        )

    def _advance(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self.plan.steps)


def _padded(pixels: NDArray[Any], multiple: int) -> Tensor:
    """Samples (H, W, C) as (1, C, h, w), reflected at the bottom and right up to multiples of ``multiple``."""
    height, width = pixels.shape[:2]
    if height % multiple or width % multiple:
        pixels = np.pad(pixels, ((0, -height % multiple), (0, -width % multiple), (0, 0)), mode="reflect")
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]

"""Tiled inference of one image: in one pass per tile, or stage by stage with latents joined between."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from onestepsr.core.errors import OneStepSRError
from onestepsr.imaging.color import TOLERANCES, gray, wavelet
from onestepsr.imaging.icc import ColorProfile
from onestepsr.imaging.read import samples_to_tensor
from onestepsr.imaging.resize import bicubic
from onestepsr.inference.devices import Arrival, no_malloc_trim, to_device
from onestepsr.inference.memory_plan import Plan, StagePlan
from onestepsr.inference.options import UpscaleOptions
from onestepsr.inference.tiling import TileJoin, join_of
from onestepsr.models.cpu_kernels import as_kind, replace_layers
from onestepsr.models.generators import Generator, Stage

# ---- Group norms with one set of statistics for all tiles of an image ------------------------------------------------
# A group norm divides by the deviation of the tile at hand: sky becomes as lively as foliage, and neighbouring tiles
# differ in tone and contrast. Inside :meth:`SharedNorms.calibrated_by`, norms take their statistics from a reduced copy
# of the whole image instead.

BAND = 2**22
"""Numbers that statistics are taken of at once."""
CALIBRATION_SHARE = 1 / 8
"""Largest part of an image's pixels in its reduced copy, and so its cost beside the tiles."""


class SharedNorm(nn.GroupNorm):
    """A group norm that may be given mean and variance."""

    watching = False
    """True while the statistics of the input are being kept."""
    kept: tuple[Tensor, Tensor] | None = None
    """Mean and variance of every channel's group, each (C,) in float32; None: those of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised ``x`` (N, C, H, W)."""
        if self.watching:
            self.kept = self._statistics(x)
        elif self.kept is not None:
            weight, bias = (None if given is None else given.float() for given in (self.weight, self.bias))
            return F.batch_norm(x, *self.kept, weight, bias, training=False, eps=self.eps)
        return super().forward(x)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Over all samples, in bands, because all of ``x`` in float32 would be the largest tensor of all."""
        own = [axis for axis in range(x.ndim) if axis != 1]
        totals = torch.zeros(2, self.num_channels, device=x.device)
        for band in torch.split(x, max(1, BAND // x[:, :, :1].numel()), dim=2):
            values = band.float()
            totals += torch.stack([values.sum(own), values.square().sum(own)])
        width = self.num_channels // self.num_groups
        mean, square = totals.reshape(2, -1, width).sum(2) / (x.numel() // self.num_groups)
        return mean.repeat_interleave(width), (square - mean.square()).clamp_min(0.0).repeat_interleave(width)


class SharedNorms:
    """All group norms of a network, as :class:`SharedNorm`."""

    def __init__(self, network: nn.Module) -> None:
        """Replaces the plain ones below ``network``; parameters and their names stay."""
        replace_layers(network, lambda layer: as_kind(SharedNorm, layer) if type(layer) is nn.GroupNorm else None)
        self._norms = [layer for layer in network.modules() if isinstance(layer, SharedNorm)]

    def __len__(self) -> int:
        return len(self._norms)

    @contextmanager
    def calibrated_by(self, run: Callable[[], object]) -> Iterator[None]:
        """Inside, every norm has the statistics of its input in ``run``."""
        try:
            for norm in self._norms:
                norm.watching = True
            run()
            for norm in self._norms:
                norm.watching = False
            yield
        finally:
            for norm in self._norms:
                norm.watching, norm.kept = False, None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, norms take the statistics of their input again: exact ones, where that is the whole image."""
        kept = [norm.kept for norm in self._norms]
        for norm in self._norms:
            norm.kept = None
        yield
        for norm, statistics in zip(self._norms, kept, strict=True):
            norm.kept = statistics


def reduced(source: Tensor, most: float, multiple: int) -> Tensor:
    """Evenly spread pixels of ``source`` (1, C, H, W), at most ``most`` of them: sides are multiples of ``multiple``,
    and no shorter than it.

    Nothing is averaged: noise and grain, which are part of the statistics, would get lost.
    """

    def rounded(side: float) -> int:
        return max(1, int(side / multiple)) * multiple

    height, width = source.shape[-2:]
    factor = min(1.0, (most / (height * width)) ** 0.5)
    rows = rounded(height * factor)
    columns = rounded(min(width * factor, most / rows))
    rows = rounded(min(height * factor, most / columns))  # where the columns could not be as few as that
    return source[..., _spread(height, rows), :][..., _spread(width, columns)]


def _spread(length: int, count: int) -> Tensor:
    """``count`` of ``length`` indices."""
    return ((torch.arange(count) + 0.5) * (length / count)).long()


AHEAD = {"cuda": 1}
"""Batches that a kind of device is given before the result of the first is waited for: while the host joins tiles, the
device computes. Elsewhere none."""


class NonFiniteError(OneStepSRError):
    """The network's output is not finite."""


@dataclass(frozen=True, kw_only=True)
class LoadedGenerator:
    """A generator on its device."""

    generator: Generator
    """The generator."""
    device: torch.device
    """Device of its weights."""
    dtype: torch.dtype
    """Their dtype."""
    name: str
    """The model's name."""

    @property
    def input_dtype(self) -> torch.dtype:
        """Dtype of the images it is given: float32 for 16-bit weights too if it takes that, so that nothing is rounded
        before its first network."""
        return torch.promote_types(self.dtype, torch.float32) if self.generator.takes_float32 else self.dtype


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A part of an image."""

    origin: tuple[int, int]
    """Row and column where it starts."""
    lr: Tensor
    """Stored samples (1, C, h, w)."""
    latent: Tensor | None = None
    """The same part of a latent (1, D, h', w'), for stages that take one."""


@dataclass(frozen=True, kw_only=True)
class _Launched:
    """Work that a device was given."""

    tiles: int
    results: Arrival
    extremes: Arrival
    """Lowest and highest value of the network's output."""


class TiledRun:
    """One image, its plan, and the generator it goes through."""

    def __init__(
        self,
        loaded: LoadedGenerator,
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
        """``pixels`` (H, W, C) are stored samples of the colour space ``profile``. ``norms`` are to treat all tiles
        alike, where there are tiles. ``progress(done, total)`` is called after every tile. ``fill``: the last batch
        repeats its last tile until it is as large as the others. ``keep_memory``: see
        :func:`onestepsr.inference.devices.no_malloc_trim`."""
        self.loaded, self.generator, self.scale = loaded, loaded.generator, loaded.generator.scale
        self.plan, self.options, self.profile = plan, options, profile
        self.fill, self.keep_memory, self._norms = fill, keep_memory, norms
        self._padding = self._join_of(plan.stages["unet"] if plan.stages else plan).multiple
        self._source = _padded(pixels, self._padding)
        self._size = (self._source.shape[2], self._source.shape[3])
        self._progress, self._done = progress, 0

    # ---- the image ----

    def rows(self) -> Iterator[Tensor]:
        """The enlarged image, padding and all, as consecutive bands (1, C, rows, W * scale) of float32."""
        # Where some norms only meet tiles, they have statistics of the whole image. The reduced copy that gives these
        # is no smaller than ``_padding``, which may be more than the memory is planned for.
        calibrated = self._norms and self.plan.cuts_autoencoder and self._padding**2 <= self.plan.pixels
        with self._norms.calibrated_by(self._calibration_pass) if self._norms and calibrated else nullcontext():
            if self.plan.stages is None:
                yield from self.run_stage(None, self.plan, None)
                return
            z_l = self._joined(self.run_stage("encode", self.plan.stages["encode"], None))
            z_h = self._joined(self.run_stage("unet", self.plan.stages["unet"], z_l))
            yield from self.run_stage("decode", self.plan.stages["decode"], z_h)

    def rows_of_each(self, images: Iterable[NDArray[Any]]) -> Iterator[Iterator[Tensor]]:
        """:meth:`rows` of each of ``images``, which are all of this one's size and kind and in one tile each."""
        join = self._join_of(self.plan)
        tiles = (Tile(origin=(0, 0), lr=_padded(pixels, self._padding)) for pixels in images)
        with no_malloc_trim(self.keep_memory):
            for piece in self._outputs(None, tiles, self.plan.batch):
                yield join.rows(iter([piece]), self._size, self.scale)

    def enlarged_rows(self) -> Iterator[Tensor]:
        """The input, enlarged bicubically, as :meth:`rows`."""
        join = self._join_of(self.plan)
        pieces = (enlarge(_to_float(tile), self.scale) for tile in join.cut(self._source))
        return join.rows(pieces, self._size, self.scale)

    def run_stage(self, stage: Stage | None, stage_plan: StagePlan, latent: Tensor | None) -> Iterator[Tensor]:
        """Bands of joined rows that ``stage`` makes of the tiles of the image, and of ``latent``: of a latent, or of
        the enlarged image. None is the whole generator."""
        join, makes_latent = self._join_of(stage_plan), stage in ("encode", "unet")
        # Norms have statistics of their input if that is the whole image.
        own_norms = self._norms.disabled() if self._norms and stage_plan.tiles == 1 else nullcontext()
        with no_malloc_trim(self.keep_memory), own_norms:
            pieces = self._outputs(stage, self._tiles(join, latent), stage_plan.batch)
            if makes_latent:
                size = (self._size[0] // self.plan.position, self._size[1] // self.plan.position)
                yield from join.in_units_of(self.plan.position).rows(pieces, size, 1)
            else:
                yield from join.rows(pieces, self._size, self.scale)

    def _joined(self, bands: Iterator[Tensor]) -> Tensor:
        """A whole latent (1, D, h, w) in float32."""
        return torch.cat(list(bands), dim=2)

    def _join_of(self, stage_plan: StagePlan) -> TileJoin:
        return join_of(stage_plan.tile, self.options.overlap, stage_plan.multiple, self.options.tile_blend)

    def _tiles(self, join: TileJoin, latent: Tensor | None) -> Iterator[Tile]:
        """The parts of the input, and of ``latent``."""
        origins = join.origins(*self._size)
        latents = [None] * len(origins) if latent is None else join.in_units_of(self.plan.position).cut(latent)
        for origin, lr, part in zip(origins, join.cut(self._source), latents, strict=True):
            yield Tile(origin=origin, lr=lr, latent=part)

    # ---- norms with statistics of the whole image ----

    def _calibration_pass(self) -> None:
        """Send a reduced copy of the image through the network, whole."""
        # Not where freed memory is kept: its blocks have other sizes, and would only break up the heap.
        most = min(self.plan.pixels, self._size[0] * self._size[1] * CALIBRATION_SHARE)
        tile = Tile(origin=(0, 0), lr=reduced(self._source, most, self._padding))
        self._evaluate(None, [tile], _on(self._home, [tile]))

    # ---- tiles through the network and the colour fix ----

    @property
    def _home(self) -> torch.device:
        """Device of everything but the network: other than on CUDA and the CPU only that is sure to run."""
        return self.loaded.device if self.loaded.device.type == "cuda" else torch.device("cpu")

    def _outputs(self, stage: Stage | None, tiles: Iterator[Tile], batch: int) -> Iterator[Tensor]:
        """The output of each tile, on the CPU, in order: latents, or colour-fixed images (1, C, h * scale, w * scale)
        in float32. It may be changed in place."""
        waiting: deque[_Launched] = deque()
        ahead = AHEAD.get(self.loaded.device.type, 0)
        while group := list(itertools.islice(tiles, batch)):
            waiting.append(self._launch(stage, group, batch))
            if len(waiting) > ahead:
                yield from self._landed(waiting.popleft())
        while waiting:
            yield from self._landed(waiting.popleft())

    def _launch(self, stage: Stage | None, tiles: list[Tile], batch: int) -> _Launched:
        given = [*tiles, *tiles[-1:] * (batch - len(tiles))] if self.fill else tiles
        lr = _on(self._home, given)
        output = self._evaluate(stage, given, lr).to(self._home)
        extremes = Arrival(torch.stack(output.aminmax()))  # far cheaper than looking at every value
        if self._home.type == "cpu":
            self._require_finite(extremes)
        else:  # checked when they land: asking now would wait
            output = output.nan_to_num()
        if stage not in ("encode", "unet"):
            output = self._color_fixed(output.clamp(0.0, 1.0), lr)
        return _Launched(tiles=len(tiles), results=Arrival(output), extremes=extremes)

    def _landed(self, launched: _Launched) -> Iterator[Tensor]:
        results = launched.results.get()
        self._require_finite(launched.extremes)
        for index in range(launched.tiles):
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self.plan.steps)
            yield results[index : index + 1]

    def _evaluate(self, stage: Stage | None, tiles: list[Tile], lr: Tensor) -> Tensor:
        """Output of the network for tiles, whose samples are ``lr`` (N, C, h, w) in [0, 1]."""
        latents = [tile.latent for tile in tiles if tile.latent is not None]
        z = _channels_last(to_device(torch.cat(latents), self.loaded.device)) if latents else lr
        if stage == "decode":
            output = self.generator.decode(z)
        else:
            rgb = (lr if self.profile is None else self.profile.to_srgb(lr)).expand(-1, 3, -1, -1)
            rgb = _channels_last(rgb.to(self.loaded.device, self.loaded.input_dtype))
            noise, embedding = self._noise(tiles[0].origin), self.options.prompt_embedding
            prompt: dict[str, Any] = {}
            if embedding is not None and self.generator.reads_text:
                prompt = {"prompt": embedding.to(self.loaded.device, self.loaded.dtype)}
            if stage == "encode":
                output = self.generator.encode_lr(rgb, **noise)
            elif stage == "unet":
                output = self.generator.restore_latent(z, rgb, **noise, **prompt)
            else:
                output = self.generator(rgb, **noise, **prompt)
        expected = (len(lr), 3, *(side * self.scale for side in lr.shape[-2:]))
        if stage not in ("encode", "unet") and output.shape != expected:
            raise OneStepSRError(
                f"{self.loaded.name}: gave {tuple(output.shape)} for {tuple(lr.shape)}, expected {expected}"
            )
        return output.float()

    def _noise(self, origin: tuple[int, int]) -> dict[str, Any]:
        """Source and position of the noise of a tile; a generator that draws any is given one tile at a time."""
        if self.generator.takes_batches:
            return {}
        seed = (self.options.seed or 0) * 1_000_003 % 2**64  # PyTorch takes no larger ones
        return {"rng": torch.Generator().manual_seed(seed), "origin": origin}

    def _color_fixed(self, output: Tensor, lr: Tensor) -> Tensor:
        """``output`` in the image's own colour space, with the low frequencies of ``lr`` where these are wanted."""
        if self.profile is not None:
            output = self.profile.from_srgb(output)
        if lr.shape[1] == 1:
            output = gray(output)
        if self.options.color_fix in TOLERANCES:
            output = wavelet(output, enlarge(lr, self.scale), TOLERANCES[self.options.color_fix])
        return output

    def _require_finite(self, extremes: Arrival) -> None:
        if not torch.isfinite(extremes.get()).all():
            raise NonFiniteError(
                f"{self.loaded.name}: values that are not finite in {self.loaded.dtype}; try --dtype float32"
            )


# ---- samples and tensors ----


def enlarge(values: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement (a = -0.5, as Pillow) of (N, C, H, W), clamped to [0, 1]."""
    return bicubic(values, scale, a=-0.5).clamp(0.0, 1.0)


def _padded(pixels: NDArray[Any], multiple: int) -> Tensor:
    """Samples (H, W, C) as (1, C, h, w), reflected at the bottom and right up to multiples of ``multiple``."""
    height, width = pixels.shape[:2]
    if height % multiple or width % multiple:
        pixels = np.pad(pixels, ((0, -height % multiple), (0, -width % multiple), (0, 0)), mode="reflect")
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]


def _to_float(tile: Tensor) -> Tensor:
    """Stored samples (1, C, h, w) as float32 in [0, 1], on the CPU."""
    return samples_to_tensor(tile[0].permute(1, 2, 0).numpy())


def _on(device: torch.device, tiles: Iterable[Tile]) -> Tensor:
    """LR tiles as float32 (N, C, h, w) in [0, 1] on ``device``; 8 bits travel as they are."""
    samples = [tile.lr for tile in tiles]
    if device.type == "cpu" or samples[0].dtype != torch.uint8:
        values = [_to_float(tile) for tile in samples]
        return to_device(values[0] if len(values) == 1 else torch.cat(values), device)
    return to_device(torch.cat(samples), device).to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)

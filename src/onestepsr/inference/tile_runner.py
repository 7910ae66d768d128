"""What happens to the tiles of an image between its samples and the joined rows: the network and the colour fix."""

from __future__ import annotations

import inspect
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from onestepsr.core.errors import OneStepSRError
from onestepsr.imaging.color import gray, wavelet
from onestepsr.imaging.icc import ColorProfile
from onestepsr.imaging.read import samples_to_tensor
from onestepsr.inference.devices import Arrival, to_device
from onestepsr.inference.options import UpscaleOptions
from onestepsr.models.memory_cost import Stage

AHEAD = {"cuda": 1}
"""Batches that a kind of device is given before the result of the first is waited for: while the host joins tiles, the
device computes. Elsewhere none."""


class NonFiniteError(OneStepSRError):
    """The network's output is not finite."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A generator where it runs."""

    generator: nn.Module
    """Maps (N, 3, h, w) in [0, 1] to (N, 3, h * scale, w * scale)."""
    device: torch.device
    """Where its weights are."""
    dtype: torch.dtype
    """Their dtype."""
    input_dtype: torch.dtype
    """That of the tiles it is given, see :func:`input_dtype_of`."""
    scale: int
    """Output side / input side."""
    name: str
    """What the model is called."""


@dataclass(frozen=True, kw_only=True)
class StageCall:
    """What of a generator tiles go through."""

    method: str
    """Its method."""
    takes_lr: bool = True
    """Whether that is given the LR tile."""
    takes_latent: bool = False
    """Whether it is given, before that, the tile of a latent."""
    makes_image: bool = True
    """Whether an image comes out, and not a latent."""


WHOLE = StageCall(method="forward")
STAGES: dict[Stage, StageCall] = {
    "encode": StageCall(method="encode_lr", makes_image=False),
    "unet": StageCall(method="restore_latent", takes_latent=True, makes_image=False),
    "decode": StageCall(method="decode", takes_lr=False, takes_latent=True),
}
"""Encoder, UNet and decoder, one after the other."""


def takes_batches(generator: nn.Module, part: StageCall) -> bool:
    """Whether several tiles of one image may be given to it together: not where each has noise of its own."""
    return {"rng", "origin"}.isdisjoint(_taken_by(generator, part))


def _taken_by(generator: nn.Module, part: StageCall) -> Collection[str]:
    """Names of what the method of a generator takes."""
    return inspect.signature(getattr(generator, part.method)).parameters


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A part of an image."""

    place: tuple[int, int]
    """Row and column where it starts."""
    lr: Tensor
    """Stored samples (1, C, h, w)."""
    latent: Tensor | None = None
    """The same part of a latent (1, D, h', w'), where the network is given one."""


@dataclass(frozen=True, kw_only=True)
class _Launched:
    """What a device was told to compute."""

    tiles: int
    results: Arrival
    extremes: Arrival
    """Lowest and highest value that the network gave."""


class TileRunner:
    """Tiles to what comes of them in one pass, in order: colour-fixed images (1, C, h * scale, w * scale) in float32,
    or latents.

    The tiles are those of one image, all of one shape, and ``batch`` of them go through the network together.
    """

    def __init__(
        self,
        network: Network,
        profile: ColorProfile | None,
        options: UpscaleOptions,
        *,
        part: StageCall = WHOLE,
        batch: int = 1,
        progress: Callable[[], None] | None = None,
        fill: bool = False,
    ) -> None:
        """``progress`` is called after each tile. ``fill``: the last batch repeats its last tile until it is as large
        as the others."""
        self.network, self.profile, self.options, self.progress = network, profile, options, progress
        self.part, self.batch, self.fill = part, batch, fill
        self._takes = _taken_by(network.generator, part)
        self._launched = 0

    def __call__(self, tiles: Iterable[Tile]) -> Iterator[Tensor]:
        """The output of each tile, on the CPU; it may be changed in place."""
        waiting: deque[_Launched] = deque()
        ahead = AHEAD.get(self.network.device.type, 0)
        remaining = iter(tiles)
        while batch := list(itertools.islice(remaining, self.batch)):
            waiting.append(self._launch(batch))
            if len(waiting) > ahead:
                yield from self._landed(waiting.popleft())
        while waiting:
            yield from self._landed(waiting.popleft())

    def rehearse(self, tile: Tile) -> None:
        """Send ``tile`` through the network for what that leaves behind there; its output is dropped."""
        self._network_output([tile], _on(self._home, [tile]))

    @property
    def _home(self) -> torch.device:
        """Where everything but the network is computed: elsewhere than on CUDA and the CPU only that is sure to run."""
        return self.network.device if self.network.device.type == "cuda" else torch.device("cpu")

    def _launch(self, tiles: list[Tile]) -> _Launched:
        home = self._home
        given = [*tiles, *tiles[-1:] * (self.batch - len(tiles))] if self.fill else tiles
        lr = _on(home, given)
        output = self._network_output(given, lr).to(home)
        extremes = Arrival(torch.stack(output.aminmax()))  # far cheaper than looking at every value
        if home.type == "cpu":
            self._require_finite(extremes)
        else:  # looked at when they land: asking now would wait
            output = output.nan_to_num()
        results = Arrival(self._coloured(output.clamp(0.0, 1.0), lr) if self.part.makes_image else output)
        self._launched += len(tiles)
        return _Launched(tiles=len(tiles), results=results, extremes=extremes)

    def _landed(self, launched: _Launched) -> Iterator[Tensor]:
        results = launched.results.get()
        self._require_finite(launched.extremes)
        for index in range(launched.tiles):
            if self.progress is not None:
                self.progress()
            yield results[index : index + 1]

    def _coloured(self, output: Tensor, lr: Tensor) -> Tensor:
        """``output`` in the image's own colour space, with the low frequencies of ``lr`` where these are wanted."""
        if self.profile is not None:
            output = self.profile.from_srgb(output)
        if lr.shape[1] == 1:
            output = gray(output)
        if self.options.color_fix == "wavelet":
            output = wavelet(output, enlarge(lr, self.network.scale))
        return output

    def _network_output(self, tiles: list[Tile], lr: Tensor) -> Tensor:
        network = self.network
        given = []
        if self.part.takes_latent:
            latents = torch.cat([tile.latent for tile in tiles if tile.latent is not None])
            given.append(to_device(latents, network.device))
        if self.part.takes_lr:
            lr = lr if self.profile is None else self.profile.to_srgb(lr)
            given.append(lr.expand(-1, 3, -1, -1).to(network.device, network.input_dtype))
        ordered = (values.contiguous(memory_format=torch.channels_last) for values in given)
        # A module is called by itself, not by its method, so that it may be a compiled one.
        run = network.generator if self.part is WHOLE else getattr(network.generator, self.part.method)
        output = run(*ordered, **self._conditions(tiles[0].place)).float()
        expected = (len(lr), 3, *(side * network.scale for side in lr.shape[-2:]))
        if self.part.makes_image and output.shape != expected:
            raise OneStepSRError(
                f"{network.name}: gave {tuple(output.shape)} for {tuple(lr.shape)}, expected {expected}"
            )
        return cast(Tensor, output)

    def _conditions(self, place: tuple[int, int]) -> dict[str, Any]:
        """What the generator takes besides the image. Those that take noise are given one tile at a time."""
        extra = dict[str, Any]()
        if "origin" in self._takes:  # the place decides the noise
            extra["origin"] = place
        if "rng" in self._takes:  # otherwise every tile has its own, the same in every run
            own = 0 if "origin" in self._takes else self._launched
            seed = (self.options.seed or 0) * 1_000_003 + own
            extra["rng"] = torch.Generator().manual_seed(seed % 2**64)  # PyTorch takes no larger ones
        if self.options.prompt_embedding is not None and "prompt_embedding" in self._takes:
            embedding = self.options.prompt_embedding
            extra["prompt_embedding"] = embedding.to(self.network.device, self.network.dtype)
        return extra

    def _require_finite(self, extremes: Arrival) -> None:
        if not torch.isfinite(extremes.get()).all():
            raise NonFiniteError(
                f"{self.network.name}: values that are not finite in {self.network.dtype}; try --dtype float32"
            )


def input_dtype_of(generator: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Number format of the images for a generator whose weights are ``dtype``: float32 if it ``takes_float32`` then
    too, so that nothing is rounded before its first network."""
    wide = getattr(generator, "takes_float32", False)
    return torch.promote_types(dtype, torch.float32) if wide else dtype


def enlarge(values: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement (a = -0.5, as Pillow) of (N, C, H, W), clamped to [0, 1]."""
    height, width = (side * scale for side in values.shape[-2:])
    return functional.interpolate(values, (height, width), mode="bicubic", antialias=True).clamp(0.0, 1.0)


def to_float(tile: Tensor) -> Tensor:
    """Stored samples (1, C, h, w) as float32 in [0, 1], on the CPU."""
    return samples_to_tensor(tile[0].permute(1, 2, 0).numpy())


def _on(device: torch.device, tiles: list[Tile]) -> Tensor:
    """LR tiles as float32 (N, C, h, w) in [0, 1] on ``device``; 8 bits travel as they are."""
    samples = [tile.lr for tile in tiles]
    if device.type == "cpu" or samples[0].dtype != torch.uint8:
        values = [to_float(tile) for tile in samples]
        return to_device(values[0] if len(values) == 1 else torch.cat(values), device)
    return to_device(torch.cat(samples), device).to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)

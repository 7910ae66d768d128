"""What happens to the tiles of a picture between its samples and the joined rows: the network and the colour fix."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from onestepsr.color import gray, wavelet
from onestepsr.errors import OneStepSRError
from onestepsr.image import samples_to_tensor
from onestepsr.image_profile import MatrixProfile
from onestepsr.transfers import Arrival, to_device
from onestepsr.upscale_options import UpscaleOptions

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
    """Their number format."""
    input_dtype: torch.dtype
    """That of the tiles it is given, see :func:`input_dtype_of`."""
    scale: int
    """Output side / input side."""
    name: str
    """What the model is called."""
    takes_rng: bool
    """Whether it draws noise from a generator that it is given."""
    takes_origin: bool
    """Whether it wants to know where a tile lies."""


@dataclass(frozen=True, kw_only=True)
class _Launched:
    """What a device was told to compute."""

    tiles: int
    pictures: Arrival
    extremes: Arrival
    """Lowest and highest value that the network gave."""


class TileStep:
    """Tiles of stored samples (1, C, h, w) to colour-fixed float32 output (1, C, h * scale, w * scale), in order.

    The tiles are those of one picture, all of one shape, and ``batch`` of them go through the network together.
    """

    def __init__(
        self,
        network: Network,
        profile: MatrixProfile | None,
        options: UpscaleOptions,
        places: list[tuple[int, int]],
        *,
        batch: int = 1,
        progress: Callable[[int, int], None] | None = None,
        fill: bool = False,
    ) -> None:
        """``places`` holds row and column of every tile, in the order of the calls; ``progress(done, total)`` is called
        after each. ``fill``: the last batch repeats its last tile until it is as large as the others."""
        self.network, self.profile, self.options, self.progress = network, profile, options, progress
        self.places, self.batch, self.fill = places, batch, fill
        self._launched = self._done = 0

    def __call__(self, tiles: Iterable[Tensor]) -> Iterator[Tensor]:
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

    def rehearse(self, tile: Tensor) -> None:
        """Send ``tile`` (1, C, h, w) through the network for what that leaves behind there; its output is dropped."""
        self._network_output(_on(self._home, [tile]))

    @property
    def _home(self) -> torch.device:
        """Where everything but the network is computed: elsewhere than on CUDA and the CPU only that is sure to run."""
        return self.network.device if self.network.device.type == "cuda" else torch.device("cpu")

    def _launch(self, tiles: list[Tensor]) -> _Launched:
        home = self._home
        lr = _on(home, [*tiles, *tiles[-1:] * (self.batch - len(tiles))] if self.fill else tiles)
        output = self._network_output(lr).to(home)
        extremes = Arrival(torch.stack(output.aminmax()))  # far cheaper than looking at every value
        if home.type == "cpu":
            self._require_finite(extremes)
        else:  # looked at when they land: asking now would wait
            output = output.nan_to_num()
        pictures = Arrival(self._coloured(output.clamp(0.0, 1.0), lr))
        self._launched += len(tiles)
        return _Launched(tiles=len(tiles), pictures=pictures, extremes=extremes)

    def _landed(self, launched: _Launched) -> Iterator[Tensor]:
        pictures = launched.pictures.get()
        self._require_finite(launched.extremes)
        for index in range(launched.tiles):
            self._done += 1
            if self.progress is not None:
                self.progress(self._done, len(self.places))
            yield pictures[index : index + 1]

    def _coloured(self, output: Tensor, lr: Tensor) -> Tensor:
        """``output`` in the picture's own colour space, with the low frequencies of ``lr`` where these are wanted."""
        if self.profile is not None:
            output = self.profile.from_srgb(output)
        if lr.shape[1] == 1:
            output = gray(output)
        if self.options.color_fix == "wavelet":
            output = wavelet(output, enlarge(lr, self.network.scale))
        return output

    def _network_output(self, lr: Tensor) -> Tensor:
        network = self.network
        lr = lr if self.profile is None else self.profile.to_srgb(lr)
        rgb = lr.expand(-1, 3, -1, -1).to(network.device, network.input_dtype)
        rgb = rgb.contiguous(memory_format=torch.channels_last)
        output = network.generator(rgb, **self._conditions()).float()
        expected = (len(lr), 3, *(side * network.scale for side in lr.shape[-2:]))
        if output.shape != expected:
            raise OneStepSRError(
                f"{network.name}: gave {tuple(output.shape)} for {tuple(lr.shape)}, expected {expected}"
            )
        return cast(Tensor, output)

    def _conditions(self) -> dict[str, Any]:
        """What the generator takes besides the picture. Those that take noise are given one tile at a time."""
        network, extra = self.network, dict[str, Any]()
        if network.takes_origin:  # the place decides the noise
            extra["origin"] = self.places[self._launched]
        if network.takes_rng:  # otherwise every tile has its own, the same in every run
            own = 0 if network.takes_origin else self._launched
            seed = (self.options.seed or 0) * 1_000_003 + own
            extra["rng"] = torch.Generator().manual_seed(seed % 2**64)  # PyTorch takes no larger ones
        if self.options.prompt_embedding is not None:
            extra["prompt_embedding"] = self.options.prompt_embedding.to(network.device, network.dtype)
        return extra

    def _require_finite(self, extremes: Arrival) -> None:
        if not torch.isfinite(extremes.get()).all():
            raise NonFiniteError(
                f"{self.network.name}: values that are not finite in {self.network.dtype}; try --dtype float32"
            )


def input_dtype_of(generator: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Number format of the pictures for a generator whose weights are ``dtype``: float32 if it ``takes_float32`` then
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


def _on(device: torch.device, tiles: list[Tensor]) -> Tensor:
    """Stored samples of tiles as float32 (N, C, h, w) in [0, 1] on ``device``; 8 bits travel as they are."""
    if device.type == "cpu" or tiles[0].dtype != torch.uint8:
        values = [to_float(tile) for tile in tiles]
        return to_device(values[0] if len(values) == 1 else torch.cat(values), device)
    return to_device(torch.cat(tiles), device).to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)

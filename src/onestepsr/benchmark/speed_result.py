"""What a measurement of speed found, and the figures that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from onestepsr.benchmark.ceiling import Ceiling
from onestepsr.benchmark.peak_memory import MemoryUse
from onestepsr.inference.tiling import Sides


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Seconds of repeated runs: the middle, the quartiles around it, and the shortest."""

    median: float
    """Half of the runs took less."""
    lower: float
    """A quarter of the runs took less."""
    upper: float
    """A quarter of the runs took more."""
    best: float
    """The shortest run."""
    runs: int
    """How many there were."""


def spread(seconds: Sequence[float]) -> Spread:
    """The spread of at least one run."""
    values = list(seconds)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Spread(median=median, lower=lower, upper=upper, best=min(values), runs=len(values))


@dataclass(frozen=True, kw_only=True)
class StageSpeed:
    """One stage of one batch."""

    name: str
    """``read``, ``enlarge``, ``encode``, ``unet`` or ``steps``, ``decode``, ``colour`` or ``write``."""
    seconds: Spread
    """Time."""
    macs: int | None = None
    """Multiply-accumulate operations; None where they are not counted."""
    tile: Sides | None = None
    """Height and width of its tiles in input pixels, where it has tiles of its own."""

    @property
    def tflops(self) -> float | None:
        """Operations, two per MAC, per second of the median, in units of 10^12."""
        return None if not self.macs else 2 * self.macs / self.seconds.median / 1e12


@dataclass(frozen=True, kw_only=True)
class PathSpeed:
    """One way of enlarging a batch of images."""

    dtype: str
    """Number format of the network."""
    memory_format: str
    """Order of the network's tensors in memory."""
    tile: Sides
    """Height and width of a tile in input pixels; those of the image where it is one tile, and the decoder's where
    stages have their own."""
    stages: tuple[StageSpeed, ...]
    """The parts, in order."""
    network: Spread
    """The generator alone: from LR tensors to SR tensors."""
    whole: Spread
    """From files to files."""

    @property
    def macs(self) -> int:
        """MACs of all stages that are counted."""
        return sum(stage.macs or 0 for stage in self.stages)

    @property
    def tflops(self) -> float | None:
        """Throughput over the counted stages together: all their operations over the sum of their medians."""
        seconds = sum(stage.seconds.median for stage in self.stages if stage.macs)
        return 2 * self.macs / seconds / 1e12 if seconds else None

    def median(self, stage: str) -> float | None:
        """Median seconds of a stage; None if there is none of that name."""
        return next((found.seconds.median for found in self.stages if found.name == stage), None)


@dataclass(frozen=True, kw_only=True)
class ModelSpeed:
    """One model with one number of steps."""

    model: str
    """Name or path."""
    steps: int
    """Evaluations of the diffusion network for one image."""
    output: tuple[int, int]
    """Columns and rows of an image put out."""
    batch: int
    """Images at once."""
    product: PathSpeed
    """The upscaler as it is used."""
    ceiling: Ceiling
    """Of the product's dtype and memory format, measured in the same run."""
    baseline: PathSpeed | None = None
    """The plain network; None where it was not wanted or does not fit into memory."""
    agreement_db: float | None = None
    """PSNR between the images of both, 8 bits, at most 100 dB."""
    memory: MemoryUse | None = None
    """Of one image, as used; None where that was not wanted."""

    @property
    def speedup_over_baseline(self) -> float | None:
        """Median time of the plain network over the product's, both without files and colour fix."""
        return None if self.baseline is None else self.baseline.network.median / self.product.network.median

    @property
    def fraction_of_ceiling(self) -> float | None:
        """Throughput over all counted stages, as a share of the convolution's."""
        tflops = self.product.tflops
        return None if tflops is None else tflops / self.ceiling.convolution

    @property
    def fraction_of_matrix_ceiling(self) -> float | None:
        """Throughput over all counted stages, as a share of the matrix product's."""
        tflops = self.product.tflops
        return None if tflops is None else tflops / self.ceiling.matrix

    @property
    def images_per_second(self) -> float:
        """Images from file to file."""
        return self.batch / self.product.whole.median

    @property
    def megapixels_per_second(self) -> float:
        """Pixels put out, from file to file, in units of 10^6."""
        return self.images_per_second * self.output[0] * self.output[1] / 1e6


@dataclass(frozen=True, kw_only=True)
class StepRatio:
    """How much faster one step is than several."""

    one: ModelSpeed
    """The one-step model."""
    many: ModelSpeed
    """The other."""

    @property
    def network(self) -> float:
        """Ratio of the networks' median times for a whole image, autoencoder included."""
        return self.many.product.network.median / self.one.product.network.median

    @property
    def whole(self) -> float:
        """Ratio of the median times from file to file."""
        return self.many.product.whole.median / self.one.product.whole.median

    @property
    def steps(self) -> float | None:
        """Ratio of the median times of the diffusion network alone: all its evaluations, nothing else."""
        one, many = (found.product.median("steps") or found.product.median("unet") for found in (self.one, self.many))
        return many / one if one and many else None


def step_ratios(found: Sequence[ModelSpeed]) -> list[StepRatio]:
    """Every one-step model beside every model of several steps."""
    ones, others = ([model for model in found if (model.steps == 1) == single] for single in (True, False))
    return [StepRatio(one=one, many=many) for one in ones for many in others]

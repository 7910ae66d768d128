"""Generators as graphs for other engines: parts that take one tensor and give one, and their ONNX files.

A small network is one graph that takes an image of any size, pads it inside and clamps the result to [0, 1]. One on
Stable Diffusion is three, encoder, UNet and decoder, between which latents are tensors: an engine can then tile each.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from onestepsr.core.errors import MissingExtra, UserError
from onestepsr.models.generators import Generator, LatentGenerator, OneStepLatentGenerator
from onestepsr.models.tiny.folded import FoldedTiny, is_foldable

OPSET = 18
"""Version of ONNX's operators that is written."""
LARGEST_FILE = 1_500_000_000
"""Bytes of weights from which on they are written beside the graph; one ONNX file holds at most 2 GiB."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One part of a generator."""

    name: str
    """Empty for a whole generator, or encoder, unet, decoder."""
    network: nn.Module
    """Takes ``input`` (N, C, h, w) and gives ``output`` (N, C', h', w')."""
    channels: int
    """C."""
    multiple: int
    """Sides of the input must be multiples of this."""


class AnySize(nn.Module):
    """A network on sides of any length from 1 on: padded as :func:`onestepsr.models.generators.pad_to_multiple` does,
    cropped, and clamped to [0, 1]."""

    def __init__(self, network: nn.Module, multiple: int, scale: int) -> None:
        super().__init__()
        self.network, self.multiple, self.scale = network, multiple, scale

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name in the graph)
        """Enlarged image (N, 3, s h, s w) of (N, 3, h, w)."""
        if self.multiple == 1:
            return cast(Tensor, self.network(input)).clamp(0.0, 1.0)
        height, width = input.shape[-2:]
        x = input.index_select(2, self._reflected(input, 2)).index_select(3, self._reflected(input, 3))
        rows = torch.arange(self.scale * height, device=x.device)
        columns = torch.arange(self.scale * width, device=x.device)
        # Slices would be contiguous or not by the size, which torch.export takes for two different graphs.
        result = cast(Tensor, self.network(x)).index_select(2, rows).index_select(3, columns)
        return result.clamp(0.0, 1.0)

    def _reflected(self, x: Tensor, dim: int) -> Tensor:
        """Indices along ``dim`` up to the next multiple, reflected at its end as often as needed."""
        length, multiple = x.shape[dim], self.multiple
        period = (2 * torch.arange(length, device=x.device)[-1:]).clamp(min=1)  # a tensor: its length may be symbolic
        index = torch.arange((length + multiple - 1) // multiple * multiple, device=x.device) % period
        return torch.minimum(index, period - index)


class _Encoder(nn.Module):
    def __init__(self, generator: LatentGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.generator.encode_lr(input)


class _UNet(_Encoder):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.generator.restore_latent(input, input)


class _Decoder(_Encoder):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.generator.decode(input)


def graphs_of(generator: Generator, name: str, *, plain: bool = False) -> tuple[Graph, ...]:
    """The graphs of a generator in float32 with the layers that were trained; one, or encoder, unet and decoder.

    ``plain``: of few kinds of layers, see :class:`onestepsr.models.tiny.folded.FoldedTiny`.
    Raises :class:`UserError` for generators whose result depends on noise.
    """
    if is_foldable(generator):
        folded = FoldedTiny(generator, plain=plain)
        return (Graph(name="", network=AnySize(folded, folded.multiple, folded.scale), channels=3, multiple=1),)
    if not isinstance(generator, LatentGenerator):
        return (Graph(name="", network=AnySize(generator, 1, generator.scale), channels=3, multiple=1),)
    if not isinstance(generator, OneStepLatentGenerator) or generator.noise_stage is not None:
        raise UserError(f"{name}: draws noise, which no exported graph does; accepted: D3SR, OSEDiff, Real-ESRGAN")
    latent, side = generator.latent_channels, max(1, generator.autoencoder.factor // generator.scale)
    return (
        Graph(name="encoder", network=_Encoder(generator), channels=3, multiple=side),
        Graph(name="unet", network=_UNet(generator), channels=latent, multiple=generator.unet.size_multiple),
        Graph(name="decoder", network=_Decoder(generator), channels=latent, multiple=1),
    )


def example_for(graph: Graph, dtype: torch.dtype) -> Tensor:
    """An input for tracing, in which no two sides that may differ are equal: (2, C, h, w) of random values."""
    rng = torch.Generator().manual_seed(0)
    multiple = graph.multiple
    sides = (3 * multiple, 5 * multiple) if multiple > 1 else (9, 14)
    return torch.rand(2, graph.channels, *sides, generator=rng).to(dtype)


def dynamic_sides(graph: Graph) -> dict[str, Any]:
    """Specification for torch.export of what may vary: batch, height and width, the last two in multiples."""
    dim = torch.export.Dim
    if graph.multiple == 1:
        return {"input": {0: dim.DYNAMIC, 2: dim.DYNAMIC, 3: dim.DYNAMIC}}
    rows, columns = dim("rows", min=1, max=4096), dim("columns", min=1, max=4096)
    return {"input": {0: dim.DYNAMIC, 2: graph.multiple * rows, 3: graph.multiple * columns}}


def write_onnx(graph: Graph, path: Path, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32) -> None:
    """Write ``graph`` as ONNX with inputs ``input`` and ``output``; large weights lie beside it in ``path``.data.

    Raises :class:`onestepsr.core.errors.MissingExtra` without the packages onnx and onnxscript.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra("ONNX export", "export") from error
    network = graph.network.to(dtype).eval()
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            network,
            (example_for(graph, dtype),),
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=dynamic_sides(graph),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.model.producer_name = "onestepsr"
    for values, scaled in ((program.model.graph.inputs, ""), (program.model.graph.outputs, "output_")):
        shape = values[0].shape
        assert shape is not None
        for axis, label in ((0, "batch"), (2, f"{scaled}height"), (3, f"{scaled}width")):
            shape[axis] = "batch" if axis == 0 else label
    size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    program.save(path, external_data=size > LARGEST_FILE)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the exporter does not speak of packages that it could also export, nor of deprecations in itself."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""Counting what an evaluation costs: multiply-accumulate operations (MACs), and the parameters that take part in it.

Two conventions are in use, and papers rarely say which is theirs:

- *all products*: every matrix product and convolution that PyTorch executes, by its own counter. This includes the
  products inside attention (queries with keys, weights with values), which belong to no layer.
- *layers only*: convolution and linear layers, counted by a hook on each module, as the usual profilers do.

Normalisation, activations, additions and resampling are in neither: they are cheap in operations. One widespread
profiler, thop, counts layers only, but adds four operations for every element that a layer normalisation with weights
puts out; and what it calls parameters are those of the layers that it knows, which leaves out group normalisation and
free parameters. Its two figures are kept beside ours, because published tables seem to be made with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
THOP_OPERATIONS_PER_NORMALISED_ELEMENT = 4


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one evaluation costs."""

    macs: int
    """MACs of all products, by PyTorch's counter (which counts two operations each)."""
    layer_macs: int
    """MACs of convolution and linear layers only, by hooks on the modules."""
    parameters: int
    """Numbers in the parameters that the evaluation uses."""
    trainable: int
    """Those of them that require a gradient."""
    thop_macs: int
    """What the profiler thop calls MACs."""
    thop_parameters: int
    """What the profiler thop calls parameters."""


def count(network: nn.Module, evaluate: Callable[[], T]) -> tuple[T, Cost]:
    """Result and cost of ``evaluate()``, which may call any part of ``network``; meant for the meta device.

    Nothing is computed there, so that any size takes moments and no memory. The counts are those of one call, for as
    many samples as it is given.
    """
    layers, use = LayerCounter(network), ParameterUse(network.parameters())
    products = FlopCounterMode(display=False, custom_mapping=_UNREGISTERED)
    with ExitStack() as stack:
        for context in (_frozen(network), layers, use, products):
            stack.enter_context(context)
        result = evaluate()
    return result, Cost(
        macs=products.get_total_flops() // 2,
        layer_macs=layers.macs,
        parameters=number_of(use.used),
        trainable=number_of(use.used, trainable=True),
        thop_macs=layers.macs + THOP_OPERATIONS_PER_NORMALISED_ELEMENT * layers.normalised,
        thop_parameters=number_of(layers.parameters),
    )


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside.

    Not ``no_grad``: a view of a trainable parameter made there requires a gradient without having a history, which
    PyTorch's counter takes for an error.
    """
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def number_of(parameters: Iterable[Tensor], *, trainable: bool = False) -> int:
    """How many numbers ``parameters`` hold, or only those that require a gradient."""
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad or not trainable)


class LayerCounter:
    """Counts the work of the layers below a module while it is entered."""

    def __init__(self, network: nn.Module) -> None:
        self.macs = 0
        """MACs of convolution and linear layers."""
        self.normalised = 0
        """Elements that layer normalisations put out."""
        self._network = network
        self._called: set[nn.Module] = set()
        self._handles: list[RemovableHandle] = []

    @property
    def parameters(self) -> set[Tensor]:
        """Parameters of the convolution, linear and layer-normalisation layers that were called."""
        return {parameter for layer in self._called for parameter in layer.parameters(recurse=False)}

    def __enter__(self) -> LayerCounter:
        for module in self._network.modules():
            if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
                self._handles.append(module.register_forward_hook(self._add))
            elif isinstance(module, nn.LayerNorm):
                self._handles.append(module.register_forward_hook(self._add_normalisation))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A weight's first axis is the outputs', in a transposed convolution the inputs'; the rest is the work for
        each."""
        weight = layer.get_parameter("weight")
        elements = inputs[0] if isinstance(layer, TRANSPOSED) else output
        self.macs += elements.numel() * (weight.numel() // weight.shape[0])
        self._called.add(layer)

    def _add_normalisation(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.normalised += output.numel()
        self._called.add(layer)


class ParameterUse(TorchFunctionMode):
    """Remembers which of ``parameters`` are passed to any PyTorch function while it is entered.

    To be asked for its type or shape is no use.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {id(parameter): parameter for parameter in parameters}
        self._used: dict[int, Tensor] = {}

    @property
    def used(self) -> list[Tensor]:
        """The parameters seen so far, each once."""
        return list(self._used.values())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note the parameters among the arguments, then call the function."""
        asked = getattr(func, "__name__", "") == "__get__"
        for argument in () if asked else (*args, *(kwargs or {}).values()):
            for item in argument if isinstance(argument, (list, tuple)) else (argument,):
                if id(item) in self._known:
                    self._used[id(item)] = self._known[id(item)]
        return func(*args, **(kwargs or {}))


def _attention_operations(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """Operations of attention on query (N, H, Q, C), key (N, H, K, C) and value (N, H, K, V): two matrix products."""
    batch, heads, queries, channels = query
    return 2 * batch * heads * queries * key[2] * (channels + value[3])


_UNREGISTERED: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations,
}
"""PyTorch's counter does not know the attention kernel of the CPU and takes it for free."""

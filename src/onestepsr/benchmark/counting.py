"""Multiply-accumulate operations (MACs) and parameters of a network, and of each stage of a generator.

Two conventions are in use, and papers rarely say which is theirs:

- *all products*: every matrix product and convolution that PyTorch executes, by its own counter. This includes the
  products inside attention (queries with keys, weights with values), which belong to no layer.
- *layers only*: convolution and linear layers, as the usual profilers count.

Normalisation, activations, additions and resampling are in neither: they are cheap in operations.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from onestepsr.inference.devices import without_compiling
from onestepsr.models.generators import LatentGenerator, OneStepLatentGenerator

T = TypeVar("T")
Method = Callable[..., Any]
Shape = tuple[int, ...]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# ---- one evaluation ----


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Operations and parameters of one evaluation."""

    macs: int
    """MACs of all products, by PyTorch's counter (which counts two operations each)."""
    layer_macs: int
    """MACs of convolution and linear layers only."""
    parameters: int
    """Size of the parameters that the evaluation uses."""
    trainable: int
    """Size of those that require a gradient."""


def count(network: nn.Module, evaluate: Callable[[], T]) -> tuple[T, Cost]:
    """Result and cost of ``evaluate()``, which may call any part of ``network``; meant for the meta device.

    Nothing is computed there, so that any size takes moments and no memory. The counts are those of one call, for as
    many samples as it is given.
    """
    layer_macs = 0

    def add(layer: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal layer_macs
        if isinstance(layer, LAYERS):  # the first axis of a weight are the outputs, the rest is the work for each
            layer_macs += output.numel() * (layer.weight.numel() // layer.weight.shape[0])

    use = _ParameterUse(network.parameters())
    products = FlopCounterMode(display=False, custom_mapping=_UNREGISTERED)
    # A view of a trainable parameter made under no_grad requires a gradient without having a history, which PyTorch's
    # counter takes for an error: so no parameter is trainable meanwhile.
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.requires_grad_(False)
    try:
        with use, products, register_module_forward_hook(add):
            result = evaluate()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return result, Cost(
        macs=products.get_total_flops() // 2,
        layer_macs=layer_macs,
        parameters=size_of(use.used.values()),
        trainable=size_of(use.used.values(), trainable=True),
    )


def size_of(parameters: Iterable[Tensor], *, trainable: bool = False) -> int:
    """Number of values in ``parameters``, or only in those that require a gradient."""
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad or not trainable)


class _ParameterUse(TorchFunctionMode):
    """Record which of ``parameters`` are given to any PyTorch function inside."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {id(parameter): parameter for parameter in parameters}
        self.used: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":  # reading a shape or dtype is no use
            for argument in (*args, *kwargs.values()):
                items = argument if isinstance(argument, (list, tuple)) else (argument,)
                self.used.update((id(item), item) for item in items if id(item) in self._known)
        return func(*args, **kwargs)


def _attention_operations(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Operations of attention on query (N, H, Q, C), key (N, H, K, C) and value (N, H, K, V): two matrix products."""
    batch, heads, queries, channels = query
    return 2 * batch * heads * queries * key[2] * (channels + value[3])


_UNREGISTERED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations}
"""PyTorch's counter does not know the attention kernel of the CPU and takes it for free."""

# ---- the stages of a generator ----

Call = tuple[str, tuple[Shape, ...]]
"""A method of a generator that was called from outside it, and the shapes of the tensors it was given."""


def stages_of(generator: nn.Module) -> dict[str, str]:
    """Method and stage of every stage that ``generator`` has, in order: one UNet evaluation is ``unet``, all steps of a
    sampler are ``steps``."""
    if not isinstance(generator, LatentGenerator):
        return {}
    middle = {"step": "unet"} if isinstance(generator, OneStepLatentGenerator) else {"sample": "steps"}
    return {"encode": "encode", **middle, "decode": "decode"}


@contextmanager
def wrapped(owner: object, wrappers: Mapping[str, Callable[[Method], Method]]) -> Iterator[None]:
    """Replace methods of ``owner``, on this object alone, by the result of each wrapper until the block ends."""
    replaced = []
    try:
        for name, wrapper in wrappers.items():
            method = getattr(owner, name)
            setattr(owner, name, functools.wraps(method)(wrapper(method)))
            replaced.append(name)
        yield
    finally:
        for name in replaced:
            delattr(owner, name)


def count_stages(generator: nn.Module, calls: Sequence[Call]) -> dict[str, int]:
    """MACs of every stage, all products, over ``calls``, counted on a copy on the meta device."""
    empty, macs = without_contents(generator), Counter(dict.fromkeys(stages_of(generator).values(), 0))
    dtype = next((parameter.dtype for parameter in generator.parameters()), torch.float32)

    def counted(stage: str, times: int, method: Method) -> Method:
        def call(*args: Any, **kwargs: Any) -> Any:
            result, cost = count(empty, lambda: method(*args, **kwargs))
            macs[stage] += times * cost.macs
            return result

        return call

    for (method, shapes), times in Counter(calls).items():
        wrappers = {name: functools.partial(counted, stage, times) for name, stage in stages_of(empty).items()}
        with wrapped(empty, wrappers):
            getattr(empty, method)(*(torch.empty(shape, device="meta", dtype=dtype) for shape in shapes))
    return dict(macs)


def without_contents(network: nn.Module) -> nn.Module:
    """A copy of ``network`` on the meta device; the original's tensors are not copied on the way."""
    made: dict[int, Any] = {}
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        empty: Tensor = torch.empty_like(tensor, device="meta")
        made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return without_compiling(copy.deepcopy(network, made))

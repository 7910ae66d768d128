"""Estimated memory of a run on each device, found without computing anything.

Weights, gradients, optimiser states, moving averages and batches are counted exactly. For activations the method is
built on the meta device, where tensors have shapes and no values; every phase runs once, forward and backward, on one
micro-batch, while the bytes of all live tensors are counted: intermediate results, activations that are computed again,
and conversions of mixed precision included. Not known are the workspace of the libraries, fragmentation, and the
context of a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from onestepsr.methods.base import Method, SampleRandom
from onestepsr.train.networks import keep_frozen_in, optimizer_bytes, trainable_parameters
from onestepsr.train.recipes import TrainConfig

Shapes = Mapping[str, Sequence[int]]
"""Shapes (3, H, W) of one sample's images by name."""


@dataclass(frozen=True, kw_only=True)
class NetworkMemory:
    """Memory of one network, in bytes, and its number of parameters."""

    name: str
    trainable: int
    """Number of trained parameters."""
    frozen: int
    """Number of the others."""
    weights: int
    """Parameters and buffers; those that networks share count for the first one."""
    gradients: int
    """Of its trained parameters; they live in its own phase only."""
    optimizer: int
    average: int
    """The moving average of its trained parameters."""
    buckets: int
    """Copies of the gradients in which several processes exchange them."""


@dataclass(frozen=True, kw_only=True)
class PhaseMemory:
    """Peak of one phase, in bytes: activations, gradients and intermediate results together."""

    network: str
    terms: tuple[str, ...]
    """Names of its loss terms."""
    peak: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of one process on its device."""

    networks: tuple[NetworkMemory, ...]
    phases: tuple[PhaseMemory, ...]
    micro_batch: int
    batches: int
    """Bytes of the images of one iteration."""

    @property
    def held(self) -> int:
        """Bytes that all networks hold all the time, and the images."""
        return sum(n.weights + n.optimizer + n.average + n.buckets for n in self.networks) + self.batches

    @property
    def peak(self) -> int:
        """Bytes in the phase that needs most."""
        return self.held + max(phase.peak for phase in self.phases)


def estimate(method: Method, config: TrainConfig, images: Shapes, processes: int = 1) -> Estimate:
    """Memory of one of ``processes`` processes; ``method`` is used up: its networks lose their values."""
    for network in method.frozen.values():
        network.requires_grad_(False).eval()
    for network in (*method.networks.values(), *method.frozen.values()):
        keep_frozen_in(network.to("meta"), getattr(torch, config.frozen_dtype))  # from files, some are not there yet
    size = config.micro_batch(processes)
    return Estimate(
        networks=tuple(_network_memory(method, config, processes)),
        phases=tuple(_phase_memory(method, config, images, size)),
        micro_batch=size,
        batches=size * config.accumulation * sum(4 * torch.Size(shape).numel() for shape in images.values()),
    )


def _network_memory(method: Method, config: TrainConfig, processes: int) -> Iterator[NetworkMemory]:
    counted: set[int] = set()
    for name, network in {**method.networks, **method.frozen}.items():
        parameters = trainable_parameters(network).values()
        trained = sum(parameter.numel() for parameter in parameters)
        storages = [tensor.untyped_storage() for tensor in (*network.parameters(), *network.buffers())]
        own = {storage._cdata: storage.nbytes() for storage in storages if storage._cdata not in counted}
        counted |= own.keys()
        yield NetworkMemory(
            name=name,
            trainable=trained,
            frozen=sum(parameter.numel() for parameter in network.parameters()) - trained,
            weights=sum(own.values()),
            gradients=4 * trained,
            optimizer=sum(optimizer_bytes(config.optimizer_of(name), parameter.shape) for parameter in parameters),
            average=4 * trained if name in method.ema else 0,
            buckets=4 * trained if processes > 1 else 0,
        )


# ---- Activations: every phase once, without values -------------------------------------------------------------------


def _phase_memory(method: Method, config: TrainConfig, images: Shapes, size: int) -> Iterator[PhaseMemory]:
    """The phases of the first iteration, then those that only join or change later."""
    every = {**method.networks, **method.frozen}
    kept = [tensor for network in every.values() for tensor in (*network.parameters(), *network.buffers())]
    trained = {name: list(trainable_parameters(network).values()) for name, network in method.networks.items()}
    casts = Casts(PRECISIONS[config.mixed_precision], on_cpu=config.device == "cpu")
    callables = {name: casts.around(network) for name, network in every.items()}
    for network in method.networks.values():
        network.train()
    measured: set[int] = set()
    for step in sorted({0, *(phase.start for phase in method.phases)}):
        running = {index: phase for index, phase in enumerate(method.phases) if phase.runs_at(step)}
        batch = {name: torch.empty((size, *shape), device="meta") for name, shape in images.items()}
        live = LiveMemory(torch.device("meta"), [*kept, *batch.values()])
        for index, phase in running.items() if running.keys() - measured else ():
            for name, parameters in trained.items():
                for parameter in parameters:
                    parameter.requires_grad_(name == phase.network)
            live.peak = live.now
            with live:
                if config.accumulation > 1:  # a later micro-batch, which adds to gradients that are there
                    for parameter in trained[phase.network]:
                        parameter.grad = torch.zeros_like(parameter)
                random = SampleRandom(config.seed, step, index, samples=range(size))
                terms = phase.loss(callables, batch, random)
                total = torch.stack(list(terms.values())).sum()
                casts.backward(total)
                del total
                batch.update({name: tensor.detach() for name, tensor in batch.items()})
            if index not in measured:
                yield PhaseMemory(network=phase.network, terms=tuple(terms), peak=live.peak)
            measured.add(index)
            del terms
            for parameter in (parameter for parameters in trained.values() for parameter in parameters):
                parameter.requires_grad_(True).grad = None


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts the bytes of tensors on ``device`` that operations make, until they are released."""

    def __init__(self, device: torch.device, given: Sequence[Tensor]) -> None:
        """``given`` were there before; they and views of them do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.now, self.peak = device, 0, 0
        self._given = list(given)  # held, so that no other storage takes the address of one of them
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == self.device.type:
                storage = value.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
IN_16_BITS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "__matmul__", "bmm", "mm", "addmm"}
    | {"baddbmm", "einsum", "scaled_dot_product_attention"}
)
"""Operations that autocast computes in 16 bits."""
IN_FLOAT32 = frozenset(
    {"group_norm", "layer_norm", "softmax", "log_softmax", "softplus", "exp", "log", "pow", "__pow__", "rsqrt"}
    | {"reciprocal", "sum", "prod", "cumsum", "norm", "normalize", "mse_loss", "l1_loss", "cosine_similarity"}
)
"""Operations that autocast computes in float32 on CUDA; on a CPU it does not change these."""


class Casts(TorchFunctionMode):
    """Mixed precision for tensors without values: autocast does not support the meta device.

    Attention is taken to be computed in blocks, as every accelerator does it, where the meta device would make the
    whole matrix.
    """

    def __init__(self, low: torch.dtype | None, *, on_cpu: bool) -> None:
        super().__init__()
        self.low, self.in_float32 = low, frozenset() if on_cpu else IN_FLOAT32

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.low is not None and (name in IN_16_BITS or name in self.in_float32):
            dtype = self.low if name in IN_16_BITS else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))
        if name == "scaled_dot_product_attention":
            return _BlockwiseAttention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)

    @contextmanager
    def active(self) -> Iterator[None]:
        """As inside a network that the loop has wrapped; layers kept in 16 bits ask whether autocast is on."""
        with self, torch.autocast("cpu", enabled=self.low is not None):
            yield

    def backward(self, total: Tensor) -> None:
        """Gradients of ``total`` under these casts, which activations that are computed again need.

        The engine is called as ``Tensor.backward`` does it, which itself would suspend the casts.
        """
        engine = torch.autograd.Variable._execution_engine
        with self.active():
            engine.run_backward((total,), (torch.ones_like(total),), False, False, (), True, True)

    def around(self, network: nn.Module) -> Callable[..., Any]:
        """``network`` as losses see it, under these casts."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.active():
                return network(*arguments, **options)

        return call if self.low is None else convert_outputs_to_fp32(call)


class _BlockwiseAttention(torch.autograd.Function):
    """Keeps what memory-efficient attention keeps: q, k, v, the output and one number per row, in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])

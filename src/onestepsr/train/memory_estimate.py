"""How much memory a run will need on each device, found out without computing anything.

The method is built on the meta device, where tensors have shapes and no values. Every phase then runs once, forward and
backward, on one micro-batch, while the bytes of all live tensors are counted as they come and go: intermediate results,
activations that are computed again, and what mixed precision converts included. Not known are the workspace of the
libraries, fragmentation, and what the context of a GPU takes.
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

from onestepsr.methods.base import Batch, Method, Networks, Phase, SampleRandom
from onestepsr.train.config import TrainConfig
from onestepsr.train.networks import keep_frozen_in
from onestepsr.train.optimization import optimizer_bytes

# Tensors without values: counting the memory they would take, and casting them as an accelerator ----------------------

COMPUTED_LOW = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "__matmul__", "bmm", "mm", "addmm"}
    | {"baddbmm", "einsum", "scaled_dot_product_attention"}
)
"""What autocast computes in 16 bits."""
COMPUTED_IN_FLOAT32 = frozenset(
    {"group_norm", "layer_norm", "softmax", "log_softmax", "softplus", "exp", "log", "pow", "__pow__", "rsqrt"}
    | {"reciprocal", "sum", "prod", "cumsum", "norm", "normalize", "mse_loss", "l1_loss", "cosine_similarity"}
)
"""What autocast computes in float32 on CUDA; on a CPU it leaves these as they come."""


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts the bytes of tensors on ``device`` that operations make, until nobody holds them."""

    def __init__(self, device: torch.device, given: Sequence[Tensor]) -> None:
        """``given`` were there before; they and views of them do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.now, self.peak = device, 0, 0
        self._given = list(given)  # held, so that no other storage takes the place of one of them
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == self.device.type:
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Casts(TorchFunctionMode):
    """What an accelerator does to the types and memory of some operations, for tensors without values.

    Autocast knows nothing of the meta device, so its lists are applied here; and attention is taken to be computed in
    blocks, as every accelerator does it, where the meta device would make the whole matrix.
    """

    def __init__(self, low: torch.dtype | None, *, on_cpu: bool) -> None:
        super().__init__()
        self.low = low
        self.in_float32 = frozenset() if on_cpu else COMPUTED_IN_FLOAT32

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.low is not None and (name in COMPUTED_LOW or name in self.in_float32):
            dtype = self.low if name in COMPUTED_LOW else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda tensor: _cast(tensor, dtype), (args, kwargs))
        if name == "scaled_dot_product_attention":
            return _BlockwiseAttention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


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


PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class NetworkMemory:
    """What one network holds on a device all the time, in bytes."""

    name: str
    trainable: int
    """Number of trained parameters."""
    frozen: int
    """Number of the others."""
    weights: int
    """Parameters and buffers; of what networks share, the first one has all."""
    gradients: int
    """Of its trained parameters; they live in its own phase only."""
    optimizer: int
    average: int
    """The moving average of its trained parameters."""
    buckets: int
    """Copies of the gradients in which several processes exchange them."""

    @property
    def held(self) -> int:
        """What is there in every phase."""
        return self.weights + self.optimizer + self.average + self.buckets


@dataclass(frozen=True, kw_only=True)
class PhaseMemory:
    """What one phase adds to that at its peak, in bytes."""

    network: str
    terms: tuple[str, ...]
    """Names of its loss terms."""
    peak: int
    """Activations, gradients and intermediate results together."""


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
        return sum(network.held for network in self.networks) + self.batches

    @property
    def peak(self) -> int:
        """Bytes in the hungriest phase."""
        return self.held + max(phase.peak for phase in self.phases)


Shapes = Mapping[str, Sequence[int]]
"""Shapes (3, H, W) of one sample's images by name."""


def estimate(method: Method, config: TrainConfig, images: Shapes, processes: int = 1) -> Estimate:
    """Memory of one of ``processes`` processes; ``method`` is used up: its networks lose their values."""
    for network in method.frozen.values():
        network.requires_grad_(False).eval()
    for network in (*method.networks.values(), *method.frozen.values()):
        keep_frozen_in(network.to("meta"), getattr(torch, config.frozen_dtype))  # from files, some are not there yet
    size = config.micro_batch(processes)
    image_bytes = sum(4 * torch.Size(shape).numel() for shape in images.values())
    return Estimate(
        networks=tuple(_network_memory(method, config, processes)),
        phases=tuple(_Rehearsal(method, config, images, size).run()),
        micro_batch=size,
        batches=size * config.accumulation * image_bytes,
    )


def _network_memory(method: Method, config: TrainConfig, processes: int) -> Iterator[NetworkMemory]:
    counted: set[int] = set()
    for name, network in {**method.networks, **method.frozen}.items():
        trained = [parameter.numel() for parameter in network.parameters() if parameter.requires_grad]
        yield NetworkMemory(
            name=name,
            trainable=sum(trained),
            frozen=sum(parameter.numel() for parameter in network.parameters()) - sum(trained),
            weights=sum(_new_bytes(tensor, counted) for tensor in (*network.parameters(), *network.buffers())),
            gradients=4 * sum(trained),
            optimizer=sum(optimizer_bytes(config.optimizer_of(name), count) for count in trained),
            average=4 * sum(trained) if name in method.ema else 0,
            buckets=4 * sum(trained) if processes > 1 else 0,
        )


def _new_bytes(tensor: Tensor, counted: set[int]) -> int:
    """Bytes of the tensor's storage if it is not in ``counted`` yet: networks may share some."""
    storage = tensor.untyped_storage()
    if storage._cdata in counted:
        return 0
    counted.add(storage._cdata)
    return storage.nbytes()


class _Rehearsal:
    """All phases of a method, once each, on the device that its networks are on."""

    def __init__(self, method: Method, config: TrainConfig, images: Shapes, size: int) -> None:
        self.method, self.config, self.images, self.size = method, config, images, size
        self.device = next(p.device for network in method.networks.values() for p in network.parameters())
        self.casts = Casts(PRECISIONS[config.mixed_precision], on_cpu=config.device == "cpu")
        every = {**method.networks, **method.frozen}
        self.networks: Networks = {name: self._callable(network) for name, network in every.items()}
        self.trained = {
            name: [parameter for parameter in network.parameters() if parameter.requires_grad]
            for name, network in method.networks.items()
        }
        self.kept = [tensor for network in every.values() for tensor in (*network.parameters(), *network.buffers())]

    def run(self) -> Iterator[PhaseMemory]:
        """Phases of the first iteration, then those that only join or change later, with those before them."""
        measured: set[int] = set()
        for network in self.method.networks.values():
            network.train()
        for step in sorted({0, *(phase.start for phase in self.method.phases)}):
            running = [(index, phase) for index, phase in enumerate(self.method.phases) if phase.runs_at(step)]
            if any(index not in measured for index, _ in running):
                found = self._iteration(step, running)
                yield from (memory for index, memory in found.items() if index not in measured)
                measured |= found.keys()

    def _iteration(self, step: int, phases: list[tuple[int, Phase]]) -> dict[int, PhaseMemory]:
        batch = {name: torch.empty((self.size, *shape), device=self.device) for name, shape in self.images.items()}
        live = LiveMemory(self.device, [*self.kept, *batch.values()])
        return {index: self._phase(index, phase, step, batch, live) for index, phase in phases}

    def _phase(self, index: int, phase: Phase, step: int, batch: Batch, live: LiveMemory) -> PhaseMemory:
        random = SampleRandom(self.config.seed, step, index, samples=range(self.size))
        live.peak = live.now
        with self._training(phase.network), live:
            if self.config.accumulation > 1:  # a later micro-batch, which adds to gradients that are there
                for parameter in self.trained[phase.network]:
                    parameter.grad = torch.zeros_like(parameter)
            terms = phase.loss(self.networks, batch, random)
            self._backward(torch.stack(list(terms.values())).sum())
            for name, tensor in batch.items():
                batch[name] = tensor.detach()
        return PhaseMemory(network=phase.network, terms=tuple(terms), peak=live.peak)

    def _backward(self, total: Tensor) -> None:
        """Gradients of ``total``; the casts apply here too, for activations that are computed again.

        The engine is called as ``Tensor.backward`` does it, which itself would suspend the casts.
        """
        engine = torch.autograd.Variable._execution_engine
        with self._computing():
            engine.run_backward((total,), (torch.ones_like(total),), False, False, (), True, True)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """As inside a network that the loop has wrapped; layers kept in 16 bits ask whether autocast is on."""
        with self.casts, torch.autocast("cpu", enabled=self.casts.low is not None):
            yield

    @contextmanager
    def _training(self, name: str) -> Iterator[None]:
        for other, parameters in self.trained.items():
            for parameter in parameters:
                parameter.requires_grad_(other == name)
        try:
            yield
        finally:
            for parameters in self.trained.values():
                for parameter in parameters:
                    parameter.requires_grad_(True)
                    parameter.grad = None

    def _callable(self, network: nn.Module) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self._computing():
                return network(*arguments, **options)

        return call if self.casts.low is None else convert_outputs_to_fp32(call)

"""The stages of a generator, timed or counted where they run: its methods are wrapped for as long as a measurement
lasts, so that what is measured is what is used."""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from onestepsr.benchmark.ceiling import wait
from onestepsr.benchmark.counting import count
from onestepsr.inference.compiling import without_compiling
from onestepsr.models.generators import LatentGenerator
from onestepsr.models.resshift.generator import ResidualShiftGenerator

Method = Callable[..., Any]
NETWORK = "network"
"""The whole evaluation of a generator, whose stages are parts of it."""
AROUND = ("forward", "encode_lr", "restore_latent")
"""Methods of generators that call these: all of it for one tile, or a part where the stages have tiles of their own."""
Call = tuple[str, tuple[tuple[int, ...], ...]]
"""A method of a generator that was called from outside it, and the shapes of the tensors it was given."""


def stages_of(generator: nn.Module) -> dict[str, str]:
    """Method and stage of every stage that ``generator`` has, in order: one UNet evaluation is ``unet``, all steps of a
    sampler are ``steps``."""
    if not isinstance(generator, LatentGenerator):
        return {}
    middle = {"sample": "steps"} if isinstance(generator, ResidualShiftGenerator) else {"step": "unet"}
    return {"encode": "encode", **middle, "decode": "decode"}


@contextmanager
def wrapped(owner: object, wrappers: Mapping[str, Callable[[Method], Method]]) -> Iterator[None]:
    """Methods of ``owner`` replaced on this object alone, by what each wrapper makes of them, until the block ends."""
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


class Stopwatch:
    """Seconds by stage. On CUDA the device's own clock is read, so that nothing waits that would not wait otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls: list[Call] = []
        """What of the generator was called, with what."""
        self._spans: list[tuple[str, Any, Any]] = []
        self._inside = False

    @contextmanager
    def section(self, name: str, *, on_device: bool = False) -> Iterator[None]:
        """Time the block as ``name``; ``on_device``: what it gives the device to do, not how long that takes to give.

        A section that is not on the device ends when the device has done what it was given.
        """
        begin = self._mark(on_device)
        yield
        if not on_device:
            wait(self.device)
        self._spans.append((name, begin, self._mark(on_device)))

    @contextmanager
    def watching(self, generator: nn.Module) -> Iterator[None]:
        """Time every evaluation of ``generator`` and its stages."""
        stages = stages_of(generator)

        def timed(name: str, method: Method) -> Method:
            def call(*args: Any, **kwargs: Any) -> Any:
                with self._outermost(name, args), self._stage(stages.get(name)):
                    return method(*args, **kwargs)

            return call

        names = {*stages, *(AROUND if stages else AROUND[:1])}
        with wrapped(generator, {name: functools.partial(timed, name) for name in names}):
            yield

    def read(self) -> dict[str, float]:
        """Seconds by stage since the last reading."""
        wait(self.device)
        seconds: Counter[str] = Counter()
        for name, begin, end in self._spans:
            seconds[name] += begin.elapsed_time(end) / 1e3 if hasattr(begin, "elapsed_time") else end - begin
        self._spans.clear()
        return dict(seconds)

    @contextmanager
    def _outermost(self, name: str, args: Sequence[Tensor]) -> Iterator[None]:
        """What is not called by another method that is timed counts as the network."""
        if self._inside:
            yield
            return
        self.calls.append((name, tuple(tuple(values.shape) for values in args)))
        self._inside = True
        try:
            with self.section(NETWORK, on_device=True):
                yield
        finally:
            self._inside = False

    def _stage(self, name: str | None) -> AbstractContextManager[None]:
        return nullcontext() if name is None else self.section(name, on_device=True)

    def _mark(self, on_device: bool) -> Any:
        if not on_device or self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event


def count_stages(generator: nn.Module, calls: Sequence[Call]) -> dict[str, int]:
    """MACs of every stage, all products, over ``calls``; see ``counting``.

    Nothing is computed: the counting is done on a copy without contents.
    """
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

"""The stages of a generator, timed or counted where they run: its methods are wrapped for as long as a measurement
lasts, so that what is measured is what is used."""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onestepsr.benchmark.ceiling import wait
from onestepsr.benchmark.counting import count
from onestepsr.compiling import without_compiling

Method = Callable[..., Any]
STAGES = {"encode": "encode", "step": "unet", "sample": "steps", "decode": "decode"}
"""Methods of generators and the stage that each is: one UNet evaluation is ``unet``, all steps of a sampler are
``steps``."""
NETWORK = "network"
"""The whole evaluation of a generator, whose stages are parts of it."""


def stages_of(generator: nn.Module) -> dict[str, str]:
    """Method and stage of every stage that ``generator`` has, in order."""
    return {method: stage for method, stage in STAGES.items() if callable(getattr(generator, method, None))}


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
        self.shapes: list[tuple[int, ...]] = []
        """Shapes of the pictures that the generator was called with."""
        self._spans: list[tuple[str, Any, Any]] = []

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

        def timed(name: str, method: Method) -> Method:
            def call(*args: Any, **kwargs: Any) -> Any:
                if name == NETWORK:
                    self.shapes.append(tuple(args[0].shape))
                with self.section(name, on_device=True):
                    return method(*args, **kwargs)

            return call

        names = {"forward": NETWORK, **stages_of(generator)}
        with wrapped(generator, {method: functools.partial(timed, stage) for method, stage in names.items()}):
            yield

    def read(self) -> dict[str, float]:
        """Seconds by stage since the last reading."""
        wait(self.device)
        seconds: Counter[str] = Counter()
        for name, begin, end in self._spans:
            seconds[name] += begin.elapsed_time(end) / 1e3 if hasattr(begin, "elapsed_time") else end - begin
        self._spans.clear()
        return dict(seconds)

    def _mark(self, on_device: bool) -> Any:
        if not on_device or self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event


def count_stages(generator: nn.Module, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """MACs of every stage, all products, over evaluations of LR pictures of ``shapes`` (N, 3, h, w); see ``counting``.

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

    for shape, times in Counter(shapes).items():
        wrappers = {name: functools.partial(counted, stage, times) for name, stage in stages_of(empty).items()}
        with wrapped(empty, wrappers):
            empty(torch.empty(shape, device="meta", dtype=dtype))
    return dict(macs)


def without_contents(network: nn.Module) -> nn.Module:
    """A copy of ``network`` on the meta device; the original's tensors are not copied on the way."""
    made: dict[int, Any] = {}
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        empty: Tensor = torch.empty_like(tensor, device="meta")
        made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return without_compiling(copy.deepcopy(network, made))

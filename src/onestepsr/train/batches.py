"""Micro-batches of the run: which global sample numbers each process sees in each step."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from onestepsr.core.errors import UserError
from onestepsr.core.rng import generator
from onestepsr.methods.base import Batch
from onestepsr.train.config import TrainConfig

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SampleSource(Protocol):
    """A dataset without end: sample ``i`` >= 0 depends on nothing but ``i`` and the dataset's own seed.

    It is pickled for worker processes.
    """

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``hr`` (3, H, W) and, for super-resolution, ``lr`` (3, H/s, W/s), RGB in [0, 1]."""
        ...


class Share(NamedTuple):
    """Which process this is, of how many."""

    rank: int = 0
    processes: int = 1


class MicroBatchNumbers(Sampler[list[int]]):
    """Sample numbers of this process's micro-batches, from iteration ``first_step`` to ``steps``.

    Iteration ``s`` consumes the numbers ``s * batch_size`` to ``(s + 1) * batch_size - 1``, whatever the number of
    processes and micro-batches; these only decide who takes which.
    """

    def __init__(self, config: TrainConfig, share: Share, first_step: int) -> None:
        self.config, self.share, self.first_step = config, share, first_step

    def __len__(self) -> int:
        return max(0, self.config.steps - self.first_step) * self.config.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.config.steps):
            for micro in range(self.config.accumulation):
                yield list(sample_numbers(self.config, self.share, step, micro))


def sample_numbers(config: TrainConfig, share: Share, step: int, micro: int) -> range:
    """Global numbers of the samples in micro-batch ``micro`` of iteration ``step`` that this process sees."""
    size = config.micro_batch(share.processes)
    first = step * config.batch_size + (micro * share.processes + share.rank) * size
    return range(first, first + size)


def micro_batches(
    source: SampleSource, config: TrainConfig, share: Share, first_step: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Yield this process's micro-batches in order, on ``device``; close it to end the worker processes."""
    # PyTorch gives each worker process one arithmetic thread. The generator keeps the loader off the global one.
    loader: DataLoader[Any] = DataLoader(
        source,  # type: ignore[arg-type]
        batch_sampler=MicroBatchNumbers(config, share, first_step),
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
        generator=generator(config.seed, "loader", share.rank),
        worker_init_fn=_leave_signals_to_the_loop,
        # A fork copies locks as they are; those that a thread of gloo, NCCL or OpenMP holds then stay shut for ever.
        multiprocessing_context="spawn" if config.num_workers else None,
    )
    try:
        for batch in _started(loader):
            yield to_device(batch, device, config.channels_last)
    except Exception as error:
        # The traceback would keep the loader alive, and with it workers for which this process waits when it ends.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, UserError):
            raise UserError(_own_words(error)) from None
        raise


def to_device(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    """A copy of the mapping with its tensors on ``device`` and images in the chosen memory order."""
    return {name: place(tensor, device, channels_last) for name, tensor in batch.items()}


def place(tensor: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """``tensor`` on ``device``; (N, C, H, W) in NHWC memory order when ``channels_last``."""
    tensor = tensor.to(device, non_blocking=True)
    if channels_last and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def _own_words(error: UserError) -> str:
    """A worker process hands its error over as a printed traceback, whose last line is what it said."""
    last_line = str(error).rstrip().rpartition("\n")[2]
    return last_line.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")


def _leave_signals_to_the_loop(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; a worker that died of them would end the run.

    Workers leave when the generator of batches is closed, or by themselves when the training process is gone.
    """
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _started(loader: DataLoader[Any]) -> Iterator[Batch]:
    """The loader's batches; its worker processes never see the signals, not even before they ignore them."""
    if not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    resource_tracker.ensure_running()  # when it starts, it lets the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

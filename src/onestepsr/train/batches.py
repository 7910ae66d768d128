"""Micro-batches of the run: the samples that each process sees in each step, with the embeddings of photos' texts."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from onestepsr.core.errors import UserError
from onestepsr.core.files import locked
from onestepsr.core.rng import generator
from onestepsr.data.datasets import PHOTO, DataConfig, Sample
from onestepsr.methods.base import Batch, Method
from onestepsr.train.recipes import TrainConfig

if TYPE_CHECKING:
    from onestepsr.prompts.embedder import PromptEmbedder

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SampleSource(Protocol):
    """A dataset without end: sample ``i`` >= 0 depends on nothing but ``i`` and the dataset's own seed.

    It is pickled for worker processes.
    """

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``hr`` (3, H, W) and, for super-resolution, ``lr`` (3, H/s, W/s), RGB in [0, 1]."""
        ...


class Share(NamedTuple):
    """Index of this process and number of all."""

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
        # A fork copies locks as they are; those held by a thread of gloo, NCCL or OpenMP then stay locked for ever.
        multiprocessing_context="spawn" if config.num_workers else None,
    )
    try:
        for batch in _started(loader):
            yield to_device(batch, device, config.channels_last)
    except Exception as error:
        # The traceback would keep the loader alive, and with it workers for which this process waits when it ends.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, UserError):
            # From a worker process it arrives as the last line of a printed traceback.
            last_line = str(error).rstrip().rpartition("\n")[2]
            raise UserError(last_line.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")) from None
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


# ---- Samples with the embedding of their photo's text, for methods whose networks read one ---------------------------

LOCK = ".lock"
GROUP = 512
"""Embeddings in memory at once while they are made: 160 MB for Stable Diffusion 2.1."""


class Prompted(Dataset[Sample]):
    """A dataset whose samples have the embedding of their photo's text, ``prompt`` (L, C), instead of its number."""

    def __init__(self, source: Any, texts: Sequence[str], embedder: PromptEmbedder | None) -> None:
        """Make the embeddings that ``embedder``'s cache lacks, which must keep all; a dry run has no embedder."""
        self.source, self.texts, self.embedder = source, texts, embedder
        if embedder is not None:
            # Looked for, not read: those of a large set would be tens of gigabytes.
            missing = [text for text in dict.fromkeys(texts) if not embedder.path(text).is_file()]
            for start in range(0, len(missing), GROUP):
                embedder.embed(missing[start : start + GROUP])

    def __len__(self) -> int:
        """Photos."""
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` of the endless stream."""
        sample: Sample = dict(self.source[index])
        text = self.texts[int(sample.pop(PHOTO))]
        if self.embedder is None:
            return sample
        embedding = self.embedder.find(text)
        if embedding is None:
            path = self.embedder.path(text)
            state = "is damaged: remove it and start again" if path.is_file() else "is gone, or could not be written"
            raise UserError(f"{path}: the embedding of a photo's text {state}")
        return sample | {"prompt": embedding}


def with_prompts(source: Any, data: DataConfig, method: Method, where: str, *, dry: bool) -> Any:
    """``source`` as it is, or with the embeddings of ``data.prompts``, which are made now and kept in its cache folder.

    ``where`` names the data in messages. Raises :class:`UserError` for photos without a text, texts that are too long,
    and methods that read none or learn their prompt.
    """
    if data.prompts is None:
        return source
    if method.embedder is None:
        raise UserError(f"{where}.prompts: the networks of this run read no texts of photos")
    from onestepsr.prompts.embedder import EmbeddingCache
    from onestepsr.prompts.sources import FilePrompts

    prompts = FilePrompts(data.prompts)
    texts = [prompts.text(Path(name)) for name in source.names()]
    cache = EmbeddingCache(data.cache_dir / "prompts", limit=None)
    if dry:
        if method.check_texts is not None:
            method.check_texts(texts, cache)
        return Prompted(source, texts, None)
    # Several processes start at once: the first one makes the embeddings, the others wait and find them there.
    with suppress(OSError):
        cache.folder.mkdir(parents=True, exist_ok=True)
    with locked(cache.folder / LOCK, wait=True):
        return Prompted(source, texts, method.embedder(cache))

"""Pictures through several processes: each has its own model, a share of the processor's threads, and the next pictures
of the list whenever it has few left."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, cast

from onestepsr.cli.upscale.jobs import Job
from onestepsr.cli.upscale.pipeline import AHEAD, Pipeline, Result, result_of
from onestepsr.cli.upscale.prompts import GROUP, Setup
from onestepsr.core.errors import OneStepSRError, UserError

if TYPE_CHECKING:
    import torch

    from onestepsr.inference.options import UpscaleOptions

PATIENCE = 10.0
"""Seconds that processes have to stop by themselves when a run is broken off."""
INTERRUPTED = 130
"""Exit code of a process that was told to stop."""


@dataclass(frozen=True, kw_only=True)
class Duty:
    """What a process is told when it starts."""

    setup: Setup
    """The model and its options."""
    processes: int
    """How many share the processor."""
    levels: tuple[int, int]
    """Log levels of the root and of this package."""


Task = Callable[[Connection, Duty], None]
"""What a process runs: groups of jobs come through the connection, None ends them; a Result goes back for each job, in
their order, or the exception that ends the run."""


def work(connection: Connection, duty: Duty) -> None:
    """Enlarge what comes until None comes, or nobody is left at the other end. The task of every process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows it is not inherited
    root, package = duty.levels
    logging.basicConfig(level=root, format="%(levelname)s: %(message)s")
    logging.getLogger("onestepsr").setLevel(package)
    with suppress(BrokenPipeError, ConnectionResetError):
        try:
            _enlarge(connection, duty)
        except Exception as error:  # noqa: BLE001  (raised again where the results are awaited)
            connection.send(_portable(error))


def _enlarge(connection: Connection, duty: Duty) -> None:
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // duty.processes))
    upscaler, prompts = duty.setup.load()
    options = with_share_of_memory(duty.setup.options, upscaler.device, duty.processes)
    with closing(Pipeline(upscaler, options, prompts).run(_groups(connection))) as results:
        for result in results:
            connection.send(result)


def with_share_of_memory(options: UpscaleOptions, device: torch.device, processes: int) -> UpscaleOptions:
    """``options`` that keep to this process's part of their limit; without one, of the memory that is free now, where
    tiles are chosen by memory.

    Each process alone would plan with all of it.
    """
    from onestepsr.core.machine import free_memory
    from onestepsr.inference.memory_plan import SHARE

    if options.memory is not None:
        return replace(options, memory=options.memory / processes)
    if options.tile != "auto":
        return options
    return replace(options, memory=SHARE * free_memory(device) / processes / 1e9)


def _groups(connection: Connection) -> Iterator[Sequence[Job]]:
    with suppress(EOFError, OSError):  # the process that sends the groups is gone
        yield from iter(connection.recv, None)


def _portable(error: Exception) -> Exception:
    """The error as another process can raise it, with the traceback of this one as a note."""
    kind = next((kind for kind in (UserError, OneStepSRError) if isinstance(error, kind)), None)
    portable = RuntimeError(f"{type(error).__name__}: {error}") if kind is None else kind(str(error))
    portable.add_note(traceback.format_exc())
    return portable


class _Member:
    """One process, seen from outside."""

    def __init__(self, task: Task, duty: Duty) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's threads, half alive
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=task, args=(theirs, duty), daemon=True)
        self.jobs: deque[tuple[int, Job]] = deque()
        """What it was sent and has not answered yet, each with its place in the list."""
        self.takes_more = True
        """Whether it may be sent more."""
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def feed(self, groups: Iterator[list[tuple[int, Job]]]) -> None:
        """Send groups until the process has enough to read ahead, and the end when there are no more."""
        while self.takes_more and len(self.jobs) < AHEAD:
            group = next(groups, None)
            self.jobs.extend(group or ())
            self.takes_more = group is not None
            with suppress(OSError):  # it has ended, which shows when its answers are read
                self.connection.send(None if group is None else [job for _, job in group])

    def answers(self) -> Iterator[tuple[int, Result]]:
        """The next result with its place; failures for all that is left when the process has ended."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            yield from self._lost()
            return
        if isinstance(answer, Exception):
            raise answer
        yield self.jobs.popleft()[0], answer

    def _lost(self) -> Iterator[tuple[int, Result]]:
        self.takes_more = False
        self.process.join(PATIENCE)
        self.clean_up()
        why = f"the process that had it ended with code {self.process.exitcode}; short of memory? fewer --workers help"
        while self.jobs:
            place, job = self.jobs.popleft()
            yield place, result_of(job, "failed", f"{job.source}: {why}")

    def clean_up(self) -> None:
        """See that the process ends, and remove what it left unfinished."""
        from onestepsr.core.files import remove_leftovers

        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        remove_leftovers(*(job.target for _, job in self.jobs))


def enlarge_in_processes(
    jobs: Sequence[Job], setup: Setup, processes: int, task: Task = work
) -> Generator[tuple[int, Result], None, None]:
    """The place in the list and the result of every job, as they are finished; close the iterator to break off.

    A process that ends before its time costs the pictures it had, as failed results. An error that is not one
    picture's own ends the run, whichever process it comes from.
    """
    levels = (logging.getLogger().level, logging.getLogger("onestepsr").level)
    duty = Duty(setup=setup, processes=processes, levels=levels)
    groups = _numbered(jobs, GROUP if setup.prompts.is_given else 1)
    members: list[_Member] = []
    try:
        with _interrupts_ignored():  # by the new processes: theirs come from here, once
            members.extend(_Member(task, duty) for _ in range(processes))
        yield from _answers(members, groups)
    except BaseException:
        for member in members:
            member.process.terminate()
        raise
    finally:
        for member in members:
            member.connection.close()
        for member in members:
            member.clean_up()


def _numbered(jobs: Sequence[Job], size: int) -> Iterator[list[tuple[int, Job]]]:
    """Groups of at most ``size`` jobs, each with its place in the list."""
    for start in range(0, len(jobs), size):
        yield list(enumerate(jobs[start : start + size], start))


def _answers(members: Sequence[_Member], groups: Iterator[list[tuple[int, Job]]]) -> Iterator[tuple[int, Result]]:
    while True:
        for member in members:
            member.feed(groups)
        busy = {member.connection: member for member in members if member.jobs}
        if not busy:
            break
        for connection in wait(list(busy)):
            yield from busy[cast(Connection, connection)].answers()
    for place, job in itertools.chain.from_iterable(groups):
        yield place, result_of(job, "failed", f"{job.source}: not begun, because every process has ended")


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where signals are not received either
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

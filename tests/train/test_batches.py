"""What the loop sees of its data loader, whether or not worker processes stand between."""

import multiprocessing
import os
import signal
import threading

import pytest
import torch

from onestepsr.core.errors import UserError
from onestepsr.train.batches import Share, micro_batches
from onestepsr.train.recipes import TrainConfig

CPU = torch.device("cpu")


class Failing:
    """Ten good samples, then an error."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        if index >= 10:
            raise self.error
        return {"hr": torch.zeros(3, 8, 8)}


MISTAKE, DEFECT = UserError("photos/a.png: cannot be decoded"), RuntimeError("a defect")


@pytest.mark.parametrize(("workers", "error"), [(0, MISTAKE), (0, DEFECT), (1, DEFECT), (2, MISTAKE)])
def test_an_error_in_the_data_ends_the_workers_and_says_what_it_was(workers, error):
    config = TrainConfig(steps=10, batch_size=2, num_workers=workers)
    batches = micro_batches(Failing(error), config, Share(), 0, CPU)
    with pytest.raises(type(error)) as caught:
        list(batches)
    if isinstance(error, UserError):
        assert str(caught.value) == str(error)  # one line, without the worker's traceback
    else:
        assert str(error) in str(caught.value)
    assert not multiprocessing.active_children()  # although the error and its traceback are still at hand


LOCK = threading.Lock()


class Worker:
    """Samples that tell of the process which made them: whether it has ``LOCK`` to itself, and its blocked signals."""

    def __getitem__(self, index):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        ignored = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)]
        facts = [os.getpid(), not LOCK.locked(), {signal.SIGINT, signal.SIGTERM} <= blocked, all(ignored)]
        return {"facts": torch.tensor(facts)}


@pytest.mark.skipif(os.name == "nt", reason="signals cannot be blocked there")
def test_workers_inherit_no_held_lock_and_never_see_a_stopping_signal():
    config = TrainConfig(steps=2, batch_size=1, num_workers=1)
    with LOCK:  # as a thread of the process group may hold one of its own
        (first,), _ = [batch["facts"].tolist() for batch in micro_batches(Worker(), config, Share(), 0, CPU)]
    assert first[0] != os.getpid()
    assert first[1:] == [True, True, True]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "this process hears them again"

"""What the loop sees of its data loader, whether or not worker processes stand between."""

import multiprocessing

import pytest
import torch

from onestepsr.errors import UserError
from onestepsr.train.batches import Share, micro_batches
from onestepsr.train.config import TrainConfig


class Failing:
    """Ten good samples, then an error."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        if index >= 10:
            raise self.error
        return {"hr": torch.zeros(3, 8, 8)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [UserError("photos/a.png: cannot be decoded"), RuntimeError("a defect")])
def test_an_error_in_the_data_ends_the_workers_and_says_what_it_was(workers, error):
    config = TrainConfig(steps=10, batch_size=2, num_workers=workers)
    batches = micro_batches(Failing(error), config, Share(), 0, torch.device("cpu"))
    with pytest.raises(type(error)) as caught:
        list(batches)
    if isinstance(error, UserError):
        assert str(caught.value) == str(error)  # one line, without the worker's traceback
    else:
        assert str(error) in str(caught.value)
    assert not multiprocessing.active_children()  # although the error and its traceback are still at hand

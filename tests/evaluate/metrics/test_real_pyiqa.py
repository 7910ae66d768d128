"""pyiqa itself, where it is installed and can be imported: the metrics that bring no weights."""

import pytest
import torch

from onestepsr.core.errors import UserError
from onestepsr.evaluate.metrics.perceptual import load_iqa

# Beside another build of torch, torchvision raises RuntimeError.
pyiqa = pytest.importorskip("pyiqa", exc_type=Exception)


def test_values_are_pyiqas_and_do_not_depend_on_the_images_before() -> None:
    images = torch.rand(3, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    ours = load_iqa("piqe")
    assert ours(images).tolist() == [pyiqa.create_metric("piqe")(image[None]).item() for image in images]
    assert ours(images[2:]).tolist() == ours(images)[2:].tolist()


def test_a_metric_that_does_not_exist_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match=r"cannot create 'no-such-metric'.*") as error:
        load_iqa("no-such-metric")
    assert "\n" not in str(error.value)

"""The line between the weights of two models: its ends, its middle, and what has no line."""

import pytest
import torch
from torch import nn

from onestepsr.core.errors import UserError
from onestepsr.models.tiny.generator import blend


def network(seed, width=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def test_ends_are_the_two_networks_and_the_middle_is_their_mean():
    first, second = network(0), network(1)
    second[1].num_batches_tracked.fill_(7)
    for share, expected in ((0.0, first), (1.0, second)):
        assert torch.equal(blend(first, second, share)[0].weight, expected[0].weight)
    middle = blend(first, second, 0.5)
    torch.testing.assert_close(middle[0].weight, (first[0].weight + second[0].weight) / 2)
    assert middle[1].num_batches_tracked == 0
    assert middle is not first


def test_networks_stay_as_they_are():
    first, second = network(0), network(1)
    before = first[0].weight.clone()
    blend(first, second, 0.3)[0].weight.data.zero_()
    assert torch.equal(first[0].weight, before)


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_share_out_of_range(share):
    with pytest.raises(UserError, match=r"share between two models: .* accepted: 0"):
        blend(network(0), network(1), share)


def test_other_shapes_are_named():
    with pytest.raises(UserError, match=r"differ in shape, first at '[01]\."):
        blend(network(0), network(1, width=4), 0.5)

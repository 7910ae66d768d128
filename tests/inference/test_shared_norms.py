"""Group norms with the statistics of an image: the same as the whole, and nothing left over."""

import copy

import pytest
import torch
from torch import nn

from onestepsr.inference.tiled import SharedNorm, SharedNorms, reduced

pytestmark = pytest.mark.numeric


def network() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8, eps=1e-6), nn.SiLU(), nn.GroupNorm(4, 8))
    for norm in (made[1], made[3]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_tiles_equal_the_whole_where_nothing_else_reaches_over_their_edges(dtype, error):
    made, x = network().to(dtype), torch.rand(1, 3, 8, 24, dtype=dtype) ** 3
    whole, own = made(x), torch.cat([made(part) for part in x.chunk(3, 3)], 3)
    norms = SharedNorms(made)
    assert len(norms) == 2
    with norms.calibrated_by(lambda: made(x)):
        tiles = torch.cat([made(part) for part in x.chunk(3, 3)], 3)
    assert tiles.dtype == dtype
    assert (tiles - whole).abs().max() < error < (own - whole).abs().max()


def test_a_batch_has_one_statistic():
    made, x = network(), torch.rand(1, 3, 4, 12)
    norms = SharedNorms(made)
    with norms.calibrated_by(lambda: made(torch.cat(x.chunk(3, 3)))):
        first = made[1].kept
    with norms.calibrated_by(lambda: made(x)):
        assert all(torch.allclose(*pair) for pair in zip(first, made[1].kept, strict=True))


def test_outside_they_are_plain_norms_with_the_same_parameters():
    plain, x = network(), torch.rand(2, 3, 4, 4)
    made = copy.deepcopy(plain)
    norms = SharedNorms(made)
    assert list(made.state_dict()) == list(plain.state_dict())
    with norms.calibrated_by(lambda: made(5.0 * x)):
        assert not torch.equal(made(x), plain(x))
    assert torch.equal(made(x), plain(x))
    assert len(SharedNorms(made)) == 2  # found again
    assert isinstance(made[1], SharedNorm)

    def fail() -> None:
        made(5.0 * x)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), norms.calibrated_by(fail):
        pass
    assert torch.equal(made(x), plain(x))


@pytest.mark.parametrize(
    ("size", "most", "multiple", "found"),
    [
        ((1225, 1225), 60_000, 16, (240, 240)),
        ((200, 156), 3900, 16, (64, 48)),
        ((64, 1000), 4096, 64, (64, 64)),  # not 64 x 320: an image cannot be thinner than a cell
        ((1000, 64), 4096, 64, (64, 64)),
        ((70, 70), 10, 16, (16, 16)),
        ((3, 5), 100, 1, (3, 5)),
    ],
)
def test_a_reduced_copy_has_whole_cells_from_everywhere(size, most, multiple, found):
    height, width = size
    source = torch.arange(height * width).reshape(1, 1, height, width)
    copied = reduced(source, most, multiple)
    assert copied.shape[2:] == found
    for values, length in ((copied[0, 0, :, 0] // width, height), (copied[0, 0, 0] % width, width)):
        steps = values.diff()
        assert steps.max() - steps.min() <= 1
        assert values[0] <= steps.max() // 2
        assert length - 1 - values[-1] <= (steps.max() + 1) // 2

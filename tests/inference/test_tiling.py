"""Tiles cover, join without a trace and fit the memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from onestepsr.imaging import color
from onestepsr.inference import tiling


def tiled(fn: Any, x: Tensor, scale: int, tile: tiling.Sides, overlap: int, **options: Any) -> Tensor:
    """``fn`` over the whole of ``x`` in tiles, joined smoothly."""
    pieces = map(fn, tiling.cut(x, tile, overlap))
    return torch.cat(list(tiling.tiled_rows(pieces, tuple(x.shape[2:]), scale, tile, overlap, **options)), dim=2)


def enlarge(x: Tensor, scale: int = 4) -> Tensor:
    return functional.interpolate(x, scale_factor=scale, mode="nearest")


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 80), st.data())
def test_plan_covers_without_leaving_the_image(length: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    starts = tiling.starts_along(length, tile, overlap)
    side = min(tile, length)
    assert starts[0] == 0
    assert starts[-1] + side == length
    for before, after in pairwise(starts):
        assert 0 < after - before <= tile - overlap


def test_plan_of_known_sizes() -> None:
    assert tiling.starts_along(40, 16, 4) == [0, 12, 24]
    assert tiling.starts_along(41, 16, 4) == [0, 12, 24, 25]
    assert tiling.starts_along(16, 16, 4) == [0]
    with pytest.raises(ValueError, match="overlap < tile"):
        tiling.starts_along(10, 4, 4)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.tuples(st.integers(4, 30), st.integers(4, 30)),
    st.sampled_from([1, 2, 4]),
    st.data(),
)
def test_tiling_of_the_identity_is_exact(
    height: int, width: int, tile: tiling.Sides, scale: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, min(tile) - 1))
    margin = data.draw(st.integers(0, 10))
    x = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(sum(tile)))
    assert torch.equal(tiled(lambda t: enlarge(t, scale), x, scale, tile, overlap, margin=margin), enlarge(x, scale))


def test_equals_the_whole_when_the_function_looks_no_further_than_the_margin() -> None:
    x = torch.rand(1, 3, 83, 61, generator=torch.Generator().manual_seed(0))

    def blurred(t: Tensor) -> Tensor:
        big = functional.interpolate(t, scale_factor=4, mode="bilinear")
        return color.wavelet(big.flip(1), big)

    whole, parts = blurred(x), tiled(blurred, x, 4, (40, 30), 18, margin=9)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    assert (tiled(blurred, x, 4, (40, 30), 18, margin=2) - whole).abs().max() > 1e-4  # a margin too small is visible


def test_bands_are_complete_rows_of_bounded_height() -> None:
    x = torch.rand(1, 1, 100, 70)
    bands = list(tiling.tiled_rows(map(enlarge, tiling.cut(x, (32, 48), 8)), (100, 70), 4, (32, 48), 8, margin=2))
    assert sum(band.shape[2] for band in bands) == 400
    assert all(band.shape[3] == 280 and band.shape[2] <= 128 for band in bands)


def test_joins_are_smooth() -> None:
    calls = iter(range(100))
    steps = tiled(
        lambda t: torch.full_like(enlarge(t), float(next(calls))), torch.zeros(1, 1, 8, 60), 4, (24, 24), 12, margin=2
    )
    assert steps[0, 0, 0].diff().abs().max() < 0.06
    assert len(tiling.tile_origins(8, 60, (24, 24), 12)) == next(calls)


@pytest.mark.parametrize("name", ["a", "c"])
def test_averaged_tiles_equal_published_code(name: str) -> None:
    golden = np.load(Path(__file__).parents[1] / "golden" / "published_tiling.npz")
    tile, stride, scale = golden[f"{name}.cfg"].tolist()
    x = torch.from_numpy(golden[f"{name}.in"])
    starts = tiling.tile_origins(*x.shape[2:], (tile, tile), tile - stride)
    assert starts == [tuple(place) for place in golden[f"{name}.starts_yx"]]
    count = iter(range(100))
    pieces = (enlarge(t, scale) + 0.1 * next(count) for t in tiling.cut(x, (tile, tile), tile - stride))
    size = (x.shape[2], x.shape[3])
    joined = torch.cat(list(tiling.averaged_rows(pieces, size, scale, (tile, tile), tile - stride)), dim=2)
    assert (joined - torch.from_numpy(golden[f"{name}.out"])).abs().max() < 1e-6


def test_published_tiles_need_one_row_of_tiles_at_a_time() -> None:
    x = torch.rand(1, 2, 70, 40)
    bands = list(tiling.averaged_rows(map(enlarge, tiling.cut(x, (32, 32), 10)), (70, 40), 4, (32, 32), 10))
    assert [band.shape[2] for band in bands] == [88, 64, 128]  # tiles start in rows 0, 22 and 38
    torch.testing.assert_close(torch.cat(bands, 2), enlarge(x), atol=1e-6, rtol=0)
    assert {side: side - tiling.published_overlap(side) for side in (512, 256, 64)} == {512: 448, 256: 224, 64: 48}
    assert (tiling.published_overlap(128, 40), tiling.published_overlap(30, 40)) == (40, 10)


def test_tiles_keep_to_the_stride_of_a_network_except_in_the_published_way() -> None:
    ours = tiling.join_of((100, 160), 32, 16, "smooth")
    assert (ours.tile, ours.overlap, ours.multiple) == ((112, 160), 32, 16)
    assert tiling.join_of((16, 200), 32, 16, "smooth").overlap == 0
    assert tiling.join_of((32, 32), 1, 16, "smooth").overlap == 16
    theirs = tiling.join_of((256, 256), 12, 64, "average")
    assert (theirs.tile, theirs.overlap, theirs.multiple) == ((256, 256), 32, 1)

"""Attention by blocks of queries against PyTorch's own in float32."""

import pytest
import torch
from agreement import decibels
from torch.nn import functional

from onestepsr.models import cpu_kernels

pytestmark = pytest.mark.numeric


def heads(count: int, rows: int, channels: int, spread: float, offset: float = 0.0):
    """(1, count, rows, channels) as a linear layer leaves it in memory."""
    common = offset * torch.randn(1, 1, count * channels)
    values = spread * torch.randn(1, rows, count * channels) + common
    return values.bfloat16().unflatten(-1, (count, channels)).transpose(1, 2)


@pytest.mark.parametrize(
    ("shape", "spread", "offset"),
    [((2, 600, 64), 1.0, 0.0), ((2, 600, 64), 2.0, 0.0), ((1, 600, 64), 0.5, 8.0), ((1, 700, 256), 0.7, 0.0)],
)
def test_attention_by_blocks_is_attention(shape, spread, offset):
    torch.manual_seed(0)
    query, value = heads(*shape, spread), heads(*shape, 1.0)
    key = heads(*shape, spread, offset)
    with torch.inference_mode():
        found = cpu_kernels.attention_by_blocks(query, key, value)
    exact = functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert found.dtype == torch.bfloat16
    assert decibels(exact, found) > 42.0


def test_large_scores_are_not_rounded_where_it_matters():
    torch.manual_seed(0)
    query, key = 5.0 * torch.randn(64, 64).bfloat16(), torch.randn(64, 600).bfloat16()
    exact = (query.float() @ key.float()).softmax(-1)
    with torch.inference_mode():
        found = cpu_kernels._scores(query, key).float().softmax(-1)
    assert decibels(exact, found) > 45.0
    assert decibels(exact, (query @ key).float().softmax(-1)) < 35.0


def test_compilers_see_what_was_written(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.inference_mode():
        assert not cpu_kernels.is_fast(torch.zeros(1).bfloat16())
        monkeypatch.undo()
        assert cpu_kernels.is_fast(torch.zeros(1).bfloat16())

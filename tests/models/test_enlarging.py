"""Fast bicubic enlargement is PyTorch's own, but for rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onestepsr.imaging.resize import bicubic

pytestmark = pytest.mark.numeric


def plain(x: Tensor, scale: int) -> Tensor:
    return F.interpolate(x, scale_factor=float(scale), mode="bicubic", align_corners=False)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 5, 1), (1, 1, 7, 9), (2, 4, 16, 11)])
def test_equals_interpolation(scale: int, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bicubic(x, scale), plain(x, scale), atol=2e-6, rtol=0)
    deep = x.double()
    torch.testing.assert_close(bicubic(deep, scale), plain(deep, scale), atol=1e-12, rtol=0)


def test_layout_and_format_of_the_input_do_not_matter() -> None:
    x = torch.rand(1, 3, 12, 20)
    rounded = x.bfloat16()
    result = bicubic(rounded.contiguous(memory_format=torch.channels_last), 4)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, bicubic(rounded.float(), 4).bfloat16())


def test_gradients_pass_also_after_use_in_inference_mode() -> None:
    with torch.inference_mode():
        bicubic(torch.rand(1, 3, 4, 4), 5)
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    bicubic(x, 5).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.sum(), torch.tensor(3 * 16 * 25.0, dtype=torch.float64))

"""EfficientNet-Lite0 and -Lite1 against their layers written out with batch normalisation and TensorFlow's padding."""

from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.models.efficientnet_lite import (
    BLOCKS,
    GROUPS,
    EfficientNetFeatures,
    EfficientNetLite,
    InvertedBottleneck,
    SameConv,
    StridedDepthwise,
    folded,
    same_convolution,
)
from weights_by_name import published_efficientnet

LITE0, LITE1 = BLOCKS
PARAMETERS_WITH_NORMS = {LITE0: 4_652_008, LITE1: 5_416_680}


def by_layers(state: dict[str, Tensor], image: Tensor, name: str) -> list[Tensor]:
    """Outputs of all blocks, layer by layer as the published code has them."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, *, depthwise: bool = False) -> Tensor:
        weight = state[f"{conv}.weight"]
        kernel = weight.shape[-1]
        sides = []
        for side in x.shape[-2:]:
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            sides.append((total // 2, total - total // 2))
        x = F.conv2d(F.pad(x, (*sides[1], *sides[0])), weight, None, stride, groups=x.shape[1] if depthwise else 1)
        parts = (state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-3)

    h = F.relu6(layer((image * 255 - 127) / 128, "_conv_stem", "_bn0", 2))
    outputs, number = [], 0
    for count, (_, stride, expansion, _) in zip(BLOCKS[name], GROUPS, strict=True):
        for repeat in range(count):
            block, before = f"_blocks.{number}", h
            if expansion > 1:
                h = F.relu6(layer(h, f"{block}._expand_conv", f"{block}._bn0"))
            own = stride if repeat == 0 else 1
            h = F.relu6(layer(h, f"{block}._depthwise_conv", f"{block}._bn1", own, depthwise=True))
            h = layer(h, f"{block}._project_conv", f"{block}._bn2")
            h = h + before if own == 1 and h.shape == before.shape else h
            outputs.append(h)
            number += 1
    return outputs


@pytest.mark.parametrize(("name", "ends"), [(LITE0, (0, 2, 4, 10, 15)), (LITE1, (0, 3, 6, 14, 20))])
def test_maps_are_those_of_the_layers(tmp_path: Path, name: str, ends: tuple[int, ...]) -> None:
    state = published_efficientnet(name)
    assert sum(value.numel() for key, value in state.items() if "running" not in key) == PARAMETERS_WITH_NORMS[name]
    torch.save(state, tmp_path / "weights.pth")
    network = EfficientNetLite.from_file(tmp_path / "weights.pth", name).double()
    state = {key: value.double() for key, value in state.items()}
    network.load_state_dict(folded(state))  # random weights amplify what float32 rounds
    image = torch.rand(1, 3, 45, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = by_layers(state, image, name)
    with torch.no_grad():
        maps = network.maps(image)
        fewer = EfficientNetFeatures(network, 2)(image)
    assert [tuple(one.shape[1:]) for one in maps] == [(16, 23, 32), (24, 12, 16), (40, 6, 8), (112, 3, 4), (320, 2, 2)]
    for one, number in zip(maps, ends, strict=True):
        expected = outputs[number]
        assert (one - expected).abs().max() < 1e-9 * expected.abs().max()
    assert len(fewer) == 3
    torch.testing.assert_close(fewer[0], image, rtol=0, atol=0)
    torch.testing.assert_close(fewer[2], maps[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "before", "after"), [(8, 3, 2, 0, 1), (7, 3, 2, 1, 1), (8, 5, 2, 1, 2)]
)
def test_odd_padding_goes_to_the_end(side: int, kernel: int, stride: int, before: int, after: int) -> None:
    conv = SameConv(2, 2, kernel, stride)
    x = torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(0))
    expected = F.conv2d(F.pad(x, (before, after, before, after)), conv.weight, conv.bias, stride)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize(("height", "width"), [(8, 6), (7, 10), (9, 9)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (5, 3)])
def test_the_other_way_back_through_a_strided_depthwise_convolution_is_exact(
    height: int, width: int, kernel: int, stride: int
) -> None:
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, height, width, generator=numbers, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, kernel, kernel, generator=numbers, dtype=torch.float64)
    bias = torch.randn(3, generator=numbers, dtype=torch.float64)
    expected = same_convolution(x, weight, bias, stride, 3)
    ours = StridedDepthwise.apply(x, weight, bias, stride)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    toward = torch.randn(expected.shape, generator=numbers, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(expected, x, toward)
    (gradient,) = torch.autograd.grad(ours, x, toward)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_features_in_bf16_pass_gradients_through_frozen_and_trained_weights_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    network = EfficientNetLite().requires_grad_(False)
    image = torch.rand(1, 3, 40, 40, requires_grad=True)
    used = []
    original = StridedDepthwise.apply
    monkeypatch.setattr(StridedDepthwise, "apply", lambda *given: used.append(given[3]) or original(*given))

    def gradient() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network.maps(image)
        return torch.autograd.grad(sum(one.float().square().sum() for one in outputs), image)[0]

    frozen = gradient()
    assert used == [2, 2, 2, 2]
    for block in network.blocks:
        cast(InvertedBottleneck, block).depthwise.requires_grad_(True)
    trained = gradient()
    assert used == [2, 2, 2, 2]
    assert (frozen - trained).norm() < 0.02 * trained.norm()


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ({"_conv_stem.weight": torch.zeros(3)}, LITE0),
        (published_efficientnet(LITE1), LITE0),
        (published_efficientnet(LITE0), LITE1),
    ],
)
def test_other_weights_are_refused_in_one_line(tmp_path: Path, state: dict[str, Tensor], name: str) -> None:
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"not {name} weights") as error:
        EfficientNetLite.from_file(tmp_path / "weights.pth", name)
    assert "\n" not in str(error.value)

"""EfficientNet-Lite0 and -Lite1, trained on ImageNet: features for perceptual distances and for discriminators.

Inverted bottlenecks with depthwise convolutions, ReLU6 and no squeeze-and-excitation (Tan and Le, "EfficientNet", 2019,
in the form for mobile devices). Batch normalisation, which is frozen, is folded into the convolutions when weights are
read; strided convolutions are padded as TensorFlow does it ("SAME"), which is how the weights were trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from onestepsr.core.errors import UserError
from onestepsr.weights.files import read_tensors

MAX_BYTES = 2**27
"""Limit on weight files; the published ones have 18 and 21 MiB."""
STEM_WIDTH = 32
GROUPS = ((3, 1, 1, 16), (3, 2, 6, 24), (5, 2, 6, 40), (3, 2, 6, 80), (5, 1, 6, 112), (5, 2, 6, 192), (3, 1, 6, 320))
"""Kernel, stride of the first block, expansion and channels of each group of blocks."""
BLOCKS = {"EfficientNet-Lite0": (1, 2, 2, 3, 3, 4, 1), "EfficientNet-Lite1": (1, 3, 3, 4, 4, 5, 1)}
"""Blocks in each group of the published networks."""
HEAD_WIDTH = 1280
CLASSES = 1000
BATCH_NORM_EPSILON = 1e-3
MEAN, SCALE = 127 / 255, 255 / 128
"""Mean that is subtracted from an image in [0, 1], and factor that it is then multiplied with."""


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's padding: the output has ceil(side / stride), and what is odd goes to the end."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', ceil(H / stride), ceil(W / stride))."""
        stride = self.stride[0]
        if self._is_slow_backwards(x):
            dtype = torch.get_autocast_dtype("cpu")
            bias = None if self.bias is None else self.bias.to(dtype)
            return cast(Tensor, StridedDepthwise.apply(x.to(dtype), self.weight.to(dtype), bias, stride))  # type: ignore[no-untyped-call]
        return same_convolution(x, self.weight, self.bias, stride, self.groups)

    def _is_slow_backwards(self, x: Tensor) -> bool:
        strided_depthwise = self.stride[0] > 1 and self.groups == self.in_channels
        needed = torch.is_grad_enabled() and x.requires_grad and not self.weight.requires_grad
        return strided_depthwise and needed and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def same_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int) -> Tensor:
    """Convolution of (N, C, H, W) padded to ceil(side / stride) outputs."""
    kernel = weight.shape[-1]
    height, width = (total_padding(side, kernel, stride) for side in x.shape[-2:])
    if height == width == kernel - 1 and height % 2 == 0:  # even on all sides: without a padded copy
        padding = height // 2
    else:
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        padding = 0
    return F.conv2d(x, weight, bias, stride, padding, 1, groups)


def total_padding(side: int, kernel: int, stride: int) -> int:
    """Values added along a side, before and after it together; before it is the smaller half."""
    return max((-(-side // stride) - 1) * stride + kernel - side, 0)


class StridedDepthwise(torch.autograd.Function):
    """:func:`same_convolution` of every channel by its own kernel, with frozen weights and another way back.

    Its gradient is the stride-1 convolution of the output's gradient, spread out to the input's positions, with the
    turned kernel. PyTorch's own takes ten times as long in bf16 on a CPU with AMX, a seventh of a training step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        """(N, C, H, W) to (N, C, ceil(H / stride), ceil(W / stride)); ``weight`` is (C, 1, K, K)."""
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride = x.shape, stride
        return same_convolution(x, weight, bias, stride, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of ``x`` alone."""
        (weight,) = ctx.saved_tensors
        kernel, stride = weight.shape[-1], ctx.stride
        # Output o saw inputs from o * stride - before on, so the turned kernel begins kernel - 1 - before to the left.
        top, left = (kernel - 1 - total_padding(side, kernel, stride) // 2 for side in ctx.shape[-2:])
        images, channels, height, width = ctx.shape
        padded = (images, channels, height + kernel - 1, width + kernel - 1)
        spread = torch.empty(padded, dtype=gradient.dtype, memory_format=torch.channels_last).zero_()
        spread[..., top : top + height : stride, left : left + width : stride] = gradient
        return F.conv2d(spread, weight.flip(2, 3), None, groups=weight.shape[0]), None, None, None


class InvertedBottleneck(nn.Module):
    """Expansion by 1x1, depthwise convolution, projection by 1x1 without activation; a residual connection where the
    shape stays."""

    def __init__(self, channels: int, out: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = nn.Conv2d(channels, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = nn.Conv2d(inner, out, 1)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', ceil(H / stride), ceil(W / stride))."""
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        return torch.as_tensor(x + h if self.residual else h)


class EfficientNetLite(nn.Module):
    """Classifier and, in :meth:`maps`, features: the last map at each of the five resolutions."""

    channels = (16, 24, 40, 112, 320)
    """Channels of the maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's sides."""

    def __init__(self, name: str = "EfficientNet-Lite0") -> None:
        """``name`` is one of :data:`BLOCKS`."""
        super().__init__()
        self.stem = SameConv(3, STEM_WIDTH, 3, 2)
        blocks: list[nn.Module] = []
        ends: list[int] = []
        width = STEM_WIDTH
        for count, (kernel, stride, expansion, out) in zip(BLOCKS[name], GROUPS, strict=True):
            if stride > 1:
                ends.append(len(blocks) - 1)
            for number in range(count):
                own = stride if number == 0 else 1
                blocks.append(InvertedBottleneck(width, out, kernel=kernel, stride=own, expansion=expansion))
                width = out
        self.blocks = nn.ModuleList(blocks)
        self.ends = (*ends, len(blocks) - 1)
        self.head = nn.Conv2d(width, HEAD_WIDTH, 1)
        self.classifier = nn.Linear(HEAD_WIDTH, CLASSES)

    @classmethod
    def from_file(cls, path: Path, name: str = "EfficientNet-Lite0") -> EfficientNetLite:
        """The network with the published weights, in eval mode; :class:`UserError` in one line for any other file."""
        network = cls(name)
        try:
            network.load_state_dict(folded(read_tensors(path, limit=MAX_BYTES)))
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{path}: not {name} weights ({str(error).splitlines()[-1].strip()})") from error
        return network.eval()

    def maps(self, x: Tensor, stages: int = 5) -> list[Tensor]:
        """The first ``stages`` maps of :attr:`channels` for ``x`` (N, 3, H, W) in [0, 1]; no more is computed."""
        h = F.relu6(self.stem((x - MEAN) * SCALE))
        maps: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            h = block(h)
            if number == self.ends[len(maps)]:
                maps.append(h)
                if len(maps) == stages:
                    break
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 1000) of ImageNet's classes for ``x`` (N, 3, H, W) in [0, 1], 224x224 as published."""
        h = F.relu6(self.head(self.maps(x)[-1]))
        return torch.as_tensor(self.classifier(h.mean(dim=(2, 3))))


class EfficientNetFeatures(nn.Module):
    """The network as the feature network of a distance: a list of maps that begins with the image itself."""

    keeps_float32 = True
    """Distances are small differences of its features; training leaves it in float32 when it keeps backbones in 16
    bits."""

    def __init__(self, network: EfficientNetLite, stages: int = 5) -> None:
        super().__init__()
        if not 1 <= stages <= len(EfficientNetLite.channels):
            raise UserError(f"EfficientNet-Lite: {stages} stages, accepted: 1 to {len(EfficientNetLite.channels)}")
        self.network, self.stages = network, stages
        self.channels = (3, *EfficientNetLite.channels[:stages])

    def forward(self, x: Tensor) -> list[Tensor]:
        """``stages`` + 1 maps for ``x`` (N, 3, H, W) in [0, 1]."""
        return [x, *self.network.maps(x, self.stages)]


def folded(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of :class:`EfficientNetLite` from the published one, batch normalisation folded into convolutions."""
    state: dict[str, Tensor] = {}

    def fold(own: str, convolution: str, norm: str) -> None:
        weight = published[f"{convolution}.weight"].double()
        scale = published[f"{norm}.weight"].double()
        scale = scale / (published[f"{norm}.running_var"].double() + BATCH_NORM_EPSILON).sqrt()
        shift = published[f"{norm}.bias"].double() - scale * published[f"{norm}.running_mean"].double()
        dtype = published[f"{convolution}.weight"].dtype
        state[f"{own}.weight"] = (weight * scale[:, None, None, None]).to(dtype)
        state[f"{own}.bias"] = shift.to(dtype)

    fold("stem", "_conv_stem", "_bn0")
    for number in range(sum(key.endswith("._depthwise_conv.weight") for key in published)):
        theirs, own = f"_blocks.{number}", f"blocks.{number}"
        if f"{theirs}._expand_conv.weight" in published:
            fold(f"{own}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        fold(f"{own}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        fold(f"{own}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
    fold("head", "_conv_head", "_bn1")
    for kind in ("weight", "bias"):
        state[f"classifier.{kind}"] = published[f"_fc.{kind}"]
    return state

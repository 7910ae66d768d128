"""What a generator is given: tiles in float32 where it takes them, else in the format of its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onestepsr.inference.tile_runner import input_dtype_of
from onestepsr.inference.upscaler import Upscaler
from onestepsr.models.generators import NoisedLatentGenerator, OneStepLatentGenerator
from onestepsr.models.osediff.generator import OSEDiffGenerator
from onestepsr.models.resshift.generator import ResidualShiftGenerator
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyConfig

SMALL = TinyConfig(
    encoder_width=8, decoder_width=8, widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16
)
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


class Recorder(nn.Module):
    """Enlarges, and remembers the dtypes that it was given."""

    scale = 4

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.given: list[torch.dtype] = []

    def forward(self, lr: Tensor) -> Tensor:
        self.given.append(lr.dtype)
        return self.weight * lr.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


class WideRecorder(Recorder):
    takes_float32 = True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tiles_have_the_format_that_the_generator_takes(dtype: str) -> None:
    for generator, expected in ((Recorder(), getattr(torch, dtype)), (WideRecorder(), torch.float32)):
        Upscaler(generator, "cpu", dtype)(PIXELS)
        assert generator.given == [expected]
        assert generator.weight.dtype == getattr(torch, dtype)


def test_one_step_generators_take_float32_and_those_that_draw_from_a_posterior_do_not() -> None:
    for kind, wide in (
        (OneStepLatentGenerator, True),
        (NoisedLatentGenerator, True),
        (OSEDiffGenerator, False),
        (ResidualShiftGenerator, False),
    ):
        assert getattr(kind, "takes_float32", False) is wide
    assert input_dtype_of(WideRecorder(), torch.float64) == torch.float64


@pytest.mark.parametrize("noised", [False, True])
def test_images_are_enlarged_before_they_are_rounded(noised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    generator = tiny_generator(TinyGeneratorConfig(model=SMALL, noised=noised))
    encoded: list[Tensor] = []
    encode = generator.encode
    monkeypatch.setattr(generator, "encode", lambda x: (encoded.append(x), encode(x))[1])
    Upscaler(generator, "cpu", "bfloat16")(PIXELS)
    lr = torch.from_numpy(PIXELS).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(encoded[0], generator.enlarge(lr), atol=1e-5, rtol=0.0)


class Foreign(Tensor):
    """On a device where little more runs than the networks: it can be looked at, and brought home."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.aminmax, Tensor.clamp, Tensor.nan_to_num):
            raise NotImplementedError(f"{func.__name__} is not implemented for this device")
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(Tensor) if func is Tensor.to else result


def test_on_other_devices_nothing_but_the_network_runs() -> None:
    class Elsewhere(Recorder):
        def forward(self, lr: Tensor) -> Tensor:
            return super().forward(lr).as_subclass(Foreign)

    assert Upscaler(Elsewhere(), "cpu", "float32")(PIXELS).size == (64, 48)

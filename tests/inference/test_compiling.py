"""Compiled networks give what plain ones give, once per shape; what is missing is named in one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onestepsr.core.errors import OneStepSRError, UserError
from onestepsr.imaging.read import LoadedImage
from onestepsr.inference import devices
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
from onestepsr.models.generators import Generator
from small import small_generator

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 70, 3), dtype=np.uint8)
OPTIONS = UpscaleOptions(tile=24, tile_batch=3)


class Whole(Generator):
    """A generator that does not consist of the usual networks."""

    def forward(self, lr: Tensor, **conditions: Any) -> Tensor:
        return lr.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3).sqrt()


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """``torch.compile`` with another backend: PyTorch's own takes a minute."""
    plain = torch.compile

    def use(backend: Any) -> None:
        monkeypatch.setattr(torch, "compile", functools.partial(plain, backend=backend))

    torch._dynamo.reset()
    return use


@pytest.mark.parametrize(("make", "parts"), [(small_generator, 3), (Whole, 1)])
def test_compiled_equals_plain_and_every_part_is_compiled_once(
    make: Callable[[], Generator], parts: int, use_backend: Callable[[Any], None]
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    use_backend(backend)
    plain = Upscaler(make(), "cpu", "float32").upscale_image(LoadedImage(pixels=PIXELS), OPTIONS)
    assert graphs == []
    compiled = Upscaler(make(), "cpu", "float32", compiled=True)
    result = compiled.upscale_image(LoadedImage(pixels=PIXELS), OPTIONS)
    assert compiled.last_plan is not None
    assert compiled.last_plan.tiles % compiled.last_plan.batch != 0  # the last batch is filled up
    assert len(graphs) == parts
    assert np.abs(plain.pixels.astype(int) - result.pixels).max() <= 1


def test_weights_keep_their_names() -> None:
    generator = small_generator()
    names = list(generator.state_dict())
    devices.compile_networks(generator)
    assert list(generator.state_dict()) == names


def test_a_compiler_that_fails_is_one_line(use_backend: Callable[[Any], None]) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("no such header")

    use_backend(backend)
    upscaler = Upscaler(Whole(), "cpu", "float32", "whole", compiled=True)
    with pytest.raises(OneStepSRError, match=r"^whole: cannot be compiled here \(.*\); leave --compile out$") as caught:
        upscaler.upscale_image(LoadedImage(pixels=PIXELS), OPTIONS)
    assert "no such header" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"found none \(g\+\+, clang"):
        Upscaler(Whole(), "cpu", "float32", compiled=True)
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs Triton"):
        devices.require_compiler(torch.device("cuda"))
    with pytest.raises(UserError, match="device 'mps'; accepted: cpu, cuda"):
        devices.require_compiler(torch.device("mps"))

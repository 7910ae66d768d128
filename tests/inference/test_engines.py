"""Other engines through the upscaler: the same image, a graph that is written once, and what they refuse."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onestepsr import Upscaler
from onestepsr.core.errors import UserError
from onestepsr.inference import engines
from onestepsr.models.architectures import describe
from onestepsr.weights.files import save_model
from small import small_generator


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small model, and a cache of its own, in which its graph is written once."""
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONESTEPSR_CACHE", str(folder / "cache"))
        yield save_small(folder / "small.safetensors")


def save_small(path: Path, **changes: Any) -> Path:
    generator = small_generator(**changes)
    architecture, config = describe(generator)
    save_model(path, architecture=architecture, config=config, state_dict=generator.state_dict())
    return path


def test_the_image_is_that_of_torch(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    image = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    wanted = np.asarray(Upscaler.from_pretrained(weights, "cpu", "float32")(image, tile=16)).astype(int)
    for engine in ("onnxruntime", "openvino"):
        found = np.asarray(Upscaler.from_pretrained(weights, engine=engine)(image, tile=16)).astype(int)  # type: ignore[arg-type]
        assert found.shape == (84, 136, 3)
        assert np.abs(found - wanted).max() <= 1
        assert (found == wanted).mean() > 0.99
    assert len(list((weights.parent / "cache" / "graphs").iterdir())) == 1  # both engines read one graph
    monkeypatch.setattr(engines, "write_onnx", lambda *_: pytest.fail("written again"))
    assert Upscaler.from_pretrained(weights, engine="onnxruntime").engine == "onnxruntime"
    with pytest.raises(pytest.fail.Exception, match="written again"):
        engines.in_engine(small_generator(timestep=100), "onnxruntime", "small")  # equal weights, but another graph


def test_what_an_engine_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match="accepted: auto, torch, onnxruntime, openvino"):
        Upscaler.from_pretrained(engine="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="runs on the CPU in float32"):
        Upscaler.from_pretrained(engine="onnxruntime", dtype="bfloat16")
    with pytest.raises(UserError, match="draws noise"):
        Upscaler.from_pretrained("random:resshift-tiny", engine="onnxruntime")


# ---- the choice by measurement ----


def test_auto_takes_what_was_measured_until_anything_changes(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    load = functools.partial(Upscaler.from_pretrained, weights, "cpu", engine="auto")
    assert load().engine == "torch"  # nothing is measured yet
    monkeypatch.setattr(engines, "fastest_equal", lambda found: "onnxruntime")
    chosen, found = engines.measure_engines(str(weights))
    assert chosen == "onnxruntime"
    assert found[0].engine == "torch"
    assert all(one.difference < engines.TOLERANCE for one in found[1:])
    assert load().engine == "onnxruntime"
    image = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    wanted = np.asarray(Upscaler.from_pretrained(weights, "cpu", "float32")(image)).astype(int)
    assert np.abs(np.asarray(load()(image)).astype(int) - wanted).max() <= 1
    assert Upscaler.from_pretrained(weights, "cpu").engine == "torch"  # the API's default
    assert load(dtype="float32").engine == "torch"  # a dtype that was asked for is torch's
    with monkeypatch.context() as other:
        other.setattr(engines, "processor_name", lambda: "another processor")
        assert load().engine == "torch"
    with monkeypatch.context() as other:
        other.setattr(torch, "get_num_threads", lambda: 77)
        assert load().engine == "torch"
    note = next((weights.parent / "cache" / "engines").iterdir())
    written = note.read_text()
    note.write_text(written.replace("onnxruntime", "no-such-engine"))
    assert load().engine == "torch"
    note.write_text(written)
    save_small(weights, timestep=100)  # another model under the same name, of equal weights
    assert load().engine == "torch"


def test_only_a_faster_engine_with_the_same_image_is_chosen() -> None:
    def measured(engine: engines.Engine, seconds: float, difference: float = 1e-6) -> engines.Measured:
        return engines.Measured(engine=engine, dtype="float32", seconds=seconds, difference=difference)

    torch_takes = measured("torch", 1.0)
    assert engines.fastest_equal([torch_takes]) == "torch"
    assert engines.fastest_equal([torch_takes, measured("onnxruntime", 0.8), measured("openvino", 0.7)]) == "openvino"
    assert engines.fastest_equal([torch_takes, measured("onnxruntime", 0.97)]) == "torch"  # no more than noise
    assert engines.fastest_equal([torch_takes, measured("openvino", 0.5, difference=2e-4)]) == "torch"

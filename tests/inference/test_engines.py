"""Other engines through the upscaler: the same image, a graph that is written once, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest

from onestepsr import Upscaler
from onestepsr.core.errors import UserError
from onestepsr.inference import engines
from onestepsr.models.architectures import describe
from onestepsr.weights.files import save_model
from small import small_generator


def test_the_image_is_that_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "small.safetensors"
    generator = small_generator()
    architecture, config = describe(generator)
    save_model(weights, architecture=architecture, config=config, state_dict=generator.state_dict())
    image = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    wanted = np.asarray(Upscaler.from_pretrained(weights, "cpu", "float32")(image, tile=16)).astype(int)
    for engine in ("onnxruntime", "openvino"):
        found = np.asarray(Upscaler.from_pretrained(weights, engine=engine)(image, tile=16)).astype(int)  # type: ignore[arg-type]
        assert found.shape == (84, 136, 3)
        assert np.abs(found - wanted).max() <= 1
        assert (found == wanted).mean() > 0.99
    assert len(list((tmp_path / "cache" / "graphs").iterdir())) == 1  # both engines read one graph
    monkeypatch.setattr(engines, "write_onnx", lambda *_: pytest.fail("written again"))
    Upscaler.from_pretrained(weights, engine="onnxruntime")


def test_what_an_engine_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match="accepted: torch, onnxruntime, openvino"):
        Upscaler.from_pretrained(engine="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="runs on the CPU in float32"):
        Upscaler.from_pretrained(engine="onnxruntime", dtype="bfloat16")
    with pytest.raises(UserError, match="draws noise"):
        Upscaler.from_pretrained("random:resshift-tiny", engine="onnxruntime")

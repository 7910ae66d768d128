"""Other engines than PyTorch for networks on a CPU: onnxruntime and OpenVINO, from a graph in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onestepsr import __version__
from onestepsr.core.errors import MissingExtra, UserError
from onestepsr.core.files import replacing
from onestepsr.models.generators import Generator, MemoryCost, Origin, Rng
from onestepsr.models.graphs import OPSET, graphs_of, write_onnx
from onestepsr.weights.download import cache_folder

Engine = Literal["torch", "onnxruntime", "openvino"]
ENGINES: tuple[Engine, ...] = ("torch", "onnxruntime", "openvino")
Run = Callable[[NDArray[Any]], NDArray[Any]]


class EngineGenerator(Generator):
    """A generator whose network another engine runs, in float32 on the CPU; values are clamped to [0, 1]."""

    takes_float32 = True

    def __init__(self, source: Generator, run: Run) -> None:
        """``run`` maps images (N, 3, h, w) of any size to enlarged ones; ``source`` is the generator it was made of."""
        super().__init__()
        self.scale, self.lr_multiple = source.scale, source.lr_multiple
        self.takes_batches, self.largest_tile = source.takes_batches, source.largest_tile
        self._run, self._cost = run, source.memory_cost(torch.float32)

    def memory_cost(self, dtype: torch.dtype) -> MemoryCost:
        """That of the source in float32, in one piece."""
        return MemoryCost(bytes_per_pixel=self._cost.bytes_per_pixel)

    def forward(self, lr: Tensor, *, rng: Rng = None, origin: Origin = None, prompt: Tensor | None = None) -> Tensor:
        """Enlarged image (N, 3, s h, s w) in float32."""
        return torch.from_numpy(self._run(np.ascontiguousarray(lr.float().numpy())))


def in_engine(generator: Generator, engine: Engine, name: str) -> Generator:
    """``generator`` (float32, the layers that were trained, on the CPU), run by ``engine``.

    The graph is written into the cache at the first use, and found there by a checksum of the weights afterwards.
    Raises :class:`UserError` for models that are no single graph, and MissingExtra without the engine.
    """
    if engine == "torch":
        return generator
    graphs = graphs_of(generator, name)
    if len(graphs) > 1:
        raise UserError(f"--engine {engine}: '{name}' is a network on Stable Diffusion, which runs in torch only")
    checksum = hashlib.sha256(f"{__version__} {OPSET} {type(generator).__name__}".encode())
    for key, value in sorted(generator.state_dict().items()):
        checksum.update(key.encode() + value.contiguous().numpy().tobytes())
    path = cache_folder() / "graphs" / f"{checksum.hexdigest()[:32]}.onnx"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_onnx(graphs[0], temporary, {"model": name, "scale": str(generator.scale)})
    return EngineGenerator(generator, _RUNNERS[engine](path))


def open_onnxruntime(path: Path, purpose: str = "--engine onnxruntime") -> Run:
    """An ONNX file in onnxruntime, on the CPU and PyTorch's number of threads; its input has the file's dtype.

    Raises MissingExtra without the package, with what it is wanted for.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra(purpose, "export") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: np.asarray(session.run(None, {"input": image})[0])


def open_openvino(path: Path, purpose: str = "--engine openvino") -> Run:
    """An ONNX file or OpenVINO's own in OpenVINO, computed in float32; otherwise as :func:`open_onnxruntime`."""
    try:
        import openvino
    except ImportError as error:
        raise MissingExtra(purpose, "export") from error
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    settings["ENABLE_CPU_PINNING"] = False  # the first core may be busy with something else
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda image: np.array(compiled(image)[0])


_RUNNERS: dict[str, Callable[[Path], Run]] = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}

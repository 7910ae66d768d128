"""Other engines than PyTorch for networks on a CPU, from a graph in the cache, and the choice by measurement.

onnxruntime and OpenVINO run a network where it is one graph. Which of them is faster than PyTorch depends on the
processor and on the network, so ``onestepsr doctor`` measures it, and the engine "auto" follows what was measured here:
with the same processor, versions, number of threads and weights. Without a measurement it is PyTorch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onestepsr import __version__
from onestepsr.core.errors import MissingExtra, UserError, first_line
from onestepsr.core.files import at_home, read_text, replacing, write_text
from onestepsr.core.machine import instructions, onednn_limit, processor_name
from onestepsr.imaging.read import read_image, samples_to_tensor
from onestepsr.inference.devices import resolve_dtype
from onestepsr.models.generators import Generator, MemoryCost, OneStepLatentGenerator, Origin, Rng
from onestepsr.models.graphs import OPSET, graphs_of, write_onnx
from onestepsr.weights.download import cache_folder

logger = logging.getLogger(__name__)

Engine = Literal["auto", "torch", "onnxruntime", "openvino"]
ENGINES: tuple[Engine, ...] = ("auto", "torch", "onnxruntime", "openvino")
Run = Callable[[NDArray[Any]], NDArray[Any]]


class EngineGenerator(Generator):
    """A generator whose network another engine runs, on the CPU; values are clamped to [0, 1]."""

    takes_float32 = True

    def __init__(self, source: Generator, run: Run) -> None:
        """``run`` maps images (N, 3, h, w) of any size to enlarged ones; ``source`` is the generator it was made of."""
        super().__init__()
        self.scale, self.lr_multiple = source.scale, source.lr_multiple
        self.takes_batches, self.largest_tile = source.takes_batches, source.largest_tile
        self.color_fix = source.color_fix
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
    path = _graph_path(generator)
    if not path.is_file():
        graphs = graphs_of(generator, name)
        if len(graphs) > 1:
            raise UserError(f"--engine {engine}: '{name}' is a network on Stable Diffusion, which runs in torch only")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_onnx(graphs[0], temporary, {"model": name, "scale": str(generator.scale)})
    return EngineGenerator(generator, _RUNNERS[engine](path))


def _graph_path(generator: Generator) -> Path:
    """The graph of these weights and settings in the cache, whether it is there or not."""
    config = generator.config if isinstance(generator, OneStepLatentGenerator) else ""  # others' is in their weights
    checksum = hashlib.sha256(f"{__version__} {OPSET} {type(generator).__name__} {config}".encode())
    for key, value in sorted(generator.state_dict().items()):
        checksum.update(key.encode() + value.contiguous().numpy().tobytes())
    return cache_folder() / "graphs" / f"{checksum.hexdigest()[:32]}.onnx"


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


# ---- the choice by measurement ---------------------------------------------------------------------------------------

SCHEMA = 1
SIDE, ROUNDS = 128, 5
"""Side of the image that is enlarged, and timed runs of each engine."""
TOLERANCE = 1e-4
"""Largest difference from PyTorch in float32, of values in [0, 1], with which an engine is chosen; a step of 8 bits is
forty times as large."""
LEAST_GAIN = 0.95
"""Part of PyTorch's time that an engine may take at most to be chosen: below that is what runs differ by."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One engine on this machine."""

    engine: Engine
    dtype: str
    seconds: float
    """Shortest time for the image."""
    difference: float
    """Largest difference from PyTorch in float32, of values in [0, 1]."""


def measure_engines(name: str) -> tuple[Engine, list[Measured]]:
    """The engine that "auto" takes for the model from now on, and all that are installed, PyTorch as it is used first.

    Chosen is the fastest that gives PyTorch's image. Raises :class:`UserError` for a model that is no single graph,
    MissingExtra where no other engine is installed, and UserError if the choice cannot be kept.
    """
    from onestepsr.models.loading import load_generator

    plain = load_generator(name, faster=False)
    dtype = resolve_dtype("auto", torch.device("cpu"))
    generators: dict[Engine, Generator] = {"torch": load_generator(name, dtype=dtype)}
    missing: MissingExtra | None = None
    for engine in ENGINES[2:]:
        try:
            generators[engine] = in_engine(plain, engine, name)
        except MissingExtra as error:
            missing = error
        except RuntimeError as error:  # OpenVINO where the environment hides instructions that it has seen
            logger.warning("%s cannot run %s here: %s", engine, name, first_line(error))
    if missing is not None and len(generators) == 1:
        raise missing
    with resources.as_file(resources.files("onestepsr") / "assets" / "photo.jpg") as photo:
        lr = samples_to_tensor(read_image(photo).pixels)[:, :3, :SIDE, :SIDE]
    seconds: dict[Engine, list[float]] = {engine: [] for engine in generators}
    images: dict[Engine, Tensor] = {}
    with torch.inference_mode():
        wanted = plain(lr).clamp(0.0, 1.0)
        for _ in range(1 + ROUNDS):  # by turns, so that other work on the machine meets all of them
            for engine, generator in generators.items():
                given = lr if generator.takes_float32 else lr.to(dtype)
                begun = time.perf_counter()
                images[engine] = generator(given.contiguous(memory_format=torch.channels_last))
                seconds[engine].append(time.perf_counter() - begun)
    found = [
        Measured(
            engine=engine,
            dtype=str(dtype).removeprefix("torch.") if engine == "torch" else "float32",
            seconds=min(seconds[engine][1:]),
            difference=float((images[engine].float().clamp(0.0, 1.0) - wanted).abs().max()),
        )
        for engine in generators
    ]
    chosen = fastest_equal(found)
    note = {"schema": SCHEMA, **_circumstances(name), "engine": chosen, "graph": _graph_path(plain).name}
    note["measured"] = [asdict(one) for one in found]
    write_text(_note_of(name), json.dumps(note, indent=1) + "\n")
    return chosen, found


def fastest_equal(found: Sequence[Measured]) -> Engine:
    """PyTorch, which comes first, or the fastest engine that is clearly faster and gives the same image."""
    faster = [one for one in found[1:] if one.seconds <= LEAST_GAIN * found[0].seconds and one.difference <= TOLERANCE]
    return min(faster, key=lambda one: one.seconds).engine if faster else found[0].engine


def measured_engine(name: str | Path) -> tuple[Engine, str] | None:
    """The engine that was chosen for the model on this machine, and the name of its graph; None if none was."""
    try:
        note = json.loads(read_text(_note_of(str(name)), 1 << 16, "note of a measurement"))
        engine, graph = note["engine"], note["graph"]
    except (UserError, ValueError, KeyError, TypeError):  # nothing measured, or not to be read: PyTorch is always right
        return None
    return (engine, graph) if engine in ENGINES[2:] else None


def in_measured_engine(generator: Generator, choice: tuple[Engine, str]) -> Generator | None:
    """``generator`` in the engine of ``choice``; None where its weights are not those that were measured."""
    engine, graph = choice
    path = _graph_path(generator)
    return EngineGenerator(generator, _RUNNERS[engine](path)) if path.name == graph and path.is_file() else None


def _circumstances(name: str) -> dict[str, Any]:
    """Everything on which the choice depends, but for the weights."""
    versions = {package: _version(package) for package in ("onestepsr", "torch", *ENGINES[2:])}
    model = at_home(Path(name))
    return {
        "model": str(model.resolve()) if model.is_file() else name,
        "processor": processor_name(),
        "instructions": " ".join(sorted(instructions())),
        "onednn_limit": onednn_limit(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _note_of(name: str) -> Path:
    key = hashlib.sha256(json.dumps(_circumstances(name)).encode()).hexdigest()[:32]
    return cache_folder() / "engines" / f"{key}.json"

"""Exported files: written in each format, run again by its own engine, and compared with the generator."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onestepsr.core.errors import MissingExtra, UserError
from onestepsr.export.diffusers_folder import export_folder, load_pipeline
from onestepsr.imaging.read import read_image, samples_to_tensor
from onestepsr.inference.engines import Run, open_onnxruntime, open_openvino
from onestepsr.models.generators import Generator, pad_to_multiple
from onestepsr.models.graphs import OPSET, AnySize, Graph, dynamic_sides, example_for, graphs_of, write_onnx

Format = Literal["onnx", "openvino", "ncnn", "torch", "diffusers"]
SHORT = {torch.float32: "fp32", torch.float16: "fp16"}
TOLERANCES: dict[tuple[str, torch.dtype], float] = {
    ("onnx", torch.float32): 1e-4,
    ("openvino", torch.float32): 1e-4,
    ("torch", torch.float32): 1e-5,
    ("diffusers", torch.float32): 1e-4,
    ("ncnn", torch.float32): 2e-3,
    ("onnx", torch.float16): 4e-2,
    ("openvino", torch.float16): 4e-2,
    ("ncnn", torch.float16): 4e-2,
    ("diffusers", torch.float16): 4e-2,
}
"""Largest difference from the generator, of values in [0, 1], by format and dtype of the weights. ncnn computes 3x3
convolutions by Winograd's method, whose rounding is larger; 16 bits lose three digits."""
PNNX_BYTES = 4_000_000_000
"""Memory that pnnx may take on Linux: 0.5 GB suffice for 16 of Real-ESRGAN's groups, all 23 took 16 GB and no end."""
ODD_SIZES = ((37, 53), (64, 41), (21, 95))
"""Height and width of the images of the comparison."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Files that were written, and how to run them."""

    files: tuple[Path, ...]
    runs: tuple[Run, ...]
    """One for each graph: (N, C, h, w) float32 to float32. A single one takes any size, of several the first takes
    multiples of the generator's."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An image that the generator and the exported files have both enlarged."""

    image: str
    size: tuple[int, int]
    """Height and width."""
    difference: float
    """Largest absolute difference of values in [0, 1]."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def export_generator(
    generator: Generator,
    name: str,
    to: Format,
    out: Path,
    *,
    licence: str = "",
    dtype: torch.dtype = torch.float32,
) -> Exported:
    """Write ``generator`` (float32, the layers that were trained) into the folder ``out``; its file names carry the
    model, scale, dtype and, for ONNX, the version of the operators.

    Raises :class:`UserError` for a model that the format cannot hold, MissingExtra without the packages it takes.
    """
    if (to, dtype) not in TOLERANCES:
        raise UserError(f"--dtype {str(dtype).removeprefix('torch.')}: {to} is written in float32 only")
    if to == "diffusers":
        return _diffusers(generator, name, out, licence, dtype)
    graphs = graphs_of(generator, name, plain=to == "ncnn")
    if to == "ncnn" and len(graphs) > 1:
        raise UserError(f"{name}: ncnn holds whole networks only; for one on Stable Diffusion take onnx or openvino")
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{Path(name).stem.replace(':', '-')}_x{generator.scale}"
    written: list[Path] = []
    runs: list[Run] = []
    for graph in graphs:
        label = f"{stem}_{graph.name}" if graph.name else stem
        metadata = {
            "model": name,
            "licence": licence,
            "scale": str(generator.scale),
            "multiple": str(graph.multiple),
            "padded_inside_to_multiple": str(graph.network.multiple if isinstance(graph.network, AnySize) else 1),
            "range": "[0, 1] RGB, NCHW" if graph.channels == 3 else "latent",
        }
        files, run = _WRITERS[to](graph, out / label, metadata, dtype)
        written += files
        runs.append(run)
    if len(graphs) > 1:
        written.append(_write_pipeline(out / f"{stem}.json", name, generator, licence, written))
    return Exported(files=tuple(written), runs=tuple(runs))


def _diffusers(generator: Generator, name: str, out: Path, licence: str, dtype: torch.dtype) -> Exported:
    files = export_folder(generator, name, out, licence=licence, dtype=dtype)
    pipe = load_pipeline(out)
    pipe.set_progress_bar_config(disable=True)

    def run(image: NDArray[Any]) -> NDArray[Any]:
        return cast(Tensor, pipe(torch.from_numpy(image), color_fix="none", output_type="pt").images).numpy()

    return Exported(files=files, runs=(run,))


def _write_pipeline(path: Path, name: str, generator: Generator, licence: str, files: Sequence[Path]) -> Path:
    """A note on how the parts belong together."""
    document = {
        "schema": 1,
        "model": name,
        "licence": licence,
        "scale": generator.scale,
        "lr_multiple": generator.lr_multiple,
        "parts": [file.name for file in files if file.suffix in (".onnx", ".xml", ".pt2")],
        "order": "input padded to lr_multiple, encoder, unet, decoder, cropped to scale x input",
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def _onnx(graph: Graph, stem: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> tuple[list[Path], Run]:
    path = stem.with_name(f"{stem.name}_{SHORT[dtype]}_op{OPSET}.onnx")
    write_onnx(graph, path, metadata, dtype)
    opened = open_onnxruntime(path, "checking an ONNX file")
    kind = np.float16 if dtype == torch.float16 else np.float32

    def run(image: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(opened(image.astype(kind)), np.float32)

    data = path.with_name(path.name + ".data")
    return [path, data] if data.exists() else [path], run


def _openvino(graph: Graph, stem: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> tuple[list[Path], Run]:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtra("OpenVINO export", "export") from error
    path = stem.with_name(f"{stem.name}_{SHORT[dtype]}.xml")
    with tempfile.TemporaryDirectory(prefix="onestepsr-export-") as folder:
        between = Path(folder) / "graph.onnx"
        write_onnx(graph, between, metadata)
        model = openvino.convert_model(between)
        for key, value in metadata.items():
            model.set_rt_info(value, ["onestepsr", key])
        openvino.save_model(model, path, compress_to_fp16=dtype == torch.float16)
    return [path, path.with_suffix(".bin")], open_openvino(path)


def _torch(graph: Graph, stem: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> tuple[list[Path], Run]:
    path = stem.with_name(f"{stem.name}_{SHORT[dtype]}.pt2")
    network = graph.network.eval()
    with torch.no_grad():
        program = torch.export.export(network, (example_for(graph, dtype),), dynamic_shapes=dynamic_sides(graph))
    torch.export.save(program, path, extra_files={"onestepsr.json": json.dumps(dict(metadata))})
    loaded = torch.export.load(path).module()

    def run(image: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            return cast(Tensor, loaded(torch.from_numpy(image))).numpy()

    return [path], run


# ---- ncnn ------------------------------------------------------------------------------------------------------------


def _ncnn(graph: Graph, stem: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> tuple[list[Path], Run]:
    """The pair of files ``NAME-x4.param`` and ``.bin``, with blobs ``data`` and ``output`` as Real-ESRGAN's."""
    try:
        import ncnn
        import pnnx
    except ImportError as error:
        raise MissingExtra("ncnn export", "export") from error
    whole = cast(AnySize, graph.network)
    param = stem.with_name(f"{stem.name.replace('_', '-')}{'-fp16' if dtype == torch.float16 else ''}.param")
    side = 8 * whole.multiple
    inputs = (torch.rand(1, 3, side, 2 * side), torch.rand(1, 3, 3 * side, side))
    with tempfile.TemporaryDirectory(prefix="onestepsr-export-") as folder:
        traced = Path(folder) / "net.pt"
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.jit.trace(whole.network.eval(), inputs[0]).save(str(traced))  # type: ignore[no-untyped-call]
        shapes = [f"{name}={list(x.shape)}" for name, x in zip(("inputshape", "inputshape2"), inputs, strict=True)]
        command = [pnnx.EXEC_PATH, str(traced), *shapes, f"fp16={int(dtype == torch.float16)}"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder) as process:
            if sys.platform == "linux":
                import resource

                resource.prlimit(process.pid, resource.RLIMIT_AS, (PNNX_BYTES, PNNX_BYTES))
        produced = Path(folder) / "net.ncnn.param"
        if not produced.is_file():
            raise UserError(
                f"{metadata['model']}: pnnx could not convert the network in {PNNX_BYTES / 1e9:.0f} GB of memory"
            )
        param.write_text(_with_borders(produced.read_text(), whole.multiple, whole.scale), encoding="ascii")
        param.with_suffix(".bin").write_bytes((Path(folder) / "net.ncnn.bin").read_bytes())
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    net.load_param(str(param))
    net.load_model(str(param.with_suffix(".bin")))

    def run(image: NDArray[Any]) -> NDArray[Any]:
        outputs = []
        for one in image:
            extractor = net.create_extractor()
            extractor.input("data", ncnn.Mat(np.ascontiguousarray(one)))
            outputs.append(np.array(extractor.extract("output")[1]))
        return np.stack(outputs)

    return [param, param.with_suffix(".bin")], run


def _with_borders(param: str, multiple: int, scale: int) -> str:
    """An ncnn description whose blobs are ``data`` and ``output``, and which pads any size from ``multiple`` on.

    Sides are reflected by ``multiple`` - 1 and cropped to the next multiple: shrinking counts whole cells, whose
    enlargement has the size that is wanted. Programs made for Real-ESRGAN have all of these layers.
    """
    lines = param.splitlines()
    layers = [line.replace("in0", "data").replace("out0", "output") for line in lines[2:]]
    if multiple > 1:
        layers = [line.replace("in0", "padded_in").replace("out0", "padded_out") for line in lines[2:]]
        first = next(index for index, line in enumerate(layers) if line.startswith("Input"))
        rest = layers[:first] + layers[first + 1 :]
        reach = multiple - 1
        layers = [
            "Input data 0 1 data",
            "Split border_split 1 2 data border_a border_b",
            f"Padding border_pad 1 1 border_a border_c 0=0 1={reach} 2=0 3={reach} 4=2",
            "Split border_split2 1 2 border_c border_d border_e",
            f"Interp border_cells 1 1 border_e border_f 0=1 1={1 / multiple} 2={1 / multiple}",
            f"Interp border_size 1 1 border_f border_g 0=1 1={multiple}.0 2={multiple}.0",
            "Crop border_crop 2 1 border_d border_g padded_in",
            *rest,
            f"Interp border_size2 1 1 border_b border_h 0=1 1={scale}.0 2={scale}.0",
            "Crop border_crop2 2 1 padded_out border_h output",
        ]
    blobs = sum(int(line.split()[3]) for line in layers)
    return "\n".join([lines[0], f"{len(layers)} {blobs}", *layers]) + "\n"


_WRITERS: dict[str, Callable[[Graph, Path, Mapping[str, str], torch.dtype], tuple[list[Path], Run]]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "ncnn": _ncnn,
    "torch": _torch,
}


# ---- comparison with the generator -----------------------------------------------------------------------------------


def compare(exported: Exported, generator: Generator, images: Sequence[Path] = ()) -> list[Comparison]:
    """The exported files beside the generator, on noise and photos at three odd sizes; ``images`` are photos of the
    user's, of which the middle is taken, beside the packaged one."""
    rng = np.random.default_rng(0)
    with resources.as_file(resources.files("onestepsr") / "assets" / "photo.jpg") as packaged:
        named = [("photo.jpg", packaged), *((str(path), path) for path in images)]
        photos = [(label, samples_to_tensor(read_image(path).pixels)[:, :3]) for label, path in named]
    found = []
    for height, width in ODD_SIZES:
        cases = [("noise", torch.from_numpy(rng.random((1, 3, height, width), np.float32)))]
        for label, photo in photos:
            top, left = max(0, photo.shape[2] - height) // 2, max(0, photo.shape[3] - width) // 2
            part = photo[..., top : top + height, left : left + width].expand(-1, 3, -1, -1)
            cases.append((label, part.contiguous()))
        for label, lr in cases:
            with torch.inference_mode():
                wanted = generator(lr).float().clamp(0.0, 1.0)
            difference = (wanted - torch.from_numpy(run_exported(exported, generator, lr))).abs().max()
            found.append(Comparison(image=label, size=(lr.shape[2], lr.shape[3]), difference=float(difference)))
    return found


def run_exported(exported: Exported, generator: Generator, lr: Tensor) -> NDArray[Any]:
    """Image (N, 3, s h, s w) in [0, 1] that the exported files make of LR (N, 3, h, w)."""
    height, width = (generator.scale * side for side in lr.shape[-2:])
    value = lr if len(exported.runs) == 1 else pad_to_multiple(lr, generator.lr_multiple)
    result = value.numpy()
    for run in exported.runs:
        result = run(np.ascontiguousarray(result))
    return np.asarray(np.clip(result[..., :height, :width], 0.0, 1.0))

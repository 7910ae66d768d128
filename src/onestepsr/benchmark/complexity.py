"""Complexity of the networks that have a name here, stage by stage: parameters and multiply-accumulate operations.

Networks are built on the meta device, without weights and memory, and counted as :mod:`onestepsr.benchmark.counting`
says. The report puts published figures beside them: tables, one JSON document and a page of Markdown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from onestepsr.benchmark.counting import Cost, count, size_of, without_contents
from onestepsr.core.errors import UnknownModel, UserError, did_you_mean
from onestepsr.core.files import at_home
from onestepsr.core.tables import Grid
from onestepsr.models.architectures import (
    RANDOM,
    RANDOM_GENERATORS,
    build_network,
    random_backbone,
    random_generator,
)
from onestepsr.models.backbones import load_discriminator_backbone
from onestepsr.models.discriminators import DiffusionEncoder, NoiseAwareDiscriminator
from onestepsr.models.generators import Generator, OneStepLatentGenerator
from onestepsr.models.loading import family_of, load_network
from onestepsr.models.lora import LoraConfig, add_lora
from onestepsr.models.osediff.generator import ENCODER_LAYERS, FIRST_LAYER, UNET_LAYERS, OSEDiffGenerator
from onestepsr.models.realesrgan.networks import PUBLISHED as PUBLISHED_REALESRGAN
from onestepsr.models.realesrgan.networks import RealESRGANGenerator
from onestepsr.models.resshift.config import PUBLISHED
from onestepsr.models.resshift.generator import ResidualShiftGenerator, residual_shift_generator
from onestepsr.models.seesr.generator import SeeSRGenerator
from onestepsr.models.stable_diffusion.networks import StableDiffusionUNet, StableDiffusionUNetEncoder
from onestepsr.models.tiny.networks import FACTOR as TINY_FACTOR
from onestepsr.prompts.ram import RamConfig, RamNetwork
from onestepsr.prompts.sources import require_transformers
from onestepsr.weights import catalog
from onestepsr.weights.files import read_shapes, read_weights

SD_FACTOR = 8
"""Pixels per latent position of Stable Diffusion."""
TOKENS = 77
"""Length of its prompts."""

# ---- results ----


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a network's evaluation."""

    name: str
    """``encode``, ``unet``, ``decode``, ``discriminator``, or ``denoiser``."""
    cost: Cost
    """Cost of one evaluation."""
    times: int = 1
    """Evaluations for one image."""


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """A network and the cost of its evaluation."""

    name: str
    """Name of the network in the tables."""
    summary: str
    """Description in one line."""
    parameters: int
    """Size of all its parameters, those that the evaluation does not touch included."""
    trainable: int
    """Size of those that training changes."""
    parts: Mapping[str, int]
    """Size of the parameters by part of the network; adapters apart from the layers that they adapt."""
    stages: tuple[Stage, ...]
    """The parts of one evaluation, in order."""

    @property
    def steps(self) -> int:
        """Evaluations of the diffusion network for one image."""
        return max(stage.times for stage in self.stages)

    @property
    def macs(self) -> int:
        """MACs of all stages, by PyTorch's counter."""
        return sum(stage.times * stage.cost.macs for stage in self.stages)

    @property
    def layer_macs(self) -> int:
        """MACs of all stages in convolution and linear layers."""
        return sum(stage.times * stage.cost.layer_macs for stage in self.stages)


# ---- networks by name, with ``requires_grad`` as training sets it ----


def _d3sr(*, adapters: bool = True) -> nn.Module:
    """The generator of D3SR on Stable Diffusion 2.1, with or without adapters; only these and the prompt are
    trainable."""
    generator = random_backbone(f"{RANDOM}sd21-base").requires_grad_(False)
    if adapters:
        add_lora(generator.unet, LoraConfig())
        generator.prompt.requires_grad_(True)
    return generator


def _d3sr_tiny() -> nn.Module:
    """UNet, prompt and decoder are trained, as the packaged recipe says."""
    generator = _from_weights("d3sr-tiny")
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(name.startswith(("unet.", "prompt", "autoencoder.decoder")))
    return generator


def _resshift(alias: str) -> nn.Module:
    return residual_shift_generator(PUBLISHED[alias]).requires_grad_(False)


def _osediff(scale: int = 4, *, adapters: bool = False) -> OSEDiffGenerator:
    """OSEDiff's generator; with ``adapters`` as it trains: on UNet and encoder, and the first convolution whole."""
    generator = OSEDiffGenerator.of(random_backbone(f"{RANDOM}sd21-base"), scale=scale).requires_grad_(False)
    if adapters:
        add_lora(generator.autoencoder, LoraConfig(rank=4, alpha=8.0, targets=ENCODER_LAYERS))
        add_lora(generator.unet, LoraConfig(rank=4, alpha=8.0, targets=UNET_LAYERS))
        for name, parameter in generator.unet.named_parameters():
            if re.fullmatch(rf"{FIRST_LAYER}\.base_layer\.\w+", name):
                parameter.requires_grad_(True)
    return generator


def _osediff_regularizer(*, adapters: bool) -> nn.Module:
    """The UNet of OSEDiff's regulariser, or without adapters that of its teacher."""
    unet = _osediff().unet
    if adapters:
        add_lora(unet, LoraConfig(rank=4, alpha=8.0, targets=UNET_LAYERS))
    return unet


def _discriminator(backbone: str, *, adapters: bool = True) -> nn.Module:
    encoder, prompt = load_discriminator_backbone(backbone)
    discriminator = NoiseAwareDiscriminator(encoder, prompt)
    if adapters:
        add_lora(encoder, LoraConfig())
    return discriminator


def _text_encoder() -> nn.Module:
    """Stable Diffusion 2.1's text encoder: OpenCLIP's ViT-H up to its last layer but one."""
    require_transformers("counting the text encoder")
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = CLIPTextConfig(
        vocab_size=49_408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
    )
    return cast(nn.Module, CLIPTextModel(sizes)).requires_grad_(False)


TEXT_ENCODER, TAGGER = "sd21-text-encoder", "ram-tagger"
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "d3sr-tiny": ("the bundled model, of which all but the encoder is trained", _d3sr_tiny),
    "d3sr-sd21": ("D3SR on Stable Diffusion 2.1-base as it trains: rank-16 adapters beside their layers", _d3sr),
    "d3sr-sd21-merged": (
        "the same as it runs: adapters merged into their layers, nothing left to train",
        lambda: _d3sr(adapters=False),
    ),
    "resshift-realsr-v1": ("ResShift in 15 steps, nothing trained", lambda: _resshift("resshift-realsr-v1")),
    "resshift-realsr-v3": ("ResShift in 4 steps, nothing trained", lambda: _resshift("resshift-realsr-v3")),
    "sinsr": ("SinSR, the same networks in one step, as TAD-SR's", lambda: _resshift("sinsr")),
    "osediff-sd21": (
        "OSEDiff on Stable Diffusion 2.1-base as it trains: rank-4 adapters on UNet and encoder, first convolution",
        lambda: _osediff(adapters=True),
    ),
    "osediff": ("the same as it runs: adapters merged; without the text encoder and the prompt extractor", _osediff),
    "osediff-regularizer": (
        "its second UNet, which follows the generator under rank-4 adapters; training only",
        lambda: _osediff_regularizer(adapters=True),
    ),
    "osediff-teacher": ("its third UNet, frozen; training only", lambda: _osediff_regularizer(adapters=False)),
    TEXT_ENCODER: (
        f"Stable Diffusion 2.1's text encoder for one prompt of {TOKENS} tokens, as OSEDiff runs it",
        _text_encoder,
    ),
    TAGGER: (
        "RAM, which writes OSEDiff's prompt; DAPE's adapters merged. It sees 384 x 384 pixels whatever the image is",
        lambda: RamNetwork(RamConfig()).requires_grad_(False),
    ),
    "tiny-discriminator": (
        "half of the tiny UNet, all of it trained; training only",
        lambda: _discriminator("random:d3sr-tiny", adapters=False),
    ),
    "sd21-discriminator": (
        "half of the Stable Diffusion 2.1-base UNet, rank-16 adapters; training only",
        lambda: _discriminator("random:sd21-base"),
    ),
    "sdxl-discriminator": (
        "half of the SDXL-base UNet, rank-16 adapters; training only",
        lambda: _discriminator("random:sdxl-base"),
    ),
}
"""Description and builder of each."""


def default_names() -> list[str]:
    """Every network that has a name here, and every bundled model besides."""
    known = [name for name in NETWORKS if name != TEXT_ENCODER or find_spec("transformers") is not None]
    bundled = (spec.id for spec in catalog.list_models("upscaler") if spec.bundled)
    return list(dict.fromkeys([*known, *bundled]))


def _build(name_or_path: str) -> tuple[str, nn.Module]:
    """Description and network."""
    if name_or_path in NETWORKS:
        summary, build = NETWORKS[name_or_path]
        return summary, build()
    kinds = {spec.id: spec.kind for spec in catalog.list_models()}
    name = str(at_home(Path(name_or_path)))
    if kinds.get(name) == "backbone":
        name = f"{RANDOM}{name}"
    family = family_of(name)
    if family == "random":
        return "a backbone as it comes, nothing trained", random_generator(name).requires_grad_(False)
    if not Path(name).is_file():
        if kinds.get(name) != "upscaler":
            near = did_you_mean(name, [*NETWORKS, *(known for known in kinds if kinds[known] == "upscaler")])
            raise UnknownModel(f"unknown network '{name}', and no weights file: {near}")
        summary = "a published model as it runs, nothing trained"
        if name in RANDOM_GENERATORS:
            return summary, random_generator(f"{RANDOM}{name}").requires_grad_(False)
        if family == "osediff":
            return summary, _osediff(catalog.OSEDIFF_SCALES[name])
        if family == "realesrgan":
            return summary, RealESRGANGenerator(PUBLISHED_REALESRGAN[name]).requires_grad_(False)
    summary = "a model as it runs, nothing trained"
    if family == "native":
        return summary, _from_weights(name)
    with torch.device("cpu"):  # sizes that only the weights tell
        return summary, without_contents(load_network(name))


def _from_weights(name_or_path: str) -> nn.Module:
    """The network that a weights file of ours describes, without its weights."""
    path = catalog.resolve(name_or_path)
    architecture, config, _ = read_weights(path, lambda key: False)
    return build_network(architecture, config, path, read_shapes(path)).requires_grad_(False)


# ---- counting ----


def measure(name_or_path: str, side: int) -> Complexity:
    """Complexity of a network named in :data:`NETWORKS`, a backbone, or whatever :func:`load_network` takes (alias,
    weights file, ``random:ALIAS``), for one image of ``side`` x ``side`` pixels.

    Weights are read only where nothing else tells the sizes: in files of other projects, which are fetched if they are
    missing. Raises :class:`UnknownModel` for other names and :class:`UserError` for a network that is no generator, a
    file that cannot be read, or a side that does not suit the network.
    """
    with torch.device("meta"):
        summary, network = _build(name_or_path)
        return _complexity(network, side, name=name_or_path, summary=summary)


def _complexity(network: nn.Module, side: int, *, name: str, summary: str = "") -> Complexity:
    """Complexity of ``network``; the default device must be "meta", so that tables of a schedule stay there."""
    network.eval()
    if isinstance(network, Generator):
        _require_multiple(side, network.scale * network.lr_multiple, name)
        lr = torch.empty(1, 3, *[side // network.scale] * 2)
        if isinstance(network, (OneStepLatentGenerator, ResidualShiftGenerator, SeeSRGenerator)):
            stages = _latent_stages(network, lr)
        else:
            stages = [Stage(name="network", cost=count(network, lambda: network(lr))[1])]
    elif isinstance(network, NoiseAwareDiscriminator):
        factor = SD_FACTOR if isinstance(network.encoder, StableDiffusionUNetEncoder) else TINY_FACTOR
        _require_multiple(side, factor, name)
        z_t, t = _latent(cast(DiffusionEncoder, network.encoder).latent_channels, side // factor)
        stages = [Stage(name="discriminator", cost=count(network, lambda: network(z_t, t))[1])]
    elif isinstance(network, StableDiffusionUNet):
        _require_multiple(side, SD_FACTOR, name)
        z_t, t = _latent(network.config.in_channels, side // SD_FACTOR)
        prompt = torch.empty(1, TOKENS, network.config.cross_attention_dim)
        stages = [Stage(name="denoiser", cost=count(network, lambda: network(z_t, t, prompt))[1])]
    elif isinstance(network, RamNetwork):
        image = torch.empty(1, 3, network.config.side, network.config.side)
        stages = [Stage(name="tagger", cost=count(network, lambda: network(image))[1])]
    elif name == TEXT_ENCODER:
        ids = torch.empty(1, TOKENS, dtype=torch.long)
        stages = [Stage(name="text encoder", cost=count(network, lambda: network(ids).last_hidden_state)[1])]
    else:
        raise UserError(f"{name}: a {type(network).__name__} has no stages to count, expected a generator")
    parts: Counter[str] = Counter()
    for key, parameter in network.named_parameters():
        parts["adapters" if ".lora_" in key else key.partition(".")[0]] += parameter.numel()
    return Complexity(
        name=name,
        summary=summary,
        parameters=size_of(network.parameters()),
        trainable=size_of(network.parameters(), trainable=True),
        parts=parts,
        stages=tuple(stages),
    )


def _require_multiple(side: int, multiple: int, name: str) -> None:
    if side < 1 or side % multiple:
        near = max(multiple, round(side / multiple) * multiple)
        raise UserError(f"size {side}: '{name}' counts images whose side is a multiple of {multiple}, such as {near}")


def _latent(channels: int, side: int) -> tuple[Tensor, Tensor]:
    """A latent and its diffusion step."""
    return torch.empty(1, channels, side, side), torch.empty(1, dtype=torch.long)


def _latent_stages(
    generator: OneStepLatentGenerator | ResidualShiftGenerator | SeeSRGenerator, lr: Tensor
) -> list[Stage]:
    """Encoding, every UNet evaluation and decoding. Bicubic enlargement and the formulas around the UNet count nothing:
    they have no matrix products."""
    z, encode = count(generator, lambda: generator.encode(generator.enlarge(lr)))
    if isinstance(generator, ResidualShiftGenerator):
        z, unet = count(generator, lambda: generator.unet(z, torch.empty(1, dtype=torch.long), lr))
    elif isinstance(generator, SeeSRGenerator):
        z, unet = count(generator, lambda: generator.predict(z, 0, generator.condition(lr, None)))
    else:
        z, unet = count(generator, lambda: generator.step(z))
    _, decode = count(generator, lambda: generator.decode(z))
    return [
        Stage(name="encode", cost=encode),
        Stage(name="unet", cost=unet, times=generator.steps),
        Stage(name="decode", cost=decode),
    ]


# ---- published figures, as printed ----


class PublishedComplexity(NamedTuple):
    """One column of a published table of complexity."""

    method: str
    steps: int
    """Evaluations of the diffusion network for one image."""
    seconds: float
    parameters_millions: float
    """Parameters in total; the source prints 1.4e3 and the like for some, which are two digits only."""
    macs_billions: float
    """MACs for one image; the source does not say how they were counted."""


COMPLEXITY_SOURCE = "D3SR (arXiv 2410.04224), Table 3: one image of 512 x 512 on one A100 with 40 GB"
COMPLEXITY_SIDE = 512
"""Output side of the table's images."""
COMPLEXITY = (
    PublishedComplexity("StableSR", 200, 11.50, 1400, 75_812),
    PublishedComplexity("DiffBIR", 50, 7.79, 1600, 24_528),
    PublishedComplexity("SeeSR", 50, 5.93, 2000, 32_336),
    PublishedComplexity("ResShift", 15, 0.71, 173.8, 4_903),
    PublishedComplexity("SinSR", 1, 0.16, 173.8, 2_059),
    PublishedComplexity("OSEDiff", 1, 0.35, 1400, 2_269),
    PublishedComplexity("D3SR", 1, 0.11, 966.3, 2_132),
)

# ---- report ----

COUNTING = """\
One multiply-accumulate operation (MAC) is one multiplication and one addition. Two ways of counting stand side by side.
*All products* is PyTorch's own counter: every convolution and every matrix product, also the two inside each
attention, queries with keys and weights with values. *Layers only* looks at convolution and linear layers, as most
profilers do, and so leaves the two products of attention out. Normalisation, activations, additions, Eq. 1 of the paper
and bicubic enlargement are in neither."""
STAGES = """\
Inference runs `encode`, `unet` as often as its line says (once if it says nothing) and `decode`. A discriminator is
used in training only: it is evaluated three times for every photo, once for the generator's update and twice for its
own. OSEDiff's two further UNets are used in training only too: each is evaluated twice for every photo, the teacher
under two prompts, the regulariser for the generator's update and for its own. A stage's parameters are those that it
uses; the prompt embedding belongs to `unet`. With adapters beside their layers the UNet costs more than with adapters
merged into them, which is how it runs in the end. Where the prompt is constant, its keys and values could be kept as
well; that is not counted."""
PUBLISHED_NOTE = """\
The paper's rows are as printed (its 1.4e3 and the like are two digits). Ours name both ways of counting. Time depends
on the machine and is not measured here."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Complexity of several networks for one image size."""

    side: int
    """Side of the square output image, in pixels."""
    networks: Sequence[Complexity]
    """The networks, in the order asked for."""


def as_document(report: Report) -> dict[str, Any]:
    """All counts, and the published figures, as plain data for JSON."""
    totals = ("parameters", "trainable", "macs", "layer_macs")
    return {
        "schema": 1,
        "size": report.side,
        "networks": [
            {
                **{name: getattr(network, name) for name in ("name", "summary", *totals)},
                "parts": dict(network.parts),
                "stages": [
                    {"name": stage.name, "times": stage.times, **asdict(stage.cost)} for stage in network.stages
                ],
            }
            for network in report.networks
        ],
        "published": {
            "source": COMPLEXITY_SOURCE,
            "size": COMPLEXITY_SIDE,
            "methods": [row._asdict() for row in COMPLEXITY],
        },
    }


def tables(report: Report) -> list[Grid]:
    """Stages, parts, and the published comparison where the size is the published one."""
    parts = [(network.name, part, millions(n)) for network in report.networks for part, n in network.parts.items()]
    found = [stage_table(report)]
    found.append(Grid(title="Parts", columns=("network", "part", "parameters, M"), rows=tuple(parts), words=2))
    if report.side == COMPLEXITY_SIDE:
        found.append(published_table(report))
    return found


def stage_table(report: Report) -> Grid:
    """Parameters and MACs of every stage of every network, with totals where there is more than one stage."""
    rows: list[tuple[str, ...]] = []

    def add(network: str, name: str, counted: Cost | Complexity, times: int = 1) -> None:
        sizes = millions(counted.parameters), millions(counted.trainable)
        macs = billions(times * counted.macs), billions(times * counted.layer_macs)
        rows.append((network, name if times == 1 else f"{times} x {name}", *sizes, *macs))

    for network in report.networks:
        for stage in network.stages:
            add(network.name, stage.name, stage.cost, stage.times)
        if len(network.stages) > 1:
            add(network.name, "total", network)
    counted = ("parameters, M", "trainable, M", "MACs, G (all products)", "MACs, G (layers only)")
    title = f"Stages, for one image of {report.side} x {report.side} pixels"
    return Grid(title=title, lead=STAGES, columns=("network", "stage", *counted), rows=tuple(rows), words=2)


def published_table(report: Report) -> Grid:
    """The paper's table, and under it the generators counted here."""
    rows: list[tuple[str, ...]] = []
    for row in COMPLEXITY:
        parameters = f"{row.parameters_millions:,.{1 if row.parameters_millions < 1000 else 0}f}"
        rows.append((row.method, str(row.steps), f"{row.seconds:.2f}", parameters, f"{row.macs_billions:,.0f}"))
    for network in (network for network in report.networks if len(network.stages) > 1):
        macs = f"{billions(network.layer_macs)} layers only, {billions(network.macs)} all products"
        name, parameters = f"{network.name}, counted here", f"{network.parameters / 1e6:,.1f}"
        rows.append((name, str(network.steps), "", parameters, macs))
    known = {network.name: network for network in report.networks}
    parts = [known[name] for name in ("osediff", TEXT_ENCODER, TAGGER) if name in known]
    for count_of, label in ((2, "osediff with text encoder"), (3, "osediff with text encoder and tagger")):
        if len(parts) >= count_of and parts[0].name == "osediff":
            whole = parts[:count_of]
            macs = f"{billions(sum(n.layer_macs for n in whole))} layers only, "
            macs += f"{billions(sum(n.macs for n in whole))} all products"
            size = f"{sum(n.parameters for n in whole) / 1e6:,.1f}"
            rows.append((f"{label}, counted here", "1", "", size, macs))
    columns = ("method", "steps", "time, s", "parameters, M", "MACs, G")
    return Grid(title=f"Beside {COMPLEXITY_SOURCE}", lead=PUBLISHED_NOTE, columns=columns, rows=tuple(rows))


def as_markdown(report: Report, *, command: str, machine: str) -> str:
    """A page: command and machine, way of counting, and every table with its note."""
    made = (
        f"Made by `{command}` on {machine}.\n\nNothing was computed: the networks are built on PyTorch's meta device, "
        "where tensors have shapes but no contents, so that the counts are the same on every machine."
    )
    summaries = "\n".join(f"- `{network.name}`: {network.summary}" for network in report.networks)
    sections = ["# Complexity: parameters and operations", made, COUNTING, summaries]
    return "\n\n".join([*sections, *(table.section() for table in tables(report))]) + "\n"


def millions(count: float) -> str:
    """A count of parameters in millions, three decimals."""
    return f"{count / 1e6:,.3f}"


def billions(count: float) -> str:
    """A count of operations in billions: one decimal, three below ten."""
    value = count / 1e9
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"

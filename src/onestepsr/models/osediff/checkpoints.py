"""OSEDiff's trained weights: adapters of UNet and encoder and the UNet's whole first convolution, without the backbone.

Names are those of the published weights: layers as diffusers names them, and adapters named by the part of the UNet,
such as ``mid_block.resnets.0.conv1.lora_A.default_others.weight``. The published ``osediff.pkl`` and
``osediff_face.pkl`` are dictionaries of two state dicts, two ranks and four lists of layer names. A safetensors file of
ours holds the same in the same order, so that each can be made from the other.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.core.files import replacing
from onestepsr.models.osediff.generator import DECODER_LAYERS, Enlarging, OSEDiffGenerator
from onestepsr.models.stable_diffusion.networks import StableDiffusionAutoencoder, StableDiffusionUNet
from onestepsr.weights.files import load_pickle, read_weights, reading, save_model

Part = Literal["unet", "vae"]
PARTS: tuple[Part, ...] = ("unet", "vae")
ALPHA = 8.0
"""Scaling numerator of every adapter: the published code leaves it at peft's default and stores it nowhere."""
LISTS = {
    "vae_lora_encoder_modules": ("vae", "default_encoder"),
    "unet_lora_encoder_modules": ("unet", "default_encoder"),
    "unet_lora_decoder_modules": ("unet", "default_decoder"),
    "unet_lora_others_modules": ("unet", "default_others"),
}
"""The published lists of adapted layers: whose they are, and the name of their adapter."""
_ADAPTER_NAMES = {"mid_block": "default_others", "up_blocks": "default_decoder", "conv_out": "default_decoder"}
_ADAPTER = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.\w+\.weight")
_WHOLE = re.compile(r"(?P<layer>.+)\.base_layer\.(?P<kind>weight|bias)")


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The trained weights of one OSEDiff model."""

    rank_unet: int
    """Rank of the UNet's adapters, 4 in the published models."""
    rank_vae: int
    """Rank of the autoencoder's adapters."""
    unet: dict[str, Tensor]
    """Tensors of the UNet in their order."""
    vae: dict[str, Tensor]
    """Tensors of the autoencoder in their order."""
    modules: dict[str, list[str]]
    """The published lists of adapted layers (:data:`LISTS`), kept so that the file can be written again."""
    enlarging: Enlarging = "bicubic"
    """Enlargement of the LR image in inference: of published weights as the published script does it."""

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """Tensors of one network."""
        return self.unet if part == "unet" else self.vae

    def rank(self, part: Part) -> int:
        """Rank of one network's adapters."""
        return self.rank_unet if part == "unet" else self.rank_vae

    def scaling(self, part: Part) -> float:
        """Factor of an update in W + scaling B A: 8 / rank, 2 in the published models."""
        return ALPHA / self.rank(part)


# ---- into and out of the networks ----


@dataclass(frozen=True)
class _Layer:
    """One layer of the backbone, and what the adapters do to it."""

    module: nn.Module
    whole: Mapping[str, Tensor]
    a: Tensor | None
    b: Tensor | None


@torch.no_grad()
def merge(generator: OSEDiffGenerator, adapters: Adapters, where: str) -> None:
    """Add the adapters to the weights of ``generator``, in place; raises :class:`UserError` if they are another's.

    Everything is checked before the first weight changes.
    """
    layers = [(adapters.scaling(part), layer) for part in PARTS for layer in _layers(generator, adapters, part, where)]
    for scaling, layer in layers:
        for kind, value in layer.whole.items():
            cast(nn.Parameter, getattr(layer.module, kind)).copy_(value)
        if layer.a is not None and layer.b is not None:
            weight = cast(nn.Parameter, layer.module.weight)
            weight.add_(scaling * product(layer.b, layer.a).reshape(weight.shape).to(weight))


def product(b: Tensor, a: Tensor) -> Tensor:
    """B A of a linear layer (out, r) and (r, in), or of a convolution (out, r, 1, 1) and (r, in, kh, kw), as a matrix
    in float32."""
    return b.float().flatten(1) @ a.float().flatten(1)


@torch.no_grad()
def copy_into_adapters(generator: OSEDiffGenerator, adapters: Adapters, where: str) -> None:
    """Start the peft adapters of ``generator``, and its first convolution, from published ones, unmerged.

    Both must have the same rank and scaling; layers that only one of them adapts are refused in one line.
    """
    for part in PARTS:
        own = {key: p for key, p in network_of(generator, part).named_parameters() if _is_trained_name(key)}
        given = {re.sub(r"(\.lora_[AB])\.\w+\.", r"\1.default.", key): t for key, t in adapters.tensors(part).items()}
        for key in sorted(own.keys() ^ given.keys()):
            side = "lacks" if key in own else "adapts another layer:"
            raise UserError(f"{where}: {side} '{key}'; the layers of this run and of that file must be the same")
        for key, parameter in own.items():
            _check_shape(given[key], parameter.shape, key, where)
            parameter.copy_(given[key])


def can_be_published(generator: OSEDiffGenerator) -> bool:
    """True if the published layout can hold the adapters of ``generator``: it has some, on a Stable Diffusion, and none
    in the decoder."""
    adapted = {name.partition(".lora_")[0] for name, _ in generator.named_parameters() if ".lora_" in name}
    in_decoder = any(re.fullmatch(rf"autoencoder\.({DECODER_LAYERS})", layer) for layer in adapted)
    return bool(adapted) and not in_decoder and isinstance(generator.unet, StableDiffusionUNet)


@torch.no_grad()
def collect(generator: OSEDiffGenerator) -> Adapters:
    """The adapters of a generator that has them (through peft), under the published names.

    Another alpha than :data:`ALPHA` goes into B, because the published layout cannot store it.
    """
    found: dict[Part, dict[str, Tensor]] = {part: {} for part in PARTS}
    modules: dict[str, list[str]] = {name: [] for name in LISTS}
    for part in PARTS:
        network = network_of(generator, part)
        for key, value in network.state_dict().items():
            if not _is_trained_name(key):
                continue
            layer, name, ratio = key.partition(".lora_")[0], "default_encoder", 1.0
            if part == "unet":
                name = _ADAPTER_NAMES.get(key.partition(".")[0], name)
            if ".lora_B." in key:
                adapted: Any = network.get_submodule(layer)
                ratio = float(adapted.scaling["default"]) * int(adapted.r["default"]) / ALPHA
            found[part][key.replace(".default.", f".{name}.")] = (value * ratio).cpu().contiguous()
            if ".lora_A." in key:
                modules[next(listed for listed, whose in LISTS.items() if whose == (part, name))].append(layer)
    ranks = {part: next((t.shape[0] for key, t in found[part].items() if ".lora_A." in key), 1) for part in PARTS}
    return Adapters(
        rank_unet=ranks["unet"], rank_vae=ranks["vae"], unet=found["unet"], vae=found["vae"], modules=modules
    )


def network_of(generator: OSEDiffGenerator, part: Part) -> nn.Module:
    """diffusers' own network of one part; :class:`UserError` on a backbone that is no Stable Diffusion."""
    if part == "unet" and isinstance(generator.unet, StableDiffusionUNet):
        return cast(nn.Module, generator.unet.unet)
    if part == "vae" and isinstance(generator.autoencoder, StableDiffusionAutoencoder):
        return cast(nn.Module, generator.autoencoder.vae)
    raise UserError(f"OSEDiff's weights belong to Stable Diffusion, not to a {type(generator.unet).__name__}")


def _layers(generator: OSEDiffGenerator, adapters: Adapters, part: Part, where: str) -> list[_Layer]:
    """Every layer that has tensors, all of them checked against the backbone."""
    network, grouped = network_of(generator, part), _grouped(adapters.tensors(part), where)
    modules = dict(network.named_modules())
    layers = []
    for name, tensors in grouped.items():
        if name not in modules or not isinstance(modules[name], (nn.Linear, nn.Conv2d)):
            raise UserError(f"{where}: weights for another backbone: '{name}' is no layer of this one's {part}")
        layer = _Layer(
            modules[name],
            {kind: tensors[kind] for kind in ("weight", "bias") if kind in tensors},
            tensors.get("A"),
            tensors.get("B"),
        )
        _check(layer, adapters.rank(part), name, where)
        layers.append(layer)
    return layers


def _grouped(tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        found = _ADAPTER.fullmatch(key) or _WHOLE.fullmatch(key)
        if found is None:
            raise UserError(f"{where}: unknown weight '{key}'")
        kind = found.groupdict().get("side") or found["kind"]
        if kind in grouped.setdefault(found["layer"], {}):
            raise UserError(f"{where}: two adapters on layer '{found['layer']}'")
        grouped[found["layer"]][kind] = value
    return grouped


def _check(layer: _Layer, rank: int, name: str, where: str) -> None:
    if (layer.a is None) != (layer.b is None):
        raise UserError(f"{where}: layer '{name}' has only one half of an adapter")
    weight = cast(Tensor, layer.module.weight)
    if layer.a is not None and layer.b is not None:
        _check_shape(layer.a, (rank, *weight.shape[1:]), f"{name}.lora_A", where)
        _check_shape(layer.b, (weight.shape[0], rank, *(1 for _ in weight.shape[2:])), f"{name}.lora_B", where)
    for kind, value in layer.whole.items():
        _check_shape(value, cast(Tensor, getattr(layer.module, kind)).shape, f"{name}.{kind}", where)


def _check_shape(value: Tensor, wanted: tuple[int, ...], name: str, where: str) -> None:
    if tuple(value.shape) != tuple(wanted):
        raise UserError(
            f"{where}: weights for another backbone: '{name}' is {tuple(value.shape)}, expected {tuple(wanted)}"
        )


def _is_trained_name(key: str) -> bool:
    return ".lora_" in key or key.startswith("conv_in.base_layer.")


# ---- files ----

ARCHITECTURE = "osediff-adapters"
"""Architecture in the metadata of a file of ours: weights to add to a backbone, no network."""
MAX_BYTES = 512 * 2**20
"""Limit on either file; the published ones have about 20 MB."""
STATES = {"state_dict_unet": "unet", "state_dict_vae": "vae"}
RANKS = ("rank_unet", "rank_vae")
MAX_RANK = 4096


def looks_published(path: Path) -> bool:
    """True for a pickle with a top level like the published ones'; False for a file that cannot be read."""
    try:
        return path.suffix != ".safetensors" and STATES.keys() <= _load(path).keys()
    except UserError:
        return False


def read_published(path: Path) -> Adapters:
    """The content of a published pickle; raises :class:`UserError` in one line for anything else.

    Nothing in it is executed, and it may hold nothing but tensors, whole numbers, strings, lists and dictionaries.
    """
    content = _load(path)
    expected = [*LISTS, *RANKS, *STATES]
    for name in expected:
        if name not in content:
            raise UserError(f"{path}: not OSEDiff's weights (no '{name}')")
    for name in content:
        if name not in expected:
            raise UserError(f"{path}: unknown entry {name!r}, OSEDiff's weights have {', '.join(expected)}")
    return Adapters(
        rank_unet=_checked_rank(content["rank_unet"], f"{path}: rank_unet"),
        rank_vae=_checked_rank(content["rank_vae"], f"{path}: rank_vae"),
        unet=_state(content["state_dict_unet"], f"{path}: state_dict_unet"),
        vae=_state(content["state_dict_vae"], f"{path}: state_dict_vae"),
        modules={name: _names(content[name], f"{path}: {name}") for name in LISTS},
        enlarging="pillow",
    )


def read_any(path: Path) -> Adapters:
    """The content of either file."""
    return read_adapters(path) if path.suffix == ".safetensors" else read_published(path)


def write_published(path: Path, adapters: Adapters) -> None:
    """Write the published layout; equal content gives equal bytes."""
    content = {
        **{name: adapters.modules[name] for name in LISTS},
        "rank_unet": adapters.rank_unet,
        "rank_vae": adapters.rank_vae,
        "state_dict_unet": {key: value.clone() for key, value in adapters.unet.items()},
        "state_dict_vae": {key: value.clone() for key, value in adapters.vae.items()},
    }
    buffer = io.BytesIO()  # written to a path, the file would carry that path's name inside
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_adapters(path: Path) -> Adapters:
    """The content of a file of ours that :func:`write_adapters` has made."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB, which are no adapters of OSEDiff")
    architecture, config, tensors = read_weights(path)
    if architecture != ARCHITECTURE:
        raise UserError(
            f"{path}: holds '{architecture}', expected '{ARCHITECTURE}': a merged model has no adapters left"
        )
    order = config.get("order")
    if not isinstance(order, Mapping) or not all(isinstance(keys, list) for keys in order.values()):
        raise UserError(f"{path}: damaged metadata (no order of the weights)")
    if {f"{p}.{key}" for p in order for key in order[p]} != tensors.keys():
        raise UserError(f"{path}: damaged metadata (the order of the weights does not name all of them)")
    return Adapters(
        rank_unet=_checked_rank(config.get("rank_unet"), f"{path}: rank_unet"),
        rank_vae=_checked_rank(config.get("rank_vae"), f"{path}: rank_vae"),
        unet={key: tensors[f"unet.{key}"].clone() for key in order.get("unet", ())},
        vae={key: tensors[f"vae.{key}"].clone() for key in order.get("vae", ())},
        modules={name: _names(dict(config.get("modules") or {}).get(name), f"{path}: {name}") for name in LISTS},
        enlarging="pillow" if config.get("enlarging") == "pillow" else "bicubic",
    )


def write_adapters(path: Path, adapters: Adapters) -> None:
    """Write a safetensors file that holds everything the published pickle does."""
    config, state = content_of(adapters)
    save_model(path, architecture=ARCHITECTURE, config=config, state_dict=state)


def content_of(adapters: Adapters) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a file of ours with the architecture :data:`ARCHITECTURE`."""
    config: dict[str, Any] = {
        "rank_unet": adapters.rank_unet,
        "rank_vae": adapters.rank_vae,
        "modules": adapters.modules,
        "order": {"unet": list(adapters.unet), "vae": list(adapters.vae)},
        **({} if adapters.enlarging == "bicubic" else {"enlarging": adapters.enlarging}),
    }
    state = {f"unet.{key}": value for key, value in adapters.unet.items()}
    state |= {f"vae.{key}": value for key, value in adapters.vae.items()}
    return config, state


def _load(path: Path) -> Mapping[str, Any]:
    with reading(path):
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB, which are no weights of OSEDiff")
        content = load_pickle(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: a {type(content).__name__}, not OSEDiff's dictionary of weights")
    return content


def _checked_rank(value: object, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise UserError(f"{where}: expected a rank from 1 to {MAX_RANK}, got {value!r:.60}")
    return value


def _names(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(type(name) is str for name in value):
        raise UserError(f"{where}: expected a list of layer names, got a {type(value).__name__}")
    return list(value)


def _state(value: object, where: str) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a dictionary of tensors, got a {type(value).__name__}")
    for key, tensor in value.items():
        if type(key) is not str or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise UserError(f"{where}: {key!r:.80} is a {type(tensor).__name__}, expected a tensor of real numbers")
        if not tensor.isfinite().all():
            raise UserError(f"{where}: '{key}' holds values that are not finite; the file is damaged")
    return {key: tensor.detach().contiguous() for key, tensor in value.items()}

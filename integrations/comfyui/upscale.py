"""The work of the node, for both interfaces of ComfyUI: tensors in, tensors out, memory and progress by the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = "onestepsr"
"""Name of the folder of weights below ComfyUI/models."""
SUFFIXES = (".safetensors", ".pth")
COLOR_FIXES = ("auto", "wavelet", "drift", "adain", "none")
TOOLTIPS = {
    "image": "Image or batch to enlarge.",
    "model": f"A model of onestepsr (downloaded at first use) or a file in models/{FOLDER}.",
    "scale": "Output side / input side.",
    "fidelity": "For d3sr-tiny: 0 is crisp, 1 is faithful (fewer details drawn). Other models ignore it.",
    "tile": "Tile side in input pixels; 0 follows the free memory.",
    "color_fix": "Colours from the input: auto (what suits the model), wavelet (low frequencies), "
    "drift (these where the model's differ by more than 8 levels), adain (mean and deviation) or none.",
    "seed": "For models that draw noise, such as ResShift.",
}
_loaded: dict[tuple[str, float | None, str], Any] = {}
"""The model that was used last."""


def model_names() -> list[str]:
    """Names of the upscalers in onestepsr's catalogue, the bundled one first, and the files in models/onestepsr."""
    from onestepsr.weights.catalog import list_models

    return [spec.id for spec in list_models("upscaler") if spec.id != "bicubic"] + sorted(_files())


def upscale(  # noqa: PLR0917  (the host gives them by name)
    image: torch.Tensor, model: str, scale: float, fidelity: float, tile: int, color_fix: str, seed: int
) -> torch.Tensor:
    """Images (N, H, W, C) in [0, 1], C 3 or 4, enlarged to (N, round(s H), round(s W), C), float32 on the CPU."""
    import comfy.model_management as host
    import comfy.utils

    from onestepsr.imaging.image import LoadedImage
    from onestepsr.inference.options import UpscaleOptions

    options = UpscaleOptions(scale=scale, tile=tile or "auto", color_fix=color_fix, seed=seed)
    device = host.get_torch_device()
    upscaler = _upscaler(model, fidelity, device)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in upscaler.generator.parameters())
    pixels = image.shape[1] * image.shape[2]
    per_pixel = upscaler.generator.memory_cost(upscaler.dtype).bytes_per_pixel
    host.free_memory(int(weights + min(pixels, 512 * 512) * per_pixel), device)  # larger images go in tiles
    upscaler.generator.to(upscaler.device)
    bars: list[Any] = []
    results = []
    try:
        for number, one in enumerate(image):

            def progress(done: int, total: int, number: int = number) -> None:
                host.throw_exception_if_processing_interrupted()
                if not bars:
                    bars.append(comfy.utils.ProgressBar(total * len(image)))
                bars[0].update_absolute(number * total + done, total * len(image))

            # 16 bits, in which nothing of the host's float images is lost that anyone could see.
            samples = one.detach().cpu().float().clamp(0, 1).mul(65535).round().numpy().astype(np.uint16)
            alpha = samples[..., 3] if samples.shape[-1] == 4 else None
            loaded = LoadedImage(pixels=np.ascontiguousarray(samples[..., :3]), alpha=alpha)
            large = upscaler.upscale_image(loaded, options, progress)
            planes = [large.pixels] if large.alpha is None else [large.pixels, large.alpha[..., None]]
            results.append(torch.from_numpy(np.concatenate(planes, axis=-1).astype(np.float32) / 65535.0))
    finally:
        upscaler.generator.to("cpu")
        host.soft_empty_cache()
    return torch.stack(results)


def _upscaler(model: str, fidelity: float, device: torch.device) -> Any:
    """The model, from the last run if that used it."""
    from onestepsr import Upscaler
    from onestepsr.weights.catalog import list_models

    path = _files().get(model)
    has_dial = any(spec.id == model and spec.faithful for spec in list_models()) and path is None
    kind = device.type if device.type in ("cuda", "cpu", "mps") else "cpu"
    place = str(device) if device.type == kind else kind
    key = (model, fidelity if has_dial else None, place)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = Upscaler.from_pretrained(path or model, place, fidelity=key[1])
    return _loaded[key]


def _files() -> dict[str, Path]:
    """Files in models/onestepsr by name."""
    try:
        import folder_paths
    except ImportError:  # outside the host
        return {}
    folder = Path(folder_paths.models_dir) / FOLDER
    if not folder.is_dir():
        return {}
    return {path.name: path for path in folder.iterdir() if path.suffix in SUFFIXES}

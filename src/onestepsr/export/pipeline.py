"""One-step super-resolution as a diffusers pipeline; needs diffusers, torch, numpy and Pillow, and not onestepsr.

``onestepsr export MODEL FOLDER --to diffusers`` puts a copy of this file beside the networks:

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    pipe(image=Image.open("photo.jpg")).images[0].save("large.png")

z_L = E(enlarged LR), one UNet evaluation at T_L, z_H = (z_L - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar) (D3SR, Eq. 1),
SR = D(z_H). The prompt embedding that was trained in a text encoder's place is the UNet's ``encoder_hid_proj``.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from PIL import Image

WAVELET_RADII = (1, 2, 4, 8, 16)


class OneStepSRPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Enlarge images by one evaluation of a Stable Diffusion UNet."""

    model_cpu_offload_seq = "unet->vae"

    def __init__(  # noqa: PLR0917  (diffusers gives them by name)
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        timestep: int = 399,
        scale: int = 4,
        prompt_tokens: int = 77,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.register_to_config(timestep=timestep, scale=scale, prompt_tokens=prompt_tokens)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        color_fix: str = "wavelet",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Enlarge ``image``: a Pillow image, an array (H, W, 3) or tensor (N, 3, H, W) in [0, 1], or a list of images.

        ``color_fix`` takes the low frequencies from the input ("wavelet") or leaves the network's ("none").
        ``output_type`` is "pil", "np" for (N, H, W, 3) or "pt" for (N, 3, H, W), both in [0, 1].
        """
        if color_fix not in ("wavelet", "none"):
            raise ValueError(f"color_fix '{color_fix}': accepted: wavelet, none")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type '{output_type}': accepted: pil, np, pt")
        batch = _tensors(image)
        enlarged = [self._enlarge(lr, color_fix) for lr in batch]
        results: Any = torch.cat(enlarged) if output_type == "pt" else None
        if results is None:
            arrays = [values[0].permute(1, 2, 0).numpy() for values in enlarged]
            results = np.stack(arrays) if output_type == "np" else [_pil(array) for array in arrays]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=results) if return_dict else (results,)

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """Write the folder, and a copy of this file into it."""
        super().save_pretrained(save_directory, *args, **options)
        folder = Path(save_directory)
        source = Path(inspect.getfile(type(self)))
        if source.resolve() != (folder / "pipeline.py").resolve():
            shutil.copyfile(source, folder / "pipeline.py")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["_class_name"] = ["pipeline", "OneStepSRPipeline"]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _enlarge(self, lr: torch.Tensor, color_fix: str) -> torch.Tensor:
        """Image (1, 3, s h, s w) in [0, 1], in float32 on the CPU, of LR (1, 3, h, w)."""
        device, dtype, scale = self._execution_device, self.vae.dtype, int(self.config.scale)
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        latent_multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        height, width = lr.shape[-2:]
        lr = _pad(lr, max(1, factor * latent_multiple // scale))
        enlarged = F.interpolate(lr.to(device), scale_factor=scale, mode="bicubic", align_corners=False)
        scaling = self.vae.config.scaling_factor
        z_l = self.vae.encode((enlarged * 2 - 1).to(dtype)).latent_dist.mode().float() * scaling
        timestep = int(self.config.timestep)
        prompt = torch.eye(int(self.config.prompt_tokens), device=device, dtype=dtype)[None]
        step = torch.tensor([timestep], device=device)
        eps = self.unet(z_l.to(dtype), step, encoder_hidden_states=prompt, return_dict=False)[0].float()
        alpha_bar = self.scheduler.alphas_cumprod[timestep].to(device)
        z_h = (z_l - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        sr: torch.Tensor = self.vae.decode((z_h / scaling).to(dtype), return_dict=False)[0].float() * 0.5 + 0.5
        sr = sr.cpu().clamp(0.0, 1.0)
        if color_fix == "wavelet":
            size = [scale * side for side in lr.shape[-2:]]
            style = F.interpolate(lr, size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
            low = style - sr
            for radius in WAVELET_RADII:
                low = _blur(low, radius)
            sr = (low + sr).clamp(0.0, 1.0)
        return sr[..., : scale * height, : scale * width]


def _tensors(image: Any) -> list[torch.Tensor]:
    """Images (1, 3, h, w) in [0, 1]."""
    if isinstance(image, torch.Tensor):
        return list((image if image.ndim == 4 else image[None]).float().cpu()[:, None])
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"), np.float32) / 255.0
    if isinstance(image, np.ndarray):
        array = image if image.ndim == 4 else image[None]
        return list(torch.from_numpy(np.ascontiguousarray(array, np.float32)).permute(0, 3, 1, 2)[:, None])
    if isinstance(image, Sequence) and not isinstance(image, (str, bytes)) and image:
        return [tensor for one in image for tensor in _tensors(one)]
    raise ValueError(f"image: a {type(image).__name__}; accepted: Pillow image, array, tensor, or a list of these")


def _pad(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Reflect the bottom and right up to the next multiples."""
    for dim in (2, 3):
        length = x.shape[dim]
        period = max(1, 2 * (length - 1))
        index = torch.arange(-(-length // multiple) * multiple) % period
        x = x.index_select(dim, torch.minimum(index, period - index))
    return x


def _blur(values: torch.Tensor, radius: int) -> torch.Tensor:
    """Convolve every channel with [1 2 1; 2 4 2; 1 2 1] / 16, dilated by ``radius``, the border repeated."""
    padded = F.pad(values, (radius,) * 4, mode="replicate")
    columns = padded[..., : -2 * radius] + padded[..., 2 * radius :] + 2 * padded[..., radius:-radius]
    rows = columns[..., : -2 * radius, :] + columns[..., 2 * radius :, :] + 2 * columns[..., radius:-radius, :]
    return rows / 16


def _pil(array: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray(np.floor(array * 255.0 + 0.5).astype(np.uint8))

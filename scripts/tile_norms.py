"""Agreement of tiles with the whole image when group norms see one tile each, or know the image.

    python scripts/tile_norms.py TRAIN_PHOTOS TEST_PHOTOS --minutes 10

Random weights say little about norms, so this first trains a small autoencoder with Stable Diffusion's layers on crops
of the first folder. Then images of the second, enlarged twofold so that they are large beside a tile, go through
encoder and decoder by way of the upscaler: whole, and in tiles, with either of ``UpscaleOptions.tile_norms``, and with
the latents of all tiles joined before the first is decoded. One line for each size of tile: PSNR between tiles and
whole in dB, mean over the images, and seconds.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestepsr.data.photos import find_images
from onestepsr.imaging.read import LoadedImage, read_image, samples_to_tensor
from onestepsr.imaging.resize import resize
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
from onestepsr.models.generators import LatentGenerator, LatentUNet, MemoryCost, NetworkCost
from onestepsr.models.stable_diffusion.config import AutoencoderConfig
from onestepsr.models.stable_diffusion.networks import StableDiffusionAutoencoder

SMALL = AutoencoderConfig(
    block_out_channels=(32, 64, 96, 96), layers_per_block=1, latent_channels=8, norm_num_groups=16, scaling_factor=1.0
)
CROP, BATCH = 128, 16


class Nothing(LatentUNet):
    """The UNet of no diffusion: latents stay as they are."""

    size_multiple = 1

    def network_cost(self, dtype: torch.dtype) -> NetworkCost:
        """Nothing worth counting."""
        return NetworkCost(bytes_per_position=1.0)


class Reconstruction(LatentGenerator):
    """Encoder and decoder as a generator that enlarges by one."""

    joins_latents = False
    """Whether latents are joined, in stages with tiles of their own."""

    def __init__(self) -> None:
        super().__init__(StableDiffusionAutoencoder(SMALL), Nothing(), scale=1)

    def memory_cost(self, dtype: torch.dtype) -> MemoryCost:
        """The same in both ways."""
        cost = super().memory_cost(dtype)
        return cost if self.joins_latents else MemoryCost(bytes_per_pixel=cost.bytes_per_pixel)

    def encode_lr(self, lr: Tensor, **noise: Any) -> Tensor:
        """Latent (N, C, h / 8, w / 8) of ``lr`` (N, 3, h, w) in [0, 1]."""
        return self.autoencoder.encode(lr * 2 - 1)

    def restore_latent(self, z_l: Tensor, lr: Tensor, **conditions: Any) -> Tensor:
        """``z_l`` itself."""
        return z_l

    def decode(self, z: Tensor) -> Tensor:
        """Image in [0, 1] of a latent."""
        return self.autoencoder.decode(z) * 0.5 + 0.5


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 512])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    network = cast(Any, Reconstruction()).to(memory_format=torch.channels_last)
    steps, loss = train(network, find_images(arguments.train), 60 * arguments.minutes)
    sys.stdout.write(f"{steps} steps of {BATCH} crops of {CROP} x {CROP}, mean absolute error {loss:.3f} of 2\n")
    network.autoencoder.speed_up()
    upscaler = Upscaler(network, "cpu", "float32", "reconstruction")
    paths = find_images(arguments.test)
    images = [doubled(path) for path in paths[:: max(1, len(paths) // arguments.images)][: arguments.images]]
    for tile in arguments.tiles:
        sys.stdout.write(f"tiles of {tile}: {compared(upscaler, images, tile)}\n")


def train(network: Reconstruction, paths: list[Path], seconds: float) -> tuple[int, float]:
    """Steps of Adam on the mean absolute error until the time is up; their number, and the last errors' mean."""
    optimiser = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99))
    rng, losses, begun = random.Random(0), list[float](), time.monotonic()
    while (left := 1.0 - (time.monotonic() - begun) / seconds) > 0:
        optimiser.param_groups[0]["lr"] = 1e-3 * min(1.0, (len(losses) + 1) / 100, 2 * left + 0.02)
        photos = torch.cat([crop(paths, rng) for _ in range(BATCH)]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            found = network(photos)
        loss = 2 * F.l1_loss(found.float(), photos)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    return len(losses), sum(losses[-20:]) / len(losses[-20:])


def crop(paths: list[Path], rng: random.Random) -> Tensor:
    """A random window (1, 3, CROP, CROP) of a random photo."""
    while True:
        pixels = read_image(rng.choice(paths)).pixels
        if min(pixels.shape[:2]) >= CROP and pixels.shape[2] == 3:
            top, left = (rng.randrange(side - CROP + 1) for side in pixels.shape[:2])
            return samples_to_tensor(np.ascontiguousarray(pixels[top : top + CROP, left : left + CROP]))


def doubled(path: Path) -> LoadedImage:
    """The image, twice as wide and high."""
    image = read_image(path)
    return replace(image, pixels=resize(image.pixels, 2 * image.height, 2 * image.width))


def compared(upscaler: Upscaler, images: list[LoadedImage], tile: int) -> str:
    """Figures for one size of tile."""
    ways: dict[str, tuple[bool, dict[str, Any]]] = {"norms of the tile": (False, {"tile_norms": "tile"})}
    ways |= {"norms of the image": (False, {}), "and joined latents": (True, {})}
    levels: dict[str, list[float]] = {name: [] for name in ways}
    seconds = dict.fromkeys(levels, 0.0)
    for image in images:
        whole, _ = enlarged(upscaler, image, tile="off")
        for name, (joins_latents, norms) in ways.items():
            cast(Any, upscaler.generator).joins_latents = joins_latents
            pixels, taken = enlarged(upscaler, image, tile=tile, **norms)
            levels[name].append(10 * math.log10(255**2 / np.square(pixels - whole).mean()))
            seconds[name] += taken
    return ", ".join(f"{name} {np.mean(levels[name]):.1f} dB in {seconds[name]:.1f} s" for name in ways)


def enlarged(upscaler: Upscaler, image: LoadedImage, **options: Any) -> tuple[Any, float]:
    """Samples as float64, and seconds."""
    begun = time.monotonic()
    result = upscaler.upscale_image(image, UpscaleOptions(scale=1.0, color_fix="none", **options))
    return result.pixels.astype(np.float64), time.monotonic() - begun


if __name__ == "__main__":
    main()

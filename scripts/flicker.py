"""Flicker of a model's films beside bicubic's, and what a blend of its corrections along the motion would change.

    python scripts/flicker.py PHOTO... [--model d3sr-tiny] [--frames 16] [--blend 0.5]

Each photo becomes a film: a 256 x 256 window that drifts over it by fractions of a pixel, shrunk to 64 x 64, with
sensor noise and JPEG's losses that are new in every frame. Reported are, over all films,

- the warping error, 1000 x mean squared difference in [0, 1] of a frame and the one before it, moved along the optical
  flow (OpenCV's DIS, on the film before it was shrunk) where forward and backward flow agree within half a pixel;
- PSNR to that film, which ghosts lower, and the energy of the gradient relative to it, which blur lowers.

Needs opencv-python-headless.
"""

from __future__ import annotations

import argparse
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from onestepsr.imaging.image import from_array
from onestepsr.imaging.read import read_image
from onestepsr.inference.upscaler import Upscaler

SIDE = 256


def film(path: str, frames: int, seed: int) -> tuple[list[Any], list[Any]]:
    """High-resolution frames and their degraded counterparts, uint8."""
    import cv2

    photo = read_image(Path(path))
    photo = photo.gray_as_rgb() if photo.gray else photo
    rng = np.random.default_rng(seed)
    high, low = [], []
    for number in range(frames):
        x = (photo.width - SIDE) / 2 + 1.3 * number - 0.65 * frames
        y = (photo.height - SIDE) / 2 + 0.7 * number - 0.35 * frames
        matrix = np.array([[1.0, 0.0, x], [0.0, 1.0, y]])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        own = cv2.warpAffine(photo.pixels, matrix, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REFLECT)
        small = np.asarray(Image.fromarray(own).resize((SIDE // 4, SIDE // 4), Image.Resampling.BICUBIC)).astype(float)
        noisy = np.clip(small + rng.normal(0, 4, small.shape), 0, 255).round().astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noisy).save(stream, "JPEG", quality=75)
        high.append(own)
        low.append(np.asarray(Image.open(stream).convert("RGB")))
    return high, low


def warped(image: Any, flow: Any) -> Any:
    """``image`` (H, W, C) at the places where ``flow`` (H, W, 2) points."""
    import cv2

    rows, columns = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    return cv2.remap(image, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def flows(frames: list[Any]) -> list[tuple[Any, Any]]:
    """Flow from each frame to the one before it, and where it can be trusted."""
    import cv2

    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    found = []
    for before, after in pairwise(gray):
        back, forth = dis.calc(after, before, None), dis.calc(before, after, None)
        found.append((back, np.linalg.norm(back + warped(forth, back), axis=2) < 0.5))
    return found


def blended(corrections: list[Any], motion: list[tuple[Any, Any]], share: float) -> list[Any]:
    """Each correction mixed with the one before it, moved along the motion."""
    made = corrections[:1]
    for own, (flow, sure) in zip(corrections[1:], motion, strict=True):
        made.append(np.where(sure[..., None], (1 - share) * own + share * warped(made[-1], flow), own))
    return made


def gradient(frame: Any) -> float:
    """Mean squared difference of neighbouring pixels."""
    return float((np.diff(frame, axis=0) ** 2).mean() + (np.diff(frame, axis=1) ** 2).mean())


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--model", default="d3sr-tiny")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--blend", type=float, nargs="*", default=[0.5])
    arguments = parser.parse_args()
    upscaler = Upscaler.from_pretrained(arguments.model, "cpu")
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for seed, path in enumerate(arguments.photos):
        high, low = film(path, arguments.frames, seed)
        motion = flows(high)
        reference = [frame / np.float32(255) for frame in high]
        size = (SIDE, SIDE)
        bicubic = [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) / np.float32(255) for f in low]
        sharp = [upscaler.upscale_image(from_array(frame)).pixels / np.float32(255) for frame in low]
        films = {"reference": reference, "bicubic": bicubic, arguments.model: sharp}
        for share in arguments.blend:
            mixed = blended([s - b for s, b in zip(sharp, bicubic, strict=True)], motion, share)
            films[f"{arguments.model}, blend {share:g}"] = [b + c for b, c in zip(bicubic, mixed, strict=True)]
        for name, frames in films.items():
            error = np.mean(
                [
                    ((after - warped(before, flow))[sure] ** 2).mean()
                    for before, after, (flow, sure) in zip(frames[:-1], frames[1:], motion, strict=True)
                ]
            )
            squared = np.mean([((own - true) ** 2).mean() for own, true in zip(frames, reference, strict=True)])
            psnr = float("inf") if squared == 0 else -10 * np.log10(squared)
            energy = np.mean([gradient(f) for f in frames]) / np.mean([gradient(f) for f in reference])
            rows.setdefault(name, []).append((1000 * float(error), float(psnr), float(energy)))
    print("| film | warping error x 1000 | PSNR, dB | gradient energy |\n|---|---|---|---|")
    for name, values in rows.items():
        error, psnr, energy = np.mean(values, axis=0)
        print(f"| {name} | {error:.3f} | {psnr:.2f} | {energy:.2f} |")


if __name__ == "__main__":
    main()

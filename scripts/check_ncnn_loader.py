"""Load an ncnn export of d3sr-tiny with realesrgan-ncnn-py's own loader, and compare its image with the model's.

That package holds the ncnn of realesrgan-ncnn-vulkan, which has few layers. It needs libvulkan.so.1, libGL.so.1 and
libomp.so.5, and no GPU: it runs on the processor here.

    pip install realesrgan-ncnn-py
    onestepsr export d3sr-tiny out --to ncnn
    python scripts/check_ncnn_loader.py out/d3sr-tiny-x4.param examples/cat.jpg large.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from onestepsr import Upscaler


def main() -> None:
    """Run both on one photo."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("param", type=Path, help="the export's .param file")
    parser.add_argument("photo", type=Path)
    parser.add_argument("target", type=Path, help="where its image is written")
    arguments = parser.parse_args()

    from realesrgan_ncnn_py import Realesrgan

    with Image.open(arguments.photo) as opened:
        image = opened.convert("RGB")
    other = Realesrgan(gpuid=-1, tilesize=max(32, *image.size), model=-1)
    other._load(arguments.param, arguments.param.with_suffix(".bin"), 4)
    theirs = other.process_pil(image)
    theirs.save(arguments.target)
    ours = Upscaler.from_pretrained("d3sr-tiny", "cpu", "float32")(image, color_fix="none", tile="off")
    difference = np.abs(np.asarray(theirs).astype(int) - np.asarray(ours).astype(int))
    print(f"{image.size} to {theirs.size}: largest difference {difference.max()} of 255, mean {difference.mean():.4f}")


if __name__ == "__main__":
    main()

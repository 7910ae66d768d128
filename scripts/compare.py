"""Side-by-side comparison of several models on the same inputs: one row per image, one column per model.

    python scripts/compare.py FOLDER OUT.png --models bicubic d3sr-tiny --count 6 --seed 0

Images are drawn by the seed, not by hand; each is cropped at its centre to the same size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from onestepsr import Upscaler

GAP, TITLE = 4, 14


def main() -> None:
    """Read the arguments, upscale, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["bicubic", "d3sr-tiny"])
    parser.add_argument("--references", type=Path, help="folder of HR images with the same names: a last column")
    parser.add_argument("--names", nargs="+", help="these images instead of drawn ones")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many of the drawn images: for a second sheet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crop", type=int, default=280, help="side of the shown part, in output pixels")
    arguments = parser.parse_args()
    paths = sorted(p for p in arguments.folder.iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
    if arguments.names:
        paths = [arguments.folder / name for name in arguments.names]
    else:
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(arguments.seed))
        paths = [paths[i] for i in order[arguments.skip : arguments.skip + arguments.count].tolist()]
    columns = {name: [Upscaler.from_pretrained(name)(path) for path in paths] for name in arguments.models}
    if arguments.references:
        columns["reference"] = [Image.open(arguments.references / path.name) for path in paths]
    draw(columns, arguments.crop).save(arguments.out)


def draw(columns: dict[str, list[Image.Image]], side: int) -> Image.Image:
    """Columns of centre crops under their titles."""
    rows = len(next(iter(columns.values())))
    sheet = Image.new("RGB", (len(columns) * (side + GAP) - GAP, rows * (side + GAP) - GAP + TITLE), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(columns.items()):
        pen.text((column * (side + GAP) + 2, 1), Path(title).stem, fill="black")
        for row, image in enumerate(images):
            shown = image.convert("RGBA")
            left, top = (shown.width - side) // 2, (shown.height - side) // 2
            backed = Image.new("RGBA", (side, side), "white")
            backed.alpha_composite(shown.crop((left, top, left + side, top + side)))
            sheet.paste(backed.convert("RGB"), (column * (side + GAP), TITLE + row * (side + GAP)))
    return sheet


if __name__ == "__main__":
    main()

"""Drawn images for training beside photos: shapes with outlines, curves, hatching, letters, on flat or graded colours.

    python scripts/drawings.py OUT --count 400 --seed 0

Photos hold few clean edges and flat colours, and compressed ones keep traces of their compression; of drawings every
pixel is known. Each is drawn at twice its size and reduced, so that edges are as soft as a lens leaves them.
"""

from __future__ import annotations

import argparse
import math
import random
import string
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, OVERSAMPLING = 640, 2
CANVAS = SIDE * OVERSAMPLING

Color = tuple[int, int, int]
Point = tuple[float, float]


def color(rng: random.Random) -> Color:
    """Black, white, a gray or any colour."""
    kind = rng.random()
    if kind < 0.15:
        return (rng.randrange(25),) * 3
    if kind < 0.3:
        return (255 - rng.randrange(25),) * 3
    if kind < 0.4:
        return (rng.randrange(256),) * 3
    return (rng.randrange(256), rng.randrange(256), rng.randrange(256))


def background(rng: random.Random) -> Image.Image:
    """One colour, or a gradient between two in a random direction."""
    first, second = color(rng), color(rng)
    if rng.random() < 0.6:
        return Image.new("RGB", (CANVAS, CANVAS), first)
    ramp = Image.linear_gradient("L").rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC).crop((38, 38, 218, 218))
    ramp = ramp.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    flat = [Image.new("RGB", ramp.size, chosen) for chosen in (first, second)]
    return Image.composite(flat[0], flat[1], ramp)


def closed_curve(rng: random.Random) -> list[Point]:
    """A smooth outline around a random centre: a circle with a few harmonics."""
    x, y, radius = rng.uniform(0, CANVAS), rng.uniform(0, CANVAS), rng.uniform(30, 0.35 * CANVAS)
    waves = [(number, rng.uniform(0, 0.35 / number), rng.uniform(0, math.tau)) for number in range(2, 7)]
    squeeze = rng.uniform(0.4, 1.0)
    points = []
    for step in range(180):
        angle = math.tau * step / 180
        reach = radius * (1 + sum(size * math.sin(number * angle + phase) for number, size, phase in waves))
        points.append((x + reach * math.cos(angle), y + squeeze * reach * math.sin(angle)))
    return points


def open_curve(rng: random.Random) -> list[Point]:
    """A cubic Bezier curve between random points."""
    ends = [(rng.uniform(-100, CANVAS + 100), rng.uniform(-100, CANVAS + 100)) for _ in range(4)]
    points = []
    for step in range(121):
        t = step / 120
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        x, y = (sum(weight * end[axis] for weight, end in zip(weights, ends, strict=True)) for axis in (0, 1))
        points.append((x, y))
    return points


def polygon(rng: random.Random) -> list[Point]:
    """Three to six corners around a random centre."""
    x, y, radius = rng.uniform(0, CANVAS), rng.uniform(0, CANVAS), rng.uniform(40, 0.4 * CANVAS)
    angles = sorted(rng.uniform(0, math.tau) for _ in range(rng.randint(3, 6)))
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def hatching(pen: ImageDraw.ImageDraw, rng: random.Random) -> None:
    """Parallel strokes in a rectangle of the canvas, or two crossing sets of them."""
    left, top = rng.uniform(0, 0.8 * CANVAS), rng.uniform(0, 0.8 * CANVAS)
    width, height = rng.uniform(80, 0.5 * CANVAS), rng.uniform(80, 0.5 * CANVAS)
    pitch, stroke, ink = rng.uniform(8, 50), rng.randint(2, 10), color(rng)
    for slope in rng.choice(((0.0,), (1.0,), (rng.uniform(-1, 1),), (0.3, -0.7))):
        for number in range(int(width / pitch)):
            x = left + number * pitch
            pen.line([(x, top), (x + slope * height, top + height)], fill=ink, width=stroke)


def letters(image: Image.Image, rng: random.Random) -> None:
    """A few lines of letters and digits, upright or turned."""
    font = ImageFont.load_default(rng.choice((28, 40, 56, 80, 130, 220)))
    alphabet = string.ascii_letters + string.digits + "  .,!?&%"
    lines = ["".join(rng.choices(alphabet, k=rng.randint(3, 24))) for _ in range(rng.randint(1, 5))]
    mask = Image.new("L", image.size, 0)
    place = (rng.uniform(-50, 0.6 * CANVAS), rng.uniform(-50, 0.8 * CANVAS))
    ImageDraw.Draw(mask).multiline_text(place, "\n".join(lines), fill=255, font=font)
    mask = mask.rotate(rng.choice((0, 0, 90, rng.uniform(-40, 40))), Image.Resampling.BICUBIC)
    image.paste(Image.new("RGB", image.size, color(rng)), mask=mask)


def draw(rng: random.Random) -> Image.Image:
    """One image: a background, and between 5 and 40 things on it."""
    image = background(rng)
    pen = ImageDraw.Draw(image)
    outline, stroke = color(rng), rng.choice((0, 4, 6, 10, 16))
    for _ in range(rng.randint(5, 40)):
        kind = rng.random()
        if kind < 0.5:
            points = closed_curve(rng) if rng.random() < 0.6 else polygon(rng)
            pen.polygon(points, fill=color(rng) if rng.random() < 0.8 else None)
            if stroke:
                pen.line([*points, points[0], points[1]], fill=outline, width=stroke, joint="curve")
        elif kind < 0.8:
            pen.line(open_curve(rng), fill=color(rng), width=rng.choice((2, 3, 4, 6, 10, 24)), joint="curve")
        elif kind < 0.88:
            hatching(pen, rng)
        else:
            letters(image, rng)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    """Read the arguments, draw, write PNG files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.count):
        draw(random.Random(f"{arguments.seed}/{number}")).save(arguments.out / f"{number:05d}.png")


if __name__ == "__main__":
    main()
